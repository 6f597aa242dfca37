"""Tests of paired differences, and Holm's correction for several tests."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata, wilcoxon

from aletheia.errors import StatisticsError
from aletheia.lab.statistics.results import Floats, sample

Alternative = Literal["two-sided", "greater", "less"]
Arm = TypeVar("Arm", bound=Hashable)

MOST_EXACT = 20  # differences: 2^20 sums take 8 MB and milliseconds, by scipy's permutation_test ten seconds
RESAMPLES = 10_000
NUMBERS_AT_ONCE = 2_000_000  # memory of a batch of resamples


@dataclass(frozen=True)
class PairedTest:
    """A p-value of paired differences; ``exact`` if it holds for any number of them, else from resamples or a limit."""

    p_value: float
    n: int
    exact: bool
    alternative: Alternative
    method: str


def sign_flip_test(differences: ArrayLike, alternative: Alternative = "two-sided", seed: int = 0) -> PairedTest:
    """Permutation test of paired differences (Fisher 1935, sec. 21): how many flips of signs give as large a mean.

    All flips are equally likely if the differences are symmetric about zero. Up to 20 differences, all 2^n flips are
    counted. Above, 10,000 are drawn with ``seed``; the observed one counts as well, so that p is never 0 and the test
    never too liberal (Phipson and Smyth 2010). The smallest two-sided p of n differences is 2^(1-n), so 5 or fewer
    cannot give 0.05.

    Args:
        differences: arm minus baseline, one per model, seed or item.
        alternative: ``greater`` asks whether the mean is above zero, ``less`` below.
        seed: of the flips that are drawn for more than 20 differences.

    Raises:
        StatisticsError: no difference, one that is not finite, or an unknown alternative.
    """
    vector = _oriented(sample(differences, "differences"), alternative)
    n = len(vector)
    exact = n <= MOST_EXACT
    count, total = (_count_all if exact else _count_drawn)(vector, alternative == "two-sided", seed)
    method = "sign flips, all" if exact else f"sign flips, {RESAMPLES:,} drawn"
    return PairedTest(count / total, n, exact, alternative, method)


def wilcoxon_test(differences: ArrayLike, alternative: Alternative = "two-sided") -> PairedTest:
    """Wilcoxon signed-rank test; differences of zero are dropped, as Wilcoxon 1945 does.

    Exact up to 20 differences, ties included (a sign-flip test of signed ranks), and up to 50 without ties; above, the
    normal limit. If no difference is left, p is 1.

    Raises:
        StatisticsError: no difference, one that is not finite, or an unknown alternative.
    """
    vector = sample(differences, "differences")
    n = len(vector)
    _oriented(vector, alternative)
    kept = vector[vector != 0]
    if not len(kept):
        return PairedTest(1.0, n, True, alternative, "signed ranks, all")
    ranks = rankdata(np.abs(kept))
    if len(kept) <= MOST_EXACT:
        p_value = sign_flip_test(np.sign(kept) * ranks, alternative).p_value
        return PairedTest(p_value, n, True, alternative, "signed ranks, all")
    exact = len(kept) <= 50 and len(np.unique(ranks)) == len(kept)
    how: Literal["exact", "approx"] = "exact" if exact else "approx"
    result = wilcoxon(kept, alternative=alternative, method=how)
    method = "signed ranks, all" if exact else "signed ranks, normal limit"
    return PairedTest(float(result.pvalue), n, exact, alternative, method)


def holm(p_values: Mapping[Arm, float]) -> dict[Arm, float]:
    """Holm's step-down correction (Holm 1979): p-values that keep the risk of any false claim among all arms.

    The order of the arms is kept. Include every arm that was tested, also those that lost.

    Raises:
        StatisticsError: a p-value outside 0 to 1.
    """
    for arm, p_value in p_values.items():
        if not 0 <= p_value <= 1:
            raise StatisticsError(f"{arm}: found a p-value of {p_value}; expected 0 to 1; leave out untested arms")
    adjusted: dict[Arm, float] = {}
    largest = 0.0
    for place, arm in enumerate(sorted(p_values, key=lambda arm: p_values[arm])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[arm]))
        adjusted[arm] = largest
    return {arm: adjusted[arm] for arm in p_values}


def _oriented(differences: Floats, alternative: Alternative) -> Floats:
    """Differences with the sign for which large sums support the alternative."""
    if alternative not in ("two-sided", "greater", "less"):
        raise StatisticsError(f"alternative is {alternative!r}; expected 'two-sided', 'greater' or 'less'")
    return -differences if alternative == "less" else differences


def _as_large(sums: Floats, differences: Floats, two_sided: bool) -> int:
    """How many sums reach the observed one; sums that differ only by rounding count as equal."""
    observed = float(differences.sum())
    rounding = 1e-12 * float(np.abs(differences).sum())
    if two_sided:
        return int(np.count_nonzero(np.abs(sums) >= abs(observed) - rounding))
    return int(np.count_nonzero(sums >= observed - rounding))


def _count_all(differences: Floats, two_sided: bool, seed: int) -> tuple[int, int]:
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    return _as_large(sums, differences, two_sided), len(sums)


def _count_drawn(differences: Floats, two_sided: bool, seed: int) -> tuple[int, int]:
    draw = np.random.default_rng(seed)
    n, count, left = len(differences), 1, RESAMPLES
    while left:
        rows = min(left, max(1, NUMBERS_AT_ONCE // n))
        flips = draw.integers(0, 2, (rows, n), dtype=np.int8) * 2.0 - 1.0
        count += _as_large(flips @ differences, differences, two_sided)
        left -= rows
    return count, RESAMPLES + 1
