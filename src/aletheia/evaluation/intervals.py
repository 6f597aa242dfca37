"""The 95 % intervals of an evaluation. Plain numbers in, plain numbers out; no torch.

Clusters (the subjects of MMLU) are sampled as wholes: items of one subject are right or wrong together.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

Bounds = tuple[float, float]
Values = Sequence[float] | np.ndarray
LEVEL = 0.95
RESAMPLES = 2000


def wilson(values: Values) -> Bounds:
    """Wilson's score interval for the share of ones among values of 0 and 1 [Wilson 1927]."""
    from scipy.stats import norm

    count, share, z = len(values), float(np.mean(values)), float(norm.ppf(0.5 + LEVEL / 2))
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def clustered_mean(values: Values, clusters: Sequence[object]) -> Bounds | None:
    """Interval of a mean by the cluster-robust variance and Student's t; None with fewer than two clusters."""
    from scipy.stats import t

    numbers = np.asarray(values, dtype=float)
    _, codes = np.unique(np.asarray([str(cluster) for cluster in clusters]), return_inverse=True)
    count = int(codes.max()) + 1
    if count < 2:
        return None
    deviations = np.bincount(codes, weights=numbers - numbers.mean())
    error = math.sqrt(count / (count - 1) * float(np.sum(deviations**2))) / len(numbers)
    half = float(t.ppf(0.5 + LEVEL / 2, count - 1)) * error
    return float(numbers.mean()) - half, float(numbers.mean()) + half


def bootstrap(statistic: Callable[[np.ndarray], float], items: int, seed: int = 0) -> Bounds | None:
    """Percentile bootstrap over items; ``statistic`` takes the drawn indices. None with fewer than two items."""
    if items < 2:
        return None
    random = np.random.default_rng(seed)
    drawn = [statistic(random.integers(0, items, items)) for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return float(low), float(high)
