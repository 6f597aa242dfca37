"""Evaluations and their comparisons as tables for the terminal. Torch-free."""

from rich.table import Table

from aletheia.evaluation.result import Comparison, Evaluation
from aletheia.reporting.format import NOTHING, human_seconds, printable

PLACES = 4


def evaluation_table(evaluation: Evaluation) -> Table:
    """Every number with its interval, items and upstream version."""
    settings = evaluation.settings
    adapter = f" with {settings.adapter}" if settings.adapter else ""
    table = Table(
        title=printable(f"{evaluation.model.name}{adapter}"),
        caption=f"95 % intervals; {evaluation.dtype}, batches of {settings.batch_size}, "
        + human_seconds(evaluation.seconds.eval),
    )
    for name in ("task", "metric"):
        table.add_column(name)
    for name in ("value", "interval", "items", "shots", "version"):
        table.add_column(name, justify="right")
    for task in evaluation.tasks:
        for at, metric in enumerate(task.metrics):
            items = (
                f"{task.items:,}" if task.items == task.items_available else f"{task.items:,}/{task.items_available:,}"
            )
            shared = ("", "", "") if at else (items, str(task.num_fewshot), task.version)
            bounds = _bounds(metric.low, metric.high)
            table.add_row("" if at else task.name, metric.name, _number(metric.value), bounds, *shared)
    return table


def comparison_table(comparison: Comparison) -> Table:
    """Per task and measure how much worse this is than the other, paired per item."""
    table = Table(
        title=printable(f"{comparison.kind.capitalize()}: {comparison.this} against {comparison.other}"),
        caption="positive is worse; 95 % intervals, paired per item",
    )
    for name in ("task", "metric"):
        table.add_column(name)
    for name in ("this", "other", "worse by", "interval", "items"):
        table.add_column(name, justify="right")
    for task, found in comparison.tasks.items():
        for at, one in enumerate(found):
            numbers = (_number(one.this), _number(one.other), f"{one.worse_by:+.{PLACES}f}")
            table.add_row("" if at else task, one.name, *numbers, _bounds(one.low, one.high), str(one.items))
    return table


def _number(value: float) -> str:
    return f"{value:.{PLACES}f}" if abs(value) < 1e4 else f"{value:.3g}"


def _bounds(low: float | None, high: float | None) -> str:
    return NOTHING if low is None or high is None else f"{_number(low)} to {_number(high)}"
