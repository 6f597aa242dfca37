"""A frozen matrix product and LoRA's two low-rank ones, for one module or several that share their input.

Results are exact up to rounding. Shapes: N tokens, I inputs, O outputs and R rank of a module; S is the sum of ranks.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import library, nn
from torch.autograd.function import once_differentiable

Gradients = Sequence[torch.Tensor | None]


class Product(NamedTuple):
    """What one module computes: ``x Wt + b + s (x At) Bt`` [N, O] with a frozen W.

    PEFT computes the low-rank output, its scaled copy and the sum, each [N, O], and as many gradients. Here the matrix
    product itself scales and adds. A and B may be float32 with a bfloat16 W. They are then rounded for the products,
    as under autocast, and their gradients are float32.
    """

    weight: torch.Tensor  # [O, I]
    bias: torch.Tensor | None  # [O]
    a: torch.Tensor  # [R, I]
    b: torch.Tensor  # [O, R]
    scale: float

    def fits(self, other: "Product") -> bool:
        """Whether both can be computed together, from one input."""
        return (self.weight.device, self.a.dtype) == (other.weight.device, other.a.dtype)

    def is_same(self, other: "Product") -> bool:
        """Whether both have the very same tensors and scale."""
        return self.scale == other.scale and all(own is its for own, its in zip(self[:4], other[:4], strict=True))


def product(
    x_NI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    a_RI: torch.Tensor,
    b_OR: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """The output of a :class:`Product` [N, O], operation by operation, for a compiler."""
    reduced_NR = x_NI @ a_RI.to(x_NI.dtype).T
    y_NO = nn.functional.linear(x_NI, weight_OI, bias_O)
    return y_NO.addmm_(reduced_NR, b_OR.to(x_NI.dtype).T, alpha=scale)


def products(x: torch.Tensor, members: Sequence[Product], as_operator: bool = False) -> list[torch.Tensor]:
    """The outputs [..., O] of modules that are given the same input [..., I], as one step of autograd.

    It can be differentiated once.

    Args:
        x: the input.
        members: what each module computes; all their As and Bs have one dtype.
        as_operator: as one operator for torch, too, so that selective recomputation can keep its results.
    """
    weights, biases, a_of_each, b_of_each, scales = (list(values) for values in zip(*members, strict=True))
    if as_operator:
        outputs = low_rank_products(x.reshape(-1, x.shape[-1]), weights, biases, a_of_each, b_of_each, scales)[1:]
    else:
        outputs = _Products.apply(x, scales, *weights, *biases, *a_of_each, *b_of_each)
    return [y_NO.view(*x.shape[:-1], -1) for y_NO in outputs]


def _compute(
    x_NI: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    a_SI: torch.Tensor,
    b_of_each: Sequence[torch.Tensor],
    ranks: list[int],
    scales: Sequence[float],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """``x At`` [N, S] and the outputs [N, O], from As and Bs in the dtype of x."""
    reduced_NS = x_NI @ a_SI.T
    outputs = []
    of_each = zip(weights, biases, _split(reduced_NS, ranks, 1), b_of_each, scales, strict=True)
    for weight_OI, bias_O, reduced_NR, b_OR, scale in of_each:  # an output is added to while it is in the cache
        y_NO = nn.functional.linear(x_NI, weight_OI, bias_O)
        outputs.append(y_NO.addmm_(reduced_NR, b_OR.T, alpha=scale))
    return reduced_NS, outputs


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scales: list[float], *tensors: Any) -> tuple[torch.Tensor, ...]:
        weights, biases, a_of_each, b_of_each = _quarters(tensors)
        x_NI, ranks = x.reshape(-1, x.shape[-1]), [len(a_RI) for a_RI in a_of_each]
        a_SI, b_in_dtype = _joined(a_of_each, b_of_each, x.dtype)
        reduced_NS, outputs = _compute(x_NI, weights, biases, a_SI, b_in_dtype, ranks, scales)
        ctx.shape, ctx.known = x.shape, (ranks, scales, a_of_each[0].dtype)
        ctx.save_for_backward(x_NI, a_SI, reduced_NS, *weights, *b_in_dtype)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        x_NI, a_SI, reduced_NS, *rest = ctx.saved_tensors
        saved = _Saved(x_NI, a_SI, reduced_NS, rest[: len(grads)], rest[len(grads) :], *ctx.known)
        of_x, _, *of_tensors = ctx.needs_input_grad
        _, _, of_a, of_b = _quarters(of_tensors)
        grad_x_NI, grads_a, grads_b = _gradients(saved, grads, (of_x, any(of_a), any(of_b)))
        none = [None] * (2 * len(grads))
        return None if grad_x_NI is None else grad_x_NI.view(ctx.shape), None, *none, *grads_a, *grads_b


def _quarters(values: Sequence[Any]) -> tuple[Sequence[Any], ...]:
    count = len(values) // 4
    return values[:count], values[count : 2 * count], values[2 * count : 3 * count], values[3 * count :]


def _split(tensor: torch.Tensor, sizes: list[int], dim: int = 0) -> Sequence[torch.Tensor]:
    return torch.split(tensor, sizes, dim) if len(sizes) > 1 else (tensor,)


def _joined(
    a_of_each: Sequence[torch.Tensor], b_of_each: Sequence[torch.Tensor], dtype: torch.dtype
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """All As one below another [S, I], and each B, in ``dtype``."""
    if a_of_each[0].dtype == dtype:
        return torch.cat(list(a_of_each)) if len(a_of_each) > 1 else a_of_each[0], b_of_each
    if len(a_of_each) == 1:
        return a_of_each[0].to(dtype), [b_of_each[0].to(dtype)]
    flat = torch.cat([matrix.reshape(-1) for matrix in (*a_of_each, *b_of_each)]).to(dtype)  # one conversion for all
    a_values, *b_values = _split(flat, [sum(a.numel() for a in a_of_each), *(b.numel() for b in b_of_each)])
    a_SI = a_values.view(-1, a_of_each[0].shape[1])
    return a_SI, [values.view(b.shape) for values, b in zip(b_values, b_of_each, strict=True)]


class _Saved(NamedTuple):
    """What backward needs. A and B are in the dtype of x; ``dtype`` is that of their gradients."""

    x: torch.Tensor  # [N, I]
    a: torch.Tensor  # [S, I]
    reduced: torch.Tensor  # x At [N, S]
    weights: Sequence[torch.Tensor]  # [O, I] each
    b_of_each: Sequence[torch.Tensor]  # [O, R] each
    ranks: list[int]
    scales: list[float]
    dtype: torch.dtype

    def of(self, live: Sequence[int]) -> "_Saved":
        """The same for some of the modules."""
        a_of_each, reduced = _split(self.a, self.ranks), _split(self.reduced, self.ranks, 1)
        a = torch.cat([a_of_each[index] for index in live])
        reduced_NS = torch.cat([reduced[index] for index in live], 1)
        weights, b_of_each = ([matrices[index] for index in live] for matrices in (self.weights, self.b_of_each))
        ranks, scales = [self.ranks[index] for index in live], [self.scales[index] for index in live]
        return _Saved(self.x, a, reduced_NS, weights, b_of_each, ranks, scales, self.dtype)


def _gradients(
    saved: _Saved, grads: Sequence[torch.Tensor | None], wants: tuple[bool, bool, bool]
) -> tuple[torch.Tensor | None, Gradients, Gradients]:
    """Gradients of x, of each A and of each B, where wanted, from those of the outputs."""
    live = {index: grad_NO for index, grad_NO in enumerate(grads) if grad_NO is not None}
    if len(live) == len(grads):
        return _gradients_of_all(saved, list(live.values()), wants)
    grads_a: list[torch.Tensor | None] = [None] * len(grads)
    grads_b: list[torch.Tensor | None] = [None] * len(grads)
    if not live:
        return None, grads_a, grads_b
    grad_x_NI, *of_live = _gradients_of_all(saved.of(list(live)), list(live.values()), wants)
    for index, grad_a_RI, grad_b_OR in zip(live, *of_live, strict=True):
        grads_a[index], grads_b[index] = grad_a_RI, grad_b_OR
    return grad_x_NI, grads_a, grads_b


def _gradients_of_all(
    saved: _Saved, grads: Sequence[torch.Tensor], wants: tuple[bool, bool, bool]
) -> tuple[torch.Tensor | None, Gradients, Gradients]:
    x_NI, a_SI, reduced_NS, weights, b_of_each, ranks, scales, dtype = saved
    sizes = [grad_NO.shape[1] for grad_NO in grads]
    is_even = len(set(ranks)) == 1  # gradients of Bs of one rank lie side by side
    wide_RO = x_NI.new_empty(ranks[0], sum(sizes)) if is_even and wants[2] else None
    if wide_RO is not None:
        of_b = _split(wide_RO, sizes, 1)
    else:
        of_b = [x_NI.new_empty(rank, size) for rank, size in zip(ranks, sizes, strict=True)]
    grad_reduced_NS, grad_x_NI = torch.empty_like(reduced_NS), None
    parts = zip(_split(grad_reduced_NS, ranks, 1), _split(reduced_NS, ranks, 1), of_b, strict=True)
    of_each = zip(parts, grads, weights, b_of_each, scales, strict=True)
    for (grad_NR, reduced_NR, b_RO), grad_NO, weight_OI, b_OR, scale in of_each:  # while a gradient is in the cache
        grad_NR.addmm_(grad_NO, b_OR, beta=0, alpha=scale)
        if wants[0]:
            grad_x_NI = grad_NO @ weight_OI if grad_x_NI is None else grad_x_NI.addmm_(grad_NO, weight_OI)
        if wants[2]:
            b_RO.addmm_(reduced_NR.T, grad_NO, beta=0, alpha=scale)
    if grad_x_NI is not None:
        grad_x_NI.addmm_(grad_reduced_NS, a_SI)
    grads_a: Gradients = [None] * len(grads)
    grads_b: Gradients = [None] * len(grads)
    if wants[1]:
        grads_a = _split((grad_reduced_NS.T @ x_NI).to(dtype), ranks)
    if wants[2]:
        grads_b = _split(_as_b(wide_RO, dtype), sizes) if wide_RO is not None else [_as_b(b_RO, dtype) for b_RO in of_b]
    return grad_x_NI, grads_a, grads_b


def _as_b(grad_RO: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The gradient of one B or several, one below another [O, R], from its transpose.

    They are computed as [R, O]: as [O, R], they take up to ten times as long in float32 on a CPU. One copy then brings
    them to the layout and the dtype of B, so that autograd makes none.
    """
    return grad_RO.T.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _operator(
    x_NI: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    a_of_each: Sequence[torch.Tensor],
    b_of_each: Sequence[torch.Tensor],
    scales: Sequence[float],
) -> list[torch.Tensor]:
    """``x At`` [N, S], then the output [N, O] of each module."""
    a_SI, b_in_dtype = _joined(a_of_each, b_of_each, x_NI.dtype)
    ranks = [len(a_RI) for a_RI in a_of_each]
    reduced_NS, outputs = _compute(x_NI, weights, biases, a_SI, b_in_dtype, ranks, scales)
    return [reduced_NS, *outputs]


