"""Scores of layers that may say what a layer is worth, from the gradients of the base model over some rows.

Shapes: N tokens of a row, I inputs and O outputs of a matrix, R rank. G [O, I] is the loss gradient of a matrix.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

RIDGE = 0.01  # of the mean variance, added to each direction's
DRAWS = 4  # of A


def unbiased_norm(sum_norm: float, squares: float, rows: int) -> float:
    """Norm of the mean gradient without the rows' noise, from ``||sum g||`` and ``sum ||g||^2``; 0 where that is negative.

    ``(||sum g||^2 - sum ||g||^2) / (n (n - 1))`` is the mean inner product of the gradients of two different rows: their
    noise is independent, so its expectation is the squared norm of the expected gradient.
    """
    return max((sum_norm**2 - squares) / (rows * (rows - 1)), 0.0) ** 0.5


def inverse_root(covariance_II: torch.Tensor, ridge: float = RIDGE) -> torch.Tensor:
    """``(C + ridge x mean variance x 1)^(-1/2)`` [I, I], symmetric."""
    values_I, vectors_II = torch.linalg.eigh(covariance_II)
    values_I = values_I.clamp(min=0)
    return (vectors_II * (values_I + ridge * values_I.mean()).rsqrt()) @ vectors_II.T


def adam_gain(grad_OI: torch.Tensor, rank: int, scale: float, rate: float, draws: int = DRAWS) -> float:
    """What one step of Adam on LoRA at its start gains to first order: ``rate x sum |s G At|``, mean over draws of A.

    At ``B = 0`` the gradient of B is ``s G At`` and that of A is 0; Adam's first step moves each entry by the rate. A is
    uniform up to ``1 / sqrt(I)``, as PEFT draws it.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = grad_OI.shape[1]
    total = 0.0
    for _ in range(draws):
        a_RI = (torch.rand(rank, inputs, generator=generator) * 2 - 1) / inputs**0.5
        total += (grad_OI @ a_RI.to(grad_OI.device).T).abs().sum().item()
    return rate * scale * total / draws


Seen = Callable[[str, torch.Tensor, torch.Tensor], None]


@contextmanager
def gradients_seen(model: torch.nn.Module, modules: dict[str, torch.nn.Module], seen: Seen) -> Iterator[None]:
    """Call ``seen(name, input_NI, grad_NO)``, both float32, for each matrix in each backward pass; no weight has a gradient."""

    def watch(name: str) -> Callable:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            input_NI = args[0].detach().flatten(0, -2)
            output.register_hook(lambda grad: seen(name, input_NI.float(), grad.flatten(0, -2).float()))

        return hook

    with ExitStack() as stack:
        start = model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_(True))
        stack.callback(start.remove)
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(watch(name)).remove)
        yield


def inverse_roots(
    model: torch.nn.Module, modules: dict[str, torch.nn.Module], batches: Sequence[dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """The inverse root of the second moments of each matrix's inputs over all tokens; matrices of one input share it."""
    sums: dict[str, torch.Tensor] = {}
    owner: dict[str, str] = {}
    last: list = [None, ""]
    tokens = sum(batch["input_ids"].numel() for batch in batches)

    def watch(name: str) -> Callable:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            if last[0] is not args[0]:
                last[:] = [args[0], name]
                input_NI = args[0].flatten(0, -2).float()
                moment_II = input_NI.T @ input_NI / tokens
                sums[name] = sums[name] + moment_II if name in sums else moment_II
            owner[name] = last[1]

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(watch(name)).remove)
        for batch in batches:
            model(**batch, use_cache=False)
    roots = {name: inverse_root(sums.pop(name)) for name in list(sums)}
    return {name: roots[owner[name]] for name in modules}


def module_scores(
    model: torch.nn.Module,
    modules: dict[str, torch.nn.Module],
    batches: Sequence[dict[str, torch.Tensor]],
    rank: int,
    scale: float,
    rate: float,
) -> dict[str, dict[str, float]]:
    """By matrix: ``unbiased``, ``per_parameter``, ``whitened``, ``adam_gain``, and ``clipped`` where the first was negative.

    ``batches`` are of one row each, on the model's device; the loss of a row is its mean over labelled tokens.
    """
    roots = inverse_roots(model, modules, batches)
    sums: dict[str, torch.Tensor] = {}
    squares = dict.fromkeys(modules, 0.0)
    whitened_squares = dict.fromkeys(modules, 0.0)

    def add(name: str, input_NI: torch.Tensor, grad_NO: torch.Tensor) -> None:
        grad_OI = grad_NO.T @ input_NI
        squares[name] += grad_OI.norm().item() ** 2
        whitened_squares[name] += (grad_NO.T @ (input_NI @ roots[name])).norm().item() ** 2
        sums[name] = sums[name].add_(grad_OI) if name in sums else grad_OI

    with gradients_seen(model, modules, add):
        for batch in batches:
            model(**batch, use_cache=False).loss.backward()
    found = {}
    for name, sum_OI in sums.items():
        rows = len(batches)
        unbiased = unbiased_norm(sum_OI.norm().item(), squares[name], rows)
        found[name] = {
            "unbiased": unbiased,
            "per_parameter": unbiased / sum_OI.numel() ** 0.5,
            "whitened": unbiased_norm((sum_OI @ roots[name]).norm().item(), whitened_squares[name], rows),
            "adam_gain": adam_gain(sum_OI / rows, rank, scale, rate),
            "clipped": float(unbiased == 0.0),
        }
    return found
