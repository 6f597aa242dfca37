"""The figures of the report, each a function from plain data to SVG for desktop and phone."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from aletheia.planning.plan import Adapter, Plan, layer_ranges
from aletheia.reporting.adapter_facts import curve_ends
from aletheia.reporting.comparison import SAME_LOSS, differences, held_out_points
from aletheia.reporting.format import human_loss, human_seconds, rank_summary, shorten
from aletheia.reporting.svg import DESK, PHONE, Axis, Drawing, Point, figure, run_class, run_dash, tick_texts, ticks
from aletheia.reporting.times import learning_layers, time_parts
from aletheia.runs.adapter_folder import AdapterFolder
from aletheia.runs.schema import Metrics, Run, TrainPoint

MODULE_ROWS = 12  # kinds of modules; if there are more, they are drawn by role
MANY = 3  # evaluations; with no more than these, the whole axis is shown
_LEFT, _RIGHT = 46.0, 12.0
_CURVE_POINTS = 240  # of a training curve; more make no visible difference on a screen


@dataclass(frozen=True)
class LossWindow:
    """The range of losses that a figure shows. With ``cut_top``, losses before training are above ``high``."""

    low: float
    high: float
    cut_top: bool

    @property
    def cut_bottom(self) -> bool:
        """Whether the axis begins above zero."""
        return self.low > 0

    @property
    def words(self) -> str:
        """Where the axis is cut, in words; empty if it is not."""
        if self.cut_top:
            return f"axis cut at {'both ends' if self.cut_bottom else 'the top'}"
        return "axis cut at the bottom" if self.cut_bottom else ""


def loss_window(held_out: Sequence[Sequence[float]], others: Sequence[float] = ()) -> LossWindow:
    """The range to show for held-out curves and for ``others``: training losses, or a line across.

    Several curves share their first loss. If it is far above all later ones, it is left out, so that the curves can be
    distinguished.
    """
    later = [loss for curve in held_out for loss in curve[1:]] or [loss for curve in held_out for loss in curve]
    every = [*others, *(loss for curve in held_out for loss in curve)]
    low, high = min(every), max(every)
    spread = max(later) - min(later)
    cut_top = len(held_out) > 1 and max(map(len, held_out)) > MANY and high - max(later) > 1.5 * spread > 0
    if cut_top:
        low, high = min(*later, *others), max(later) + 0.35 * spread
    margin = 0.08 * ((high - low) or high)
    return LossWindow(0.0 if low < 0.3 * high else low - margin, high if cut_top else high + margin, cut_top)


def loss_figure(
    runs: Sequence[Run], labels: Sequence[str], identifier: str, by_seconds: bool = False, wide: int = DESK
) -> Markup:
    """Held-out loss with marks, by step or by seconds of training.

    By step, it also shows where lower layers freeze and, for a single run, the smoothed training loss.
    """
    held_out = [[point.loss for point in held_out_points(run.metrics)] for run in runs]
    train = smoothed(runs[0].metrics.train_curve) if len(runs) == 1 and not by_seconds else []
    has_goal = by_seconds and len(runs) > 1 and not differences(runs, SAME_LOSS)
    goal = runs[0].metrics.held_out_loss_after
    window = loss_window(held_out, [goal] if has_goal else [loss for _, loss in train])
    unit, size = (1.0, "s") if not by_seconds or _longest(runs) < 600 else (60.0, "min")
    end = _longest(runs) / unit if by_seconds else max(run.metrics.steps for run in runs)
    title = f"Loss by {f'training time ({size})' if by_seconds else 'optimizer step'}"
    words = "; ".join(_loss_words(label, run.metrics) for label, run in zip(labels, runs, strict=True))

    def draw(width: int) -> Drawing:
        height = 280.0 if width == PHONE else 320.0
        drawing = Drawing(width, height)
        x = Axis(0.0, end or 1.0, _LEFT, width - _RIGHT - 6)
        y = Axis(window.low, window.high, height - 44, 34)
        _loss_frame(drawing, x, y, window, f"training time, {size}" if by_seconds else "optimizer step")
        if not by_seconds:
            _freezing(drawing, runs, x, y)
        for index, run in enumerate(runs):
            found = held_out_points(run.metrics)
            points = [(x(p.train_seconds / unit if by_seconds else p.step), y(p.loss)) for p in found]
            drawing.opened(run_class(index))
            drawing.clipped((x.start, y.end, width - x.start, y.start - y.end))
            drawing.curve([(x(step), y(loss)) for step, loss in train], "train")
            drawing.curve(points, "run" if index else "run first", run_dash(index))
            drawing.unclipped()
            _marks(drawing, run, points, index, y.end)
            drawing.closed()
        if has_goal:
            drawing.curve([(x.start, y(goal)), (x.end, y(goal))], "goal", "2 4")
        return drawing

    return figure(identifier, title, f"{words}. {window.words}".strip(), draw, wide)


def _longest(runs: Sequence[Run]) -> float:
    return max(run.metrics.seconds.train for run in runs)


def _loss_words(label: str, metrics: Metrics) -> str:
    before, after = human_loss(metrics.held_out_loss_before), human_loss(metrics.held_out_loss_after)
    return f"{label}: held-out loss {before} before training, {after} after {metrics.steps} steps"


def _loss_frame(drawing: Drawing, x: Axis, y: Axis, window: LossWindow, x_label: str) -> None:
    """Grid, axes with marked cuts, and axis labels."""
    narrow = drawing.width == PHONE
    drawing.text(2, 14, "Loss, nats per token" + (f" ({window.words})" if window.words else ""), "muted")
    values = ticks(window.low, window.high, 5)
    for value, text in zip(values, tick_texts(values), strict=True):
        drawing.line(x.start, y(value), drawing.width - _RIGHT, y(value))
        drawing.text(x.start - 8, y(value) + 4, text, "muted", "end")
    drawing.vertical(x.start, y.end, y.start, window.cut_top, window.cut_bottom)
    drawing.line(x.start, y.start, drawing.width - _RIGHT, y.start, "axis")
    values = ticks(0, x.high, 5 if narrow else 10, integer=x.high > 5)
    for value, text in zip(values, tick_texts(values), strict=True):
        drawing.text(x(value), y.start + 17, text, "muted", "middle")
    drawing.text(drawing.width - _RIGHT, y.start + 37, x_label, "muted", "end")


def _freezing(drawing: Drawing, runs: Sequence[Run], x: Axis, y: Axis) -> None:
    """A vertical line where the lower layers of a run stop learning."""
    for index, run in enumerate(runs):
        early = learning_layers(run)[1]
        if not early:
            continue
        at = x(run.metrics.early_steps)
        drawing.curve([(at, y.end), (at, y.start)], f"{run_class(index)} freeze", "4 3")
        if len(runs) == 1:
            right = at > x.end - 170
            drawing.text(
                at - 6 if right else at + 6,
                y.end + 10,
                f"layers {layer_ranges(early)} freeze",
                "muted",
                "end" if right else "start",
            )


def _marks(drawing: Drawing, run: Run, points: Sequence[Point], index: int, top: float) -> None:
    """A mark at each evaluation in the figure, and a ring around the kept one."""
    for found, at in zip(held_out_points(run.metrics), points, strict=True):
        if at[1] >= top:
            drawing.marker(at, index)
            if found.step == run.metrics.kept_step:
                drawing.ring(at)


def layers_figure(run: Run, label: str, index: int, identifier: str, wide: int = DESK) -> Markup:
    """For each layer, on one axis: probe score, LoRA rank of each kind of module, and the steps in which it learns."""
    plan = run.plan
    cells = rank_cells(plan.adapters)
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    lasting, early = learning_layers(run)
    words = f"Layers {layer_ranges(lasting)} of {plan.layer_count} learn to the end. "
    if early:
        words += f"Layers {layer_ranges(early)} learn in the first {run.metrics.early_steps} steps. "
    words += f"Ranks: {rank_summary(plan.adapters)}."

    def draw(width: int) -> Drawing:
        scores = 122.0 if any(plan.layer_scores) else 0.0
        ranks = 30 + 17.0 * len(kinds)
        phases = 104.0 if early else 0.0
        drawing = Drawing(width, scores + ranks + phases + 34)
        left = 78.0
        x = Axis(-0.5, plan.layer_count - 0.5, left, width - 44.0)
        drawing.opened(run_class(index))
        if scores:
            _scores(drawing, run, x, 22, scores - 12)
        _ranks(drawing, plan, x, cells, kinds, scores + 22)
        if early:
            _phases(drawing, run, x, scores + ranks + 20)
        bottom = drawing.height - 32
        if lasting[0]:
            edge = x(lasting[0] - 0.5)
            drawing.curve([(edge, 22), (edge, bottom)], "boundary", "4 3")
        drawing.closed()
        _layer_axis(drawing, plan, x, bottom)
        return drawing

    return figure(identifier, f"Layers of {label}", words, draw, wide)


def _layer_axis(drawing: Drawing, plan: Plan | AdapterFolder, x: Axis, bottom: float) -> None:
    values = ticks(0, plan.layer_count - 1, 15 if drawing.width == DESK else 6, integer=True)
    for value, text in zip(values, tick_texts(values), strict=True):
        drawing.text(x(value), bottom + 14, text, "muted", "middle")
    drawing.text(x.start - 8, bottom + 14, "layer", "muted", "end")


def _column(plan: Plan | AdapterFolder, x: Axis) -> float:
    """Width of a layer's column."""
    return 0.8 * (x.end - x.start) / plan.layer_count