# a single operator, so that selective recomputation can keep its results. It is not used elsewhere: on a GPU its
# dispatch takes as long as three small kernels
low_rank_products = library.custom_op("aletheia::low_rank_products", _operator, mutates_args=())


@low_rank_products.register_fake
def _(
    x_NI: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    a_of_each: Sequence[torch.Tensor],
    b_of_each: Sequence[torch.Tensor],
    scales: Sequence[float],
) -> list[torch.Tensor]:
    widths = [sum(len(a_RI) for a_RI in a_of_each), *(len(weight_OI) for weight_OI in weights)]
    return [x_NI.new_empty(len(x_NI), width) for width in widths]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    x_NI, weights, biases, a_of_each, b_of_each, ctx.scales = inputs
    tensors_only = all(bias is not None for bias in biases)
    ctx.of_biases = [None] * len(biases) if tensors_only else None  # torch's rule for lists
    ctx.save_for_backward(x_NI, output[0], *weights, *a_of_each, *b_of_each)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: Sequence[torch.Tensor | None]) -> tuple[Any, ...]:
    x_NI, reduced_NS, *rest = ctx.saved_tensors
    count = len(ctx.scales)
    weights, a_of_each, b_of_each = rest[:count], rest[count : 2 * count], rest[2 * count :]
    a_SI, b_in_dtype = _joined(a_of_each, b_of_each, x_NI.dtype)
    ranks = [len(a_RI) for a_RI in a_of_each]
    saved = _Saved(x_NI, a_SI, reduced_NS, weights, b_in_dtype, ranks, ctx.scales, a_of_each[0].dtype)
    grad_x_NI, grads_a, grads_b = _gradients(saved, grads[1:], (ctx.needs_input_grad[0], True, True))
    return grad_x_NI, [None] * count, ctx.of_biases, list(grads_a), list(grads_b), None


low_rank_products.register_autograd(_backward, setup_context=_keep)
