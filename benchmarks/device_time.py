"""The least time that a GPU needs for a step, if launching its kernels costs nothing. Needs no GPU.

.venv/bin/python benchmarks/device_time.py [--models 8b,1.5b] [--top 12]

A step of ours runs over fake tensors. Each operator counts as one kernel. It takes the longest of three times: its operations at
the card's measured rate, its bytes (every input and output once) at its bandwidth, and the least that a kernel takes. The sum is
a bound from below for these operators: real products of these sizes are slower than the large one of the measured rate. Differences
from the operators on a GPU: gates and rotary positions are several operators here and one kernel by Liger; the loss has more
kernels; attention is over one row, so its operations are those of all rows divided by their number. The share of the limit is
defined as in gpu.py: products with weights alone count as work.

Takes a minute on one core.
"""

import argparse
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from math import prod
from statistics import fmean
from typing import Any

import torch
from fake_steps import Kind, learning, stepping
from gpu_models import Shape, operations_of, rows_of, shapes
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from aletheia.anatomy.access import base_of

STEPS = 8  # of the GPU's benchmark, over all its rows
ATTENTION_PRODUCTS = {"forward": 2, "backward": 5}  # two of them, and five that read their inputs again


@dataclass(frozen=True)
class Card:
    """What a GPU does at most."""

    flops_per_second: float
    bytes_per_second: float
    least_kernel_seconds: float


@dataclass
class Spent:
    """Calls of one operator on one set of shapes."""

    calls: int = 0
    seconds: float = 0.0


@dataclass
class DeviceTime(TorchDispatchMode):
    """Sums up the least seconds of all operators, by their names and shapes."""

    card: Card
    rows: int
    spent: dict[str, Spent] = field(default_factory=lambda: defaultdict(Spent))

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = operator(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        name = operator.overloadpacket.__name__
        if is_kernel(operator, given, made):
            if name == "embedding":  # reads the rows it gives
                given = made
            size = sum(tensor.numel() * tensor.element_size() for tensor in given + made)
            flops = self._flops(operator, args, kwargs or {}, output)
            spent = self.spent[f"{name} {' '.join(shape_of(tensor) for tensor in given[:3])}"]
            spent.calls += 1
            spent.seconds += max(
                flops / self.card.flops_per_second, size / self.card.bytes_per_second, self.card.least_kernel_seconds
            )
        return output

    def _flops(self, operator: Any, args: Any, kwargs: Any, output: Any) -> int:
        packet = operator.overloadpacket
        if "scaled_dot_product" in packet.__name__:
            query_BHTD = args[1] if "backward" in packet.__name__ else args[0]
            products = ATTENTION_PRODUCTS["backward" if "backward" in packet.__name__ else "forward"]
            return products * prod(query_BHTD.shape) * query_BHTD.shape[2] // self.rows  # half of T x T, each times 2
        packet = getattr(torch.ops.aten, packet.__name__.removesuffix("_"), packet)  # products in place are as long
        return int(flop_registry[packet](*args, **kwargs, out_val=output)) if packet in flop_registry else 0


def is_kernel(operator: Any, given: list[torch.Tensor], made: list[torch.Tensor]) -> bool:
    """Whether an operator works on a device: it is no view and no allocation."""
    inputs = {tensor.untyped_storage()._cdata for tensor in given}
    is_view = all(tensor.untyped_storage()._cdata in inputs for tensor in made) and not operator._schema.is_mutable
    return not is_view and "empty" not in operator.overloadpacket.__name__


def shape_of(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "1"


def kinds_of(shape: Shape) -> dict[str, Kind]:
    """Steps on packed rows: with every layer, and the upper half from the cache."""
    row_tokens = round(fmean(len(row) for row in rows_of(shape, shape.batch_size * STEPS).examples))
    tokens, half = shape.batch_size * row_tokens, shape.config.num_hidden_layers // 2
    return {
        "every layer": Kind(shape.config, torch.bfloat16, 0, 1, tokens),
        "upper half, cached": Kind(shape.config, torch.bfloat16, half, 1, tokens, cached=True),
    }


def time_of(kind: Kind, rows: int, card: Card) -> tuple[DeviceTime, float]:
    """Of the second step, and the operations of its products with weights.

    The first step asks layers below the boundary for the form of their results.
    """
    with stepping(kind) as stepper:
        for module in stepper.model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = one_kernel.__get__(module)
        optimizer = torch.optim.AdamW(learning(stepper.model), fused=True)
        stepper.take(optimizer)
        with DeviceTime(card, rows) as spent:
            stepper.take(optimizer)
        labelled = round(kind.row_tokens * kind.labelled_share)
        work = operations_of(base_of(stepper.model)).of(kind.row_tokens, labelled, kind.boundary, kind.cached)
    return spent, work


def one_kernel(self: nn.Module, hidden_BTD: torch.Tensor) -> torch.Tensor:
    """A norm that, like the one on a GPU, is one kernel forward and one backward, and reads and writes as much."""
    return functional.layer_norm(hidden_BTD, hidden_BTD.shape[-1:], self.weight)  # type: ignore[arg-type]


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="8b,1.5b")
    parser.add_argument("--tflops", type=float, default=693, help="measured on the H200 of docs/results/gpu")
    parser.add_argument("--terabytes", type=float, default=4.0, help="a second; an H200 is sold with 4.8")
    parser.add_argument("--microseconds", type=float, default=2.5, help="the least that a kernel takes")
    parser.add_argument("--top", type=int, default=0, help="operators to list for each step, most time first")
    options = parser.parse_args()
    card = Card(options.tflops * 1e12, options.terabytes * 1e12, options.microseconds * 1e-6)
    print("| model | step | tokens | kernels | products alone ms | all kernels ms | share of the limit |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for name in options.models.split(","):
        shape = shapes(tiny=False)[name]
        for label, kind in kinds_of(shape).items():
            found, work = time_of(kind, shape.batch_size, card)
            spent, products = found.spent, work / card.flops_per_second
            seconds, calls = sum(one.seconds for one in spent.values()), sum(one.calls for one in spent.values())
            times = f"{products * 1e3:.0f} | {seconds * 1e3:.0f} | {products / seconds:.0%} |"
            print(f"| {shape.name} | {label} | {kind.row_tokens:,} | {calls:,} | {times}", flush=True)
            for operator, one in sorted(spent.items(), key=lambda pair: -pair[1].seconds)[: options.top]:
                print(f"    {one.seconds * 1e3:7.2f} ms {one.calls:5} x {operator}")


if __name__ == "__main__":
    main()
