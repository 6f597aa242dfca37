"""The estimate of a job, from sizes alone, as a table for the terminal."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from aletheia.planning.estimate import Job, Machine, Phase
from aletheia.reporting.format import human_seconds


def estimate_view(found: Sequence[tuple[Machine, Sequence[Phase]]], job: Job) -> RenderableType:
    """A row per machine and phase; memory beyond what the machine has is marked."""
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("machine", "phase", "memory", "disk", "read", "time"):
        table.add_column(name, justify="left" if name in ("machine", "phase") else "right")
    for machine, phases in found:
        for number, phase in enumerate(phases):
            fits = phase.memory <= machine.memory
            table.add_row(
                machine.name if number == 0 else "",
                phase.name,
                Text(_gb(phase.memory) + ("" if fits else " (!)"), style="" if fits else "bold red"),
                _gb(phase.disk),
                _gb(phase.read),
                human_seconds(phase.seconds),
            )
    head = Text(
        f"Estimated from sizes alone: {job.rows:,} rows of {job.tokens_per_row} tokens, {job.labelled_share:.0%} of "
        f"them labelled, {job.epochs:g} pass{'' if job.epochs == 1 else 'es'} in batches of {job.batch_size}. "
        "(!) marks more memory than the machine has."
    )
    return Group(head, table)


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
