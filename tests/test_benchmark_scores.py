"""The mathematics of the benchmark of scores, on gradients that are known."""

import importlib.util
from pathlib import Path

import pytest
import torch
from tiny import make_model

FILE = Path(__file__).parents[1] / "benchmarks" / "layer_scores.py"
spec = importlib.util.spec_from_file_location("layer_scores", FILE)
layer_scores = importlib.util.module_from_spec(spec)
spec.loader.exec_module(layer_scores)


def unbiased(grads):
    squares = sum(grad.norm().item() ** 2 for grad in grads)
    return layer_scores.unbiased_norm(sum(grads).norm().item(), squares, len(grads))


def test_equal_gradients_have_their_own_norm():
    assert unbiased([torch.tensor([3.0, 4.0])] * 5) == pytest.approx(5.0)


def test_gradients_that_share_nothing_have_none():
    assert unbiased([torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])]) == 0.0
    assert unbiased([torch.tensor([1.0]), torch.tensor([-1.0])]) == 0.0  # negative before it is clipped


def test_noise_of_rows_does_not_raise_the_norm():
    torch.manual_seed(0)
    signal = torch.ones(400) / 20  # norm 1
    grads = [signal + torch.randn(400) for _ in range(400)]  # each of norm 20
    assert unbiased(grads) == pytest.approx(1.0, abs=0.15)
    assert (sum(grads) / 400).norm() > 1.3


def test_whitened_inputs_have_the_identity_for_covariance():
    torch.manual_seed(0)
    x_NI = torch.randn(500, 6) @ torch.randn(6, 6)
    white_NI = x_NI @ layer_scores.inverse_root(x_NI.T @ x_NI / 500, ridge=0.0)
    assert torch.allclose(white_NI.T @ white_NI / 500, torch.eye(6), atol=1e-3)


def test_a_direction_without_inputs_stays_finite():
    assert torch.allclose(
        layer_scores.inverse_root(torch.diag(torch.tensor([2.0, 0.0])), ridge=1.0).diag(), torch.tensor([3**-0.5, 1.0])
    )


def test_adam_gains_as_much_from_each_entry_as_its_gradient_is_large():
    grad_OI = torch.randn(8, 64)
    gain = layer_scores.adam_gain(grad_OI, rank=4, scale=2.0, rate=0.1)
    assert layer_scores.adam_gain(3 * grad_OI, rank=4, scale=2.0, rate=0.1) == pytest.approx(3 * gain)
    # |G At| of an entry is about normal, of variance |G row|^2 / 3 I
    expected = 0.1 * 2.0 * 4 * (grad_OI.norm(dim=1) / (3 * 64) ** 0.5).sum().item() * (2 / torch.pi) ** 0.5
    assert gain == pytest.approx(expected, rel=0.25)


def test_scores_of_a_matrix_are_those_of_its_weight_gradients():
    torch.manual_seed(0)
    model = make_model().float().eval().requires_grad_(False)
    name, module = next((n, m) for n, m in model.named_modules() if n.endswith("q_proj"))
    batches = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 50, (3, 1, 9))]
    found = layer_scores.module_scores(model, {name: module}, batches, rank=4, scale=2.0, rate=0.1)[name]
    module.weight.requires_grad_(True)
    grads = [torch.autograd.grad(model(**batch).loss, module.weight)[0] for batch in batches]
    assert found["unbiased"] == pytest.approx(unbiased(grads), rel=1e-3)
    assert found["adam_gain"] == pytest.approx(layer_scores.adam_gain(sum(grads) / 3, 4, 2.0, 0.1), rel=1e-3)