def _groups(run: Run) -> dict[str, tuple[int, ...]]:
    """The layers by how long they learn."""
    lasting, early = learning_layers(run)
    others = tuple(layer for layer in range(run.plan.layer_count) if layer not in {*lasting, *early})
    return {"lasting": lasting, "early": early, "idle": others}


def _scores(drawing: Drawing, run: Run, x: Axis, top: float, bottom: float) -> None:
    plan = run.plan
    drawing.text(2, 12, f"Score of each layer: {shorten(plan.probe.score, 24)} in the probe", "muted")
    y = Axis(0.0, max(plan.layer_scores), bottom, top)
    width = _column(plan, x)
    for css, layers in _groups(run).items():
        heights = [(layer, y.start - y(plan.layer_scores[layer])) for layer in layers]
        drawing.boxes([(x(layer) - width / 2, y.start - tall, width, tall) for layer, tall in heights], css)
    drawing.line(x.start, bottom, x.end, bottom, "axis")
    drawing.text(x.start - 8, bottom, "0", "muted", "end")
    drawing.text(x.start - 8, top + 9, f"{max(plan.layer_scores):.3g}", "muted", "end")


def _ranks(
    drawing: Drawing,
    plan: Plan | AdapterFolder,
    x: Axis,
    cells: dict[tuple[str, int], float],
    kinds: Sequence[str],
    top: float,
) -> None:
    """A row per kind of module, with its rank, or lowest and highest rank, at the end."""
    width = _column(plan, x)
    highest, lowest = max(cells.values()), min(cells.values())
    drawing.text(2, top - 9, "LoRA rank by module" + ("; paler is lower" if lowest < highest else ""), "muted")
    for row, kind in enumerate(kinds):
        y = top + 17 * row
        own = {layer: rank for (name, layer), rank in cells.items() if name == kind}
        drawing.text(x.start - 8, y + 12, shorten(kind, 11), "", "end")
        drawing.boxes([(x(n) - width / 2, y + 1, width, 15) for n in range(plan.layer_count) if n not in own], "empty")
        for rank in sorted(set(own.values())):
            same = [(x(layer) - width / 2, y + 1, width, 15) for layer, found in own.items() if found == rank]
            drawing.boxes(same, "lasting", 0.3 + 0.7 * rank / highest)
        low, high = min(own.values()), max(own.values())
        drawing.text(x.end + 6, y + 12, f"{low:.3g}" if low == high else f"{low:.3g}-{high:.3g}")


