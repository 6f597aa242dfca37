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
from aletheia.planning.plan import Plan, layer_ranges
from aletheia.reporting.format import bar, human_percent, human_ratio, model_name, shorten
from aletheia.reporting.plan_text import plan_sentences

ROWS = 10
TITLE_WIDTH = 48  # characters of a model's name
BAR_WIDTH = 20


def frontier_view(points: Sequence[FrontierPoint], chosen: Plan, rows: int = ROWS) -> RenderableType:
    """At most ``rows`` of the choices, evenly spaced, fastest first; the one that equals the plan is marked."""
    epochs, seconds = chosen.settings.epochs or 1.0, chosen.predicted.baseline_step_seconds

    def time_of(relative: float) -> str:
        return f"{relative * seconds:.2f} s" if seconds else f"{relative:.2f}"

    passes = f"{epochs:g} pass{'' if epochs == 1 else 'es'}"
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("")
    table.add_column("layers", overflow="fold")
    for column in ("step", "cached", passes, "score"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for point in _some(points, chosen, rows):
        is_chosen = point.layers == chosen.layers
        table.add_row(
            ">" if is_chosen else "",
            layer_ranges(point.layers),
            time_of(point.relative_step_time),
            time_of(point.relative_cached_step_time),
            human_ratio(point.speedup),
            human_percent(point.captured_importance),
            bar(point.captured_importance, 1.0, BAR_WIDTH),
            style="bold" if is_chosen else "",
        )
    unit = "in seconds, from measured parts" if seconds else "relative to uniform LoRA in plain PEFT, by operations"
    note = (
        f"There are {len(points)} choices of layers that no other beats in both time and score. step, cached: time of "
        f"a step in the first pass and from a filled cache, {unit}. {passes}: speed of such a run"
        + (f", against {seconds:.2f} s per step for uniform LoRA in plain PEFT." if seconds else ".")
    )
    return Group(table, Text(), Text(note, style="dim"), Text(f"{' '.join(plan_sentences(chosen))}"))


def _some(points: Sequence[FrontierPoint], chosen: Plan, rows: int) -> list[FrontierPoint]:
    """At most ``rows`` of the points: the first, the last, the plan's own if it is among them, and some between."""
    last, count = len(points) - 1, min(rows, len(points))
    wanted = {round(number * last / max(1, count - 1)) for number in range(count)}
    own = next((at for at, point in enumerate(points) if point.layers == chosen.layers), None)
    if own is not None and own not in wanted:
        inner = wanted - {0, last} or wanted
        wanted = wanted - {min(inner, key=lambda at: abs(at - own))} | {own}
    return [points[at] for at in sorted(wanted)]


def check_plot(path: Path) -> None:
    """Refuse a picture that cannot be drawn, before anything is computed.

    Raises:
        PlanError: the suffix is unknown, or ``path`` is a folder.
        ArtifactError: its folder cannot be written.
    """
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise PlanError(f"`plot` is {path}; expected a file that ends with .svg, .png or .pdf")
    if path.is_dir():
        raise PlanError(f"`plot` is {path}, a folder; expected a file")
    check_writable(path.parent)


def plot_frontier(points: Sequence[FrontierPoint], chosen: Plan, path: Path) -> None:
    """Draw step times (first epoch, and from a filled cache) against captured importance; the suffix sets the format.

    Raises:
        ArtifactError: ``path`` cannot be written.
    """
    drawn = BytesIO()
    frontier_figure(points, chosen).savefig(drawn, dpi=144, format=path.suffix[1:])
    write_bytes(path, drawn.getvalue())


def frontier_figure(points: Sequence[FrontierPoint], chosen: Plan) -> Figure:
    """The picture of :func:`plot_frontier`."""
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
            axes.plot(
                [own * unit],
                [chosen.predicted.captured_importance],
                "o",
                color=f"C{number}",
                markersize=9,
                label="this plan" if number == 0 else None,
            )
    axes.axvline(unit, color="0.4", linestyle=":", label="uniform LoRA in plain PEFT")
    axes.set_xlabel("predicted seconds per step" if seconds else "predicted step time, relative")
    axes.set_ylabel("share of the score in layers that learn")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    axes.set_title(
        f"{shorten(model_name(chosen.model.name), TITLE_WIDTH)}: time against score", fontsize=10, loc="left"
    )
    return figure
