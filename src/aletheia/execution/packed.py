"""Batches without padding: rows one after another in one sequence, where each row attends only to itself.

Shapes: N tokens of all rows, T of one row, H query heads, K key heads, D size of a head, S rows, V vocabulary.
"""

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from aletheia.anatomy.access import input_weight, text_config
from aletheia.anatomy.modes import in_mode
from aletheia.anatomy.read import adds_router_loss
from aletheia.data.batches import collate, collate_packed, on_device_of
from aletheia.data.examples import TRIED_TOKENS, Example
from aletheia.execution.attention import OTHER_WAYS, Attention, attention_by, sees_backward_only

varlen: Any
try:
    from torch.nn.attention import varlen
except ImportError:  # torch below 2.10
    varlen = None

_TAKEN = set(inspect.signature(varlen.varlen_attn).parameters) if varlen is not None else set()
SAME = {torch.float32: 1e-4, torch.float64: 1e-8, torch.float16: 0.02, torch.bfloat16: 0.1}  # tolerance, relative
KINDS = {"full_attention", "sliding_attention"}  # layer types whose mask depends only on positions and a window


def has_kernel(model: nn.Module) -> bool:
    """Whether attention by rows is one kernel for ``model``: in half precision on a CUDA device."""
    return _in_kernel(input_weight(model))


def _in_kernel(tensor: torch.Tensor) -> bool:
    """Whether torch has a ``varlen_attn`` that supports scale and window, and supports this tensor."""
    is_half = tensor.dtype in (torch.bfloat16, torch.float16)
    return tensor.is_cuda and is_half and {"scale", "window_size"} <= _TAKEN


@contextmanager
def attention_by_row(model: nn.Module) -> Iterator[None]:
    """Let each row of a packed batch (:func:`aletheia.data.batches.collate_packed`) attend only to itself.

    Padded batches are computed as before. In half precision on a CUDA device, all rows go through one kernel, torch's
    ``varlen_attn``. Elsewhere they go one after another through the enclosing way of attention.
    """
    with attention_by(model, _by_row):
        yield


def _by_row(
    plain: Attention,
    module: nn.Module,
    query_1HND: torch.Tensor,
    key_1KND: torch.Tensor,
    value_1KND: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    bounds_S1 = kwargs.get("cu_seq_lens_q")
    if bounds_S1 is None:
        return plain(module, query_1HND, key_1KND, value_1KND, attention_mask, **kwargs)
    if any(kwargs.get(name) is not None for name in OTHER_WAYS) or not sees_backward_only(
        module, kwargs.get("is_causal")
    ):
        raise NotImplementedError("its attention needs more than a window and a scale")
    if _in_kernel(query_1HND) and not kwargs.get("dropout"):
        return _in_one_kernel(query_1HND, key_1KND, value_1KND, bounds_S1, **kwargs), None
    return _one_by_one(plain, module, query_1HND, key_1KND, value_1KND, bounds_S1, **kwargs), None


def _in_one_kernel(
    query_1HND: torch.Tensor,
    key_1KND: torch.Tensor,
    value_1KND: torch.Tensor,
    bounds_S1: torch.Tensor,
    *,
    max_length_q: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> torch.Tensor:
    """The output [1, N, H, D]."""
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query_1HND, key_1KND, value_1KND))
    given: dict[str, Any] = {"scale": scaling, "window_size": ((sliding_window or 0) - 1, 0)}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in _TAKEN:
            given["enable_gqa"] = True
        else:
            shared = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    output_NHD: torch.Tensor = varlen.varlen_attn(
        query, key, value, bounds_S1, bounds_S1, max_length_q, max_length_q, **given
    )
    return output_NHD[None]


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a graph cannot depend on the lengths of rows
def _one_by_one(
    plain: Attention,
    module: nn.Module,
    query_1HND: torch.Tensor,
    key_1KND: torch.Tensor,
    value_1KND: torch.Tensor,
    bounds_S1: torch.Tensor,
    **kwargs: Any,
) -> torch.Tensor:
    """The output [1, N, H, D]."""
    window = kwargs.get("sliding_window")
    lengths = bounds_S1.diff().tolist()
    rows = zip(*(torch.split(tensor, lengths, 2) for tensor in (query_1HND, key_1KND, value_1KND)), strict=True)
    outputs = []
    for query, key, value in rows:
        if not (length := query.shape[2]):  # a row that is missing in a batch of fixed size
            continue
        seen_11TT = _window(length, window, query.device) if window is not None and length > window else None
        outputs.append(plain(module, query, key, value, seen_11TT, **kwargs)[0])
    return torch.cat(outputs, 1)


def _window(length: int, window: int, device: torch.device) -> torch.Tensor:
    """The keys that each query sees, the last ``window`` up to its own, as booleans [1, 1, T, T]."""
    seen_TT = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return seen_TT.triu(1 - window)[None, None]


def why_not_packed(model: nn.Module, rows: Sequence[Example], pad_token_id: int) -> str | None:
    """Why packed rows would get other logits than single rows; None if they get the same. Tries the two shortest rows,
    or their first tokens.

    The model runs on both forms of the batch in its present state, with fast steps or without. The packed one also runs
    backward through the activations, because not every kernel that computes a batch has a gradient.
    """
    config = text_config(model)
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return "its attention is not `sdpa`"
    if others := sorted(set(getattr(config, "layer_types", None) or ()) - KINDS):
        return f"it has layers of the kind {others[0]}"
    if adds_router_loss(model):
        return "it adds a router loss, which is a mean over the positions of a batch"
    two = [row.cut(TRIED_TOKENS) for row in sorted(rows, key=len)[:2]]
    two = two if len(two) == 2 else two * 2
    try:
        with in_mode(model, training=False), attention_by_row(model):
            with _gradients_of_activations(model):
                packed_NV = _logits(model, collate_packed(two))
                torch.autograd.backward(packed_NV.float().mean())
            with torch.no_grad():
                padded_STV = _logits(model, collate(two, pad_token_id))
    except Exception as error:  # model families may fail in any way
        return f"{type(model).__name__} does not support packed rows ({type(error).__name__})"
    packed_NV = packed_NV.detach()
    alone_NV = torch.cat([padded_TV[: len(row)] for padded_TV, row in zip(padded_STV, two, strict=True)])
    differs = (packed_NV[0].float() - alone_NV.float()).norm() / alone_NV.float().norm()
    tolerance = SAME.get(input_weight(model).dtype, SAME[torch.bfloat16])
    return (
        None
        if math.isfinite(differs) and differs <= tolerance
        else "rows that are packed together attend to each other"
    )


def _logits(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    inputs = {name: value for name, value in on_device_of(model, batch).items() if name != "labels"}
    logits: torch.Tensor = model.forward(**inputs, use_cache=False).logits
    return logits


@contextmanager
def _gradients_of_activations(model: nn.Module) -> Iterator[None]:
    """Let backward run through the whole model without leaving a gradient at any parameter."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embedding = cast(Any, model).get_input_embeddings()
    for parameter in learning:
        parameter.requires_grad_(False)
    handle = embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    try:
        with torch.enable_grad():
            yield
    finally:
        handle.remove()
        for parameter in learning:
            parameter.requires_grad_(True)
