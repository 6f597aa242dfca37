"""RMSNorm in fewer passes against the models' own, and where it is taken."""

from functools import partial

import pytest
import torch
from tiny import make_model
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from aletheia.execution.cpu.norms import _FastRMSNorm, fast_norms


def norm(dtype=torch.float32, size=96):
    module = LlamaRMSNorm(size, 1e-5)
    module.weight.data.normal_()
    return module.to(dtype).requires_grad_(False)


def formula(module, x):
    return module.weight.double() * x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()


def with_gradient(module, x, grad):
    y = module(x)
    return y, *torch.autograd.grad(y, x, grad)


def errors(results, exact):
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(results, exact, strict=True)]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_it_equals_the_models(dtype, bound):
    module = norm(dtype)
    x = (torch.randn(3, 96, 5) * torch.arange(1, 6)).transpose(1, 2).to(dtype).requires_grad_()  # rows of other sizes
    grad = torch.randn(x.shape).to(dtype)
    before = x.detach().clone()
    exact = with_gradient(partial(formula, module), x.detach().double().requires_grad_(), grad.double())
    plain = with_gradient(module, x, grad)
    with fast_norms(module) as covered:
        ours = with_gradient(module, x, grad)
    assert covered == 1
    assert torch.equal(x, before)
    assert max(errors(ours, exact)) < bound
    assert 0 < max(errors(ours, exact)) < 1.5 * max(errors(plain, exact))


@pytest.mark.parametrize(
    ("family", "dtype", "expected"),
    [
        ("llama", torch.bfloat16, 5),
        ("qwen3", torch.bfloat16, 9),  # queries and keys, too
        ("gemma2", torch.float32, 0),  # 1 + w
        ("olmo2", torch.float32, 9),
        ("olmo2", torch.bfloat16, 0),  # rounded after w
        ("gpt2", torch.float32, 0),
    ],
)
def test_it_covers_what_returns_the_same(family, dtype, expected):
    model = make_model(family, 2).to(dtype).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.normal_()
    state = torch.get_rng_state()
    with fast_norms(model) as covered:
        assert covered == expected
    assert torch.equal(torch.get_rng_state(), state)


def test_elsewhere_norms_keep_their_way(monkeypatch):
    def none_expected(*_):
        raise AssertionError("the fast norm was taken")

    trainable = norm().requires_grad_(True)
    with fast_norms(trainable) as covered:
        assert covered == 0
    module, x = norm(), torch.randn(2, 96)
    plain = module(x)
    with fast_norms(module):
        monkeypatch.setattr(_FastRMSNorm, "apply", none_expected)
        with pytest.raises(AssertionError, match="was taken"):
            module(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(module(x), plain)
        module(x.bfloat16())
        module.weight.requires_grad_(True)
        module(x).sum().backward()
    assert module.weight.grad is not None
    assert "forward" not in vars(module)
