"""The trade-off between predicted time and captured importance, in full."""

from collections.abc import Sequence
from dataclasses import dataclass

from aletheia.planning.cost import LayerCosts


@dataclass(frozen=True)
class FrontierPoint:
    """One choice of layers that no other choice beats in both time and importance.

    Times are relative to a step of the baseline, uniform LoRA in plain PEFT. They are given without a cache, from a
    filled cache, and as the mean over a run. The frontier goes by the mean.
    """

    layers: tuple[int, ...]
    relative_step_time: float
    relative_cached_step_time: float
    relative_run_time: float
    captured_importance: float

    @property
    def boundary(self) -> int:
        """Index of the lowest adapted layer."""
        return self.layers[0]

    @property
    def speedup(self) -> float:
        """Predicted time of the baseline divided by this choice's, over the run."""
        return 1.0 / self.relative_run_time


def captured_importance(scores: Sequence[float], layers: Sequence[int]) -> float:
    """Share of the summed scores in ``layers``; 1.0 if every score is 0."""
    total = sum(scores)
    return sum(scores[layer] for layer in layers) / total if total > 0 else 1.0


def frontier(
    scores: Sequence[float], costs: LayerCosts, epochs: float = 1.0, allowed: Sequence[int] | None = None
) -> list[FrontierPoint]:
    """All choices that are not dominated, fastest first, for a run of ``epochs`` passes over the data.

    Only ``allowed`` layers are chosen; by default, any layer is.

    For a boundary ``k``, the best set of ``n`` layers is ``k`` and the ``n - 1`` highest scores above it, since layers
    of one shape cost the same to adapt. So L boundaries x L sizes hold every optimum, in O(L^2 log L). Where layers
    differ in shape, such as a dense first layer before mixtures, the set still goes by score alone.
    """
    total = sum(scores) or 1.0
    candidates: list[tuple[float, float, int, int]] = []  # time, -importance, -boundary, number of layers
    ordered: dict[int, list[int]] = {}
    layers_allowed = sorted(range(len(scores)) if allowed is None else allowed)
    for place, boundary in enumerate(layers_allowed):
        above = sorted(layers_allowed[place + 1 :], key=lambda layer: -scores[layer])
        ordered[boundary] = [boundary, *above]
        time = costs.mean_step((boundary,), epochs) - costs.adapter[boundary]
        importance = 0.0
        for count, layer in enumerate(ordered[boundary], start=1):
            time += costs.adapter[layer]
            importance += scores[layer]
            candidates.append((time, -importance / total, -boundary, count))
    points: list[FrontierPoint] = []
    best = -1.0
    for _, negative_importance, negative_boundary, count in sorted(candidates):
        if -negative_importance > best:
            best = -negative_importance
            layers = tuple(sorted(ordered[-negative_boundary][:count]))
            points.append(point(scores, costs, layers, epochs))
    return points


def point(scores: Sequence[float], costs: LayerCosts, layers: tuple[int, ...], epochs: float = 1.0) -> FrontierPoint:
    """Time and importance of one choice of layers."""
    return FrontierPoint(
        layers=layers,
        relative_step_time=costs.step(layers) / costs.baseline,
        relative_cached_step_time=costs.cached_step(layers) / costs.baseline,
        relative_run_time=costs.mean_step(layers, epochs) / costs.baseline,
        captured_importance=captured_importance(scores, layers),
    )


def best_within(points: Sequence[FrontierPoint], relative_run_time: float) -> FrontierPoint | None:
    """The point with the most importance whose predicted time fits, or None if even the fastest does not."""
    fitting = [point for point in points if point.relative_run_time <= relative_run_time * (1 + 1e-9)]
    return fitting[-1] if fitting else None
