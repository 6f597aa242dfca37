"""The step without needless copies: LoRA added by the matrix product, the loss in one buffer. Exact up to rounding.

Shapes: N tokens, I inputs, O outputs, R rank, V vocabulary.
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
from transformers.loss.loss_utils import ForCausalLMLoss

from aletheia.anatomy.access import base_of
from aletheia.errors import TrainingError

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

    PEFT computes the low-rank output, its scaled copy and the sum, each [N, O], and as many gradients. Here the
    low-rank products are added by the matrix product itself, and the scale is applied to [N, R]. A and B may be float32
    beside a bfloat16 W: they are rounded for the products, as under autocast, and their gradients are float32 again.
    """
    reduced_NR = x_NI @ a_RI.to(x_NI.dtype).T
    y_NO = nn.functional.linear(x_NI, weight_OI, bias_O)
    return y_NO.addmm_(reduced_NR, b_OR.to(x_NI.dtype).T, alpha=scale), reduced_NR


# one operator, whose result selective recomputation can keep; elsewhere its dispatch would take as long as three small
# kernels on a GPU
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
    if ctx.needs_input_grad[4]:  # the quicker order
        grad_b_OR = (reduced_NR.T @ grad_NO).to(b_OR.dtype).mul_(ctx.scale).T
    return grad_x_NI, None, None, grad_a_RI, grad_b_OR, None


lora_linear.register_autograd(_lora_linear_backward, setup_context=_keep)


class _LoraLinear(torch.autograd.Function):
    """The same without an operator's dispatch."""

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
    """Compute the adapters of ``model`` with fewer copies; yields how many modules that covers.

    Covered are plain Linear modules with one adapter and without dropout, DoRA, hooks or a bias of its own, the adapter
    in the dtype of the weight or in float32 beside bfloat16; the others keep PEFT's forward. The sums are the same up
    to the order of rounding; beside bfloat16, up to bfloat16's rounding of the low-rank products, as under autocast.
    """
    covered = [module for module in model.modules() if isinstance(module, LoraLinear) and _is_plain(module)]
    with replaced_forwards(covered, _forward):
        yield len(covered)


@contextmanager
def adapters_in_bfloat16(model: nn.Module) -> Iterator[None]:
    """Run adapted modules under autocast where activations are bfloat16, as Trainer's ``bf16=True`` does.

    For what :func:`fast_adapters` does not cover (4-bit layers, Conv1D) in a loop without autocast: PEFT by itself
    multiplies float32 adapters in float32. Adapters of experts stay as they are.
    """
    adapted = [module for module in model.modules() if isinstance(module, LoraLayer)]
    with replaced_forwards([module for module in adapted if not isinstance(module, ParamWrapper)], _in_bfloat16):
        yield


