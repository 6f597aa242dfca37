"""The calibration measures every part, leaves the model alone, and predicts what steps then take."""

import itertools

import pytest
import torch
from tiny import make_model

import aletheia
from aletheia.anatomy.fingerprint import identify
from aletheia.anatomy.read import read_anatomy
from aletheia.planning.cost import layer_costs, measured_costs
from aletheia.training import calibrate as calibrate_module
from aletheia.training.calibrate import _average_batch, _parts, _Step


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "bloom", "qwen3_moe"])
def test_every_part_is_measured_and_the_model_is_left_as_it_was(family, examples, monkeypatch):
    seconds = itertools.cycle((12.0, 2.5, 4.0, 3.5, 5.0, 0.8))  # every kind of step runs; its time is not the machine's
    monkeypatch.setattr(calibrate_module, "_timed", lambda job: (job(), next(seconds))[1])
    model = make_model(family).train()
    before = identify(model)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    timings = aletheia.calibrate(model, examples, batch_size=4)
    assert model.training
    assert identify(model) == before
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(timings.layers) == 4
    assert all(layer.forward > 0 for layer in timings.layers)
    assert timings.head > 0
    assert timings.baseline > sum(layer.forward for layer in timings.layers)
    assert timings.batch_size == 4
    assert torch.equal(torch.get_rng_state(), state)


def test_where_rows_are_packed_packed_steps_are_timed(examples, monkeypatch):
    """The prefix is computed on padded rows there, too, and its seconds are those of as many tokens as a step has."""
    monkeypatch.setattr(calibrate_module, "packing_pays", lambda model: True)
    ran, prefixes = [], []
    monkeypatch.setattr(calibrate_module, "_timed", lambda job: (ran.append(1), job(), 1.0)[2])
    parts, own = {}, calibrate_module._parts
    monkeypatch.setattr(
        calibrate_module, "_parts", lambda *given: parts.update(batch=given[2], stretched=given[4]) or own(*given)
    )
    prefix = calibrate_module.prefix_output
    monkeypatch.setattr(
        calibrate_module, "prefix_output", lambda *given: (prefixes.append(given[2]), prefix(*given))[1]
    )
    timings = aletheia.calibrate(make_model("llama"), examples, batch_size=4)
    packed = parts["batch"]
    lengths = packed["cu_seq_lens_q"].diff()
    assert len(lengths) == 4
    assert packed["input_ids"].shape == (1, lengths.sum())
    assert parts["stretched"] == pytest.approx(float(4 * lengths.max() / lengths.sum()))
    assert {"cu_seq_lens_q" in batch for batch in prefixes} == {True, False}
    assert len(ran) == 6 * calibrate_module.ROUNDS
    assert timings.tokens == pytest.approx(examples.tokens / len(examples) * 4, rel=0.1)


def test_seconds_are_shared_out_so_that_steps_come_back():
    """Steps that take what the cost model says, in a model with layers of two shapes, give the parts back."""
    model = make_model("llama", layers=6)
    for layer in model.model.layers[4:]:
        layer.mlp = torch.nn.Sequential(torch.nn.Linear(32, 400), torch.nn.Linear(400, 32))
    anatomy = read_anatomy(model)
    batch = {"input_ids": torch.ones(2, 10), "labels": torch.ones(2, 10, dtype=torch.int64)}
    operations = layer_costs(anatomy, {module.name: 16 for module in anatomy.modules}, 16, 10, 0.9)
    features = [sum(module.lora_parameters(1) for module in anatomy.in_layer(layer)) for layer in range(6)]
    steps = [_Step([5]), _Step(range(3, 6)), _Step([3]), _Step(range(3, 6), 64), _Step(range(3, 6), way="prefix")]
    for step in steps:
        k = min(step.layers)
        seconds = 2e-9 * sum(operations.forward[:k])
        if step.way == "fast":
            seconds = 0.5 + 2e-9 * sum(operations.forward[k:]) + 3e-9 * sum(operations.backward[k:])
            seconds += sum((1e-6 + 1e-7 * step.rank) * features[layer] for layer in step.layers)
        step.seconds.append(seconds)
    layers, head = _parts(anatomy, steps, batch, tokens=40)  # twice the tokens that were timed
    assert head == pytest.approx(2 * 0.5, rel=1e-5)
    for layer, found in enumerate(layers):
        assert found.forward == pytest.approx(4e-9 * operations.forward[layer], rel=1e-5)
        assert found.backward == pytest.approx(6e-9 * operations.backward[layer], rel=1e-4)
        assert found.adapter_fixed == pytest.approx(2e-6 * features[layer], rel=1e-4)
        assert found.adapter_per_parameter == pytest.approx(2e-7, rel=1e-4)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_smallest_models_are_calibrated_too(layers, examples):
    model = make_model("llama", layers)
    timings = aletheia.calibrate(model, examples, batch_size=4)
    assert len(timings.layers) == layers
    anatomy = read_anatomy(model)
    costs = measured_costs(anatomy, {module.name: 16 for module in anatomy.modules}, 16, timings)
    assert costs.cached_step(range(layers)) > 0  # which part of it is whose cannot be told where there is one layer


def test_batches_are_of_average_size(examples):
    lengths = [len(example) for example in examples.examples]
    mean = {}
    for order in ("grouped", "random"):
        rows, mean[order] = _average_batch(examples, 4, 0, order)
        assert len(rows) == 4
        assert 4 * max(lengths[row] for row in rows) == pytest.approx(mean[order], rel=0.25)
    assert mean["random"] > 1.02 * mean["grouped"]
    rows, mean["packed"] = _average_batch(examples, 4, 0, "balanced", packed=True)
    assert sum(lengths[row] for row in rows) == pytest.approx(mean["packed"], rel=0.05)
