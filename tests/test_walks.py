"""Steps do not walk over all modules of the model, and are what they were."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from test_packed import trained
from tiny import make_model
from torch import nn
from transformers import TrainerCallback

import aletheia
from aletheia.anatomy.modes import in_mode
from aletheia.training import loop
from aletheia.training.loop import RowTrainer
from aletheia.training.walks import few_walks


@pytest.fixture(scope="module")
def plan(examples):
    return aletheia.plan(aletheia.probe(make_model("llama"), examples, batches=2), policy="last", freeze_after=0.25)


class Walks(TrainerCallback):
    """Modules that walks from the top of the model visit within the last two steps."""

    def __init__(self, monkeypatch):
        self.model, self.visited, self.steps = None, 0, 0
        for name in ("named_modules", "children"):
            monkeypatch.setattr(nn.Module, name, self.counted(getattr(nn.Module, name)))

    def counted(self, own):
        def walk(module, *args, **kwargs):
            for found in own(module, *args, **kwargs):
                self.visited += module is self.model
                yield found

        return walk

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.model = model if state.global_step >= state.max_steps - 2 else None  # the cache has all rows

    def on_step_end(self, *args, **kwargs):
        self.steps += self.model is not None
        self.model = None


def test_a_step_does_not_walk_over_the_model(monkeypatch, plan, examples, tmp_path):
    walks, train = Walks(monkeypatch), RowTrainer.train

    def watched(trainer, *args, **kwargs):
        trainer.callback_handler.callbacks.insert(0, walks)  # before those of the trainer's own that may walk
        return train(trainer, *args, **kwargs)

    monkeypatch.setattr(RowTrainer, "train", watched)
    trained(plan, examples, tmp_path / "run", evaluations=1)
    assert walks.steps == 2
    assert walks.visited < 2 * 20  # looks at the first weight, for its device


def test_results_stay_the_same_bytes(monkeypatch, plan, examples, tmp_path):
    once = trained(plan, examples, tmp_path / "few")
    monkeypatch.setattr(loop, "few_walks", lambda trainer: nullcontext())
    again = trained(plan, examples, tmp_path / "all")
    assert [point.loss for point in once.metrics.train_curve] == [point.loss for point in again.metrics.train_curve]
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("few", "all")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_every_module_learns_again_after_an_evaluation():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Linear(2, 2)))
    model[1].eval()
    optimizer = torch.optim.SGD(model.parameters())
    with few_walks(SimpleNamespace(model=model, optimizer=optimizer)):
        model.train()
        assert model[1].training
        with in_mode(model, training=False):
            assert not model[0].training
        model.eval()
        model.train()
        assert all(module.training for module in model.modules())
        model(torch.ones(1, 2)).sum().backward()
        model.zero_grad()
        assert all(parameter.grad is None for parameter in model.parameters())
    assert "train" not in vars(model)
    assert model.train().training
