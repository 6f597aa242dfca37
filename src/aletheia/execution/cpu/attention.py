"""Attention by plain matrix products, where they are faster than the CPU's fused kernel. Exact up to rounding.

Shapes: B batch, H query heads, K key heads, G = H/K query heads that share a key head, T queries, S keys, D and E sizes
of a head; N = BK key heads of all samples.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import library, nn

from aletheia.execution.attention import OTHER_WAYS, Attention, attention_by, sees_backward_only

SCORES_AT_ONCE = 2**20  # 2 MB of bfloat16, which fit in the processor's cache
# measured on 2 cores with heads of 64 and 128: faster than the fused kernel up to here, slower at 2,048 tokens
LONGEST, MOST_SCORES = 1024, 2**22  # tokens, and scores GTS of a key head
MOST_KEPT = 2**16  # most scores TS of a head to keep for backward; in SmolLM2, a fifth of what a layer keeps anyway


@library.custom_op("aletheia::attention", mutates_args=())
def attention(
    query_BHTD: torch.Tensor,
    key_BKSD: torch.Tensor,
    value_BKSE: torch.Tensor,
    seen_BTS: torch.Tensor,
    scale: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``softmax(scale q kt) v`` [B, H, T, E] over the keys seen; a ``seen`` of batch size 1 holds for all samples.

    It takes a few heads at a time, so that most scores fit in the processor's cache. Keys are not repeated for the
    queries that share them. A query that sees no key gets the mean of the values, as with ``eager`` attention.

    The second result is the softmax [N, GT, S] if ``keep`` is set, else empty. Backward then computes it again, as in
    Dao et al. 2022 [arXiv:2205.14135].
    """
    query, key, value = _by_key_head(query_BHTD, key_BKSD, value_BKSE)
    output = value.new_empty(*query.shape[:2], value.shape[2])
    kept = query.new_empty(*query.shape[:2], key.shape[1] if keep else 0)
    for part, seen in _parts(query, key_BKSD, seen_BTS):
        weights = _weights(query[part], key[part], seen, scale, kept[part] if keep else None)
        torch.bmm(weights, value[part], out=output[part])
    return output.view(*query_BHTD.shape[:3], -1), kept


