"""The 95 % interval of a ratio of sums over items. Plain numbers in, plain numbers out; no torch."""

from collections.abc import Callable

import numpy as np

from aletheia.statistics.results import LEVEL, Estimate

Bounds = tuple[float, float]
RESAMPLES = 2000


def bounds_of(found: Estimate) -> Bounds | None:
    """The ends of an interval; None where there is none."""
    return (found.interval.low, found.interval.high) if found.interval else None


def bootstrap(statistic: Callable[[np.ndarray], float], items: int, seed: int = 0) -> Bounds | None:
    """Percentile bootstrap over items; ``statistic`` takes the drawn indices. None with fewer than two items."""
    if items < 2:
        return None
    random = np.random.default_rng(seed)
    drawn = [statistic(random.integers(0, items, items)) for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return float(low), float(high)
