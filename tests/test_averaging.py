"""Averaged weights: the rule, what is taken of the average, what freezes, and runs that go on."""

import json
import math

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import make_model
from torch import nn

import aletheia
from aletheia.errors import SettingsError
from aletheia.reporting.comparison import differences, kept_point, repeat_command
from aletheia.runs.folder import RunFolder
from aletheia.training import loop
from aletheia.training.averaging import AVERAGE_FILE, WeightAverage
from aletheia.training.held_out import held_out_loss
from aletheia.training.loop import takes_average
from aletheia.training.settings import TrainSettings

STEPS, FROZEN_AFTER = 12, 5
EVERY_STEP = {"evaluations": STEPS, "save_steps": 1, "save_total_limit": STEPS, "early_stop": False}


@pytest.fixture(scope="module")
def plan(examples):
    """Layers 2 and 3 to the end, 0 and 1 for the first 5 of 12 steps."""
    scores = aletheia.probe(make_model("llama"), examples, batches=2)
    made = aletheia.plan(scores, policy="last", rank=4, freeze_after=0.4)
    assert made.early_steps(STEPS) == FROZEN_AFTER
    return made


@pytest.fixture
def held_out(examples):
    return examples.subset(range(20, 26))


def trained(plan, examples, out, **settings):
    """More than two passes over 20 rows."""
    adapted = aletheia.adapt(make_model("llama"), plan)
    settings = {"steps": STEPS, "learning_rate": 1e-2, "evaluations": 6, "rescale": False} | settings
    data, held_out = examples.subset(range(20)), examples.subset(range(20, 26))
    return aletheia.train(adapted, data, plan, out, held_out, show_progress=False, **settings)


def averages(checkpoint):
    return load_file(checkpoint / AVERAGE_FILE)


def weights(folder):
    """The adapter of a folder by the names that the model's parameters have."""
    found = load_file(folder / "adapter_model.safetensors")
    return {name.replace(".weight", ".default.weight"): value for name, value in found.items()}


def loss_of(values, plan, held_out):
    """The held-out loss of plain PEFT with these weights."""
    model = aletheia.adapt(make_model("llama"), plan)
    assert not model.load_state_dict(values, strict=False).unexpected_keys
    return held_out_loss(model, held_out, 4)


def curve(run):
    return [(point.step, point.loss) for point in run.metrics.held_out_curve]


def train_losses(run):
    return [point.loss for point in run.metrics.train_curve]


def is_early(name):
    return ".layers.0." in name or ".layers.1." in name


def test_an_average_is_the_sum_of_all_weights_each_with_its_share():
    """The share of step n of T, written out: what it moved in times what later steps left of it."""
    model = nn.Linear(3, 2)
    average = WeightAverage(model)
    seen = []
    for step in range(1, 41):
        with torch.no_grad():
            model.weight.copy_(torch.randn(2, 3))
        seen.append(model.weight.detach().double().clone())
        average.update(step)
    shares = [math.prod([4 / (n + 3), *(1 - 4 / (later + 3) for later in range(n + 1, 41))]) for n in range(1, 41)]
    assert sum(shares) == pytest.approx(1)
    assert sum(shares[-10:]) > 0.6
    expected = sum(share * value for share, value in zip(shares, seen, strict=True))
    with average.swapped_in():
        torch.testing.assert_close(model.weight.double(), expected, rtol=1e-6, atol=1e-6)


def test_the_average_of_one_step_is_its_weights():
    model = nn.Linear(3, 2)
    average = WeightAverage(model)
    with torch.no_grad():
        model.weight.add_(1)
    after = model.weight.detach().clone()
    average.update(1)
    with average.swapped_in():
        assert torch.equal(model.weight, after)


def test_weights_are_put_back_after_an_error_too():
    model = nn.Linear(3, 2, dtype=torch.bfloat16)
    average = WeightAverage(model)
    with torch.no_grad():
        model.weight.add_(1)
    parameter, after = model.weight, model.weight.detach().clone()

    def break_off():
        with average.swapped_in():
            assert not torch.equal(model.weight, after)
            raise RuntimeError("broken off")

    with pytest.raises(RuntimeError, match="broken off"):
        break_off()
    assert model.weight is parameter
    assert torch.equal(model.weight, after)


def test_held_out_losses_are_those_of_the_averages(plan, examples, held_out, tmp_path):
    """Before and after the lower layers freeze, computed again by plain PEFT from what each checkpoint holds."""
    run = trained(plan, examples, tmp_path, cache="memory", keep="last", **EVERY_STEP)
    assert run.metrics.cache_bytes > 0
    apart = 0.0
    for step, loss in curve(run)[1:]:
        checkpoint = tmp_path / "checkpoints" / f"checkpoint-{step}"
        assert AVERAGE_FILE in json.loads((checkpoint / "manifest.json").read_text())["files"]
        assert loss_of(averages(checkpoint), plan, held_out) == pytest.approx(loss, abs=1e-5)
        apart = max(apart, abs(loss_of(weights(checkpoint), plan, held_out) - loss))
    assert apart > 1e-2
    adapter = PeftModel.from_pretrained(make_model("llama"), tmp_path)
    assert held_out_loss(adapter, held_out, 4) == pytest.approx(run.metrics.held_out_loss_after, abs=1e-5)
    last = averages(tmp_path / "checkpoints" / f"checkpoint-{STEPS}")
    assert all(torch.equal(value, last[name]) for name, value in weights(tmp_path).items())


