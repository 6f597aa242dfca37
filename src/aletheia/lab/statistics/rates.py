"""Shares with Wilson intervals."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest

from aletheia.errors import StatisticsError
from aletheia.lab.statistics.results import LEVEL, Estimate, Interval, check_level, sample


def proportion(successes: int, n: int, level: float = LEVEL) -> Estimate:
    """A share and its Wilson interval (Wilson 1927), which stays within 0 to 1 and has a width even at 0 and ``n``.

    Raises:
        StatisticsError: no trial, or ``successes`` is not between 0 and ``n``.
    """
    check_level(level)
    if n < 1 or not 0 <= successes <= n:
        raise StatisticsError(f"found {successes} successes of {n}; expected 0 to n of at least 1; count again")
    low, high = binomtest(successes, n).proportion_ci(confidence_level=level, method="wilson")
    return Estimate(successes / n, Interval(float(low), float(high), level, "Wilson"), n)


def win_rate(gains: ArrayLike, level: float = LEVEL) -> Estimate:
    """Share of comparisons that an arm wins: its gains over the baseline that are above zero. A tie is not a win.

    Raises:
        StatisticsError: no comparison, or a gain that is not finite.
    """
    vector = sample(gains, "gains")
    return proportion(int(np.count_nonzero(vector > 0)), len(vector), level)
