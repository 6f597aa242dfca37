"""Logits only where a label is: the LM head sees the labelled positions and nothing else.

Shapes: B rows, T tokens, D model width, N labelled positions of the batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from aletheia.data.examples import NO_LOSS
from aletheia.errors import TrainingError


@contextmanager
def labelled_logits(model: nn.Module) -> Iterator[None]:
    """Make ``model(..., labels=...)`` compute logits at labelled positions only; the loss stays the same.

    The hidden states [B, T, D] before the head are gathered into one row [1, N + 1, D], and the labels move with
    them, so the model's own head, soft-capping, scaling and loss do the rest. The last position is a copy without a
    label, because causal losses shift labels by one. ``logits`` of the output are [1, N + 1, V]. Calls without labels
    are left alone.

    Raises:
        TrainingError: the model has no head module, or calls it with another shape.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise TrainingError(f"{type(model).__name__} has no output embedding; expected a causal language model")
    pending: list[torch.Tensor] = []

    def move_labels(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        pending.clear()
        labels_BT = kwargs.get("labels")
        if labels_BT is None:
            return args, kwargs
        targets_BT = nn.functional.pad(labels_BT[:, 1:], (0, 1), value=NO_LOSS)
        keep_N = (targets_BT.reshape(-1) != NO_LOSS).nonzero().squeeze(1)
        last = keep_N[-1:] if len(keep_N) else keep_N.new_zeros(1)
        pending.append(torch.cat([keep_N, last]))
        moved = nn.functional.pad(targets_BT.reshape(-1)[keep_N], (1, 0), value=NO_LOSS)
        return args, kwargs | {"labels": moved[None]}

    def gather(module: nn.Module, args: tuple) -> tuple | None:
        if not pending:
            return None
        hidden_BTD = args[0]
        if hidden_BTD.dim() != 3:
            raise TrainingError(f"{type(model).__name__} calls its head with {hidden_BTD.dim()} dimensions; expected 3")
        keep = pending.pop()
        return (hidden_BTD.flatten(0, 1).index_select(0, keep.to(hidden_BTD.device))[None], *args[1:])

    handles = [
        model.register_forward_pre_hook(move_labels, with_kwargs=True),
        head.register_forward_pre_hook(gather),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
