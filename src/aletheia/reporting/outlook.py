"""A dry run in the terminal: the plan, a row, the size of the run, and its predicted time, memory and disk."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from aletheia.names import printable
from aletheia.planning.outlook import DryRun
from aletheia.planning.plan import layer_ranges
from aletheia.reporting.format import human_bytes, human_count, human_percent, human_seconds
from aletheia.reporting.preview import quoted

PHASES = {"load": "load", "probe": "probe", "race": "rates", "training": "train", "evaluation": "evaluate"}


def dry_run_view(found: DryRun) -> RenderableType:
    """A line for each figure that helps to decide; all fit into 80 columns."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, line in (
        ("plan", _plan(found)),
        ("why", found.plan.reason),
        ("data", _data(found)),
        ("steps", _steps(found)),
        ("time", _time(found)),
        ("memory", _memory(found)),
        ("disk", _disk(found)),
        ("writes", f"{found.out}: {', '.join(found.files)}"),
    ):
        if line:
            table.add_row(name, Text(printable(line)))
    row = Text("\n".join(quoted(found.row)))
    notes = [Text(f"note: {printable(note)}") for note in found.notes]
    head = Text("dry run: nothing was trained or written; time, memory and disk are predictions for this machine")
    return Group(head, Text(), row, Text(), table, *([Text(), *notes] if notes else []))


def _plan(found: DryRun) -> str:
    plan = found.plan
    text = f"layers {layer_ranges(plan.layers)} of {plan.layer_count} learn to the end"
    if plan.early_layers:
        share = human_percent(plan.freeze_after)
        text += f", layers {layer_ranges(plan.early_layers)} in the first {share} of the steps"
    ranks = sorted({adapter.rank for adapter in plan.adapters})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    return f"{text}; {rank}, {human_count(plan.trainable_parameters)} trainable parameters"


def _data(found: DryRun) -> str:
    mean = found.tokens / found.rows
    return f"{found.rows:,} rows to learn from, {mean:,.0f} tokens on average; {found.held_out_rows:,} held out"


def _steps(found: DryRun) -> str:
    passes = f"{found.passes:.3g} {'pass' if found.passes == 1 else 'passes'} over the rows"
    losses = f", {found.evaluations:,} held-out losses" if found.evaluations else ""
    start = f"; resumes after step {found.resumed_step:,}" if found.resumed_step else ""
    return f"{found.steps:,} of {found.rows_per_step:,} rows, at most: {passes}{losses}{start}"


def _time(found: DryRun) -> str:
    if not found.seconds:
        return f"not predicted: {found.why_no_seconds}"
    parts = ", ".join(f"{PHASES[phase]} {_about(seconds)}" for phase, seconds in found.seconds.items())
    return f"about {_about(found.total_seconds)} on this machine ({found.device}): {parts}"


def _about(seconds: float) -> str:
    """A time rounded to the digits that a prediction has."""
    return f"{max(1, round(seconds))} s" if seconds < 100 else human_seconds(float(f"{seconds:.2g}"))


def _memory(found: DryRun) -> str:
    again = "" if found.recompute == "off" else f", with gradient checkpointing {found.recompute}"
    usable = human_bytes(found.usable_memory_bytes)
    return f"at most {human_bytes(found.memory_bytes)} of the {usable} that it may use{again}"


def _disk(found: DryRun) -> str:
    sizes = [f"{name} {human_bytes(size)}" for name, size in found.disk_bytes.items() if size]
    cache = {"memory": "; its cache fits in memory", "off": "; no cache", "disk": ""}[found.cache]
    total = human_bytes(sum(found.disk_bytes.values()))
    return f"at most {total}: {', '.join(sizes)}{cache}; {human_bytes(found.free_disk_bytes)} are free"
