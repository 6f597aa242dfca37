"""Attention by products against torch's, and where it is taken."""

import pytest
import torch
from tiny import make_model
from torch import library
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from aletheia.execution.cpu import attention as module
from aletheia.execution.cpu.attention import attention, fast_attention
from aletheia.execution.recompute import recomputation


def drawn(samples=3, heads=6, key_heads=2, queries=11, keys=11, size=8, value_size=8, dtype=torch.float32):
    """As models hand them over: heads and tokens transposed."""
    shapes = (queries, heads, size), (keys, key_heads, size), (keys, key_heads, value_size)
    return [torch.randn(samples, *shape, dtype=dtype).transpose(1, 2).requires_grad_() for shape in shapes]


def with_gradients(output, inputs):
    return output, *torch.autograd.grad(output, inputs, torch.cos(torch.arange(output.numel())).view_as(output))


def by_torch(inputs, seen, scale):
    query, key, value = inputs
    group = query.shape[1] // key.shape[1]
    repeated = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
    return with_gradients(scaled_dot_product_attention(query, *repeated, attn_mask=seen[:, None], scale=scale), inputs)


def by_products(inputs, seen, scale, keep=False):
    return with_gradients(attention(*inputs, seen, scale, keep)[0], inputs)


def padded(samples, queries, keys):
    """Each sample one token shorter than the one before."""
    seen = torch.ones(samples, queries, keys, dtype=torch.bool).tril(keys - queries)
    for sample in range(samples):
        seen[sample, :, keys - sample :] = False
    return seen


def errors(results, exact):
    pairs = zip(results, exact, strict=True)
    return [((found.double() - expected).norm() / expected.norm()).item() for found, expected in pairs]


@pytest.mark.parametrize("at_once", [1, 300, 800, 2**20])  # scores; see below
@pytest.mark.parametrize(
    ("shape", "samples_of_mask"),
    [
        ({}, 3),
        ({}, 1),
        ({"heads": 2}, 3),  # 121 scores a head: two samples together at 800
        ({"key_heads": 6}, 3),  # the same: two heads together at 300, a sample at 800
        ({"keys": 13}, 3),
        ({"samples": 1, "value_size": 5}, 1),
    ],
)
def test_it_equals_torchs(shape, samples_of_mask, at_once, monkeypatch):
    monkeypatch.setattr(module, "SCORES_AT_ONCE", at_once)
    inputs = drawn(**shape)
    seen = padded(samples_of_mask, inputs[0].shape[2], inputs[1].shape[2])
    found = by_products(inputs, seen, 0.3)
    assert max(errors(found, by_torch(inputs, seen, 0.3))) < 1e-6
    for kept, repeated in zip(by_products(inputs, seen, 0.3, keep=True), found, strict=True):
        assert torch.equal(kept, repeated)


@pytest.mark.parametrize("keep", [True, False])
def test_it_is_an_operator_like_others(keep):
    """Its stand-in for shapes alone, its schema and its gradient, as torch checks them."""
    library.opcheck(attention, (*drawn(keys=13), padded(3, 11, 13), 0.3, keep))


