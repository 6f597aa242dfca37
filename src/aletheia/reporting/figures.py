"""The figures of the report, each a function from plain data to an SVG fragment. No pyplot, no global state."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from aletheia.planning.plan import Adapter, Plan, layer_ranges
from aletheia.reporting.comparison import held_out_points, phases_of
from aletheia.reporting.format import human_seconds, rank_summary, shorten
from aletheia.reporting.svg import (
    IDLE,
    INK,
    LINE,
    MUTED,
    POINTS_PER_INCH,
    drawing,
    phase_color,
    run_color,
    run_dash,
    to_svg,
)
from aletheia.runs.adapter_folder import AdapterFolder
from aletheia.runs.schema import PHASES, PhaseSeconds, Run, TrainPoint

# One width for all: 360 points stay legible on a phone and in two columns on a desk.
WIDTH = 360.0
HEIGHT = 200.0
LABEL_LENGTH = 28
MODULE_ROWS = 12  # more kinds of modules than this are drawn by role

_Box = tuple[float, float, float, float]  # x, y, width, height


def layer_scores_svg(plan: Plan, label: str, index: int, identifier: str) -> str:
    """Bars of the probe score by decoder layer; adapted layers in the run's colour, the boundary marked."""
    with drawing(identifier):
        figure, axes = canvas(HEIGHT, left=40)
        bars = [(layer - 0.39, 0.0, 0.78, score) for layer, score in enumerate(plan.layer_scores)]
        _boxes(axes, bars, IDLE)
        _boxes(axes, [bars[layer] for layer in plan.layers], run_color(index))
        top = 1.22 * max(0.0, *plan.layer_scores) or 1.0
        axes.set_ylim(0, top)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5), useMathText=False)
        _layer_axis(axes, plan.layer_count)
        _mark_boundary(axes, plan.boundary, plan.layer_count, top)
        axes.grid(axis="y")
        _title(axes, f"Score: {shorten(plan.probe.score, LABEL_LENGTH)}, summed over the probe")
        words = f"Score by decoder layer, {label}. Adapted: {layer_ranges(plan.layers)} of {plan.layer_count}."
        return to_svg(figure, identifier, words)


def ranks_svg(plan: Plan | AdapterFolder, label: str, index: int, identifier: str) -> str:
    """Heat map of the LoRA rank by layer and kind of module; darker is higher, empty is not adapted."""
    cells = rank_cells(plan.adapters)
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    highest = max(cells.values())
    with drawing(identifier):
        figure, axes = canvas(HEIGHT, left=90)
        boxes: dict[float | None, list[_Box]] = {}
        for row, kind in enumerate(kinds):
            for layer in range(plan.layer_count):
                box = (layer - 0.44, row - 0.42, 0.88, 0.84)
                boxes.setdefault(cells.get((kind, layer)), []).append(box)
        for rank, same in boxes.items():
            if rank is None:
                _boxes(axes, same, LINE, 0.45)
            else:
                _boxes(axes, same, run_color(index), _shade(rank, highest))
        axes.set_ylim(len(kinds) - 0.5, -0.5)
        axes.set_yticks(range(len(kinds)), [shorten(kind, 16) for kind in kinds])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        _layer_axis(axes, plan.layer_count)
        _title(axes, "LoRA rank by layer and module")
        _rank_legend(axes, sorted(set(cells.values())), index)
        words = f"LoRA rank by layer and module, {label}: {rank_summary(plan.adapters)}."
        return to_svg(figure, identifier, words)


def rank_cells(adapters: Sequence[Adapter]) -> dict[tuple[str, int], float]:
    """Mean rank by (kind of module, layer), attention first; kinds are roles if there are many."""
    kinds = {adapter.name.rpartition(".")[2] for adapter in adapters}
    by_role = len(kinds) > MODULE_ROWS
    ranks: dict[tuple[str, int], list[int]] = {}
    for adapter in sorted(adapters, key=lambda adapter: adapter.role != "attention"):
        kind = adapter.role if by_role else adapter.name.rpartition(".")[2]
        ranks.setdefault((kind, adapter.layer), []).append(adapter.rank)
    return {cell: sum(found) / len(found) for cell, found in ranks.items()}