def _phases(drawing: Drawing, run: Run, x: Axis, top: float) -> None:
    """Steps from top to bottom: a column is coloured while its layer learns."""
    early, steps = run.metrics.early_steps, run.metrics.steps
    drawing.text(2, top - 9, "Steps in which a layer learns", "muted")
    y = Axis(0, steps, top, top + 72)
    width = _column(run.plan, x)
    drawing.line(x.start, y(early), x.end, y(early))
    for css, layers in _groups(run).items():
        until = {"lasting": steps, "early": early, "idle": 0}[css]
        drawing.boxes([(x(layer) - width / 2, top, width, y(until) - top) for layer in layers if until], css)
    for step in [0, *([early] if 0.3 < early / steps < 0.8 else []), steps]:
        drawing.text(x.start - 8, y(step) + (10 if step == 0 else 4), f"{step:,}", "muted", "end")
    drawing.line(x.start, top, x.end, top, "axis")


def rank_cells(adapters: Sequence[Adapter]) -> dict[tuple[str, int], float]:
    """Mean rank by (kind of module, layer), attention first; kinds are roles if there are many."""
    kinds = {adapter.name.rpartition(".")[2] for adapter in adapters}
    by_role = len(kinds) > MODULE_ROWS
    ranks: dict[tuple[str, int], list[int]] = {}
    for adapter in sorted(adapters, key=lambda adapter: adapter.role != "attention"):
        kind = adapter.role if by_role else adapter.name.rpartition(".")[2]
        ranks.setdefault((kind, adapter.layer), []).append(adapter.rank)
    return {cell: sum(found) / len(found) for cell, found in ranks.items()}


