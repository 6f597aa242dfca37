"""On a device that works off a queue no step looks at its own results, and a run stays what it is."""

import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from test_attach import logged, make_trainer, sft
from test_packed import trained
from tiny import make_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback

import aletheia
from aletheia.data.batches import COPY_OF, on_host
from aletheia.prefix import source
from aletheia.training import feed, loop
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
    for module in (loop, source, feed):
        patch.setattr(module, "is_behind", lambda device: True)
    patch.setattr(feed, "moved", elsewhere)
    ELSEWHERE.clear()


ELSEWHERE = []  # what stands for tensors on a GPU


def elsewhere(value, device):
    """A tensor in other memory, as ``moved`` leaves it."""
    if not isinstance(value, torch.Tensor):
        return value
    there = value.clone()
    vars(there)[COPY_OF] = value, (value._version, there._version)
    ELSEWHERE.append(there)
    return there


@pytest.mark.parametrize("changed", [0, 1], ids=["the original", "the copy"])
def test_an_original_counts_until_one_of_the_two_changes(changed):
    original = torch.arange(6)
    there = elsewhere(original, None)
    assert on_host(there) is original
    (original, there)[changed].add_(1)  # as where a collator uses its buffer again
    assert on_host(there) is there


def who_waits():
    """The package whose line is computed now."""
    frame = sys._getframe(1)
    while (path := Path(frame.f_code.co_filename)).is_relative_to(Path(torch.__file__).parent) or path.samefile(
        __file__
    ):
        frame = frame.f_back
    return next((name for name in ("aletheia", "trl", "transformers", "accelerate") if name in path.parts), str(path))


class Watched(TorchDispatchMode):
    """The operators of each step that a host would wait for, and who calls them."""

    def __init__(self):
        super().__init__()
        self.inside, self.found, self.steps = False, [], 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        if self.inside and name in WAITS:
            self.found.append((self.steps, name, who_waits()))
        return operator(*args, **(kwargs or {}))


class Listed(TorchFunctionMode):
    """Tensors of a GPU that are read as lists, which no operator shows."""

    def __init__(self, watched):
        super().__init__()
        self.watched = watched

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if self.watched.inside and function is torch.Tensor.tolist:
            memory = {tensor.untyped_storage().data_ptr() for tensor in ELSEWHERE}
            if args[0].untyped_storage().data_ptr() in memory:
                self.watched.found.append((self.watched.steps, "tolist", who_waits()))
        return function(*args, **(kwargs or {}))


class Steps(TrainerCallback):
    """From the first operator of a step to its last one; loggers and held-out losses stand outside."""

    def __init__(self, watched):
        self.watched = watched

    def on_step_begin(self, *given, **named):
        self.watched.inside, self.watched.steps = True, self.watched.steps + 1

    def on_step_end(self, *given, **named):
        self.watched.inside = False


def watching(trainer, watched):
    trainer.add_callback(Steps(watched))
    stack = ExitStack()
    stack.enter_context(watched)
    stack.enter_context(Listed(watched))
    return stack


def watched_run(monkeypatch, plan, examples, out, **settings):
    watched = Watched()
    train = RowTrainer.train

    def watched_train(trainer, *args, **kwargs):
        with watching(trainer, watched):
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
    assert {step for step, *_ in found} == set(range(1, 16))


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


# --- in a trainer of the user's

SILENT = {"logging_steps": 100, "logging_nan_inf_filter": False}  # Trainer itself looks at every loss otherwise
KINDS = {
    "padded": (make_trainer, {}),
    "accumulation": (make_trainer, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
    "workers": (make_trainer, {"dataloader_num_workers": 1}),
    "TRL, padded": (sft, {}),
    "TRL, packing": (sft, {"packing": True, "max_length": 128}),
    "TRL, padding free": (sft, {"padding_free": True, "max_length": None}),
}


def attached(kind, examples, tokenizer, plan, folder, **settings):
    make, own = KINDS[kind]
    given = (examples, tokenizer, plan, folder) if make is sft else (examples, plan, folder)
    trainer = make(*given, **own | settings)
    aletheia.attach(trainer, plan)
    return trainer


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_waits_for_what_is_attached(kind, behind, examples, tokenizer, plan, tmp_path):
    """transformers waits to see whether a mask hides anything, and TRL for its metrics."""
    trainer, watched = attached(kind, examples, tokenizer, plan, tmp_path, **SILENT), Watched()
    with watching(trainer, watched):
        trainer.train()
    early = plan.early_steps(watched.steps)
    tried = {early, early + 1}  # the phase ends, stored states are tried
    assert watched.steps == 18
    assert {step for step, _, who in watched.found if who == "aletheia"} <= tried
    assert {who for step, _, who in watched.found if step not in tried} <= {"transformers", "trl"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_users_trainer_learns_the_same(kind, monkeypatch, examples, tokenizer, plan, tmp_path):
    losses = []
    for on_a_gpu in (False, True):
        if on_a_gpu:
            as_on_a_gpu(monkeypatch)
        trainer = attached(kind, examples, tokenizer, plan, tmp_path / str(on_a_gpu))
        trainer.train()
        losses.append(logged(trainer))
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


def test_batches_that_a_loop_changes_are_read_again(behind, examples, plan, tmp_path):
    """Rows are those of the call: cut ones are found on the device, for which the step waits."""

    class Halves(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            inputs["input_ids"][:, 5] = 7
            first, second = ({name: value[half::2] for name, value in inputs.items()} for half in (0, 1))
            return super().compute_loss(model, first, **kwargs) + super().compute_loss(model, second, **kwargs)

    trainer, watched = make_trainer(examples, plan, tmp_path / "attached", Halves, **SILENT), Watched()
    aletheia.attach(trainer, plan)
    with watching(trainer, watched):
        trainer.train()
    early = plan.early_steps(18)
    assert {step for step, name, who in watched.found if (name, who) == ("tolist", "aletheia")} == set(
        range(early + 1, 19)
    )
    plain = make_trainer(examples, plan, tmp_path / "off", Halves, **SILENT)
    aletheia.attach(plain, plan, aletheia.AttachSettings(cache="off"))
    plain.train()
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(
        plain.state.log_history[-1]["train_loss"], rel=1e-6
    )


def test_the_trainer_is_as_it_was(behind, examples, plan, tmp_path):
    trainer = make_trainer(examples, plan, tmp_path, max_steps=3)
    aletheia.attach(trainer, plan)
    trainer.train()
    assert trainer.callback_handler.train_dataloader.device == trainer.args.device
    assert trainer.get_batch_samples.__func__ is Trainer.get_batch_samples
