"""Selection policies: scores in, layer indices out. Ties are won by the lower layer index everywhere."""

import random
from collections.abc import Sequence

from aletheia.errors import PlanError
from aletheia.planning.cost import LayerCosts
from aletheia.planning.frontier import best_within, frontier
from aletheia.planning.plan import Policy


def layer_share(layer_count: int, percent: float) -> int:
    """How many layers ``percent`` of them are: rounded down, at least 1 [arXiv:2604.15351].

    Raises:
        PlanError: ``percent`` is outside (0, 100].
    """
    if not 0 < percent <= 100:
        raise PlanError(f"--percent is {percent:g}; expected more than 0 and at most 100")
    return max(int(layer_count * percent / 100), 1)


def select_layers(
    policy: Policy,
    scores: Sequence[float],
    percent: float,
    seed: int,
    costs: LayerCosts,
    epochs: float = 1.0,
    speedup: float | None = None,
    lowest: int = 0,
) -> tuple[int, ...]:
    """The sorted layers that ``policy`` adapts.

    ``top-percent`` is the published method. ``depth-aware`` spends the predicted time of a run of ``epochs`` passes,
    that of adapting the last ``percent`` of the layers or the baseline's divided by ``speedup``, on the set that
    captures the most importance. ``last``, ``first``, ``random`` and ``bottom`` (lowest scores) take as many layers as
    ``top-percent``: they are its controls. No layer below ``lowest`` may be adapted; ``depth-aware`` works around
    that.

    Raises:
        PlanError: ``percent`` is outside (0, 100], or another policy wants a lower layer.
    """
    chosen = _chosen(policy, scores, percent, seed, costs, epochs, speedup, lowest)
    if chosen[0] < lowest:
        raise PlanError(
            f"--policy {policy} adapts layer {chosen[0]}; expected none below {lowest}, from where on training fits "
            "in --max-memory; take depth-aware, fewer layers or more memory"
        )
    return chosen


def _chosen(
    policy: Policy,
    scores: Sequence[float],
    percent: float,
    seed: int,
    costs: LayerCosts,
    epochs: float,
    speedup: float | None,
    lowest: int,
) -> tuple[int, ...]:
    count = layer_share(len(scores), percent)
    layers = range(len(scores))
    match policy:
        case "uniform":
            return tuple(layers)
        case "top-percent":
            return tuple(sorted(sorted(layers, key=lambda layer: -scores[layer])[:count]))
        case "bottom":
            return tuple(sorted(sorted(layers, key=lambda layer: scores[layer])[:count]))
        case "first":
            return tuple(layers[:count])
        case "last":
            return tuple(layers[-count:])
        case "random":
            return tuple(sorted(random.Random(seed).sample(layers, count)))
        case "depth-aware":
            points = frontier(scores, costs, epochs, lowest)
            budget = 1 / speedup if speedup else costs.mean_step(layers[-count:], epochs) / costs.baseline
            point = best_within(points, budget)
            return (point or points[0]).layers  # rounding aside, a speed-up that cannot be had was refused before
