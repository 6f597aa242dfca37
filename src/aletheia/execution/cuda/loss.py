"""The causal loss by kernels of ours, where Triton is installed, as it is with torch for CUDA on Linux.

Shapes: N tokens, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from aletheia.anatomy.access import text_config
from aletheia.data.examples import NO_LOSS
from aletheia.execution.cuda.trial import agree, dtype_of, random_values
from aletheia.execution.loss import fast_loss, in_buffer


@contextmanager
def kernel_loss(model: nn.Module) -> Iterator[bool]:
    """Compute the causal loss of ``model`` by two kernels: forward reads the logits, backward overwrites them.

    They are tried on random values on the model's device. Where they differ or fail, the loss is that of
    :func:`~aletheia.execution.loss.fast_loss`. Yields whether the kernels compute it.
    """
    tried = _agrees(model)
    with fast_loss(model, _by_kernels if tried else in_buffer) as applies:
        yield applies and tried


def _by_kernels(logits_NV: torch.Tensor, target_N: torch.Tensor, ignore_index: int) -> torch.Tensor:
    if logits_NV.stride(1) != 1:
        return in_buffer(logits_NV, target_N, ignore_index)
    from aletheia.execution.cuda.cross_entropy import summed  # needs Triton

    return summed(logits_NV, target_N, ignore_index)


def _agrees(model: nn.Module) -> bool:
    """Whether the kernels equal torch's cross-entropy, and its gradient, for as many logits as the model has."""
    like = next(model.parameters()).new_empty(0, dtype=dtype_of(model))
    vocab_size = text_config(model).vocab_size
    target_N = torch.tensor([0, NO_LOSS, vocab_size // 2, vocab_size - 1], device=like.device)

    def plain(x_NV: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(x_NV.float(), target_N, ignore_index=NO_LOSS, reduction="sum")[None]

    def ours(x_NV: torch.Tensor) -> torch.Tensor:
        return _by_kernels(x_NV, target_N, NO_LOSS)[None]

    return agree(plain, ours, random_values(4, vocab_size, like=like), rounded=0)
