"""The result of every estimate, and checks of its inputs."""

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
    """A number, its interval and the number of observations.

    Without an interval, ``reason`` says why there is none; an interval without width is never returned.
    """

    value: float
    interval: Interval | None
    n: int
    reason: str = ""


def sample(values: ArrayLike, name: str) -> Floats:
    """``values`` as a vector of finite floats.

    Raises:
        StatisticsError: ``values`` is empty, not a vector of numbers, or contains NaN or infinity.
    """
    try:
        vector = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise StatisticsError(f"{name}: found a value that is not a number; expected numbers only ({error})") from error
    if vector.ndim != 1:
        raise StatisticsError(f"{name}: found {vector.ndim} dimensions; expected a plain list of numbers")
    if not len(vector):
        raise StatisticsError(f"{name}: found no value; expected at least one; leave out what has not run")
    bad = np.flatnonzero(~np.isfinite(vector))
    if len(bad):
        raise StatisticsError(
            f"{name}: found {vector[bad[0]]} at position {bad[0]}; expected finite numbers; leave out failed runs"
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
            f"{name}: found {vector[bad[0]]:g} at position {bad[0]}; expected more than 0; measure it again"
        )
    return vector


def check_paired(name: str, n: int, other_name: str, other: int) -> None:
    """Check that both sides of a pairing have equally many values.

    Raises:
        StatisticsError: they do not.
    """
    if n != other:
        raise StatisticsError(f"found {n} {name} and {other} {other_name}; expected equally many; pair them first")


def check_level(level: float) -> None:
    """Check that a confidence level is a share, not per cent.

    Raises:
        StatisticsError: ``level`` is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise StatisticsError(f"level is {level:g}; expected a share between 0 and 1, such as 0.95")


def cluster_numbers(clusters: Sequence[Hashable], n: int) -> NDArray[np.int64]:
    """The names of clusters as numbers from 0, in order of first appearance.

    Raises:
        StatisticsError: there is not one name for each of the ``n`` values.
    """
    check_paired("values", n, "clusters", len(clusters))
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in clusters], dtype=np.int64)


def is_constant(values: Floats) -> bool:
    """Whether the values differ by no more than rounding does."""
    return bool(np.ptp(values) <= 1e-12 * np.abs(values).max())
