"""RMSNorm in fewer passes over its activations; exact up to the order of sums.

Shapes: N tokens (or heads), D values normalized together.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from aletheia.execution.fast import Forward, replaced_forwards


class _FastRMSNorm(torch.autograd.Function):
    """``w x / sqrt(mean(x^2) + eps)`` [N, D] for a frozen w, rounded once before w, as models do.

    For the plain formula autograd keeps three tensors [N, D], two of them float32, and passes over them many times.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        wide_ND = x_ND.float()
        inverse_N1 = wide_ND.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()  # summed in the order of models
        normed_ND = (wide_ND * inverse_N1 if wide_ND is x_ND else wide_ND.mul_(inverse_N1)).to(x_ND.dtype)
        ctx.save_for_backward(normed_ND, inverse_N1, weight_D)
        return weight_D * normed_ND

    @staticmethod
    def backward(ctx: Any, grad_ND: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        normed_ND, inverse_N1, weight_D = ctx.saved_tensors
        grad_ND = grad_ND * weight_D
        wide_ND, normed_ND = grad_ND.float(), normed_ND.float()
        along_N1 = (wide_ND * normed_ND).mean(dim=-1, keepdim=True)
        return wide_ND.sub_(normed_ND * along_N1).mul_(inverse_N1).to(grad_ND.dtype), None, None


@contextmanager
def fast_norms(model: nn.Module) -> Iterator[int]:
    """Compute the frozen RMSNorms of ``model`` in fewer passes on a CPU; yields how many modules it covers.

    It covers modules that are called RMSNorm, have only a weight, and agree with the formula on random values. Others,
    such as Gemma's with ``1 + w``, keep their forward.
    """
    covered = [module for module in model.modules() if _is_plain(module)]
    with replaced_forwards(covered, _forward):
        yield len(covered)


def _forward(module: nn.Module, plain: Forward, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    weight = module.weight
    usual = x.device.type == "cpu" and x.dtype == weight.dtype and not (args or kwargs or weight.requires_grad)
    usual = usual and x.shape[-1:] == weight.shape  # some accept other widths, for which they skip their weight
    if not usual or torch.is_autocast_enabled("cpu"):
        return plain(x, *args, **kwargs)
    normed: torch.Tensor = _FastRMSNorm.apply(x, weight, _eps(module))
    return normed


def _eps(module: nn.Module) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


@torch.no_grad()
def _is_plain(module: nn.Module) -> bool:
    own = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    if "RMSNorm" not in type(module).__name__ or own != {"weight"} or not isinstance(_eps(module), float):
        return False
    weight = module.weight
    if weight.ndim != 1 or weight.requires_grad or weight.device.type != "cpu" or not weight.is_floating_point():
        return False
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(8, len(weight), generator=generator).to(weight.dtype)
    try:
        expected_ND = module.forward(x_ND)
    except Exception:  # it needs more than one argument, or another shape
        return False
    found_ND = _FastRMSNorm.apply(x_ND, weight, _eps(module))
    if not isinstance(expected_ND, torch.Tensor) or expected_ND.dtype != found_ND.dtype:
        return False
    difference = (found_ND - expected_ND).float().norm() / expected_ND.float().norm()
    return bool(difference <= max(torch.finfo(weight.dtype).eps / 8, 1e-6))
