"""Attention by products against torch's, and where it is taken."""

import pytest
import torch
from tiny import make_model
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from aletheia.tuning import attention as module
from aletheia.tuning.attention import LONGEST, attention, lean_attention
from aletheia.tuning.recompute import recomputation


def drawn(samples=3, heads=6, key_heads=2, queries=11, keys=11, size=8, value_size=8, dtype=torch.float32):
    shapes = (heads, queries, size), (key_heads, keys, size), (key_heads, keys, value_size)
    return [torch.randn(samples, *shape, dtype=dtype, requires_grad=True) for shape in shapes]


def with_gradients(output, inputs):
    return output, *torch.autograd.grad(output, inputs, torch.cos(torch.arange(output.numel())).view_as(output))


def by_torch(inputs, seen, scale):
    query, key, value = inputs
    group = query.shape[1] // key.shape[1]
    repeated = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
    return with_gradients(scaled_dot_product_attention(query, *repeated, attn_mask=seen[:, None], scale=scale), inputs)


def by_products(inputs, seen, scale):
    bias = torch.zeros(seen.shape, dtype=inputs[0].dtype).masked_fill(~seen, torch.finfo(inputs[0].dtype).min)
    return with_gradients(attention(*inputs, bias, scale), inputs)


def padded(samples, queries, keys):
    """Each sample one token shorter than the one before."""
    seen = torch.ones(samples, queries, keys, dtype=torch.bool).tril(keys - queries)
    for sample in range(samples):
        seen[sample, :, keys - sample :] = False
    return seen


@pytest.mark.parametrize("at_once", [1, 700, 2**20])  # one head, the heads of one sample, everything
@pytest.mark.parametrize(
    ("shape", "samples_of_mask"),
    [({}, 3), ({}, 1), ({"heads": 2}, 3), ({"keys": 13}, 3), ({"value_size": 5}, 1), ({"key_heads": 3}, 3)],
)
def test_it_equals_torchs(shape, samples_of_mask, at_once, monkeypatch):
    monkeypatch.setattr(module, "SCORES_AT_ONCE", at_once)
    inputs = drawn(**shape)
    seen = padded(samples_of_mask, inputs[0].shape[2], inputs[1].shape[2])
    for found, expected in zip(by_products(inputs, seen, 0.3), by_torch(inputs, seen, 0.3), strict=True):
        assert ((found - expected).norm() / expected.norm()).item() < 1e-6


def test_in_bfloat16_it_is_as_exact_as_torchs():
    inputs = drawn(samples=2, queries=96, keys=96, size=64, value_size=64, dtype=torch.bfloat16)
    seen = padded(2, 96, 96)
    exact = by_torch([tensor.detach().double().requires_grad_() for tensor in inputs], seen, 0.125)

    def errors(results):
        return [
            ((found.double() - expected).norm() / expected.norm()).item()
            for found, expected in zip(results, exact, strict=True)
        ]

    ours, theirs = errors(by_products(inputs, seen, 0.125)), errors(by_torch(inputs, seen, 0.125))
    assert all(0 < own < 2 * other for own, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("family", "taken"),
    [("llama", 2), ("mistral", 2), ("qwen2", 2), ("gpt2", 2), ("gpt_neox", 2), ("olmo2", 2)],
)
def test_it_is_taken_for_padded_and_whole_batches(family, taken, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "attention", lambda *given: calls.append(given) or attention(*given))
    model = make_model(family, 2).bfloat16().eval()
    tokens = torch.randint(3, 200, (3, 9))
    mask = torch.ones_like(tokens)
    for padding in (0, 4):
        mask[1, 9 - padding :] = 0
        calls.clear()
        plain = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        with lean_attention(model):
            ours = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        assert len(calls) == taken
        assert ((ours - plain)[mask.bool()].norm() / plain[mask.bool()].norm()).item() < 0.02


def test_elsewhere_attention_keeps_its_way(monkeypatch):
    def none_expected(*_):
        raise AssertionError("attention by products was taken")

    monkeypatch.setattr(module, "attention", none_expected)
    plain, tokens = ALL_ATTENTION_FUNCTIONS["sdpa"], torch.randint(3, 200, (2, 9))
    model, other, eager = (make_model("llama", 2).bfloat16() for _ in range(3))
    eager.set_attn_implementation("eager")
    with lean_attention(model):
        other(tokens)
        with lean_attention(eager):
            eager(tokens)
        model.float()(tokens)
        monkeypatch.setattr(module, "LONGEST", 8)
        model.bfloat16()(tokens)
        monkeypatch.setattr(module, "LONGEST", LONGEST)
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        model.train()(tokens)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is plain


@pytest.mark.parametrize(("kind", "expected"), [("off", 4), ("selective", 4), ("full", 6)])
def test_selective_recomputation_does_not_repeat_it(kind, expected, monkeypatch):
    calls = []
    weights = module._weights
    monkeypatch.setattr(module, "_weights", lambda *given: calls.append(given) or weights(*given))
    model, tokens = make_model("llama", 2).bfloat16().train(), torch.randint(3, 200, (2, 9))
    with lean_attention(model), recomputation(model, kind):
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    assert len(calls) == expected  # forward and backward of two layers