def loss_by_step_svg(runs: Sequence[Run], labels: Sequence[str], identifier: str) -> str:
    """Held-out loss with markers and the smoothed training loss, faint, against the optimizer step."""
    with drawing(identifier):
        figure, axes = canvas(HEIGHT + 20, left=40)
        for index, (run, label) in enumerate(zip(runs, labels, strict=True)):
            train = smoothed(run.metrics.train_curve)
            axes.plot(*_columns(train), color=run_color(index), linewidth=0.9, alpha=0.45)
            points = held_out_points(run.metrics)
            _held_out_line(axes, [p.step for p in points], [p.loss for p in points], label, index)
            _ring(axes, *((p.step, p.loss) for p in points if p.step == run.metrics.kept_step), index=index)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        _loss_axis(axes, "optimizer step")
        return to_svg(figure, identifier, f"Held-out and training loss by step: {', '.join(labels)}.")


def loss_by_seconds_svg(runs: Sequence[Run], labels: Sequence[str], identifier: str) -> str:
    """Held-out loss of all runs against wall-clock train seconds; the first run's final loss as a line."""
    with drawing(identifier):
        figure, axes = canvas(HEIGHT + 20, left=40)
        for index, (run, label) in enumerate(zip(runs, labels, strict=True)):
            points = held_out_points(run.metrics)
            _held_out_line(axes, [p.train_seconds for p in points], [p.loss for p in points], label, index)
            _ring(axes, *((p.train_seconds, p.loss) for p in points if p.step == run.metrics.kept_step), index=index)
        if len(runs) > 1:
            goal = runs[0].metrics.held_out_loss_after
            axes.axhline(goal, color=MUTED, linewidth=0.7, linestyle=(0, (2, 3)), zorder=1)
        axes.set_xlim(left=0)
        _loss_axis(axes, "train time (s)")
        return to_svg(figure, identifier, f"Held-out loss by train seconds: {', '.join(labels)}.")


def adapter_losses_svg(folders: Sequence[AdapterFolder], labels: Sequence[str], identifier: str) -> str:
    """Held-out loss with markers and the smoothed training loss against the step, of the folders that have them."""
    with drawing(identifier):
        figure, axes = canvas(HEIGHT + 20, left=40)
        for index, (folder, label) in enumerate(zip(folders, labels, strict=True)):
            train = [TrainPoint(step=step, loss=loss, train_seconds=0.0) for step, loss in folder.train_curve]
            is_only_one = not folder.held_out_curve
            axes.plot(
                *_columns(smoothed(train)),
                color=run_color(index),
                linewidth=0.9,
                alpha=0.45,
                label=shorten(label, LABEL_LENGTH) if train and is_only_one else None,
            )
            if folder.held_out_curve:
                _held_out_line(axes, *_columns(folder.held_out_curve), label, index)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        _loss_axis(axes, "optimizer step")
        return to_svg(figure, identifier, f"Held-out and training loss by step: {', '.join(labels)}.")


def phases_svg(runs: Sequence[Run], labels: Sequence[str], identifier: str) -> str:
    """One stacked bar per run: seconds of load, probe, plan, train and eval."""
    longest = max(run.metrics.seconds.total for run in runs) or 1.0
    with drawing(identifier):
        figure, axes = canvas(64 + 42 * len(runs), left=8, right=84, top=30)
        for row, (run, label) in enumerate(zip(runs, labels, strict=True)):
            _phase_bar(axes, row, run.metrics.seconds)
            axes.text(0, row - 0.30, shorten(label, 48), color=INK, va="bottom")
            total = human_seconds(run.metrics.seconds.total)
            axes.annotate(total, (run.metrics.seconds.total, row), (5, 0), textcoords="offset points", va="center")
        axes.set(xlim=(0, longest), ylim=(len(runs) - 0.55, -0.85), yticks=[])
        axes.set_xlabel("wall-clock (s)", fontsize=9)
        axes.spines["left"].set_visible(False)
        handles = [Patch(facecolor=phase_color(phase), label=phase) for phase in phases_of(runs)]
        axes.legend(
            handles=handles,
            ncols=5,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            borderaxespad=0.2,
            handlelength=0.9,
            handleheight=0.9,
            columnspacing=1.2,
            borderpad=0,
        )
        words = "; ".join(
            f"{label} {human_seconds(run.metrics.seconds.total)}" for run, label in zip(runs, labels, strict=True)
        )
        return to_svg(figure, identifier, f"Seconds by phase: {words}.")


def smoothed(curve: Sequence[TrainPoint]) -> list[tuple[float, float]]:
    """(step, mean loss of the last twentieth of the steps), so that single batches do not hide the trend."""
    window = smoothing_window(len(curve))
    losses = [point.loss for point in curve]
    means = [sum(losses[max(0, end - window) : end]) / min(window, end) for end in range(1, len(losses) + 1)]
    return [(point.step, mean) for point, mean in zip(curve, means, strict=True)]