@attention.register_fake
def _(
    query_BHTD: torch.Tensor,
    key_BKSD: torch.Tensor,
    value_BKSE: torch.Tensor,
    seen_BTS: torch.Tensor,
    scale: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    samples, heads, keys, _ = key_BKSD.shape
    queries = query_BHTD.shape[1] // heads * query_BHTD.shape[2]
    kept = query_BHTD.new_empty(samples * heads, queries, keys if keep else 0)
    return query_BHTD.new_empty(*query_BHTD.shape[:3], value_BKSE.shape[3]), kept


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _attention_backward(ctx: Any, grad_BHTE: torch.Tensor, _: object) -> tuple[torch.Tensor | None, ...]:
    *inputs, seen_BTS, kept = ctx.saved_tensors
    query, key, value = _by_key_head(*inputs)
    grad = grad_BHTE.reshape(*query.shape[:2], -1)
    grad_query, grad_key, grad_value = (torch.empty_like(tensor) for tensor in (query, key, value))
    for part, seen in _parts(query, inputs[1], seen_BTS):
        weights = kept[part] if kept.numel() else _weights(query[part], key[part], seen, ctx.scale)
        torch.bmm(weights.mT, grad[part], out=grad_value[part])
        grad_weights = torch.bmm(grad[part], value[part].mT)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_query[part].baddbmm_(grad_scores, key[part], beta=0, alpha=ctx.scale)
        grad_key[part].baddbmm_(grad_scores.mT, query[part], beta=0, alpha=ctx.scale)
    grads = grad_query, grad_key, grad_value
    return *(found.view(tensor.shape) for found, tensor in zip(grads, inputs, strict=True)), None, None, None


attention.register_autograd(_attention_backward, setup_context=_keep)


def _by_key_head(query_BHTD: torch.Tensor, key_BKSD: torch.Tensor, value_BKSE: torch.Tensor) -> list[torch.Tensor]:
    """Queries, keys and values grouped by key head: [N, GT, D], [N, S, D] and [N, S, E]."""
    number = key_BKSD.shape[0] * key_BKSD.shape[1]
    return [tensor.reshape(number, -1, tensor.shape[-1]) for tensor in (query_BHTD, key_BKSD, value_BKSE)]


def _parts(query: torch.Tensor, key_BKSD: torch.Tensor, seen_BTS: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Slices of key heads to compute together, of several samples or of part of one, and what their samples see."""
    samples, heads, keys, _ = key_BKSD.shape
    at_once = max(1, SCORES_AT_ONCE // (query.shape[1] * keys))
    if at_once >= heads:
        at_once -= at_once % heads
    else:
        at_once = max(number for number in range(1, at_once + 1) if heads % number == 0)
    for start in range(0, samples * heads, at_once):
        stop = min(start + at_once, samples * heads)
        yield slice(start, stop), seen_BTS if len(seen_BTS) == 1 else seen_BTS[start // heads : -(-stop // heads)]


def _weights(
    query: torch.Tensor, key: torch.Tensor, seen: torch.Tensor, scale: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The softmax [n, GT, S] of n key heads."""
    scores = torch.baddbmm(query.new_empty(1, 1, 1), query, key.mT, beta=0, alpha=scale)
    bias = query.new_zeros(seen.shape).masked_fill_(~seen, torch.finfo(query.dtype).min)
    scores.view(len(seen), -1, *seen.shape[1:]).add_(bias[:, None])
    return torch.softmax(scores, -1, out=out)


_repeating: list[None] = []


@contextmanager
def repeated_weights() -> Iterator[None]:
    """Let backward compute all attention weights again, which saves memory and takes time."""
    _repeating.append(None)
    try:
        yield
    finally:
        _repeating.pop()


@contextmanager
def fast_attention(model: nn.Module) -> Iterator[None]:
    """Compute the ``sdpa`` attention of ``model`` by :func:`attention` where that is faster.

    It is faster in bfloat16 on a CPU, up to LONGEST tokens, without dropout or a bias. Results are equal up to
    bfloat16's rounding of the scores, which ``eager`` attention rounds, too.
    """
    with attention_by(model, _forward):
        yield


def _forward(
    plain: Attention,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    causal = sees_backward_only(module, is_causal)
    usual = not dropout and all(kwargs.get(name) is None for name in OTHER_WAYS)
    if not (usual and _is_quicker(query, key, value) and _is_plain(attention_mask, query, key, causal)):
        kwargs |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return plain(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None:
        seen_BTS = attention_mask[:, 0]
    else:
        seen_BTS = torch.ones(1, query.shape[2], key.shape[2], dtype=torch.bool)
        seen_BTS = seen_BTS.tril() if causal else seen_BTS
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    keep = learns and not _repeating and query.shape[2] * key.shape[2] <= MOST_KEPT
    output_BHTE, _ = attention(query, key, value, seen_BTS, scale, keep)
    return output_BHTE.transpose(1, 2).contiguous(), None


def _is_quicker(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    (samples, heads, queries, _), (_, key_heads, keys, _) = query.shape, key.shape
    pairs = len(key) == len(value) == samples and heads % key_heads == 0 and value.shape[1:3] == key.shape[1:3]
    short = max(queries, keys) <= LONGEST and heads // key_heads * queries * keys <= MOST_SCORES
    return pairs and short and all(x.device.type == "cpu" and x.dtype == torch.bfloat16 for x in (query, key, value))


def _is_plain(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, causal: bool) -> bool:
    """Whether all heads share one boolean mask, or there is no mask."""
    square = [query.shape[2], key.shape[2]]
    if mask is None:
        return not causal or square[0] == square[1]
    samples, *rest = mask.shape
    return mask.dtype == torch.bool and rest == [1, *square] and samples in (1, len(query))
