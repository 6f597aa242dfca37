"""``learning_rate`` auto: three rates go the same first steps, held-out rows judge, and the run is as if none had."""

import re
import signal
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import make_model

import aletheia
from aletheia.anatomy.checkpoint import Checkpoint
from aletheia.data.examples import Example
from aletheia.errors import Interrupted, SettingsError, TrainingError
from aletheia.prefix.fill_streamed import fill_streamed, streamed_cache
from aletheia.runs.schema import Run
from aletheia.training import race
from aletheia.training.interrupts import SaveInTime
from aletheia.training.learning_rate import default_learning_rate
from aletheia.training.race import FACTORS, FEWEST_ROWS, choose, race_steps, share_of_rate
from aletheia.training.train import Prepared

STEPS, DEFAULT = 12, 2.0
LEVEL = [1.0 + 0.1 * row for row in range(FEWEST_ROWS)]


def lower(by, rows=LEVEL, spread=0.0):
    """Losses below ``rows`` by ``by``, every second row by ``spread`` more and the others by as much less."""
    return [loss - by + (spread if row % 2 else -spread) for row, loss in enumerate(rows)]


# --- the rule


@pytest.mark.parametrize(
    ("low", "default", "high", "chosen"),
    [
        (LEVEL, LEVEL, LEVEL, 2.0),  # no difference
        (lower(0.1), LEVEL, lower(-0.1), 1.0),
        (lower(-0.1), LEVEL, lower(0.1), 3.0),
        (lower(0.1), LEVEL, lower(0.2), 3.0),  # of two that are better, the lowest
        (lower(0.1, spread=0.5), LEVEL, LEVEL, 2.0),  # lower, but not clearly
        (lower(0.1, spread=0.5), LEVEL, lower(0.05), 3.0),  # the lowest is not clear, another is
        (lower(0.1)[1:], LEVEL[1:], LEVEL[1:], 2.0),  # too few rows to tell
        (LEVEL, LEVEL, None, 2.0),
        (lower(0.1), None, None, 1.0),
        (LEVEL, None, lower(0.0, spread=0.1), 1.0),  # without the default, the lowest rate stands
    ],
)
def test_another_rate_is_taken_only_where_it_is_clearly_better(low, default, high, chosen):
    assert choose({1.0: low, 2.0: default, 3.0: high}, 2.0) == chosen


def test_a_race_that_no_rate_ends_is_an_error():
    with pytest.raises(TrainingError, match=r"`learning_rate` auto tried 1\.0e-03, 2\.0e-03.*finite.*a lower rate"):
        choose({1e-3: None, 2e-3: None}, 2e-3)


ROWS = st.lists(st.floats(0.0, 10.0), min_size=FEWEST_ROWS, max_size=FEWEST_ROWS)


@given(st.lists(ROWS | st.none(), min_size=2, max_size=4))
def test_what_is_taken_is_never_worse_than_the_default(columns):
    losses = dict(enumerate(columns, 1))
    if not any(losses.values()):
        return
    chosen = choose(losses, 1)
    assert losses[chosen] is not None
    if losses[1] is not None:
        assert sum(losses[chosen]) <= sum(losses[1])


@given(st.integers(1, 10_000))
def test_a_race_is_short_and_each_step_of_it_has_a_rate(run_steps):
    steps = race_steps(run_steps)
    shares = [share_of_rate(step, steps) for step in range(steps)]
    assert steps == min(run_steps, 8)
    assert all(0 < share <= 1 for share in shares)
    assert steps < 3 or max(shares) == 1


# --- in a run


@pytest.fixture(scope="module")
def scores(examples):
    return aletheia.probe(make_model("llama"), examples, batches=2)


@pytest.fixture(scope="module")
def whole(scores, examples, tmp_path_factory):
    """A run that raced and was left in peace."""
    return trained(scores, examples, tmp_path_factory.mktemp("whole") / "run")


def trained(scores, examples, out, dropout=0.0, **settings):
    """Train a tiny Llama whose layers 0 and 1 learn at first only."""
    plan = aletheia.plan(scores, policy="last", rank=4, freeze_after=0.25, dropout=dropout)
    adapted = aletheia.adapt(make_model("llama"), plan)
    data, held_out = examples.subset(range(40)), examples.subset(range(40, 60))
    settings = {"steps": STEPS, "learning_rate": "auto", "show_progress": False} | settings
    return aletheia.train(adapted, data, plan, out, held_out, **settings)


