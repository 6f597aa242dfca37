"""On a device that works off a queue no step looks at its own results, and a run stays what it is."""

import pytest
from test_packed import trained
from tiny import make_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

import aletheia
from aletheia.prefix import source
from aletheia.prefix.stored import PREFIX, SPANS
from aletheia.training import loop
from aletheia.training.loop import LOOKED_AT_EVERY, RowTrainer

WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "is_nonzero",
    "equal",
    "masked_select",
    "_unique2",
}  # for what a device finds


@pytest.fixture(scope="module")
def plan(examples):
    """Layers 2 and 3 to the end, 0 and 1 for the first quarter of the steps."""
    return aletheia.plan(aletheia.probe(make_model("llama"), examples, batches=2), policy="last", freeze_after=0.25)


@pytest.fixture
def behind(monkeypatch):
    """As on a GPU."""
    as_on_a_gpu(monkeypatch)


def as_on_a_gpu(patch):
    for module in (loop, source):
        patch.setattr(module, "is_behind", lambda device: True)


class Watched(TorchDispatchMode):
    """The operators of each step that a host would wait for, whoever calls them."""

    def __init__(self):
        super().__init__()
        self.inside, self.found, self.steps = False, [], 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        if self.inside and name in WAITS:
            self.found.append((self.steps, name))
        return operator(*args, **(kwargs or {}))


class Steps(TrainerCallback):
    """From the first operator of a step to its last one; loggers and held-out losses stand outside."""

    def __init__(self, watched):
        self.watched = watched

    def on_step_begin(self, *given, **named):
        self.watched.inside, self.watched.steps = True, self.watched.steps + 1

    def on_step_end(self, *given, **named):
        self.watched.inside = False


def watched_run(monkeypatch, plan, examples, out, **settings):
    watched = Watched()
    train = RowTrainer.train

    def watched_train(trainer, *args, **kwargs):
        trainer.add_callback(Steps(watched))
        with watched:
            return train(trainer, *args, **kwargs)

    monkeypatch.setattr(RowTrainer, "train", watched_train)
    metrics = trained(plan, examples, out, evaluations=1, **settings).metrics
    assert watched.steps == metrics.steps
    return watched.found, metrics


@pytest.mark.parametrize("averaging", ["on", "off"])
def test_no_step_waits(behind, monkeypatch, plan, examples, tmp_path, averaging):
    """Every layer learns at first, then the cache is filled, from the eleventh step on it is read."""
    found, metrics = watched_run(
        monkeypatch, plan, examples, tmp_path / "run", packing="on", steps=15, averaging=averaging, cache="memory"
    )
    assert metrics.settings.cache == "memory"
    tried = {4, 5, metrics.steps}  # the phase ends, stored states are tried, the run ends
    assert not [entry for entry in found if entry[0] not in tried]


def test_a_step_that_waits_is_seen(monkeypatch, plan, examples, tmp_path):
    """On a processor, where nothing is gained, a step looks at its results at once."""
    found, _ = watched_run(monkeypatch, plan, examples, tmp_path / "run", packing="on", steps=15, cache="memory")
    assert {step for step, _ in found} == set(range(1, 16))


@pytest.mark.parametrize("settings", [{}, {"packing": "on"}, {"gradient_accumulation_steps": 2, "batch_size": 2}])
def test_nothing_else_is_different(monkeypatch, plan, examples, tmp_path, settings):
    waiting = trained(plan, examples, tmp_path / "waiting", steps=15, **settings).metrics
    as_on_a_gpu(monkeypatch)
    looking_back = trained(plan, examples, tmp_path / "behind", steps=15, **settings).metrics
    assert [point.step for point in looking_back.train_curve] == list(range(1, 16))
    expected = [point.loss for point in waiting.train_curve]
    assert [point.loss for point in looking_back.train_curve] == pytest.approx(expected, rel=1e-6)
    assert looking_back.held_out_curve[-1].loss == pytest.approx(waiting.held_out_curve[-1].loss, rel=1e-6)
    assert looking_back.seconds.train > 0


def test_stored_states_or_rows_come_with_the_batch(behind, monkeypatch, plan, examples, tmp_path):
    came, batch_of = [], RowTrainer._batch

    def seen(trainer, rows):
        batch = batch_of(trainer, rows)
        came.append((trainer.state.global_step, PREFIX in batch, SPANS in batch))
        return batch

    monkeypatch.setattr(RowTrainer, "_batch", seen)
    trained(plan, examples, tmp_path / "run", steps=15, evaluations=1, cache="memory")
    assert all(has_states for step, has_states, _ in came if step >= 10)
    assert not any(has_states for step, has_states, _ in came if step < 4)
    assert all(has_rows for step, has_states, has_rows in came if step >= 4 and not has_states)


def test_the_first_pass_runs_the_frozen_layers_once_a_step(behind, monkeypatch, plan, examples, tmp_path):
    """On packed rows as they are, which is the shape that is recorded; later passes do not run them."""
    ran, own = [], source.prefix_output
    monkeypatch.setattr(
        source, "prefix_output", lambda model, boundary, batch: ran.append(batch) or own(model, boundary, batch)
    )
    trained(plan, examples, tmp_path / "run", steps=15, packing="on", evaluations=1, cache="memory")
    assert all("cu_seq_lens_q" in batch for batch in ran)
    assert len(ran) <= 15 - 3


def test_a_run_that_goes_on_is_whole(behind, plan, examples, tmp_path):
    """Curves and held-out losses are those of a run that was not stopped."""
    whole = trained(plan, examples, tmp_path / "whole", steps=12).metrics

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 7:
                raise KeyboardInterrupt

    settings = {"steps": 12, "save_steps": 6}
    train = RowTrainer.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            RowTrainer, "train", lambda trainer, *a, **k: (trainer.add_callback(Stop()), train(trainer, *a, **k))
        )
        with pytest.raises(KeyboardInterrupt):
            trained(plan, examples, tmp_path / "run", **settings)
    run = trained(plan, examples, tmp_path / "run", **settings).metrics
    assert [point.loss for point in run.train_curve] == pytest.approx([point.loss for point in whole.train_curve])
    assert run.held_out_loss_after == pytest.approx(whole.held_out_loss_after)


def test_loggers_get_a_mean_now_and_then(behind, monkeypatch, plan, examples, tmp_path):
    logged = []

    class Logger(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                logged.append((state.global_step, logs["loss"]))

    train = RowTrainer.train
    monkeypatch.setattr(
        RowTrainer, "train", lambda trainer, *a, **k: (trainer.add_callback(Logger()), train(trainer, *a, **k))
    )
    metrics = trained(plan, examples, tmp_path / "run", steps=LOOKED_AT_EVERY, evaluations=1).metrics
    mean = sum(point.loss for point in metrics.train_curve) / LOOKED_AT_EVERY
    assert logged == [(LOOKED_AT_EVERY, pytest.approx(mean, rel=1e-3))]
