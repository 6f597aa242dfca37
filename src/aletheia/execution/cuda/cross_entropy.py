"""Cross-entropy by two kernels: forward reads the logits once, backward overwrites them with their gradient.

Only where Triton is installed can this file be imported.

Shapes: N tokens, V vocabulary.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from aletheia.execution.loss import only_once

BLOCK, WARPS = 2**15, 32  # logits of a row at a time: Liger's choice for its kernel on an H100


@triton.jit(do_not_specialize_on_alignment=["targets"])  # shifted labels start inside their buffer
def _losses(logits, stride, targets, ignored, kept, V, BLOCK: tl.constexpr):
    """The loss of a row, its largest logit and the sum of exponentials relative to that; nothing if it is ignored."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    if target != ignored:
        logits += row * stride
        largest, total = -3.4e38, 0.0  # the sum is relative to the largest so far: Milakov and Gimelshein 2018
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(logits + column, mask=column < V, other=float("-inf")).to(tl.float32)
            larger = tl.maximum(largest, tl.max(x))
            total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger))
            largest = larger
        own = tl.load(logits + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)
        kept += row * 3
        tl.store(kept, largest - own + tl.log(total))
        tl.store(kept + 1, largest)
        tl.store(kept + 2, total)


@triton.jit(do_not_specialize_on_alignment=["targets"])  # shifted labels start inside their buffer
def _to_gradients(logits, stride, targets, ignored, kept, grad, V, BLOCK: tl.constexpr):
    """Overwrite a block of a row by ``grad`` times (softmax - 1 at the target); by zeros if the row is ignored."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    counted = tl.where(target == ignored, 0, V)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits += row * stride + column
    x = tl.load(logits, mask=column < counted, other=float("-inf")).to(tl.float32)
    kept += row * 3
    softmax = tl.exp(x - tl.load(kept + 1)) / tl.load(kept + 2)
    gradient = (softmax - tl.where(column == target, 1.0, 0.0)) * tl.load(grad)
    tl.store(logits, tl.where(column < counted, gradient, 0.0), mask=column < V)


class _CrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of logits [N, V], which keep their values until backward."""

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, target_N: torch.Tensor, ignore_index: int) -> torch.Tensor:
        kept_N3 = torch.zeros(len(target_N), 3, dtype=torch.float32, device=logits_NV.device)
        ctx.kept = logits_NV, logits_NV.stride(0), target_N, ignore_index, kept_N3
        with torch.cuda.device_of(logits_NV):
            _losses[len(target_N),](*ctx.kept, logits_NV.shape[1], **_blocks(logits_NV))
        return kept_N3[:, 0].sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits_NV, *others = only_once(ctx)
        how = _blocks(logits_NV)
        grid = len(logits_NV), triton.cdiv(logits_NV.shape[1], how["BLOCK"])
        with torch.cuda.device_of(logits_NV):
            _to_gradients[grid](logits_NV, *others, grad, logits_NV.shape[1], **how)
        torch.autograd.graph.increment_version(logits_NV)  # so that autograd refuses them to whoever kept them
        return logits_NV, None, None


def _blocks(logits_NV: torch.Tensor) -> dict[str, int]:
    return {"BLOCK": min(BLOCK, triton.next_power_of_2(logits_NV.shape[1])), "num_warps": WARPS}


def summed(logits_NV: torch.Tensor, target_N: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """The summed cross-entropy in float32; backward, which is possible once, overwrites ``logits_NV`` [N, V].

    Raises:
        TrainingError: from a second backward pass.
    """
    loss: torch.Tensor = _CrossEntropy.apply(logits_NV, target_N, ignore_index)
    return loss
