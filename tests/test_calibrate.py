"""The calibration measures every part, leaves the model alone, and predicts what steps then take."""

import pytest
import torch
from tiny import make_model

import aletheia
from aletheia.anatomy.fingerprint import identify
from aletheia.tuning.calibrate import _kinds, _typical_batch


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "bloom", "qwen3_moe"])
def test_every_part_is_measured_and_the_model_is_left_as_it_was(family, examples):
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


def test_layers_of_other_shapes_are_measured_for_themselves():
    model = make_model("qwen3_moe")
    assert _kinds(model) == [[0, 1, 2, 3]]
    model.model.layers[0].mlp = torch.nn.Sequential(torch.nn.Linear(32, 40), torch.nn.Linear(40, 32))
    assert _kinds(model) == [[0], [1, 2, 3]]


def test_padding_is_that_of_the_batches(examples):
    rows, tokens, padding = _typical_batch(examples, 4, seed=0)
    assert len(rows) == 4
    lengths = [len(example) for example in examples.examples]
    assert 4 * min(lengths) < tokens < 4 * max(lengths)
    assert padding > 1.02
