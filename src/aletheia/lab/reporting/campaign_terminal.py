"""The rows of a campaign, and its forecast, as tables for a terminal."""

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from aletheia.lab.campaign.grid import Forecast, Job
from aletheia.lab.campaign.store import Record
from aletheia.names import printable
from aletheia.reporting.format import human_bytes

MARKS = {"done": ("●", "green"), "failed": ("✗", "red"), "pending": ("·", "dim")}
SHOWN_FAILURES = 10


def status_table(records: Sequence[Record], running: Sequence[Job]) -> list[RenderableType]:
    """A table of models by arms with a mark per seed; then failures with their reasons."""
    arms = list(dict.fromkeys(record.row.arm for record in records))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for arm in arms:
        table.add_column(Text(arm), no_wrap=True)
    for model in dict.fromkeys(record.row.model for record in records):
        cells = []
        for arm in arms:
            cell = Text()
            for record in records:
                if (record.row.model, record.row.arm) == (model, arm):
                    cell.append(*MARKS[record.status])
            cells.append(cell)
        table.add_row(Text(printable(model)), *cells)
    count = {status: sum(record.status == status for record in records) for status in MARKS}
    lines: list[RenderableType] = [
        table,
        Text(f"\n{count['done']} done, {count['failed']} failed, {count['pending']} to come"),
    ]
    if running:
        lines.append(Text(f"next: {', '.join(job.name for job in running[:3])}", style="dim"))
    failures = [record for record in records if record.status == "failed"]
    for record in failures[:SHOWN_FAILURES]:
        named = f"{record.row.model} {record.row.arm} {record.row.seed}"
        lines.append(Text(f"✗ {named}: {printable(record.reason or '')}", style="red"))
    if len(failures) > SHOWN_FAILURES:
        lines.append(Text(f"and {len(failures) - SHOWN_FAILURES} more failures", style="red"))
    return lines


def forecast_table(expected: Forecast) -> list[RenderableType]:
    """What ``--dry-run`` prints."""
    rough = "a rough guess from operations and this machine's speed"
    source = "from the rows that are done" if expected.measured else rough
    return [
        Text(f"{expected.rows} rows in {expected.jobs} jobs, {expected.rows_done} rows done"),
        Text(f"about {expected.hours:.1f} hours to go ({source})"),
        Text(f"up to {human_bytes(expected.disk_bytes)} of disk, {human_bytes(expected.free_bytes)} free"),
        *(Text(f"{name} is not on this machine and is not counted in these numbers") for name in expected.unread),
    ]
