"""Non-inferiority: whether an arm is worse than the baseline by less than a margin fixed before the run."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import ndtri

from aletheia.errors import StatisticsError
from aletheia.lab.statistics.means import standard_error
from aletheia.lab.statistics.results import LEVEL, Floats, check_level, check_paired, cluster_numbers, sample

Verdict = Literal["shown", "not shown", "cannot be shown at this size"]


@dataclass(frozen=True)
class NonInferiority:
    """The verdict on a margin, in the unit of the differences (arm minus baseline, higher is better).

    ``low`` is the one-sided bound below the mean difference: shown if it lies above minus the margin.
    ``smallest_margin`` is what these data would show if the arms had come out equal; a margin at or below it cannot be
    shown at this size, except by luck. Both are None if their spread cannot be estimated; ``reason`` says why.
    """

    verdict: Verdict
    difference: float
    low: float | None
    margin: float
    smallest_margin: float | None
    level: float
    n: int
    method: str
    reason: str = ""


def non_inferiority(
    differences: ArrayLike, margin: float, clusters: Sequence[Hashable] | None = None, level: float = LEVEL
) -> NonInferiority:
    """Verdict on the mean of paired differences (losses, seeds, models) by a one-sided bound of Student's t.

    For items that are right or wrong, use ``non_inferiority_of_items``: if few of them differ, the t bound claims too
    often.

    Args:
        differences: arm minus baseline, higher is better, one per seed, model or item.
        margin: the loss that would be accepted, above zero, in the same unit.
        clusters: for each difference, the name of its group.
        level: of the one-sided bound.

    Raises:
        StatisticsError: as ``means.mean``, or a margin that is not above zero.
    """
    vector = sample(differences, "differences")
    _check_margin(margin, level)
    if clusters is not None:
        cluster_numbers(clusters, len(vector))
    difference = float(vector.mean())
    error = standard_error(vector, clusters)
    if isinstance(error, str):
        verdict: Verdict = "cannot be shown at this size"
        return NonInferiority(verdict, difference, None, margin, None, level, len(vector), "none", error)
    half = error.half_width(level)
    return _judged(difference, difference - half, margin, half, level, len(vector), error.method)


def non_inferiority_of_items(
    baseline_right: ArrayLike,
    arm_right: ArrayLike,
    margin: float,
    clusters: Sequence[Hashable] | None = None,
    level: float = LEVEL,
) -> NonInferiority:
    """Verdict on the difference of two accuracies on the same items, as shares (0.01 is one point).

    The bound is Tango's score bound for paired proportions. It uses the spread that the margin itself would imply, so a
    run in which few or no items changed, by luck, does not look certain. Clusters can only lower it: the lower of this
    bound and the cluster-robust one counts.

    Args:
        baseline_right: 1 or True where the baseline is right, one per item.
        arm_right: the same for the arm, same items, same order.
        margin: the loss of accuracy that would be accepted, a share above zero.
        clusters: the name of each item's group, such as its MMLU subject.
        level: of the one-sided bound.

    Raises:
        StatisticsError: no items, unequal numbers of items, a value other than 0 or 1, or a margin not above zero.
    """
    baseline, arm = _right_or_wrong(baseline_right, "baseline"), _right_or_wrong(arm_right, "arm")
    check_paired("baseline items", len(baseline), "arm items", len(arm))
    _check_margin(margin, level)
    differences = arm - baseline
    n, difference = len(differences), float(differences.mean())
    gained, lost = float((differences > 0).sum()), float((differences < 0).sum())
    low, smallest = (
        score_bound(gained, lost, n, level),
        -score_bound((gained + lost) / 2, (gained + lost) / 2, n, level),
    )
    method = "Tango's score"
    if clusters is not None:
        cluster_numbers(clusters, n)
        error = standard_error(differences, clusters)
        if not isinstance(error, str):
            half = error.half_width(level)
            low, smallest = min(low, difference - half), max(smallest, half)
            method = f"lower of Tango's score and {error.method}"
    return _judged(difference, low, margin, smallest, level, n, method)


def smallest_margin(n: int, discordance: float, level: float = LEVEL) -> float:
    """The smallest margin, a share, that ``n`` items show if both arms get the same accuracy.

    ``discordance`` is the share of items on which the arms differ. Like the verdict, it uses the score bound. The usual
    1.645 sqrt(discordance / n) gives 2.9 points for 164 items and 5 %, and the score bound 3.3. For thousands of items
    both agree (1,319 and 10 %: 1.4 points; 14,042 and 5 %: 0.3).

    At a true difference of zero, a run shows this margin every second time, because its result is below zero as often.
    To show it 4 times of 5 takes about 1.5 times the margin.

    Raises:
        StatisticsError: no items, or a discordance outside 0 to 1.
    """
    check_level(level)
    if n < 1 or not 0 <= discordance <= 1:
        raise StatisticsError(f"found {n} items and a discordance of {discordance:g}; expected at least 1, and 0 to 1")
    return -score_bound(n * discordance / 2, n * discordance / 2, n, level)


def score_bound(gained: float, lost: float, n: int, level: float = LEVEL) -> float:
    """One-sided lower bound of the difference of two paired proportions, (gained - lost) / n.

    Tango 1998 (Statistics in Medicine 17:891-908, eq. 11): the difference at which the score statistic, with the
    likelihood maximised under that difference, reaches the normal quantile.
    """
    quantile = float(ndtri(level))

    def excess(difference: float) -> float:
        b = (2 * n - gained + lost) * difference - gained - lost
        c = -lost * difference * (1 - difference)
        lost_share = (np.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = n * (2 * lost_share + difference * (1 - difference))
        return float(gained - lost - n * difference - quantile * np.sqrt(max(variance, 0.0)))

    estimate = (gained - lost) / n
    if estimate <= -1:
        return -1.0
    return float(brentq(excess, -1.0, estimate - 1e-9))  # at the estimate itself the variance of 0 changes is 0


def _judged(
    difference: float, low: float, margin: float, smallest: float, level: float, n: int, method: str
) -> NonInferiority:
    verdict: Verdict = "not shown"
    if low > -margin:
        verdict = "shown"
    elif margin <= smallest:
        verdict = "cannot be shown at this size"
    return NonInferiority(verdict, difference, low, margin, smallest, level, n, method)


def _check_margin(margin: float, level: float) -> None:
    check_level(level)
    if not 0 < margin < np.inf:
        raise StatisticsError(f"the margin is {margin:g}; expected more than 0, in the unit of the differences")


def _right_or_wrong(values: ArrayLike, name: str) -> Floats:
    vector = sample(values, f"{name}'s items")
    bad = np.flatnonzero((vector != 0) & (vector != 1))
    if len(bad):
        raise StatisticsError(
            f"{name}'s items: found {vector[bad[0]]:g} at position {bad[0]}; expected 0 or 1; "
            "use non_inferiority for graded scores"
        )
    return vector
