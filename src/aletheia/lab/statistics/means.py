"""Means with Student's t intervals: over a few seeds, and of paired differences, clustered or not."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student

from aletheia.errors import StatisticsError
from aletheia.lab.statistics.results import (
    LEVEL,
    Estimate,
    Floats,
    Interval,
    check_level,
    check_paired,
    cluster_numbers,
    is_constant,
    positive,
    sample,
)


@dataclass(frozen=True)
class StandardError:
    """The standard error of a mean, in the unit of the values, and its degrees of freedom."""

    value: float
    degrees_of_freedom: int
    clusters: int | None = None

    def half_width(self, probability: float) -> float:
        """Distance from the mean to the one-sided bound that holds with ``probability``."""
        return float(student.ppf(probability, self.degrees_of_freedom)) * self.value

    @property
    def method(self) -> str:
        """The name of an interval that is made from it."""
        return "Student's t" if self.clusters is None else "Student's t, cluster-robust (CR1)"


def standard_error(values: Floats, clusters: Sequence[Hashable] | None = None) -> StandardError | str:
    """The standard error of the mean of ``values``, or in words why there is none.

    With clusters it is cluster-robust (Liang and Zeger 1986), with the factor G / (G - 1) for G clusters and G - 1
    degrees of freedom. For a mean, that factor is the whole correction CR1 (Cameron and Miller 2015, eq. 11 and 12). It
    allows any dependence within a cluster and clusters of any size. With fewer than about 20 clusters, or a few that
    hold most of the items, its intervals are too short.
    """
    n = len(values)
    if n < 2:
        return "one value; an interval needs at least 2"
    if is_constant(values):
        return f"all {n} values are equal; their spread cannot be estimated"
    if clusters is None:
        return StandardError(float(values.std(ddof=1) / np.sqrt(n)), n - 1)
    sums = np.bincount(cluster_numbers(clusters, n), weights=values - values.mean())
    if len(sums) < 2:
        return "one cluster; an interval needs at least 2"
    variance = len(sums) / (len(sums) - 1) * float((sums**2).sum()) / n**2
    if np.sqrt(variance) <= 1e-12 * float(np.abs(values).max()):
        return f"all {len(sums)} clusters have the mean of the whole; their spread cannot be estimated"
    return StandardError(float(np.sqrt(variance)), len(sums) - 1, len(sums))


def mean(values: ArrayLike, clusters: Sequence[Hashable] | None = None, level: float = LEVEL) -> Estimate:
    """A mean and its interval: of a metric over seeds, or of paired differences over items.

    Args:
        values: one per seed, or one difference (arm minus baseline) per item.
        clusters: for each value, the name of its group, such as an MMLU subject.
        level: of the two-sided interval.

    Raises:
        StatisticsError: no value, a value that is not finite, or not one cluster per value.
    """
    vector = sample(values, "values")
    check_level(level)
    if clusters is not None:
        cluster_numbers(clusters, len(vector))  # refused before any other reason is given
    value = float(vector.mean())
    error = standard_error(vector, clusters)
    if isinstance(error, str):
        return Estimate(value, None, len(vector), error)
    half = error.half_width((1 + level) / 2)
    return Estimate(value, Interval(value - half, value + half, level, error.method), len(vector))


def linearised(sums: ArrayLike, weights: ArrayLike) -> Floats:
    """Numbers, one per item, whose mean is ``sum(sums) / sum(weights)`` and whose spread is that of the ratio.

    An item counts by its deviation from the ratio, not by its length (Cochran 1977, Sampling Techniques, ch. 6).
    :func:`mean` of these numbers is the ratio with its interval, and their differences are paired by item.

    Raises:
        StatisticsError: no items, unequal numbers, a number that is not finite, or a weight that is not above zero.
    """
    above, below = sample(sums, "sums"), positive(weights, "weights")
    check_paired("sums", len(above), "weights", len(below))
    ratio = above.sum() / below.sum()
    return np.asarray((above - ratio * below) / below.mean() + ratio)


def geometric_mean_of_few(ratios: ArrayLike, level: float = LEVEL) -> Estimate:
    """Geometric mean of 2 to 7 ratios, too few for a bootstrap: Student's t on their logarithms.

    Exact if the ratios are lognormal, which so few cannot confirm.

    Raises:
        StatisticsError: no ratio, or one that is not above zero.
    """
    logs = mean(np.log(positive(ratios, "ratios")), level=level)
    if logs.interval is None:
        return Estimate(float(np.exp(logs.value)), None, logs.n, logs.reason)
    low, high = float(np.exp(logs.interval.low)), float(np.exp(logs.interval.high))
    return Estimate(float(np.exp(logs.value)), Interval(low, high, level, "Student's t on logarithms"), logs.n)


def crossed_mean(
    values: Sequence[ArrayLike], clusters: Sequence[Hashable] | None = None, level: float = LEVEL
) -> Estimate:
    """Mean of values with a row per seed and a column per item, both of which are samples.

    Effects that all items of a seed share (a lucky run) and effects that all seeds of an item share (a hard question)
    vary independently. The variance is the sum of two: over items, of values averaged over seeds, and over seeds, of
    values averaged over items. It is a little too large, as the residual counts twice (Owen 2007, Annals of Applied
    Statistics 1:386-411). Degrees of freedom follow Satterthwaite 1946. With one seed, the interval is that of this
    run, and ``reason`` says so.

    Raises:
        StatisticsError: no seed, unequal numbers of items, or as :func:`mean`.
    """
    rows = [sample(row, "values of a seed") for row in values]
    if not rows:
        raise StatisticsError("found no seed; expected at least one; leave out what has not run")
    for row in rows[1:]:
        check_paired("items of one seed", len(rows[0]), "of another", len(row))
    by_item = np.mean(rows, axis=0)
    over_items = mean(by_item, clusters, level)
    if len(rows) == 1:
        return replace(over_items, reason=over_items.reason or "of one run")
    check_level(level)
    items = standard_error(by_item, clusters)
    seeds = standard_error(np.array([row.mean() for row in rows]))
    if isinstance(items, str):
        return over_items
    if isinstance(seeds, str):  # seeds that agree to the last digit add nothing
        return over_items
    parts = [(error.value**2, error.degrees_of_freedom) for error in (items, seeds)]
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    half = float(student.ppf((1 + level) / 2, freedom) * np.sqrt(variance))
    method = f"Student's t over items and seeds{', clustered' if clusters is not None else ''}"
    return Estimate(
        over_items.value, Interval(over_items.value - half, over_items.value + half, level, method), over_items.n
    )