def smoothing_window(points: int) -> int:
    """Points in the moving mean of a training curve of ``points`` points."""
    return max(1, points // 20)


def canvas(height: float, left: float, right: float = 10, top: float = 26, bottom: float = 34) -> tuple[Figure, Axes]:
    """A figure of our width with one pair of axes; sizes and margins in points."""
    figure = Figure(figsize=(WIDTH / POINTS_PER_INCH, height / POINTS_PER_INCH))
    box = (left / WIDTH, bottom / height, 1 - (left + right) / WIDTH, 1 - (top + bottom) / height)
    return figure, figure.add_axes(box)


def _boxes(axes: Axes, boxes: Sequence[_Box], color: str, alpha: float = 1.0) -> None:
    """Rectangles of one colour as a single path: a heat map of hundreds stays small and quick."""
    corners = [[(x, y), (x + w, y), (x + w, y + h), (x, y + h), (x, y)] for x, y, w, h in boxes]
    path = Path.make_compound_path_from_polys(np.array(corners))
    axes.add_patch(PathPatch(path, facecolor=color, alpha=alpha, linewidth=0))


def _title(axes: Axes, text: str) -> None:
    """The quantity on the y axis, written flat above it: easier to read than a turned label."""
    axes.annotate(text, (0, 1), (4, 10), xycoords=("figure fraction", "axes fraction"), textcoords="offset points")


def _layer_axis(axes: Axes, layer_count: int) -> None:
    axes.set_xlim(-0.7, layer_count - 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    axes.set_xlabel("decoder layer", fontsize=9)


def _mark_boundary(axes: Axes, boundary: int, layer_count: int, top: float) -> None:
    """The frozen prefix shaded, a dashed line at its end, and its name on the side with more room."""
    if boundary == 0:
        return
    edge = boundary - 0.5
    axes.axvspan(-0.7, edge, color=IDLE, alpha=0.16, linewidth=0, zorder=0)
    axes.axvline(edge, color=INK, linewidth=0.9, linestyle=(0, (3, 2)))
    to_left = boundary > 0.7 * layer_count
    axes.annotate(
        f"boundary {boundary}",
        (edge, 0.985 * top),
        (-4 if to_left else 4, 0),
        textcoords="offset points",
        ha="right" if to_left else "left",
        va="top",
        color=INK,
        fontsize=9,
    )


def _shade(rank: float, highest: float) -> float:
    return round(0.3 + 0.7 * rank / highest, 3)


def _rank_legend(axes: Axes, ranks: Sequence[float], index: int) -> None:
    shown = ranks if len(ranks) <= 4 else [ranks[0], ranks[len(ranks) // 2], ranks[-1]]
    handles = [
        Patch(facecolor=run_color(index), alpha=_shade(rank, ranks[-1]), linewidth=0, label=f"{rank:.3g}")
        for rank in shown
    ]
    axes.legend(
        handles=handles,
        ncols=len(handles),
        loc="lower right",
        bbox_to_anchor=(1, 1),
        borderaxespad=0.4,
        handlelength=0.9,
        handleheight=0.9,
        columnspacing=1.0,
        borderpad=0,
    )


def _held_out_line(axes: Axes, at: Sequence[float], losses: Sequence[float], label: str, index: int) -> None:
    axes.plot(
        at,
        losses,
        color=run_color(index),
        linestyle=run_dash(index),
        linewidth=1.8,
        marker="o",
        markersize=3.2,
        label=shorten(label, LABEL_LENGTH),
        zorder=3,
        clip_on=False,
    )


def _ring(axes: Axes, *points: tuple[float, float], index: int) -> None:
    """Around the point whose adapter was kept."""
    x, y = _columns(points)
    axes.plot(
        x, y, "o", color=run_color(index), markersize=9, markerfacecolor="none", markeredgewidth=1.2, clip_on=False
    )


def _loss_axis(axes: Axes, x_label: str) -> None:
    axes.set_xlabel(x_label, fontsize=9)
    axes.grid(axis="y")
    _title(axes, "Loss (nats per token)")
    axes.legend(loc="upper right", handlelength=1.6, borderaxespad=0.2)


def _phase_bar(axes: Axes, row: int, seconds: PhaseSeconds) -> None:
    start = 0.0
    for phase in PHASES:
        length: float = getattr(seconds, phase)
        axes.barh(row, length, left=start, height=0.5, color=phase_color(phase))
        start += length


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
