"""A trial of whether stored hidden states give the same results as the layers themselves."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from aletheia.anatomy.access import base_of, computed_in, input_weight, text_config
from aletheia.anatomy.modes import in_mode
from aletheia.anatomy.read import adds_router_loss
from aletheia.data.batches import collate, on_device_of
from aletheia.data.examples import TRIED_TOKENS, Example
from aletheia.prefix.spans import Span
from aletheia.prefix.stored import Shortcut, prefix_output

SAME = 1e-3  # relative tolerance; two runs on one shape agree to the last digits
PACKED = 0.1  # relative tolerance in half precision: other kernels and shapes round otherwise, and layers amplify it
ALIKE = 0.03  # relative tolerance where other tokens share the experts of a token, which changes the rounding


@torch.no_grad()
def why_not_exact(
    model: nn.Module, boundary: int, rows: Sequence[Example], pad_token_id: int
) -> tuple[str | None, torch.dtype]:
    """Why a cache would not be exact, or None if it would be, and the dtype of its states. Tries the two shortest rows,
    or their first tokens.

    - In training mode, the prefix must give the same output twice: no dropout, no noise.
    - In eval mode it must give that output again, since evaluation reads what training stored. 8-bit layers differ.
    - Other tokens at the end must not change the states at the start, since padding is such tokens.
    - Started from the stored output, with an embedding of NaN, the model must give its usual logits: nothing above the
      boundary reads anything else.

    The model's own hooks are not called, so a hook may call this function.
    """
    embedding = base_of(model).get_input_embeddings()
    dtype = input_weight(model).dtype
    if boundary == 0:
        return "layer 0 is adapted, so there is no frozen prefix", dtype
    if adds_router_loss(model):
        return "the model adds a router loss, which also depends on the layers below the boundary", dtype
    if positions_vary(model, max(map(len, rows))):
        return "rotary positions depend on the longest row of a batch (long or dynamic RoPE scaling)", dtype
    batch = on_device_of(model, collate([row.cut(TRIED_TOKENS) for row in sorted(rows, key=len)[:2]], pad_token_id))
    del batch["labels"]
    try:
        with in_mode(model, training=True), torch.random.fork_rng():
            first_BTD, second_BTD = (prefix_output(model, boundary, batch) for _ in range(2))
        if _differ(first_BTD, second_BTD):
            return "the layers below the boundary are random (dropout), so every epoch differs", dtype
        with in_mode(model, training=False), ExitStack() as stack:
            hidden_BTD = prefix_output(model, boundary, batch)
            if _differ(first_BTD, hidden_BTD, SAME / 10):
                return "the layers below the boundary give other results in training than in evaluation", dtype
            if _sees_later_tokens(model, boundary, batch, hidden_BTD):
                return (
                    "the layers below the boundary attend to later tokens, so the states of a row depend on padding",
                    dtype,
                )
            plain = model.forward(**batch, use_cache=False).logits
            blank = embedding.register_forward_hook(lambda *called: torch.full_like(called[2], math.nan))
            stack.callback(blank.remove)
            shortcut = Shortcut(model, boundary)
            stack.callback(shortcut.close)
            shortcut.begin(hidden_BTD)
            stored = model.forward(**batch, use_cache=False).logits
    except Exception as error:  # model families may fail in any way
        message = str(error).splitlines()[0] if str(error) else ""
        reason = f"{type(model).__name__} cannot start at layer {boundary} ({type(error).__name__}: {message})"
        return reason, dtype
    reads_more = bool(torch.isfinite(plain).all()) and not torch.isfinite(stored).all()
    if hidden_BTD.dim() != 3 or reads_more or _differ(plain, stored):
        return "the layers from the boundary up read more than the hidden states", dtype
    return None, hidden_BTD.dtype


def _sees_later_tokens(model: nn.Module, boundary: int, batch: Mapping[str, Any], hidden_BTD: torch.Tensor) -> bool:
    """Whether the states of the first half of the positions change when the first token fills the second half."""
    ids_BT = batch["input_ids"]
    half = ids_BT.shape[1] // 2
    other_BT = torch.cat([ids_BT[:, :half], ids_BT[:, :1].expand(-1, ids_BT.shape[1] - half)], dim=1)
    other_BTD = prefix_output(model, boundary, {**batch, "input_ids": other_BT})
    return half > 0 and _differ(hidden_BTD[:, :half], other_BTD[:, :half], ALIKE)


@torch.no_grad()
def packs_differ(model: nn.Module, boundary: int, batch: Mapping[str, Any], spans: Sequence[Span]) -> bool:
    """Whether rows packed into one sequence get other states than alone: not every attention separates them.

    Differences are relative to each position's own state, because that of a first position may outweigh all others. A
    row's first position differs most if it attends to the row before.
    """
    samples = [span.sample for span in spans]
    inner = next((span for at, span in enumerate(spans) if at and samples[at - 1] == span.sample), spans[-1])
    packed_BTD = prefix_output(model, boundary, batch)
    alone_TD = prefix_output(model, boundary, on_device_of(model, collate([inner.row], 0)))[0].float()
    packed_TD = packed_BTD[inner.sample, inner.start : inner.start + len(inner.row)].float()
    differences_T = (alone_TD - packed_TD).norm(dim=-1) / alone_TD.norm(dim=-1)
    most = torch.maximum(differences_T[0], differences_T.mean())
    is_half = computed_in(packed_BTD) in (torch.bfloat16, torch.float16)
    return not bool(most <= (PACKED if is_half else SAME))


def positions_vary(model: nn.Module, longest: int) -> bool:
    """Whether a row's rotary frequencies depend on the other rows of its batch."""
    config = text_config(model)
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    original = scaling.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", 0)
    varies = scaling.get("rope_type", scaling.get("type")) in ("dynamic", "longrope")
    return varies and longest > (original or config.max_position_embeddings)


def _differ(one: torch.Tensor, other: torch.Tensor, tolerance: float = SAME) -> bool:
    return bool((one.float() - other.float()).norm() > tolerance * one.float().norm())
