"""Selection policies: scores in, layer indices out. Ties are won by the lower layer index everywhere."""

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

    ``layers`` are those that have something to adapt, sorted; none below ``lowest`` may be adapted. Time is that of a
    run of ``epochs`` passes, which has to be ``speedup`` times as fast as the baseline where that is given.
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
    """How many layers ``percent`` of them are: rounded down, at least 1 [arXiv:2604.15351]."""
    return max(int(layer_count * percent / 100), 1)


def select_layers(settings: PlanSettings, candidates: Candidates) -> tuple[int, ...]:
    """The sorted layers that ``settings.policy`` adapts.

    ``top-percent`` is the published method. ``depth-aware`` spends the predicted time of a run, that of adapting the
    last ``percent`` of the layers or the baseline's divided by the speed-up, on the set that captures the most
    importance. ``last``, ``first``, ``random`` and ``bottom`` (lowest scores) take as many layers as ``top-percent``:
    they are its controls. ``depth-aware`` works around layers that may not be adapted.

    Raises:
        PlanError: another policy wants a layer below the lowest that may be adapted.
    """
    chosen = _chosen(settings, candidates)
    if chosen[0] < candidates.lowest:
        raise PlanError(
            f"`policy` {settings.policy} adapts layer {chosen[0]}; expected none below {candidates.lowest}, from where "
            "on training fits in `max_memory`; take depth-aware, fewer layers or more memory"
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
            return (point or points[0]).layers  # rounding aside, a speed-up that cannot be had was refused before