@pytest.mark.parametrize("lowest", [4, 8])
def test_the_best_point_is_kept_as_an_average(lowest, plan, examples, held_out, tmp_path, monkeypatch):
    """Also where it lies before the freeze, and the lower layers had another average than they have later."""
    steps = iter(range(0, STEPS + 1, 2))
    monkeypatch.setattr(loop, "loss_over", lambda *given: 1.0 + abs(next(steps) - lowest))
    run = trained(plan, examples, tmp_path, save_steps=2, save_total_limit=9, early_stop=False)
    assert run.metrics.kept_step == lowest
    best = tmp_path / "checkpoints" / f"checkpoint-{lowest}"
    expected, raw, found = averages(best), weights(best), weights(tmp_path)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name])
        assert torch.equal(value, raw[name]) == (is_early(name) and lowest > FROZEN_AFTER)


def test_training_goes_on_from_the_weights(plan, examples, tmp_path):
    """Until layers freeze, losses of training and weights in checkpoints are those of a run without an average."""
    on, off = (trained(plan, examples, tmp_path / name, averaging=name, **EVERY_STEP) for name in ("on", "off"))
    assert train_losses(on)[:FROZEN_AFTER] == train_losses(off)[:FROZEN_AFTER]
    assert curve(on)[1:] != curve(off)[1:]
    one, other = (tmp_path / name / "checkpoints" / f"checkpoint-{FROZEN_AFTER - 1}" for name in ("on", "off"))
    assert (one / "adapter_model.safetensors").read_bytes() == (other / "adapter_model.safetensors").read_bytes()
    assert not (other / AVERAGE_FILE).exists()


def test_what_freezes_takes_its_average(plan, examples, held_out, tmp_path):
    """Which is halfway from the one before to the weights after 5 steps."""
    run, _ = (
        trained(plan, examples, tmp_path / name, averaging=name, keep="last", cache="memory", **EVERY_STEP)
        for name in ("on", "off")
    )
    before, at, end = (
        tmp_path / "on" / "checkpoints" / f"checkpoint-{step}" for step in (FROZEN_AFTER - 1, FROZEN_AFTER, STEPS)
    )
    for name, value in weights(end).items():
        assert torch.equal(value, averages(end)[name]) == is_early(name)
        assert torch.equal(value, weights(at)[name]) == is_early(name)
    assert loss_of(averages(end), plan, held_out) == pytest.approx(run.metrics.held_out_loss_after, abs=1e-5)
    found, raw = weights(at), weights(tmp_path / "off" / "checkpoints" / f"checkpoint-{FROZEN_AFTER}")
    for name, average in averages(before).items():
        expected = (average + raw[name]) / 2 if is_early(name) else raw[name]
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("keep", "broken_at"), [("best", 4), ("last", 6), ("last", 10)])
def test_a_run_that_goes_on_ends_with_the_same_bytes(keep, broken_at, plan, examples, tmp_path, monkeypatch):
    """Broken off before, at and after the freeze: step 6 is evaluated from checkpoint 5."""
    settings = {"keep": keep, "save_steps": 1, "save_total_limit": STEPS, "early_stop": False}
    whole = trained(plan, examples, tmp_path / "whole", **settings)
    compute, left = loop.loss_over, iter(range(0, broken_at + 1, 2))

    def breaks(*given):
        if next(left) == broken_at:
            raise RuntimeError("broken off")
        return compute(*given)

    monkeypatch.setattr(loop, "loss_over", breaks)
    with pytest.raises(RuntimeError, match="broken off"):
        trained(plan, examples, tmp_path / "run", **settings)
    monkeypatch.setattr(loop, "loss_over", compute)
    with RunFolder.claim(tmp_path / "run", resume="auto") as folder:
        run = trained(plan, examples, folder, **settings)
    assert curve(run) == curve(whole)
    for file in ("adapter_model.safetensors", f"checkpoints/checkpoint-{STEPS}/{AVERAGE_FILE}"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize(
    ("settings", "is_averaged"),
    [
        ({}, False),
        ({"epochs": 1}, False),
        ({"epochs": 1.5}, True),
        ({"steps": 11}, False),  # 42 rows are 11 steps, the last of them of two rows
        ({"steps": 12}, True),
        ({"epochs": 1, "averaging": "on"}, True),
        ({"epochs": 3, "averaging": "off"}, False),
    ],
)
def test_weights_are_averaged_where_rows_come_back(settings, is_averaged):
    assert takes_average(42, TrainSettings(batch_size=4, **settings)) == is_averaged


def test_sharded_layers_have_no_average(plan, examples, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "is_sharded", lambda trainer: True)
    with pytest.raises(SettingsError, match="`averaging` is on, but layers are sharded") as refused:
        trained(plan, examples, tmp_path / "on", averaging="on")
    assert "\n" not in str(refused.value)
    assert trained(plan, examples, tmp_path / "auto", evaluations=1).metrics.settings.averaging == "off"


def test_a_run_says_whether_its_weights_are_an_average(plan, examples, tmp_path):
    on, off = (trained(plan, examples, tmp_path / name, evaluations=1, averaging=name) for name in ("on", "off"))
    assert [run.metrics.settings.averaging for run in (on, off)] == ["on", "off"]
    assert kept_point(on.metrics) == "step 12 of 12, weights averaged"
    assert kept_point(off.metrics) == "step 12 of 12"
    assert "--averaging on" in repeat_command(on)
    assert "averaging (on, off)" in differences([on, off])
    assert "averaged" in (tmp_path / "on" / "README.md").read_text()