def weights(run):
    return load_file(run.path / "adapter_model.safetensors")


def losses(run):
    return [point.loss for point in (*run.metrics.train_curve, *run.metrics.held_out_curve)]


@pytest.mark.parametrize(("chosen", "more"), [(0, {}), (2, {"dropout": 0.2, "gradient_accumulation_steps": 2})])
def test_the_run_is_the_one_that_the_chosen_rate_given_as_a_number_has(
    scores, examples, tmp_path, monkeypatch, chosen, more
):
    monkeypatch.setattr(race, "choose", lambda losses, default: list(losses)[chosen])
    raced = trained(scores, examples, tmp_path / "raced", **more)
    rate = raced.metrics.settings.learning_rate
    assert rate == raced.metrics.rate_race.chosen == raced.metrics.rate_race.rates[chosen]
    plain = trained(scores, examples, tmp_path / "plain", **more, learning_rate=rate)
    assert losses(raced) == losses(plain)
    assert all(torch.equal(weight, weights(plain)[name]) for name, weight in weights(raced).items())
    assert plain.metrics.rate_race is None


def test_a_race_takes_no_larger_batches_than_training(scores, examples, tmp_path, monkeypatch):
    """Its batches are padded, also where those of the run are packed: rows of very unlike lengths."""
    lengths, seen, trainers = [5, 6, 7, 60], [], []
    rows = [Example([3 + at] * lengths[at % 4], [3 + at] * lengths[at % 4], str(at)) for at in range(60)]
    own_loss = race._loss

    def watched(trainer, batch):
        trainers.append(trainer)
        seen.append(batch["input_ids"].numel())
        return own_loss(trainer, batch)

    monkeypatch.setattr(race, "_loss", watched)
    trained(scores, replace(examples, examples=rows), tmp_path / "run", packing="on")
    assert 60 < trainers[0].most_tokens < 2 * 60
    assert max(seen) <= trainers[0].most_tokens


def test_adapters_and_random_state_are_afterwards_as_they_were(scores, examples, tmp_path, monkeypatch):
    own, seen = race.race_rates, []

    def state(model):
        return [
            torch.get_rng_state(),
            *(weight.detach().clone() for weight in model.parameters() if weight.requires_grad),
        ]

    def watched(trainer, *given):
        before = state(trainer.model)
        found = own(trainer, *given)
        seen.extend(zip(before, state(trainer.model), strict=True))
        assert trainer.optimizer is None
        assert all(weight.grad is None for weight in trainer.model.parameters())
        return found

    monkeypatch.setattr("aletheia.training.train.race_rates", watched)
    trained(scores, examples, tmp_path / "run", dropout=0.2)
    assert len(seen) > 1
    assert all(torch.equal(before, after) for before, after in seen)


def test_what_was_raced_is_recorded_and_said(scores, examples, tmp_path, capsys):
    run = trained(scores, examples, tmp_path / "run", show_progress=True)
    found, rate = run.metrics.rate_race, run.metrics.settings.learning_rate
    default = default_learning_rate(32, STEPS)  # more than a pass, so averaged
    assert found.rates == pytest.approx([factor * default for factor in FACTORS])
    assert (found.steps, found.rows, found.chosen) == (8, 20, rate)
    assert all(loss < run.metrics.held_out_loss_before for loss in found.losses)
    assert run.metrics.seconds.race > 0
    assert Run.read(run.path).metrics.rate_race == found
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rate ")]
    assert said[0] == "rate   tries 3 learning rates for 8 steps each"
    assert re.fullmatch(r"rate   \S+ chosen; held-out loss (\d\.\d{3} at \S+(, |$)){3}", said[1])
    assert said[1].startswith(f"rate   {rate:.1e} chosen")
    assert len(said) == 2


def test_a_rate_with_a_loss_that_is_not_finite_drops_out(scores, examples, tmp_path, monkeypatch):
    monkeypatch.setattr(race, "FACTORS", (1.0, 1e30))
    run = trained(scores, examples, tmp_path / "run")
    assert run.metrics.rate_race.losses[1] is None
    assert run.metrics.settings.learning_rate == run.metrics.rate_race.rates[0]
    assert re.search(r", not finite at \S+$", race.summary(run.metrics.rate_race))


