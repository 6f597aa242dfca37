"""From rows, one per item, to the numbers of a task with their intervals; alone, or paired with another evaluation."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aletheia.errors import EvaluationError
from aletheia.evaluation.intervals import bootstrap, bounds_of
from aletheia.evaluation.result import Difference, Metric
from aletheia.statistics.means import mean
from aletheia.statistics.rates import proportion

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Measure:
    """How a number comes from rows: the mean of ``column``, or ``scale`` of its sum over the sum of ``per``."""

    name: str
    column: str
    per: str | None = None
    scale: Callable[[float], float] = float

    @property
    def higher_is_better(self) -> bool:
        """True of shares of right answers, not of losses and perplexities."""
        return self.per is None


# the first of a task is its main one; names are upstream's, a filter behind the comma
MEASURES: dict[str, tuple[Measure, ...]] = {
    "mmlu": (Measure("acc", "acc"),),
    "gsm8k": tuple(Measure(name, name) for name in ("exact_match,strict-match", "exact_match,flexible-extract")),
    "humaneval": (Measure("pass@1", "pass@1"),),
    "wikitext": (
        Measure("word_perplexity", "loss_sum", "words", math.exp),
        Measure("byte_perplexity", "loss_sum", "bytes", math.exp),
        Measure("bits_per_byte", "loss_sum", "bytes", lambda nats: nats / math.log(2)),
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
    """How much worse these rows are than the others, item by item; positive is worse, whichever way a measure runs."""
    return tuple(_difference(task, measure, these, others) for measure in MEASURES[task])


def _summary(task: str, measure: Measure, rows: Sequence[Row]) -> Metric:
    value = _value(task, measure, rows)
    if measure.per is not None:
        method = "bootstrap over documents" if task == "wikitext" else "bootstrap over rows"
        bounds = bootstrap(_ratio(measure, rows), len(rows))
    else:
        values = _column(rows, measure.column)
        bounds = bounds_of(mean(values, [row["subject"] for row in rows])) if task == "mmlu" else None
        method = "clustered by subject" if bounds else "Wilson"
        wilson = bounds_of(proportion(int(values.sum()), len(values)))
        bounds = (max(0.0, bounds[0]), min(1.0, bounds[1])) if bounds else wilson
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
        one, two = _ratio(measure, these), _ratio(measure, others)
        method = "paired bootstrap"
        bounds = bootstrap(lambda drawn: one(drawn) - two(drawn), len(these))
    else:
        worse = _column(others, measure.column) - _column(these, measure.column)
        clusters = [row["subject"] for row in these] if task == "mmlu" else None
        method = "paired, clustered by subject" if task == "mmlu" else "paired by item"
        bounds = bounds_of(mean(worse, clusters))
    low, high = bounds or (None, None)
    return Difference(
        name=measure.name,
        this=this,
        other=other,
        worse_by=other - this if measure.higher_is_better else this - other,
        low=low,
        high=high,
        interval=method if bounds else "none",
        items=len(these),
    )


def _column(rows: Sequence[Row], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], dtype=float)


def _ratio(measure: Measure, rows: Sequence[Row]) -> Callable[[np.ndarray], float]:
    assert measure.per is not None
    sums, counts = _column(rows, measure.column), _column(rows, measure.per)

    def of(drawn: np.ndarray) -> float:
        try:
            return measure.scale(float(sums[drawn].sum() / counts[drawn].sum()))
        except OverflowError:  # exp of a loss beyond 709 nats
            return math.inf

    return of


def _value(task: str, measure: Measure, rows: Sequence[Row]) -> float:
    if measure.per is None:
        value = float(_column(rows, measure.column).mean())
    else:
        value = _ratio(measure, rows)(np.arange(len(rows)))
    if not math.isfinite(value):
        raise EvaluationError(
            f"{task}: {measure.name} is {value}; expected a finite number, try --dtype float32 or --attention sdpa"
        )
    return value
