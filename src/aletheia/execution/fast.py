"""Adapters without needless copies: the matrix product adds LoRA. Results are exact up to rounding.

Shapes: N tokens, I inputs, O outputs, R rank.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeGuard, cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from aletheia.execution.low_rank import Product, product
from aletheia.execution.shared_input import compute, others, shared_inputs, take

Forward = Callable[..., torch.Tensor]


@contextmanager
def fast_adapters(model: nn.Module) -> Iterator[int]:
    """Compute the adapters of ``model`` with fewer copies, within this context; yields how many modules it covers.

    It covers plain Linear modules that have one adapter without dropout, DoRA, hooks or bias. The adapter has the
    dtype of the weight, or float32 with a bfloat16 weight. Other modules keep PEFT's forward. Results are the same up
    to the order of rounding. With a bfloat16 weight, the low-rank products are rounded to bfloat16, as under autocast.
    Modules that are given the same tensor are computed together, see :mod:`aletheia.execution.shared_input`. The
    outputs can be differentiated once.
    """
    covered = [module for module in model.modules() if isinstance(module, LoraLinear) and _plain_product(module)]
    with replaced_forwards(covered, _forward), shared_inputs(model, covered):
        yield len(covered)


@contextmanager
def adapters_in_bfloat16(model: nn.Module) -> Iterator[None]:
    """Run adapted modules under autocast where activations are bfloat16, as Trainer's ``bf16=True`` does.

    It is for modules that :func:`fast_adapters` does not cover (4-bit layers, Conv1D), in a loop without autocast:
    there PEFT multiplies float32 adapters in float32. Adapters of experts stay as they are.
    """
    adapted = [module for module in model.modules() if isinstance(module, LoraLayer)]
    with replaced_forwards([module for module in adapted if not isinstance(module, ParamWrapper)], _in_bfloat16):
        yield


@contextmanager
def replaced_forwards(modules: Sequence[nn.Module], forward: Forward) -> Iterator[None]:
    """Replace the forward of each module by ``forward(module, plain, ...)``, where ``plain`` is its own forward.

    Each module gets a class of the same name, so that a compiler sees one function for all modules of a kind. A forward
    that is set on the module itself, as accelerate's hooks do, is wrapped in place.
    """
    own = [(module, type(module), module.__dict__.get("forward")) for module in modules]
    for module, kind, hooked in own:
        if hooked is None:
            module.__class__ = _with_forward(kind, forward)  # type: ignore[arg-type]  # a class is hashable
        else:
            module.forward = partial(forward, module, hooked)
    try:
        yield
    finally:
        for module, kind, hooked in own:
            if hooked is None:
                module.__class__ = kind
            else:
                module.forward = hooked


@functools.cache
def _with_forward(kind: type[nn.Module], forward: Forward) -> type[nn.Module]:
    def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        return forward(self, lambda *given, **named: kind.forward(self, *given, **named), *args, **kwargs)

    made: type[nn.Module] = type(kind.__name__, (kind,), {"forward": replaced, "__module__": kind.__module__})
    return made


def bfloat16_autocast(model: nn.Module) -> torch.autocast:
    """The autocast of Trainer's ``bf16=True`` around a bfloat16 model's forward pass; disabled for other dtypes.

    PEFT keeps adapters in float32 on a bfloat16 base, and multiplies them in float32 unless autocast is on. With
    autocast is the faster of these two plain ways.
    """
    dtype = next(model.parameters()).dtype
    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


# adapter dtypes that are covered besides the dtype of the weight: float32 is PEFT's default for a bfloat16 model
OTHER_ADAPTER_DTYPES = {torch.bfloat16: (torch.float32,)}


def _plain_product(module: LoraLinear) -> Product | None:
    """What a module computes, if it is one that :func:`fast_adapters` covers.

    It runs in every call, so it looks up submodules without ``Module.__getattr__``, which takes as long as a launch.
    """
    names, parts = module.active_adapters, cast("dict[str, nn.Module]", module._modules)
    if len(names) != 1 or names[0] in module.lora_variant:
        return None
    base = parts["base_layer"]
    dropout, a, b = (parts[kind]._modules.get(names[0]) for kind in ("lora_dropout", "lora_A", "lora_B"))
    if not (_is_bare(base) and _is_bare(a) and _is_bare(b) and isinstance(dropout, nn.Identity)):
        return None
    weight, bias, a_weight, b_weight = base.weight, base.bias, a.weight, b.weight
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    if a.bias is not None or b.bias is not None or a_weight.dtype != b_weight.dtype:
        return None
    if a_weight.dtype not in (weight.dtype, *OTHER_ADAPTER_DTYPES.get(weight.dtype, ())):
        return None
    return Product(weight, bias, a_weight, b_weight, module.scaling[names[0]])


def _is_bare(linear: Any) -> TypeGuard[nn.Linear]:
    """Whether it is a plain Linear: no hook or replaced forward watches its calls or loads its weight for them."""
    if type(linear) is not nn.Linear:
        return False
    watched = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks
    return not watched and "forward" not in linear.__dict__


_as_operators: list[None] = []


@contextmanager
def adapters_as_operators() -> Iterator[None]:
    """Run the products of adapted modules as single operators, so that recomputation can keep their results."""
    _as_operators.append(None)
    try:
        yield
    finally:
        _as_operators.pop()


def _forward(module: LoraLinear, plain: Forward, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    own = None if args or kwargs else _product(module, x)
    if own is None:
        return plain(x, *args, **kwargs)
    if torch.compiler.is_compiling():  # it fuses better when it sees every product of a module
        return product(x.reshape(-1, x.shape[-1]), *own).view(*x.shape[:-1], -1)
    if (taken := take(module, own, x)) is not None:
        return taken
    together = ((other, _product(other, x)) for other in others(module))
    fitting = {other: its for other, its in together if its is not None and its.fits(own)}
    return compute(x, {module: own, **fitting}, as_operator=bool(_as_operators))


def _product(module: LoraLinear, x: torch.Tensor) -> Product | None:
    """What a module computes for ``x``, if this is a case that is covered."""
    if module.disable_adapters or module.merged or x.numel() == 0:
        return None
    kind, found = x.device.type, _plain_product(module)
    casts = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype
    return None if casts or found is None or found.weight.dtype != x.dtype else found


def _in_bfloat16(_: nn.Module, plain: Forward, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    with torch.autocast(x.device.type, torch.bfloat16) if x.dtype == torch.bfloat16 else nullcontext():
        return plain(x, *args, **kwargs)
