"""Liger's kernels for gated activations, with the extra ``gpu``. Exact up to rounding.

Each kernel is tried on random values on the model's device and compared with the model's own code. Where it differs or
fails, the model's code stays.

Shapes: N tokens, I values inside an MLP.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from aletheia.errors import TrainingError
from aletheia.execution.cuda.trial import agree, dtype_of, has_triton, is_alone, not_taken, random_values
from aletheia.execution.fast import Forward, replaced_forwards


def has_liger() -> bool:
    """Whether Liger's kernels are installed, and Triton, which compiles them."""
    return find_spec("liger_kernel") is not None and has_triton()


@contextmanager
def liger_gates(model: nn.Module) -> Iterator[int]:
    """Compute ``silu(gate) * up`` of the MLPs of ``model`` by one kernel; yields how many modules it covers.

    It covers modules with a ``down_proj`` and either a ``gate_proj`` and an ``up_proj`` or a ``gate_up_proj``, which
    compute nothing else around them. Gradients overwrite the outputs of the projections, so only one backward pass is
    possible.

    Raises:
        TrainingError: from a second backward pass.
    """
    gated: dict[Forward, list[nn.Module]] = {_gated_mlp: [], _fused_mlp: []}
    dtype = dtype_of(model)
    for module in model.modules():
        if (forward := _mlp_of(module, dtype)) is not None:
            gated[forward].append(module)
    with replaced_forwards(gated[_gated_mlp], _gated_mlp), replaced_forwards(gated[_fused_mlp], _fused_mlp):
        yield sum(map(len, gated.values()))


class _Gated(torch.autograd.Function):
    """``silu(gate) * up`` [N, I]; backward writes both gradients over its inputs."""

    @staticmethod
    def forward(ctx: Any, gate_NI: torch.Tensor, up_NI: torch.Tensor) -> torch.Tensor:
        from liger_kernel.ops import swiglu_forward

        gate_NI, up_NI = gate_NI.contiguous(), up_NI.contiguous()
        product_NI: torch.Tensor = swiglu_forward(gate_NI, up_NI)[2]
        ctx.save_for_backward(gate_NI, up_NI)
        ctx.is_spent = False
        return product_NI

    @staticmethod
    def backward(ctx: Any, grad_NI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from liger_kernel.ops import swiglu_backward

        if ctx.is_spent:
            raise TrainingError(
                "a loss was differentiated twice, but the buffers of Liger's kernels serve one backward pass; expected "
                "one; for more, set `liger` off"
            )
        ctx.is_spent = True
        gate_NI, up_NI = ctx.saved_tensors
        grads: tuple[torch.Tensor, torch.Tensor] = swiglu_backward(gate_NI, up_NI, grad_NI.contiguous())
        return grads


def _gated_mlp(module: Any, plain: Forward, *args: Any, **kwargs: Any) -> torch.Tensor:
    if not is_alone(args, kwargs) or _is_watched(module.gate_proj) or _is_watched(module.up_proj):
        return plain(*args, **kwargs)
    output: torch.Tensor = module.down_proj(_Gated.apply(module.gate_proj(*args), module.up_proj(*args)))
    return output


def _fused_mlp(module: Any, plain: Forward, *args: Any, **kwargs: Any) -> torch.Tensor:
    if not is_alone(args, kwargs):
        return plain(*args, **kwargs)
    from liger_kernel.ops import LigerFusedGateUpSiLUMulFunction

    both = module.gate_up_proj(*args)
    with torch.cuda.device_of(both):
        # as one row of tokens: its gradient supports no other shape
        product = LigerFusedGateUpSiLUMulFunction.apply(both.view(-1, both.shape[-1]))
    output: torch.Tensor = module.down_proj(product.view(*both.shape[:-1], -1))
    return output


def _is_watched(module: nn.Module) -> bool:
    """Whether a hook sees what it returns, and may keep it longer than a backward pass."""
    return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)


def _mlp_of(module: nn.Module, dtype: torch.dtype) -> Forward | None:
    """The forward that agrees with the module's, if there is one; the trial leaves out its projections."""
    parts = dict(module.named_children())
    stand_ins: dict[str, nn.Module] = {"down_proj": nn.Identity()}
    if {"gate_proj", "up_proj", "down_proj"} <= parts.keys():
        forward: Forward = _gated_mlp
        stand_ins |= {"gate_proj": _Half(0), "up_proj": _Half(1)}
    elif {"gate_up_proj", "down_proj"} <= parts.keys():
        forward = _fused_mlp
        stand_ins["gate_up_proj"] = nn.Identity()
    else:
        return None
    weight = next(module.parameters(), None)
    if weight is None or "forward" in vars(module):
        return None
    bare = copy.copy(module)
    vars(bare)["_modules"] = parts | stand_ins
    x = random_values(2, 4, 2 * 96, like=torch.empty(0, dtype=dtype, device=weight.device))
    return forward if agree(bare.forward, partial(forward, bare, not_taken), x) else None


class _Half(nn.Module):
    """The first or second half of every row, for a trial."""

    def __init__(self, which: int) -> None:
        super().__init__()
        self._which = which

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.chunk(2, dim=-1)[self._which]
