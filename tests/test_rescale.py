"""How strong the kept adapter is: what is tried, what is kept and recorded, and where nothing is tried."""

import math

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import make_model
from torch import nn

import aletheia
from aletheia.reporting.comparison import differences, kept_point, repeat_command
from aletheia.runs.card import model_card
from aletheia.training import loop
from aletheia.training.held_out import held_out_loss, loss_over
from aletheia.training.rescale import rescale

STEPS = 6


class Adapter(nn.Module):
    def __init__(self):
        super().__init__()
        self.lora_A, self.lora_B = nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False)
        self.whole = self.lora_B.weight.detach().clone()

    @property
    def scale(self):
        return (self.lora_B.weight / self.whole).mean().item()


@pytest.fixture(scope="module")
def plan(examples):
    scores = aletheia.probe(make_model("llama"), examples, batches=2)
    return aletheia.plan(scores, policy="last", rank=4)


def trained(plan, examples, out, **settings):
    """Less than a pass over 40 rows, at a rate that is too high."""
    adapted = aletheia.adapt(make_model("llama"), plan)
    settings = {
        "steps": STEPS,
        "learning_rate": 0.3,
        "evaluations": 3,
        "save_steps": 2,
        "save_total_limit": 9,
    } | settings
    data, held_out = examples.subset(range(40)), examples.subset(range(40, 46))
    return aletheia.train(adapted, data, plan, out, held_out, show_progress=False, **settings)


@pytest.mark.parametrize(("lowest", "kept", "tried"), [(1.0, 1.0, 1), (0.78, 0.8, 2), (0.61, 0.6, 3), (0.1, 0.4, 3)])
def test_the_scale_of_the_lowest_loss_is_kept(lowest, kept, tried):
    model, seen = Adapter(), []
    first = model.lora_A.weight.detach().clone()

    def loss_of():
        seen.append(model.scale)
        return (model.scale - lowest) ** 2

    scale, loss = rescale(model, loss_of, (1 - lowest) ** 2)
    assert scale == kept
    assert loss == pytest.approx((kept - lowest) ** 2, abs=1e-6)
    assert model.scale == pytest.approx(kept)
    assert seen == pytest.approx([0.8, 0.6, 0.4][:tried])
    assert torch.equal(model.lora_A.weight, first)


@pytest.mark.parametrize("loss", [2.0, math.nan])
def test_what_is_no_better_changes_no_bit(loss):
    model = Adapter()
    assert rescale(model, lambda: loss, 2.0) == (1.0, 2.0)
    assert torch.equal(model.lora_B.weight, model.whole)


def test_an_error_leaves_the_best_so_far():
    model, losses = Adapter(), iter([1.0])
    with pytest.raises(StopIteration):
        rescale(model, lambda: next(losses), 2.0)
    assert model.scale == pytest.approx(0.8)


def test_a_run_at_too_high_a_rate_keeps_less_of_its_adapter(plan, examples, tmp_path):
    """Plain PEFT computes the loss that was recorded; A and the direction of B are those of the kept step."""
    run = trained(plan, examples, tmp_path)
    metrics = run.metrics
    lowest = min(point.loss for point in metrics.held_out_curve[1:])
    assert metrics.kept_scale in (0.8, 0.6, 0.4)
    assert metrics.held_out_loss_after < lowest
    adapter = PeftModel.from_pretrained(make_model("llama"), tmp_path)
    held_out = examples.subset(range(40, 46))
    assert held_out_loss(adapter, held_out, 4) == pytest.approx(metrics.held_out_loss_after, abs=1e-5)
    whole = load_file(tmp_path / "checkpoints" / f"checkpoint-{metrics.kept_step}" / "adapter_model.safetensors")
    for name, value in load_file(tmp_path / "adapter_model.safetensors").items():
        torch.testing.assert_close(value, whole[name] * (metrics.kept_scale if "lora_B" in name else 1))
    told = f"at {metrics.kept_scale:g} of its strength"
    assert told in kept_point(metrics)
    assert told in model_card(run)
    assert metrics.seconds.eval > 0


@pytest.mark.parametrize("settings", [{"rescale": False}, {"keep": "last"}])
def test_where_nothing_is_tried(settings, plan, examples, tmp_path, monkeypatch):
    losses = iter([5.0, 4.0, 3.0, 2.0])
    monkeypatch.setattr(loop, "loss_over", lambda *given: next(losses))
    run = trained(plan, examples, tmp_path, **settings)
    assert (run.metrics.kept_scale, run.metrics.held_out_loss_after) == (1.0, 2.0)
    assert "strength" not in kept_point(run.metrics) + model_card(run)
    assert ("--no-rescale" in repeat_command(run)) == ("keep" not in settings)


def test_a_point_before_the_freeze_is_judged_by_its_own_lower_layers(examples, tmp_path, monkeypatch):
    """The cache holds what later lower layers computed, which have another average than those that are kept."""
    scores = aletheia.probe(make_model("llama"), examples, batches=2)
    plan = aletheia.plan(scores, policy="last", rank=4, freeze_after=0.4)
    before = [9.0, 8.0, *range(10, 15)]  # seven losses, then those of other strengths

    def lower_at_the_end(*given):
        own = loss_over(*given)
        return before.pop(0) if before else own

    monkeypatch.setattr(loop, "loss_over", lower_at_the_end)
    settings = {"steps": 12, "evaluations": 6, "cache": "memory", "early_stop": False, "averaging": "on"}
    run = trained(plan, examples, tmp_path, **settings)
    monkeypatch.undo()
    assert run.metrics.kept_step == 2 < run.metrics.early_steps
    assert run.metrics.cache_bytes > 0
    assert run.metrics.kept_scale < 1
    adapter = PeftModel.from_pretrained(make_model("llama"), tmp_path)
    held_out = examples.subset(range(40, 46))
    assert held_out_loss(adapter, held_out, 4) == pytest.approx(run.metrics.held_out_loss_after, abs=1e-5)


def test_it_is_part_of_the_record(plan, examples, tmp_path):
    on, off = (trained(plan, examples, tmp_path / str(way), rescale=way) for way in (True, False))
    assert "--no-rescale" not in repeat_command(on)
    assert any("rescaling" in line for line in differences([on, off]))
    assert on.metrics.held_out_curve[-1].loss == off.metrics.held_out_curve[-1].loss
