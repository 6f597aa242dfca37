"""Evaluations and their comparisons as tables for the terminal. Torch-free."""

from rich import box
from rich.table import Table

from aletheia.lab.evaluation.record import Comparison, Evaluation, single_answer
from aletheia.names import printable
from aletheia.reporting.format import NOTHING, human_seconds

PLACES = 4


def evaluation_table(evaluation: Evaluation) -> Table:
    """Every number with its interval; below, upstream's version and the few-shot examples of each task."""
    settings = evaluation.settings
    adapter = f" with {settings.adapter}" if settings.adapter else ""
    upstream = [f"{task.name} {task.version}, {task.num_fewshot}-shot" for task in evaluation.tasks]
    how = f"{evaluation.dtype}, batches of {settings.batch_size}, {human_seconds(evaluation.seconds.eval)}"
    notes = [
        f"{task.name}: answers {answer}, so accuracy is the share of that answer"
        for task in evaluation.tasks
        if (answer := single_answer(task.answers))
    ]
    caption = "\n".join(["; ".join(upstream), f"95 % intervals; {how}", *notes])
    table = _table(f"{evaluation.model.name}{adapter}", caption)
    for name in ("value", "interval", "items"):
        table.add_column(name, justify="right", no_wrap=True)
    for task in evaluation.tasks:
        part = f"/{task.items_available:,}" if task.items < task.items_available else ""
        for at, metric in enumerate(task.metrics):
            items = "" if at else f"{task.items:,}{part}"
            bounds = _bounds(metric.low, metric.high)
            table.add_row("" if at else task.name, metric.name, _number(metric.value), bounds, items)
    return table


def comparison_table(comparison: Comparison) -> Table:
    """How much worse this evaluation is than the other, by task and measure, paired by item."""
    items = ", ".join(f"{task} {found[0].items:,}" for task, found in comparison.tasks.items())
    table = _table(
        f"{comparison.kind.capitalize()}: {comparison.this} against {comparison.other}",
        f"positive is worse; 95 % intervals, paired by item ({items})",
    )
    for name in ("this", "other", "worse by", "interval"):
        table.add_column(name, justify="right", no_wrap=True)
    for task, found in comparison.tasks.items():
        for at, one in enumerate(found):
            numbers = (_number(one.this), _number(one.other), f"{one.worse_by:+.{PLACES}f}")
            table.add_row("" if at else task, one.name, *numbers, _bounds(one.low, one.high))
    return table


def _table(title: str, caption: str) -> Table:
    table = Table(title=printable(title), caption=caption, box=box.SIMPLE, pad_edge=False, padding=(0, 1))
    table.add_column("task", no_wrap=True)
    table.add_column("metric")
    return table


def _number(value: float) -> str:
    return f"{value:.{PLACES}f}" if abs(value) < 1e4 else f"{value:.3g}"


def _bounds(low: float | None, high: float | None) -> str:
    return NOTHING if low is None or high is None else f"{_number(low)} to {_number(high)}"