def test_in_bfloat16_it_is_off_by_less_than_twice_what_torchs_is():
    inputs = drawn(samples=2, queries=96, keys=96, size=64, value_size=64, dtype=torch.bfloat16)
    seen = padded(2, 96, 96)
    exact = by_torch([tensor.detach().double().requires_grad_() for tensor in inputs], seen, 0.125)
    ours, theirs = errors(by_products(inputs, seen, 0.125), exact), errors(by_torch(inputs, seen, 0.125), exact)
    assert all(0 < own < 2 * other for own, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gpt2", "gpt_neox", "olmo2", "qwen3_moe"])
@pytest.mark.parametrize(("length", "padding"), [(9, 0), (9, 4), (24, 4)])  # 24 is more than mistral's window
def test_it_is_taken_for_padded_and_whole_batches(family, length, padding, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "attention", lambda *given: calls.append(given) or attention(*given))
    model = make_model(family, 2).bfloat16().eval()
    tokens = torch.randint(3, 200, (3, length))
    mask = torch.ones_like(tokens)
    mask[1, length - padding :] = 0
    plain = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[mask.bool()]
    with fast_attention(model):
        ours = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[mask.bool()]
    assert len(calls) == 2
    assert ((ours - plain).norm() / plain.norm()).item() < 0.02


def asked(owner, inputs, mask=None, **more):
    """What transformers' registry returns to a module."""
    return ALL_ATTENTION_FUNCTIONS["sdpa"](owner, *inputs, mask, scaling=0.3, **more)[0]


def test_elsewhere_attention_keeps_its_way(monkeypatch):
    def none_expected(*_):
        raise AssertionError("attention by products was taken")

    monkeypatch.setattr(module, "attention", none_expected)
    owner, stranger = torch.nn.Identity(), torch.nn.Identity()
    usual = drawn(heads=2, dtype=torch.bfloat16)
    seen = padded(3, 11, 11)[:, None]
    with fast_attention(owner):
        for inputs, mask in ((usual, None), (usual, seen), (usual, seen[:1])):
            with pytest.raises(AssertionError, match="by products"):
                asked(owner, inputs, mask)
            asked(stranger, inputs, mask)
        asked(owner, drawn(heads=2))  # float32
        asked(owner, usual, torch.zeros(3, 1, 11, 11, dtype=torch.bfloat16))  # a bias
        asked(owner, usual, seen.expand(3, 2, 11, 11))  # a mask for each head
        asked(owner, usual, dropout=0.1)
        asked(owner, usual, position_bias=torch.zeros(3, 2, 11, 11, dtype=torch.bfloat16))
        asked(owner, drawn(heads=2, keys=13, dtype=torch.bfloat16))  # a causal mask that torch has to align
        query, key, value = usual
        asked(owner, (query[:1], key, value), is_causal=False)  # one query for every sample
        monkeypatch.setattr(module, "MOST_SCORES", 120)
        asked(owner, usual)
        monkeypatch.setattr(module, "MOST_SCORES", 121)
        monkeypatch.setattr(module, "LONGEST", 10)
        asked(owner, usual)


def test_contexts_end_in_any_order_and_leave_nothing_behind():
    first, second = fast_attention(torch.nn.Identity()), fast_attention(torch.nn.Identity())
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward
    second.__exit__(None, None, None)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def test_someone_elses_function_stays(monkeypatch):
    def own(*_, **__):
        return "own", None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", own)
    owner = torch.nn.Identity()
    with fast_attention(owner):
        assert asked(owner, drawn(dtype=torch.bfloat16)) == "own"


# forward, and backward where it does not keep the weights of two layers; MOST_KEPT is that of 9 tokens or one less
@pytest.mark.parametrize(
    ("kind", "most_kept", "expected"),
    [("off", 81, 2), ("off", 80, 4), ("selective", 81, 4), ("full", 81, 4), ("full", 80, 6)],
)
def test_what_backward_repeats(kind, most_kept, expected, monkeypatch):
    calls = []
    weights = module._weights
    monkeypatch.setattr(module, "MOST_KEPT", most_kept)
    monkeypatch.setattr(module, "_weights", lambda *given: calls.append(given) or weights(*given))
    model, tokens = make_model("llama", 2).bfloat16().train(), torch.randint(3, 200, (2, 9))
    with fast_attention(model), recomputation(model, kind):
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    assert len(calls) == expected


def test_nothing_is_kept_where_nothing_learns(monkeypatch):
    kept = []
    monkeypatch.setattr(module, "attention", lambda *given: kept.append(given[-1]) or attention(*given))
    model, tokens = make_model("llama", 2).bfloat16(), torch.randint(3, 200, (2, 9))
    with fast_attention(model):
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
        model.requires_grad_(False)(input_ids=tokens, use_cache=False)
        assert kept == [False] * 4
        model.model.layers[1].requires_grad_(True)
        model(input_ids=tokens, use_cache=False)
    assert kept[4:] == [False, True]