def times_figure(runs: Sequence[Run], labels: Sequence[str], identifier: str) -> Markup:
    """A bar per run, in parts; its length is the time that the run took."""
    longest = max(run.metrics.seconds.total for run in runs) or 1.0
    totals = [human_seconds(run.metrics.seconds.total) for run in runs]
    words = "; ".join(f"{label} took {total}" for label, total in zip(labels, totals, strict=True))

    def draw(width: int) -> Drawing:
        drawing = Drawing(width, 52.0 * len(runs))
        x = Axis(0.0, longest, 2.0, width - 2.0)
        for row, (run, label) in enumerate(zip(runs, labels, strict=True)):
            y = 52.0 * row
            drawing.text(2, y + 14, shorten(label, 34 if width == PHONE else 80))
            drawing.text(width - 2, y + 14, f"{totals[row]} in all", "strong", "end")
            start = 0.0
            for part in time_parts(run):
                length = max(x(start + part.seconds) - x(start), 1.0)
                drawing.boxes([(x(start), y + 21, length, 20)], f"p-{part.key}")
                start += part.seconds
        return drawing

    return figure(identifier, "Where the time went", words, draw)


def smoothed(curve: Sequence[TrainPoint]) -> list[tuple[float, float]]:
    """(step, mean loss of the last twentieth of the steps), so that single batches do not hide the trend.

    A long curve is thinned to every n-th point and the last one.
    """
    window = smoothing_window(len(curve))
    losses = [point.loss for point in curve]
    means = [sum(losses[max(0, end - window) : end]) / min(window, end) for end in range(1, len(losses) + 1)]
    points = [(float(point.step), mean) for point, mean in zip(curve, means, strict=True)]
    every = 1 + len(points) // _CURVE_POINTS
    return [*points[:-1:every], *points[-1:]]


def smoothing_window(points: int) -> int:
    """Points in the moving mean of a training curve of ``points`` points."""
    return max(1, points // 20)


def adapter_losses_figure(folders: Sequence[AdapterFolder], labels: Sequence[str], identifier: str) -> Markup:
    """Held-out loss with marks and smoothed training loss by step, for the folders that have them."""
    train = [
        smoothed([TrainPoint(step=step, loss=loss, train_seconds=0.0) for step, loss in folder.train_curve])
        for folder in folders
    ]
    curves = [[loss for _, loss in folder.held_out_curve] for folder in folders if folder.held_out_curve]
    curves = curves or [[loss for _, loss in curve] for curve in train if curve]
    window = loss_window(curves, [loss for curve in train for _, loss in curve])
    last = max(step for folder in folders for step, _ in (*folder.train_curve, *folder.held_out_curve))

    def draw(width: int) -> Drawing:
        drawing = Drawing(width, 280.0 if width == PHONE else 320.0)
        x, y = Axis(0.0, last, _LEFT, width - _RIGHT - 6), Axis(window.low, window.high, drawing.height - 44, 34)
        _loss_frame(drawing, x, y, window, "optimizer step")
        for index, folder in enumerate(folders):
            points = [(x(step), y(loss)) for step, loss in folder.held_out_curve]
            drawing.opened(run_class(index))
            drawing.clipped((x.start, y.end, width - x.start, y.start - y.end))
            drawing.curve([(x(step), y(loss)) for step, loss in train[index]], "train")
            drawing.curve(points, "run", run_dash(index))
            drawing.unclipped()
            for at in points:
                drawing.marker(at, index)
            drawing.closed()
        return drawing

    words = "; ".join(_adapter_words(label, folder) for label, folder in zip(labels, folders, strict=True))
    return figure(identifier, "Loss by optimizer step", f"{words}. {window.words}".strip(), draw)


def _adapter_words(label: str, folder: AdapterFolder) -> str:
    for kind, curve in (("held-out", folder.held_out_curve), ("training", folder.train_curve)):
        if curve:
            return f"{label}: {kind} loss {curve_ends(curve)}"
    return f"{label}: no losses"


def adapter_ranks_figure(folder: AdapterFolder, label: str, index: int, identifier: str) -> Markup:
    """The rank of each kind of module, layer by layer."""
    cells = rank_cells(folder.adapters)
    kinds = list(dict.fromkeys(kind for kind, _ in cells))

    def draw(width: int) -> Drawing:
        drawing = Drawing(width, 17.0 * len(kinds) + 60)
        x = Axis(-0.5, folder.layer_count - 0.5, 78.0, width - 44.0)
        drawing.opened(run_class(index))
        _ranks(drawing, folder, x, cells, kinds, 22)
        drawing.closed()
        _layer_axis(drawing, folder, x, drawing.height - 32)
        return drawing

    return figure(identifier, f"Ranks of {label}", rank_summary(folder.adapters), draw)
