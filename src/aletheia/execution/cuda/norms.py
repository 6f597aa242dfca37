"""RMSNorms by one or two kernels: Liger's, with the extra ``gpu``, or torch's own. Exact up to rounding.

Each is tried on random values on the model's device and compared with the model's own code. Where it differs or fails,
the model's code stays.

Shapes: N tokens (or heads), D values normalized together.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from aletheia.execution.cuda.trial import agree, is_alone, not_taken, random_values
from aletheia.execution.fast import Forward, replaced_forwards

TRIAL_ROWS = (8, 2**15)  # for many short rows Liger uses another kernel, which takes several at a time
SHORT = 256

# arguments: x [N, D], weight [D], eps, what is added to the weight, and whose rounding it follows
Norm = Callable[[torch.Tensor, torch.Tensor, float, float, str], torch.Tensor]
FORMULAS = ((0.0, "llama"), (1.0, "gemma"), (0.0, "gemma"))  # Llama rounds before the weight, Gemma after it


def liger_norms(model: nn.Module) -> AbstractContextManager[int]:
    """Compute the frozen RMSNorms of ``model`` by Liger's kernels; yields how many modules it covers.

    It covers modules that are called RMSNorm, have only a weight, and agree with the formula for ``w`` or Gemma's
    ``1 + w``.
    """
    return _norms_by(_by_liger, model)


def torch_norms(model: nn.Module) -> AbstractContextManager[int]:
    """The same by ``torch.nn.functional.rms_norm``, which is one kernel on a GPU; yields how many modules it covers."""
    return _norms_by(_by_torch, model)


def _by_liger(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, rounds_as: str) -> torch.Tensor:
    from liger_kernel.ops import LigerRMSNormFunction

    in_place = False  # a residual connection may need the same gradient
    normed: torch.Tensor = LigerRMSNormFunction.apply(x, weight, eps, offset, rounds_as, in_place)
    return normed


def _by_torch(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, rounds_as: str) -> torch.Tensor:
    casts = torch.is_autocast_enabled(x.device.type)  # to float32, where a model rounds
    with torch.autocast(x.device.type, enabled=False) if casts else nullcontext():
        if rounds_as == "llama" and x.dtype != torch.float32:
            return weight * nn.functional.rms_norm(x, weight.shape, None, eps)
        if offset:  # the sum would lose digits in bfloat16
            return nn.functional.rms_norm(x.float(), weight.shape, offset + weight.float(), eps).to(x.dtype)
        return nn.functional.rms_norm(x, weight.shape, weight, eps)


@contextmanager
def _norms_by(norm: Norm, model: nn.Module) -> Iterator[int]:
    covered: dict[Forward, list[nn.Module]] = {forward: [] for forward in _FORWARDS[norm]}
    for module in model.modules():
        if (forward := _agreeing(module, norm)) is not None:
            covered[forward].append(module)
    with ExitStack() as stack:
        for forward, modules in covered.items():
            stack.enter_context(replaced_forwards(modules, forward))
        yield sum(map(len, covered.values()))


def _forward(
    norm: Norm, offset: float, rounds_as: str, module: nn.Module, plain: Forward, *args: Any, **kwargs: Any
) -> torch.Tensor:
    weight: Any = module.weight
    if not is_alone(args, kwargs) or weight.requires_grad:
        return plain(*args, **kwargs)
    (x,) = args
    if (x.dtype, x.device, x.shape[-1:]) != (weight.dtype, weight.device, weight.shape):
        return plain(x)
    return norm(x, weight, _eps(module), offset, rounds_as)


_FORWARDS: dict[Norm, list[Forward]] = {
    norm: [partial(_forward, norm, *formula) for formula in FORMULAS] for norm in (_by_liger, _by_torch)
}


def _eps(module: nn.Module) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _agreeing(module: Any, norm: Norm) -> Forward | None:
    """The first forward by ``norm`` that agrees with the module's, if there is one."""
    own = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    if "RMSNorm" not in type(module).__name__ or own != {"weight"} or not isinstance(_eps(module), float):
        return None
    weight = module.weight
    if weight.ndim != 1 or weight.requires_grad or not weight.is_floating_point() or "forward" in vars(module):
        return None
    rows = TRIAL_ROWS if norm is _by_liger and len(weight) <= SHORT else TRIAL_ROWS[:1]
    trials = [random_values(2, count // 2, len(weight), like=weight) for count in rows]
    for forward in _FORWARDS[norm]:
        if all(agree(module.forward, partial(forward, module, not_taken), x) for x in trials):
            return forward
    return None
