"""The causal loss in the buffer of its logits, exact up to rounding. Shapes: N tokens, V vocabulary."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from aletheia.anatomy.access import base_of
from aletheia.errors import TrainingError

ROWS_ON_CPU = 32  # rows of the softmax: a few megabytes, which fit in the processor's cache
BUFFER_ON_DEVICE = 2**29  # bytes of the softmax in float32


class _FastCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy that overwrites the logits with their gradient, so both share one buffer [N, V]."""

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, target_N: torch.Tensor, ignore_index: int) -> torch.Tensor:
        wants_grad = ctx.needs_input_grad[0]
        in_place = wants_grad and logits_NV.dtype == torch.float32
        summed = torch.zeros((), dtype=torch.float32, device=logits_NV.device)
        at_once = min(rows_at_once(logits_NV.device.type, logits_NV.shape[1]), len(target_N))
        buffer = None if in_place else logits_NV.new_empty(at_once, logits_NV.shape[1], dtype=torch.float32)
        for start in range(0, len(target_N), at_once):
            chunk, target = logits_NV[start : start + at_once], target_N[start : start + at_once]
            counted = (target != ignore_index)[:, None]
            column = torch.where(counted, target[:, None], 0)
            own = chunk.gather(1, column).float()
            largest = chunk.amax(dim=1, keepdim=True).float()
            softmax = (chunk if buffer is None else buffer[: len(chunk)].copy_(chunk)).sub_(largest).exp_()
            total = softmax.sum(dim=1, keepdim=True)
            summed += torch.where(counted, largest + total.log() - own, 0.0).sum()
            if wants_grad:  # an infinite divisor makes zeros of rows that do not count
                softmax.div_(torch.where(counted, total, torch.inf)).scatter_add_(1, column, -counted.float())
                if buffer is not None:
                    chunk.copy_(softmax)
        ctx.kept = logits_NV if wants_grad else None
        return summed

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return only_once(ctx).mul_(grad), None, None


def rows_at_once(device_type: str, vocab_size: int) -> int:
    """Rows of the softmax that are in float32 at a time."""
    return ROWS_ON_CPU if device_type == "cpu" else max(1, BUFFER_ON_DEVICE // (4 * vocab_size))


def only_once(ctx: Any) -> Any:
    """What a loss kept for its backward pass, as ``ctx.kept``.

    Raises:
        TrainingError: a pass has taken it before.
    """
    kept, ctx.kept = ctx.kept, None
    if kept is None:
        raise TrainingError(
            "the loss of fast steps was differentiated twice, but its buffer serves one backward pass; expected "
            "one; for more, use aletheia.frozen_prefix alone"
        )
    return kept


def in_buffer(logits_NV: torch.Tensor, target_N: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """The summed cross-entropy in float32; where logits [N, V] need a gradient, it overwrites them.

    Raises:
        TrainingError: from a second backward pass.
    """
    summed: torch.Tensor = _FastCrossEntropy.apply(logits_NV, target_N, ignore_index)
    return summed


def fast_causal_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    cross_entropy: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor] = in_buffer,
    **kwargs: Any,
) -> torch.Tensor:
    """transformers' ``ForCausalLMLoss`` in one buffer: position t predicts label t + 1.

    For float16 logits it calls ``ForCausalLMLoss``: small probabilities would underflow in a buffer that is scaled only
    afterwards.

    Args:
        logits: logits of every position [..., V]; after backward they hold their gradient.
        labels: token ids [..., T], not shifted.
        vocab_size: V.
        num_items_in_batch: what to divide the summed loss by; None: the number of labels that count.
        ignore_index: label of positions that do not count.
        shift_labels: labels that are shifted already, in place of ``labels``.
        cross_entropy: the sum over logits [N, V], targets [N] and ``ignore_index``, in float32.
        kwargs: passed to ``ForCausalLMLoss``.

    Returns:
        The loss, a float32 scalar.
    """
    if logits.dtype == torch.float16:
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target_N = shift_labels.reshape(-1).to(logits.device)
    summed = cross_entropy(logits.view(-1, vocab_size), target_N, ignore_index)
    items = (target_N != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return summed / (items.to(summed.device) if torch.is_tensor(items) else items)


@contextmanager
def fast_loss(model: nn.Module, cross_entropy: Callable[..., torch.Tensor] = in_buffer) -> Iterator[bool]:
    """Compute the causal loss of ``model`` in the buffer of its logits, which then hold their gradient.

    Yields whether it applies: models with a different loss keep theirs. Results are the same up to the order of
    rounding.

    Args:
        model: the model, adapted or not.
        cross_entropy: as in :func:`fast_causal_loss`.
    """
    base = base_of(model)
    plain = getattr(base, "loss_function", None)
    applies = plain is ForCausalLMLoss and not hasattr(base, "_loss_function")
    if applies:
        base.loss_function = partial(fast_causal_loss, cross_entropy=cross_entropy)
    try:
        yield applies
    finally:
        if applies:
            del base._loss_function
