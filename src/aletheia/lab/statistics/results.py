"""What every estimate returns, and the checks of what it is given."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aletheia.errors import StatisticsError

Floats = NDArray[np.float64]
LEVEL = 0.95  # of every interval, two-sided, and of every one-sided bound


@dataclass(frozen=True)
class Interval:
    """A confidence interval and how it was made."""

    low: float
    high: float
    level: float
    method: str


@dataclass(frozen=True)
class Estimate:
    """A figure, its interval and the number of observations behind it.

    Without an interval, ``reason`` says why none can be known; an interval of no width is never made up.
    """

    value: float
    interval: Interval | None
    n: int
    reason: str = ""


def sample(values: ArrayLike, name: str) -> Floats:
    """``values`` as a vector of finite floats.

    Raises:
        StatisticsError: empty, not a vector of numbers, or with a NaN or an infinity.
    """
    try:
        vector = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise StatisticsError(f"{name}: found something that is no number; expected numbers only ({error})") from error
    if vector.ndim != 1:
        raise StatisticsError(f"{name}: found {vector.ndim} dimensions; expected a plain list of numbers")
    if not len(vector):
        raise StatisticsError(f"{name}: found no value; expected at least one, so leave out what has not run")
    bad = np.flatnonzero(~np.isfinite(vector))
    if len(bad):
        raise StatisticsError(
            f"{name}: found {vector[bad[0]]} at position {bad[0]}; expected finite numbers, so count failed runs apart"
        )
    return vector


def positive(values: ArrayLike, name: str) -> Floats:
    """``values`` as a vector of finite floats above zero: times, ratios.

    Raises:
        StatisticsError: as ``sample``, or a value of zero or less.
    """
    vector = sample(values, name)
    bad = np.flatnonzero(vector <= 0)
    if len(bad):
        raise StatisticsError(
            f"{name}: found {vector[bad[0]]:g} at position {bad[0]}; expected more than 0, so measure it again"
        )
    return vector


def check_paired(name: str, n: int, other_name: str, other: int) -> None:
    """Both sides of a pairing have as many values.

    Raises:
        StatisticsError: they have not.
    """
    if n != other:
        raise StatisticsError(f"found {n} {name} and {other} {other_name}; expected one for one, so pair them first")


def check_level(level: float) -> None:
    """A confidence level is a share, not per cent.

    Raises:
        StatisticsError: outside (0, 1).
    """
    if not 0 < level < 1:
        raise StatisticsError(f"level is {level:g}; expected a share between 0 and 1, such as 0.95")


def cluster_numbers(clusters: Sequence[Hashable], n: int) -> NDArray[np.int64]:
    """The names of clusters as numbers from 0, in order of first appearance.

    Raises:
        StatisticsError: not one name for each of the ``n`` values.
    """
    check_paired("values", n, "clusters", len(clusters))
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in clusters], dtype=np.int64)


def is_constant(values: Floats) -> bool:
    """Whether the values differ by no more than rounding does."""
    return bool(np.ptp(values) <= 1e-12 * np.abs(values).max())