@contextmanager
def replaced_forwards(modules: Sequence[nn.Module], forward: Forward) -> Iterator[None]:
    """Put ``forward(module, its own forward, ...)`` in the place of each module's forward.

    By a class of the same name: to a compiler all modules of a kind then run one function. A forward that somebody set
    on a module itself, as accelerate's hooks do, is wrapped where it is.
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
    """What Trainer's ``bf16=True`` puts around the forward pass of a bfloat16 model; around others, nothing.

    PEFT keeps adapters in float32 beside a bfloat16 base, and multiplies them so; under autocast it does not. This is
    the quicker of the two plain ways.
    """
    dtype = next(model.parameters()).dtype
    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


ALSO_BESIDE = {torch.bfloat16: (torch.float32,)}  # a weight: PEFT's default for adapters of a bfloat16 model


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
        and a.weight.dtype in (base.weight.dtype, *ALSO_BESIDE.get(base.weight.dtype, ()))
        and not any(part.requires_grad for part in base.parameters())
    )


def _is_bare(linear: nn.Module) -> bool:
    """Whether it is its weight and bias alone: nothing looks at its calls, or brings the weight for them."""
    watched = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks
    return type(linear) is nn.Linear and not watched and "forward" not in linear.__dict__


_as_operators: list[None] = []


@contextmanager
def adapters_as_operators() -> Iterator[None]:
    """Let every adapted module be one operator, whose result recomputation can keep."""
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
    if torch.compiler.is_compiling():  # which likes every product in sight
        y_NO = _lora_linear(*inputs)[0]
    else:
        y_NO = lora_linear(*inputs)[0] if _as_operators else _LoraLinear.apply(*inputs)
    return y_NO.view(*x.shape[:-1], -1)


def _in_bfloat16(_: nn.Module, plain: Forward, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    with torch.autocast(x.device.type, torch.bfloat16) if x.dtype == torch.bfloat16 else nullcontext():
        return plain(x, *args, **kwargs)


ROWS_AT_ONCE = {"cpu": 32}  # of the softmax: a few megabytes, which stay in the processor's cache
ROWS_ON_DEVICE = 4096


class _FastCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy that turns the logits into their own gradient, so both share one buffer [N, V]."""

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, target_N: torch.Tensor, ignore_index: int) -> torch.Tensor:
        wants_grad = ctx.needs_input_grad[0]
        in_place = wants_grad and logits_NV.dtype == torch.float32
        summed = torch.zeros((), dtype=torch.float32, device=logits_NV.device)
        at_once = min(ROWS_AT_ONCE.get(logits_NV.device.type, ROWS_ON_DEVICE), len(target_N))
        buffer = None if in_place else logits_NV.new_empty(at_once, logits_NV.shape[1], dtype=torch.float32)
        for start in range(0, len(target_N), at_once):
            chunk, target = logits_NV[start : start + at_once], target_N[start : start + at_once]
            counted = target != ignore_index
            column = torch.where(counted, target, 0)[:, None]
            own = chunk.gather(1, column).float()
            largest = chunk.amax(dim=1, keepdim=True).float()
            softmax = (chunk if buffer is None else buffer[: len(chunk)].copy_(chunk)).sub_(largest).exp_()
            total = softmax.sum(dim=1, keepdim=True)
            summed += torch.where(counted, (largest + total.log() - own).squeeze(1), 0.0).sum()
            if wants_grad:
                softmax.div_(total).scatter_add_(1, column, torch.full_like(own, -1.0))
                softmax *= counted[:, None]
                if buffer is not None:
                    chunk.copy_(softmax)
        ctx.grad_NV = logits_NV if wants_grad else None
        return summed

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        grad_NV: torch.Tensor | None
        grad_NV, ctx.grad_NV = ctx.grad_NV, None
        if grad_NV is None:
            raise TrainingError(
                "the loss of fast steps was differentiated twice, which its buffer does not outlast; expected one "
                "backward pass; take aletheia.frozen_prefix alone for more"
            )
        return grad_NV.mul_(grad), None, None


def fast_causal_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """transformers' ``ForCausalLMLoss`` in one buffer: position t predicts label t + 1.

    float16 logits take the plain way: small probabilities would be lost in a buffer that is scaled only afterwards.
    """
    if logits.dtype == torch.float16:
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target_N = shift_labels.reshape(-1).to(logits.device)
    summed: torch.Tensor = _FastCrossEntropy.apply(logits.view(-1, vocab_size), target_N, ignore_index)
    items = (target_N != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return summed / (items.to(summed.device) if torch.is_tensor(items) else items)


@contextmanager
def fast_loss(model: nn.Module) -> Iterator[bool]:
    """Compute the causal loss of ``model`` in the buffer of its logits, which hold their gradient afterwards.

    Yields whether it applies: models with a loss of their own keep it. The sums are the same up to the order of
    rounding.
    """
    base = base_of(model)
    plain = getattr(base, "loss_function", None)
    applies = plain is ForCausalLMLoss and not hasattr(base, "_loss_function")
    if applies:
        base.loss_function = fast_causal_loss
    try:
        yield applies
    finally:
        if applies:
            del base._loss_function