def test_a_race_without_a_finite_loss_ends_the_run(scores, examples, tmp_path, monkeypatch):
    monkeypatch.setattr(race, "FACTORS", (1e29, 1e30))
    with pytest.raises(TrainingError, match="no loss was finite"):
        trained(scores, examples, tmp_path / "run")


class Signalled(SaveInTime):
    """Ctrl-C in the fifth step."""

    def on_step_begin(self, args, state, control, **kwargs):
        super().on_step_begin(args, state, control, **kwargs)
        if state.global_step == 4:
            signal.raise_signal(signal.SIGINT)


def test_a_run_that_goes_on_does_not_race_again(scores, examples, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("aletheia.training.train.SaveInTime", Signalled)
        with pytest.raises(Interrupted, match="after step 5"):
            trained(scores, examples, tmp_path / "run")
    monkeypatch.setattr(race, "choose", lambda losses, default: pytest.fail("raced again"))
    run = trained(scores, examples, tmp_path / "run")
    assert run.metrics.rate_race == whole.metrics.rate_race
    assert run.metrics.seconds.race > 0
    assert losses(run) == losses(whole)
    assert all(torch.equal(weight, weights(whole)[name]) for name, weight in weights(run).items())


def test_a_run_that_is_stopped_in_its_race_races_again(scores, examples, whole, tmp_path, monkeypatch):
    own = race.choose

    def signalled(losses, default):
        signal.raise_signal(signal.SIGINT)
        return own(losses, default)

    with monkeypatch.context() as patched:
        patched.setattr(race, "choose", signalled)
        with pytest.raises(
            Interrupted, match="before the first checkpoint; the same command starts again from the beginning"
        ):
            trained(scores, examples, tmp_path / "run")
    run = trained(scores, examples, tmp_path / "run")
    assert run.metrics.rate_race == whole.metrics.rate_race
    assert losses(run) == losses(whole)


def test_a_race_takes_its_rows_from_a_stored_prefix(examples, model_folder, tmp_path):
    """Of a model whose lower layers are not in memory."""
    data, held_out = examples.subset(range(8)), examples.subset(range(8, 18))
    base = aletheia.load(str(model_folder), "float32").model
    plan = aletheia.plan(aletheia.probe(base, examples, batches=2), policy="last", rank=4, freeze_after=0)
    common = {"steps": 3, "batch_size": 2, "learning_rate": "auto", "show_progress": False}
    whole = aletheia.train(aletheia.adapt(base, plan), data, plan, tmp_path / "whole", held_out, cache="off", **common)
    checkpoint = Checkpoint(str(model_folder), "float32")
    cache = streamed_cache(checkpoint, plan.boundary, tmp_path / "cache")
    fill_streamed(checkpoint, plan.boundary, [*data.examples, *held_out.examples], cache, 2, 0, show_progress=False)
    adapted = aletheia.adapt(checkpoint.suffix(plan.boundary), plan, identity=plan.model)
    run = aletheia.train(adapted, data, plan, tmp_path / "run", held_out, prepared=Prepared(cache), **common)
    assert run.metrics.rate_race.losses == pytest.approx(whole.metrics.rate_race.losses, rel=1e-5)
    assert run.metrics.rate_race.chosen == whole.metrics.rate_race.chosen


# --- how it is asked for


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ("fast", "`learning_rate` is 'fast'; expected a number or auto"),
        (-1.0, "`learning_rate` is -1; expected more than 0 or auto"),
        (float("nan"), "`learning_rate` is nan; expected a finite number or auto"),
    ],
)
def test_what_is_neither_a_rate_nor_auto_is_refused(given, fault):
    with pytest.raises(SettingsError, match=re.escape(fault)):
        aletheia.TrainSettings(learning_rate=given)


def test_the_command_line_takes_auto_or_a_number(run, model_folder, data_file):
    asked = ("train", model_folder, "--data", data_file, "--steps", 2, "--max-length", 64, "--out", "run")
    code, _, err = run(*asked, "--learning-rate", "fast")
    assert code == 2
    assert err.splitlines()[-1].endswith("--learning-rate is 'fast'; expected a number or auto")
    code, _, err = run(*asked, "--learning-rate", "auto")
    assert code == 0, err
    assert "rate   tries 3 learning rates for 2 steps each" in err
    _, out, _ = run("train", "--help")
    assert re.search(r"--learning-rate\s+\{auto\}\|NUMBER", out)
