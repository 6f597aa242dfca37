"""Ratios of times with bootstrap intervals: of two arms over paired rounds, and their mean over models or seeds.

The intervals are bias-corrected and accelerated (BCa, Efron 1987) with expanded levels. At 8 to 12 rounds, plain BCa
intervals of 95 % cover the truth in 86 to 90 of 100 cases. They use normal quantiles, and a resample spreads less than
the sample by sqrt((n - 1) / n). The expansion replaces the normal quantile z by sqrt(n / (n - 1)) t, as Hesterberg 2015
(The American Statistician 69:371-386) does for percentile intervals. The measured coverage is in
``docs/results/statistics/README.md``.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr
from scipy.stats import bootstrap
from scipy.stats import t as student

from aletheia.lab.statistics.results import (
    LEVEL,
    Estimate,
    Floats,
    Interval,
    check_level,
    check_paired,
    is_constant,
    positive,
)

RESAMPLES = 10_000
FEWEST = 8  # the smallest size with sufficient coverage for all tested noise; with 6 rounds it is 92 %
NUMBERS_AT_ONCE = 2_000_000  # memory of a batch of resamples


def ratio_of_times(
    baseline_seconds: ArrayLike, arm_seconds: ArrayLike, level: float = LEVEL, seed: int = 0
) -> Estimate:
    """How many times faster than the baseline an arm is: the ratio of summed times over paired rounds.

    Rounds are resampled as pairs, so noise common to both arms (a large batch, a busy machine) cancels. The ratio of
    sums weights rounds by their length. If few long rounds dominate, there are fewer degrees of freedom than rounds:
    (sum w^2)^2 / sum w^4 - 1, after Satterthwaite 1946.

    Args:
        baseline_seconds: a time per round.
        arm_seconds: the arm's times in the same rounds, in the same order.
        level: of the two-sided interval.
        seed: of the resamples; the same seed gives the same interval.

    Raises:
        StatisticsError: no rounds, unequal numbers of rounds, or a time that is not above zero.
    """
    baseline, arm = positive(baseline_seconds, "baseline's times"), positive(arm_seconds, "arm's times")
    check_paired("baseline times", len(baseline), "arm times", len(arm))
    check_level(level)

    def log_ratio(top: Floats, bottom: Floats, axis: int = -1) -> Floats:
        return np.asarray(np.log(top.sum(axis=axis) / bottom.sum(axis=axis)))

    weights = (baseline / baseline.sum() + arm / arm.sum()) ** 2  # of a round's residual, squared
    effective = float(weights.sum() ** 2 / (weights**2).sum())
    shares = (baseline / baseline.sum(), arm / arm.sum())
    return _estimate(float(baseline.sum() / arm.sum()), shares, log_ratio, effective, level, seed)


def geometric_mean(ratios: ArrayLike, level: float = LEVEL, seed: int = 0) -> Estimate:
    """Geometric mean of independent ratios, with a BCa interval.

    Ratios of several seeds on one model are not independent: take their geometric mean first and give one ratio per
    model. For fewer than 8 ratios, see ``geometric_mean_of_few``.

    Raises:
        StatisticsError: no ratio, or one that is not above zero.
    """
    logs = np.log(positive(ratios, "ratios"))
    check_level(level)

    def mean(values: Floats, axis: int = -1) -> Floats:
        return np.asarray(values.mean(axis=axis))

    return _estimate(float(np.exp(logs.mean())), (logs - logs.mean(),), mean, len(logs), level, seed)


def _estimate(
    value: float,
    data: tuple[Floats, ...],
    log_statistic: Callable[..., Floats],
    effective: float,
    level: float,
    seed: int,
) -> Estimate:
    """``value`` with its BCa interval; the ``data`` are centred, so that their ``log_statistic`` is 0.

    The degrees of freedom come from ``effective`` observations, at least 4: there, the quantile for 8 values is at 3.4
    standard errors, where the resamples end.
    """
    n = len(data[0])
    if n < FEWEST:
        return Estimate(value, None, n, f"{n} ratios; a BCa interval needs at least {FEWEST}")
    if is_constant(data[0] / data[1] if len(data) > 1 else np.exp(data[0])):
        return Estimate(value, None, n, f"all {n} ratios are equal; their spread cannot be estimated")
    quantile = np.sqrt(n / (n - 1)) * student.ppf((1 + level) / 2, max(effective, 4.0) - 1)
    tail = float(ndtr(-quantile))
    if tail * RESAMPLES < 1:
        return Estimate(value, None, n, f"{n} ratios; too few for a BCa interval of {100 * level:g} %")

    def rounded(*resampled: Floats, axis: int = -1) -> Floats:
        return np.round(log_statistic(*resampled, axis=axis), 12)  # BCa counts ties with the estimate, which is 0

    # scipy's BCa converts its level to a normal quantile; this level gives ours
    result = bootstrap(
        data,
        rounded,
        paired=len(data) > 1,
        vectorized=True,
        method="BCa",
        confidence_level=1 - 2 * tail,
        n_resamples=RESAMPLES,
        batch=max(1, NUMBERS_AT_ONCE // n),
        rng=np.random.default_rng(seed),
    )
    low, high = value * np.exp(result.confidence_interval)
    return Estimate(value, Interval(float(low), float(high), level, "BCa, expanded levels"), n)
