"""The frontier in the terminal and as a picture: predicted step time against captured importance."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from aletheia.errors import PlanError
from aletheia.files import check_writable, write_bytes
from aletheia.planning.frontier import FrontierPoint
from aletheia.planning.plan import Plan

BAR_WIDTH = 24


def frontier_view(points: Sequence[FrontierPoint], chosen: Plan, rows: int = 40) -> RenderableType:
    """At most about ``rows`` undominated choices, fastest first; the point with the chosen layers is marked."""
    epochs, seconds = chosen.settings.epochs, chosen.predicted.baseline_step_seconds

    def time_of(relative: float) -> str:
        return f"{relative * seconds:.2f} s" if seconds else f"{relative:.3f}"

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for column in ("boundary", "layers", "first epoch", "cached", f"{epochs:g} epochs", "speed-up", "importance"):
        table.add_column(column, justify="right")
    table.add_column("")
    every = max(1, len(points) // rows)
    for number, point in enumerate(points):
        is_chosen = point.layers == chosen.layers
        if number % every and not is_chosen and number != len(points) - 1:
            continue
        table.add_row(
            ">" if is_chosen else "",
            str(point.boundary),
            str(len(point.layers)),
            time_of(point.relative_step_time),
            time_of(point.relative_cached_step_time),
            time_of(point.relative_run_time),
            f"{point.speedup:.2f}x",
            f"{point.captured_importance:.1%}",
            "█" * round(point.captured_importance * BAR_WIDTH),
            style="bold" if is_chosen else "",
        )
    what = "seconds per step, measured parts" if seconds else "step time relative to it, counted in operations"
    note = (
        f"{len(points)} choices that no other beats in both; {what}; speed-up over {epochs:g} epoch(s) against uniform "
        "LoRA in plain PEFT"
    )
    if seconds:
        note += f", {seconds:.2f} s per step"
    plan_line = (
        f"this plan ({chosen.settings.policy}, {len(chosen.layers)} layers from {chosen.boundary} up): first epoch "
        f"{chosen.predicted.speedup:.2f}x, cached {chosen.predicted.cached_speedup:.2f}x, "
        f"importance {chosen.predicted.captured_importance:.1%}"
    )
    return Group(table, Text(note), Text(plan_line))


def check_plot(path: Path) -> None:
    """Refuse a picture that cannot be drawn, before anything is computed.

    Raises:
        PlanError: an unknown suffix, or a folder.
        ArtifactError: its folder cannot be written.
    """
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise PlanError(f"`plot` is {path}; expected a file that ends with .svg, .png or .pdf")
    if path.is_dir():
        raise PlanError(f"`plot` is {path}, a folder; expected a file")
    check_writable(path.parent)


def plot_frontier(points: Sequence[FrontierPoint], chosen: Plan, path: Path) -> None:
    """Draw step time, first epoch and from a filled cache, against captured importance; the suffix says the format.

    Raises:
        ArtifactError: a place that cannot be written.
    """
    seconds = chosen.predicted.baseline_step_seconds
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    importance = [point.captured_importance for point in points]
    unit = seconds or 1.0
    series = (
        ("first epoch", [point.relative_step_time * unit for point in points], chosen.predicted.relative_step_time),
        (
            "from a filled cache",
            [point.relative_cached_step_time * unit for point in points],
            chosen.predicted.relative_cached_step_time,
        ),
    )
    for number, (label, times, own) in enumerate(series):
        axes.plot(times, importance, ".-", color=f"C{number}", label=label, linewidth=1)
        if own is not None:
            axes.plot([own * unit], [chosen.predicted.captured_importance], "o", color=f"C{number}", markersize=9)
    axes.axvline(unit, color="0.4", linestyle=":", label="uniform LoRA in plain PEFT")
    axes.set_xlabel("predicted seconds per step" if seconds else "predicted step time, relative")
    axes.set_ylabel("captured importance")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    axes.set_title(f"{chosen.model.name}: large dots are the plan, {chosen.settings.policy}", fontsize=10)
    drawn = BytesIO()
    figure.savefig(drawn, dpi=144, format=path.suffix[1:])
    write_bytes(path, drawn.getvalue())
