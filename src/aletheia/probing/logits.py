"""Logits only where there is a label: the LM head sees only the labelled positions.

Shapes: B rows, T tokens, D model width, N labelled positions of the batch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from aletheia.anatomy.access import base_of
from aletheia.anatomy.layerwise import Call
from aletheia.data.batches import LABELLED, labelled_tokens, on_host
from aletheia.data.examples import NO_LOSS
from aletheia.errors import TrainingError


@contextmanager
def labelled_logits(model: nn.Module) -> Iterator[None]:
    """Make ``model(..., labels=...)`` compute logits at labelled positions only; the loss stays the same.

    The hidden states [B, T, D] before the head are gathered into one row [1, N + 1, D], and the labels with them. The
    model's own head, soft-capping, scaling and loss do the rest. The last position is a copy without a label, because
    causal losses shift labels by one. ``logits`` of the output are [1, N + 1, V]. Calls without labels do not change. A
    batch may hold the number of its labelled tokens as ``labelled_tokens``.

    Raises:
        TrainingError: the model has no head module, or calls it with another number of dimensions than 3.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise TrainingError(f"{type(model).__name__} has no output embedding; expected a causal language model")
    pending: list[torch.Tensor] = []

    def gather(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not pending:
            return None
        if args[0].dim() != 3:
            raise TrainingError(
                f"{type(model).__name__} calls its head with a {args[0].dim()}-d tensor; expected [B, T, D]"
            )
        return (_gathered(args[0], pending.pop()), *args[1:])

    with _labels_moved(model, pending, lambda kwargs, keep_N: True):
        handle = head.register_forward_pre_hook(gather)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def labelled_states(model: nn.Module) -> Iterator[None]:
    """Return hidden states of labelled positions only from ``model(..., fused_lm_head=True, labels=...)``.

    TRL's SFTTrainer calls the model so. Off the GPU its head scores every position, and masks those without a label
    afterwards. Here it gets one row [1, N + 1, D] and its labels; its sums over positions stay the same. Other calls do
    not change.
    """
    pending: list[torch.Tensor] = []

    def applies(kwargs: dict[str, Any], keep_N: torch.Tensor) -> bool:
        has_labels = len(keep_N) > 1
        return bool(kwargs.get("fused_lm_head")) and kwargs.get("shift_labels") is None and has_labels

    def gather(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if pending:
            output.last_hidden_state = _gathered(output.last_hidden_state, pending.pop())
        return output

    with _labels_moved(model, pending, applies):
        handle = base_of(model).base_model.register_forward_hook(gather)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def _labels_moved(
    model: nn.Module, pending: list[torch.Tensor], applies: Callable[[dict[str, Any], torch.Tensor], bool]
) -> Iterator[None]:
    """Move the labels of calls for which ``applies`` is true; put the positions to gather [N + 1] into ``pending``."""

    def move(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        pending.clear()
        count = kwargs.pop(LABELLED, None)
        if kwargs.get("labels") is None:
            return args, kwargs
        keep_N, moved_BN = _labelled(kwargs["labels"], count)
        if not applies(kwargs, keep_N):
            return args, kwargs
        pending.append(keep_N)
        return args, kwargs | {"labels": moved_BN}

    handle = model.register_forward_pre_hook(move, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _gathered(hidden_BTD: torch.Tensor, keep_N: torch.Tensor) -> torch.Tensor:
    """The hidden states [B, T, D] at the flat positions ``keep_N``, as one row [1, N + 1, D]."""
    return hidden_BTD.flatten(0, 1).index_select(0, keep_N.to(hidden_BTD.device))[None]


def _labelled(labels_BT: torch.Tensor, count: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat positions that predict a label, the last one twice [N + 1], and their labels, shifted back [1, N + 1].

    With ``count``, their number, or labels that can be read on the host, the call does not wait for the device.
    """
    labels_on_host_BT = on_host(labels_BT)
    if count is None and labels_on_host_BT is not labels_BT:
        count = int(labelled_tokens(labels_on_host_BT).numpy())
    targets_BT = nn.functional.pad(labels_BT[:, 1:], (0, 1), value=NO_LOSS)
    is_labelled = targets_BT.reshape(-1) != NO_LOSS
    found_N1 = is_labelled.nonzero() if count is None else torch.nonzero_static(is_labelled, size=count)
    keep_N = found_N1.squeeze(1)
    last = keep_N[-1:] if len(keep_N) else keep_N.new_zeros(1)
    moved = nn.functional.pad(targets_BT.reshape(-1)[keep_N], (1, 0), value=NO_LOSS)
    return torch.cat([keep_N, last]), moved[None]
