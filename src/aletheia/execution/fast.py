"""Adapters without needless copies: the matrix product adds LoRA. Results are exact up to rounding.

Shapes: N tokens, I inputs, O outputs, R rank.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import library, nn

Forward = Callable[..., torch.Tensor]


def _lora_linear(
    x_NI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    a_RI: torch.Tensor,
    b_OR: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x Wt + b + s (x At) Bt`` [N, O] for a frozen W, and the low-rank ``x At`` [N, R].

    PEFT computes the low-rank output, its scaled copy and the sum, each [N, O], and as many gradients. Here the matrix
    product itself adds the low-rank products, and the scale is applied to [N, R]. A and B may be float32 with a
    bfloat16 W. They are then rounded for the products, as under autocast, and their gradients are float32.
    """
    reduced_NR = x_NI @ a_RI.to(x_NI.dtype).T
    y_NO = nn.functional.linear(x_NI, weight_OI, bias_O)
    return y_NO.addmm_(reduced_NR, b_OR.to(x_NI.dtype).T, alpha=scale), reduced_NR


# a single operator, so that selective recomputation can keep its result. It is not used elsewhere: on a GPU its
# dispatch takes as long as three small kernels
lora_linear = library.custom_op("aletheia::lora_linear", _lora_linear, mutates_args=())


@lora_linear.register_fake
def _(
    x_NI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    a_RI: torch.Tensor,
    b_OR: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x_NI.new_empty(len(x_NI), len(weight_OI)), x_NI.new_empty(len(x_NI), len(a_RI))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x_NI, weight_OI, _, a_RI, b_OR, ctx.scale = inputs
    ctx.save_for_backward(x_NI, weight_OI, a_RI, b_OR, output[1])
    ctx.set_materialize_grads(False)


def _lora_linear_backward(ctx: Any, grad_NO: torch.Tensor, _: object) -> tuple[torch.Tensor | None, ...]:
    x_NI, weight_OI, a_RI, b_OR, reduced_NR = ctx.saved_tensors
    grad_reduced_NR = (grad_NO @ b_OR.to(x_NI.dtype)).mul_(ctx.scale)
    grad_x_NI = None
    if ctx.needs_input_grad[0]:
        grad_x_NI = grad_NO @ weight_OI
        grad_x_NI.addmm_(grad_reduced_NR, a_RI.to(x_NI.dtype))
    grad_a_RI = grad_b_OR = None
    if ctx.needs_input_grad[3]:
        grad_a_RI = (grad_reduced_NR.T @ x_NI).to(a_RI.dtype)
    if ctx.needs_input_grad[4]:  # this order of factors is faster
        grad_b_OR = (reduced_NR.T @ grad_NO).to(b_OR.dtype).mul_(ctx.scale).T
    return grad_x_NI, None, None, grad_a_RI, grad_b_OR, None


lora_linear.register_autograd(_lora_linear_backward, setup_context=_keep)


class _LoraLinear(torch.autograd.Function):
    """:func:`_lora_linear` without the dispatch of an operator."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        output_NO, reduced_NR = _lora_linear(*inputs)
        _keep(ctx, inputs, (output_NO, reduced_NR))
        return output_NO

    @staticmethod
    def backward(ctx: Any, grad_NO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _lora_linear_backward(ctx, grad_NO, None)


@contextmanager
def fast_adapters(model: nn.Module) -> Iterator[int]:
    """Compute the adapters of ``model`` with fewer copies, within this context; yields how many modules it covers.

    It covers plain Linear modules that have one adapter without dropout, DoRA, hooks or bias. The adapter has the
    dtype of the weight, or float32 with a bfloat16 weight. Other modules keep PEFT's forward. Results are the same up
    to the order of rounding. With a bfloat16 weight, the low-rank products are rounded to bfloat16, as under autocast.
    """
    covered = [module for module in model.modules() if isinstance(module, LoraLinear) and _is_plain(module)]
    with replaced_forwards(covered, _forward):
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


def _is_plain(module: LoraLinear) -> bool:
    if len(module.active_adapters) != 1 or module.active_adapters[0] not in module.lora_A:
        return False
    name = module.active_adapters[0]
    a, b, base = module.lora_A[name], module.lora_B[name], module.base_layer
    return (
        all(_is_bare(linear) for linear in (base, a, b))
        and name not in module.lora_variant
        and isinstance(module.lora_dropout[name], nn.Identity)
        and a.bias is None
        and b.bias is None
        and a.weight.dtype == b.weight.dtype
        and a.weight.dtype in (base.weight.dtype, *OTHER_ADAPTER_DTYPES.get(base.weight.dtype, ()))
        and not any(part.requires_grad for part in base.parameters())
    )


def _is_bare(linear: nn.Module) -> bool:
    """Whether it is a plain Linear: no hook or replaced forward watches its calls or loads its weight for them."""
    watched = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks
    return type(linear) is nn.Linear and not watched and "forward" not in linear.__dict__


_as_operators: list[None] = []


@contextmanager
def adapters_as_operators() -> Iterator[None]:
    """Run every adapted module as one operator, so that recomputation can keep its result."""
    _as_operators.append(None)
    try:
        yield
    finally:
        _as_operators.pop()


def _forward(module: LoraLinear, plain: Forward, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    usual = not (module.disable_adapters or module.merged or args or kwargs) and x.numel() > 0
    if not usual or not _is_plain(module):
        return plain(x, *args, **kwargs)
    name, base = module.active_adapters[0], module.base_layer
    casts = torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type) != x.dtype
    if x.dtype != base.weight.dtype or casts:
        return plain(x)
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    inputs: Any = x.reshape(-1, x.shape[-1]), base.weight, base.bias, a, b, module.scaling[name]
    if torch.compiler.is_compiling():  # the compiler fuses better when it sees every product
        y_NO = _lora_linear(*inputs)[0]
    else:
        y_NO = lora_linear(*inputs)[0] if _as_operators else _LoraLinear.apply(*inputs)
    return y_NO.view(*x.shape[:-1], -1)


def _in_bfloat16(_: nn.Module, plain: Forward, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    with torch.autocast(x.device.type, torch.bfloat16) if x.dtype == torch.bfloat16 else nullcontext():
        return plain(x, *args, **kwargs)
