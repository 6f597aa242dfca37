"""The measures of a task with intervals, from rows with one item each; alone, or paired with another evaluation."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from aletheia.errors import EvaluationError
from aletheia.lab.evaluation.record import Difference, Metric
from aletheia.lab.statistics.means import linearised, mean
from aletheia.lab.statistics.rates import proportion
from aletheia.lab.statistics.results import Estimate

Row = Mapping[str, Any]


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


Scale = Literal["nats", "bits", "perplexity"]
SCALES: dict[
    Scale, tuple[Callable[[float], float], Callable[[float], float]]
] = {  # functions of nats per unit, and their slopes
    "nats": (float, lambda nats: 1.0),
    "bits": (lambda nats: nats / math.log(2), lambda nats: 1 / math.log(2)),
    "perplexity": (_exp, _exp),
}


@dataclass(frozen=True)
class Measure:
    """A number from rows: the mean of ``column``, or ``scale`` of its sum divided by the sum of ``per``."""

    name: str
    column: str
    per: str | None = None
    scale: Scale = "nats"

    @property
    def higher_is_better(self) -> bool:
        """True for shares of right answers, not for losses and perplexities."""
        return self.per is None


# the first measure of a task is its main one; names are upstream's, with a filter after the comma
MEASURES: dict[str, tuple[Measure, ...]] = {
    "mmlu": (Measure("acc", "acc"),),
    "gsm8k": tuple(Measure(name, name) for name in ("exact_match,strict-match", "exact_match,flexible-extract")),
    "humaneval": (Measure("pass@1", "pass@1"),),
    "wikitext": (
        Measure("word_perplexity", "loss_sum", "words", "perplexity"),
        Measure("byte_perplexity", "loss_sum", "bytes", "perplexity"),
        Measure("bits_per_byte", "loss_sum", "bytes", "bits"),
    ),
    "heldout": (Measure("loss", "loss_sum", "tokens"),),
}


def summarise(task: str, rows: Sequence[Row]) -> tuple[Metric, ...]:
    """Every measure of a task with its interval.

    Raises:
        EvaluationError: a value is not finite.
    """
    return tuple(_summary(task, measure, rows) for measure in MEASURES[task])


def differences(task: str, these: Sequence[Row], others: Sequence[Row]) -> tuple[Difference, ...]:
    """How much worse these rows are than the others, item by item; positive is worse for every measure."""
    return tuple(_difference(task, measure, these, others) for measure in MEASURES[task])


def _summary(task: str, measure: Measure, rows: Sequence[Row]) -> Metric:
    value = _value(task, measure, rows)
    if measure.per is not None:
        scale, _ = SCALES[measure.scale]
        bounds, method = _bounds(mean(linearised(_column(rows, measure.column), _column(rows, measure.per))))
        bounds = (scale(bounds[0]), scale(bounds[1])) if bounds else None
    else:
        values = _column(rows, measure.column)
        bounds, method = _bounds(mean(values, [row["subject"] for row in rows])) if task == "mmlu" else (None, "")
        if bounds:
            bounds = (max(0.0, bounds[0]), min(1.0, bounds[1]))
        else:
            bounds, method = _bounds(proportion(int(values.sum()), len(values)))
    low, high = bounds or (None, None)
    return Metric(
        name=measure.name,
        value=value,
        low=low,
        high=high,
        interval=method if bounds else "none",
        items=len(rows),
        higher_is_better=measure.higher_is_better,
    )


def _difference(task: str, measure: Measure, these: Sequence[Row], others: Sequence[Row]) -> Difference:
    this, other = _value(task, measure, these), _value(task, measure, others)
    if measure.per is not None:
        worse = _deviations(measure, these) - _deviations(measure, others) + (this - other)
        clusters = None
    else:
        worse = _column(others, measure.column) - _column(these, measure.column)
        clusters = [row["subject"] for row in these] if task == "mmlu" else None
    bounds, method = _bounds(mean(worse, clusters))
    low, high = bounds or (None, None)
    return Difference(
        name=measure.name,
        this=this,
        other=other,
        worse_by=other - this if measure.higher_is_better else this - other,
        low=low,
        high=high,
        interval=f"{method}, paired by item" if bounds else "none",
        items=len(these),
    )


def _bounds(found: Estimate) -> tuple[tuple[float, float] | None, str]:
    """The ends and the method of an interval; None without one."""
    interval = found.interval
    return ((interval.low, interval.high), interval.method) if interval else (None, "")


def _deviations(measure: Measure, rows: Sequence[Row]) -> np.ndarray:
    """The first-order effect of each item on the number (delta method); their mean is 0."""
    assert measure.per is not None
    nats = linearised(_column(rows, measure.column), _column(rows, measure.per))
    _, slope = SCALES[measure.scale]
    return np.asarray(slope(float(nats.mean())) * (nats - nats.mean()))


def _column(rows: Sequence[Row], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], dtype=float)


def _value(task: str, measure: Measure, rows: Sequence[Row]) -> float:
    values = _column(rows, measure.column)
    value = float(values.mean())
    if measure.per is not None:
        value = SCALES[measure.scale][0](float(values.sum() / _column(rows, measure.per).sum()))
    if not math.isfinite(value):
        raise EvaluationError(
            f"{task}: {measure.name} is {value}; expected a finite number; try `dtype` float32 or `attention` sdpa"
        )
    return value
