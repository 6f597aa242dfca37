"""Selection policies: scores in, layer indices out. The lower layer index wins every tie."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from aletheia.errors import PlanError
from aletheia.planning.cost import LayerCosts
from aletheia.planning.frontier import FrontierPoint, best_within, frontier
from aletheia.planning.plan import PERCENT, PlanSettings


@dataclass(frozen=True)
class Candidates:
    """What a policy chooses from.

    ``layers`` are the sorted indices of layers that have modules to adapt; none below ``lowest`` may be adapted. Time
    is that of a run of ``epochs`` passes. A ``speedup`` says how many times as fast as the baseline it must be.
    """

    scores: Sequence[float]
    costs: LayerCosts
    layers: Sequence[int]
    lowest: int = 0
    epochs: float = 1.0
    speedup: float | None = None

    @property
    def frontier(self) -> list[FrontierPoint]:
        """All choices that no other beats in both time and importance, fastest first."""
        allowed = [layer for layer in self.layers if layer >= self.lowest]
        return frontier(self.scores, self.costs, self.epochs, allowed)


def layer_share(layer_count: int, percent: float) -> int:
    """``percent`` of ``layer_count`` layers, rounded down, at least 1 [arXiv:2604.15351]."""
    return max(int(layer_count * percent / 100), 1)


def select_layers(settings: PlanSettings, candidates: Candidates) -> tuple[int, ...]:
    """The sorted layers that ``settings.policy`` adapts.

    ``top-percent`` is the published method. ``depth-aware`` takes the set that captures the most importance within a
    time budget: that of adapting the last ``percent`` of the layers, or the baseline's time divided by the speed-up.
    ``last``, ``first``, ``random`` and ``bottom`` (lowest scores) are controls and take as many layers as
    ``top-percent``. Only ``depth-aware`` works around layers that may not be adapted.

    Raises:
        PlanError: another policy chooses a layer below the lowest that may be adapted.
    """
    chosen = _chosen(settings, candidates)
    if chosen[0] < candidates.lowest:
        raise PlanError(
            f"`policy` {settings.policy} adapts layer {chosen[0]}, but only layers from {candidates.lowest} up fit in "
            "`max_memory`; expected none below; use depth-aware, fewer layers or more memory"
        )
    return chosen


def _chosen(settings: PlanSettings, candidates: Candidates) -> tuple[int, ...]:
    scores, layers = candidates.scores, tuple(candidates.layers)
    count = layer_share(len(layers), settings.percent or PERCENT)
    match settings.policy:
        case "uniform":
            return layers
        case "top-percent":
            return tuple(sorted(sorted(layers, key=lambda layer: -scores[layer])[:count]))
        case "bottom":
            return tuple(sorted(sorted(layers, key=lambda layer: scores[layer])[:count]))
        case "first":
            return layers[:count]
        case "last":
            return layers[-count:]
        case "random":
            return tuple(sorted(random.Random(settings.seed).sample(layers, count)))
        case "depth-aware" | None:
            costs, points = candidates.costs, candidates.frontier
            budget = costs.mean_step(layers[-count:], candidates.epochs) / costs.baseline
            point = best_within(points, 1 / candidates.speedup if candidates.speedup else budget)
            return (point or points[0]).layers  # apart from rounding, an unreachable speed-up was refused before
