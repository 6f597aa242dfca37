"""Rotary positions by Liger's kernel, with the extra ``gpu``. Exact up to rounding.

Shapes: B rows, H heads, T tokens, D size of a head.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn

from aletheia.execution.cuda.trial import agree, dtype_of, not_taken, random_values

ROTARY = "apply_rotary_pos_emb"


@contextmanager
def liger_rotary(model: nn.Module) -> Iterator[int]:
    """Rotate queries and keys of ``model`` by one kernel; yields the number of modeling files it covers.

    Attention calls a function of its modeling file, so the context replaces that function. Models of the same family on
    another kind of device keep theirs. It covers families whose halves rotate by the same angles, as in Llama.
    """
    files = {type(module).__module__ for module in model.modules()}
    found = [sys.modules[name] for name in sorted(files) if hasattr(sys.modules.get(name), ROTARY)]
    device, dtype = next(model.parameters()).device, dtype_of(model)
    covered = [file for file in found if _rotates_halves(model, file, device, dtype)]
    with ExitStack() as stack:
        for file in covered:
            stack.enter_context(_rotated_by_liger(file, device.type))
        yield len(covered)


class _Rotary(torch.autograd.Function):
    """Queries and keys [B, H, T, D] rotated by angles [B or 1, T, D]; the inputs stay as they are."""

    @staticmethod
    def forward(
        ctx: Any, query_BHTD: torch.Tensor, key_BHTD: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from liger_kernel.ops import rope_forward

        ctx.save_for_backward(cos_BTD, sin_BTD)
        with torch.cuda.device_of(query_BHTD):
            query_BHTD, key_BHTD, *_ = rope_forward(_copied(query_BHTD), _copied(key_BHTD), cos_BTD, sin_BTD)
        return query_BHTD, key_BHTD

    @staticmethod
    def backward(ctx: Any, grad_query: torch.Tensor, grad_key: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from liger_kernel.ops import rope_backward

        with torch.cuda.device_of(grad_query):
            grad_query, grad_key = rope_backward(_copied(grad_query), _copied(grad_key), *ctx.saved_tensors)
        return grad_query, grad_key, None, None


def _copied(x_BHTD: torch.Tensor) -> torch.Tensor:
    """A copy laid out token by token, which Liger rotates in place; recomputation still needs the original."""
    return x_BHTD.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def _rotated(
    plain: Callable[..., Any],
    device_type: str,
    *args: Any,
    **kwargs: Any,
) -> Any:
    usual = len(args) == 4 and not kwargs and not torch.compiler.is_compiling()
    return (_Rotary.apply if usual and _is_usual(device_type, *args) else plain)(*args, **kwargs)


def _is_usual(device_type: str, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether the whole head is rotated, and all tensors have one dtype, on the expected kind of device."""
    return (
        query.device.type == device_type
        and query.ndim == key.ndim == 4
        and query.shape[2:] == key.shape[2:] == cos.shape[1:] == sin.shape[1:]
        and cos.shape[0] in (1, query.shape[0])
        and query.dtype == key.dtype == cos.dtype == sin.dtype
        and query.numel() > 0
        and key.numel() > 0
    )


_replaced: dict[str, tuple[Callable[..., Any], int]] = {}  # by file: its own function, and how many contexts replace it


@contextmanager
def _rotated_by_liger(file: ModuleType, device_type: str) -> Iterator[None]:
    name = file.__name__
    own, users = _replaced.get(name, (getattr(file, ROTARY), 0))
    _replaced[name] = own, users + 1
    setattr(file, ROTARY, partial(_rotated, own, device_type))
    try:
        yield
    finally:
        own, users = _replaced.pop(name)
        if users > 1:
            _replaced[name] = own, users - 1
        else:
            setattr(file, ROTARY, own)


def _rotates_halves(model: nn.Module, file: ModuleType, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the function of ``file`` agrees with Liger's, for the angles of each of its rotary modules."""
    own, _ = _replaced.get(file.__name__, (getattr(file, ROTARY), 0))
    of_file = [module for module in model.modules() if type(module).__module__ == file.__name__]
    rotary = [module for module in of_file if "RotaryEmbedding" in type(module).__name__]
    like = torch.empty(0, dtype=dtype, device=device)
    positions_BT = torch.tensor([[0, 1, 2, 30, 4], [900, 2, 7, 7, 8]], device=device)
    for module in rotary:
        try:
            cos_BTD, sin_BTD = copy.deepcopy(module)(like[None, None].expand(2, 5, 0), positions_BT)
            halves = [part for angles in (cos_BTD, sin_BTD) for part in angles.chunk(2, dim=-1)]
            same = torch.equal(halves[0], halves[1]) and torch.equal(halves[2], halves[3])
        except Exception:  # it needs other arguments, or returns something else
            return False
        states = [random_values(2, 5, heads, cos_BTD.shape[-1], like=like).transpose(1, 2) for heads in (4, 2)]
        plain, rotated = (
            partial(_of_angles, f, cos_BTD, sin_BTD) for f in (own, partial(_rotated, not_taken, device.type))
        )
        if not same or not agree(plain, rotated, *states, rounded=1 / 2):
            return False
    return bool(rotary)


def _of_angles(
    rotate: Callable[..., Any], cos: torch.Tensor, sin: torch.Tensor, query: torch.Tensor, key: torch.Tensor
) -> Any:
    return rotate(query, key, cos, sin)
