"""Trials of kernels: a kernel and the model's own code run on the same random values, on the model's device."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn


def has_triton() -> bool:
    """Whether Triton is installed, which compiles kernels. It comes with torch for CUDA on Linux."""
    return find_spec("triton") is not None


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the first weight that is not quantized."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def random_values(*shape: int, like: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Normal random values of ``shape``, with scales from 0.1 in the first row to 10 in the last; fixed by ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-1, 1, shape[0]).view(-1, *(1 for _ in shape[1:]))
    return (torch.randn(shape, generator=generator) * scales).to(like.device, like.dtype)


def agree(plain: Callable[..., Any], ours: Callable[..., Any], *inputs: torch.Tensor, rounded: float = 1 / 8) -> bool:
    """Whether both return equal values and gradients, up to ``rounded`` times the dtype's epsilon for values."""
    try:
        with torch.enable_grad():
            expected, found = _results(plain, inputs), _results(ours, inputs)
        pairs = list(zip(found, expected, strict=True))
        epsilon = torch.finfo(inputs[0].dtype).eps
        bounds = [rounded * epsilon] * (len(expected) - len(inputs)) + [epsilon] * len(inputs)
        return all(_is_near(*pair, max(bound, 1e-5)) for pair, bound in zip(pairs, bounds, strict=True))
    except Exception:  # no compiler, another shape, not a tensor: the model's own code stays
        return False


def _results(function: Callable[..., Any], inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """What ``function`` returns, and the gradients of its inputs."""
    given = [x.detach().clone().requires_grad_() for x in inputs]
    returned = function(*given)
    values = [returned] if isinstance(returned, torch.Tensor) else list(returned)
    above = [random_values(*value.shape, like=value, seed=1) for value in values]
    return [value.detach() for value in values] + list(torch.autograd.grad(values, given, above))


def _is_near(found: torch.Tensor, expected: torch.Tensor, bound: float) -> bool:
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return False
    return bool((found - expected).float().norm() <= bound * expected.float().norm())


def not_taken(*_: Any) -> torch.Tensor:
    """A fallback that fails, so that a trial does not compare the model's own code with itself."""
    raise TypeError("the kernel was not taken, so there is nothing to compare")


def is_alone(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call has one tensor and no other argument, outside a compiler, which fuses by itself."""
    return len(args) == 1 and not kwargs and args[0].numel() > 0 and not torch.compiler.is_compiling()
