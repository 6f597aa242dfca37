"""Scores, plans and runs as tables and bars for a terminal of 80 columns or more."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from aletheia.names import printable
from aletheia.planning.plan import Adapter, Plan, PlanSettings, Prediction, layer_ranges
from aletheia.probing.scores import ProbeSettings, Scores
from aletheia.probing.timings import Timings
from aletheia.reporting.comparison import (
    NO_INTERVAL,
    Row,
    comparison_sections,
    differences,
    held_out_points,
    kept_point,
    run_labels,
    step_time,
)
from aletheia.reporting.format import (
    NOTHING,
    alpha_summary,
    human_bytes,
    human_count,
    human_loss,
    human_percent,
    human_ratio,
    human_seconds,
    rank_summary,
    shorten,
)
from aletheia.runs.schema import PHASES, Run

TOP_MODULES = 10
_BAR_WIDTH = 26
_ACCENT = "cyan"
_EIGHTHS = " ▏▎▍▌▋▊▉"
# the rows of the report's comparison that a terminal shows
_COMPARED = (
    "Policy",
    "Adapted layers",
    "Trainable parameters",
    "Train time",
    "Step time",
    "Time saved",
    "Speed-up",
    "Total time",
    "Time saved, all counted",
    "Speed-up, all counted",
    "Before",
    "After",
    "Peak memory",
)
_HELD_OUT_NAMES = {"Before": "Held-out loss before", "After": "Held-out loss after"}


def render(artifact: Scores | Plan | Run) -> RenderableType:
    """What ``aletheia show`` prints for an artefact."""
    if isinstance(artifact, Scores):
        return _render_scores(artifact)
    if isinstance(artifact, Plan):
        return _render_plan(artifact)
    return _render_run(artifact)


def comparison_table(runs: Sequence[Run]) -> Table:
    """Time, held-out loss and trainable parameters side by side; the first run is the reference.

    Raises:
        ArtifactError: no runs.
    """
    labels = run_labels(runs)
    table = Table(title_justify="left", caption_justify="left", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("")
    for label in labels:
        table.add_column(Text(label), overflow="fold")
    rows = {row.label: row for section in comparison_sections(runs) for row in section.rows}
    for name in _COMPARED:
        if name in rows:
            table.add_row(*_compared(rows[name]))
    differing = differences(runs)
    if differing:
        table.caption = Text(f"Not like for like: the runs differ in {'; '.join(differing)}.", style="bold yellow")
    else:
        table.caption = Text(NO_INTERVAL if len(runs) > 1 else "", style="dim")
    return table


def _compared(row: Row) -> list[Text]:
    strong = "bold" if row.label.startswith(("Time saved", "Speed-up", "After")) else ""
    return [Text(_HELD_OUT_NAMES.get(row.label, row.label)), *(Text(cell, style=strong) for cell in row.cells)]


def bar(value: float, highest: float, width: int) -> str:
    """A bar of at most ``width`` characters, an eighth of a character fine."""
    if not value > 0 or not highest > 0:
        return ""
    eighths = max(1, round(8 * width * min(1.0, value / highest)))
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _render_scores(scores: Scores) -> RenderableType:
    total = sum(scores.layers) or 1.0
    highest = max(scores.layers)
    table = _table(("layer", 5, "right"), ("score", 10, "right"), ("", _BAR_WIDTH, "left"), ("share", 8, "right"))
    for layer, score in enumerate(scores.layers):
        line = Text(bar(score, highest, _BAR_WIDTH), style=_ACCENT)
        table.add_row(str(layer), _score(score), line, human_percent(score / total))
    data = [("data", printable(scores.data.name))] if scores.data else []
    head = _head("Scores", scores.model.name, [*data, *_probe(scores.probe), *_timings(scores.timings)])
    experts: list[RenderableType] = [Text(), _experts(scores)] if scores.experts else []
    return Group(head, Text(), table, Text(), _top_modules(scores), *experts)


def _timings(timings: Timings | None) -> list[tuple[str, str]]:
    if timings is None:
        return []
    count = len(timings.layers)
    forward = human_seconds(sum(layer.forward for layer in timings.layers) / count)
    backward = human_seconds(sum(layer.backward for layer in timings.layers) / count)
    return [
        ("step", f"of {timings.batch_size} rows: {human_seconds(timings.baseline)} with uniform LoRA in plain PEFT"),
        ("", f"a layer {forward} forward, {backward} backward; the head {human_seconds(timings.head)}"),
    ]


def _top_modules(scores: Scores) -> Table:
    known = [(name, score) for name, score in scores.modules.items() if score is not None]
    best = sorted(known, key=lambda item: (-item[1], item[0]))[:TOP_MODULES]
    table = _table(("top modules", 52, "left"), ("score", 10, "right"), ("", 12, "left"))
    for name, score in best:
        line = Text(bar(score, best[0][1], 12), style=_ACCENT)
        table.add_row(Text(shorten(name, 52)), _score(score), line)
    return table


def _experts(scores: Scores) -> Table:
    """How the probe's tokens spread over the experts of each layer, and which experts none of them reached."""
    table = _table(
        ("layer", 5, "right"), ("experts", 7, "right"), ("tokens each", 14, "right"), ("no token", 40, "left")
    )
    layers = {module.name: module.layer for module in scores.anatomy.modules}
    stacks = {layers[name]: stack for name, stack in scores.experts.items()}  # those of a layer got the same tokens
    for layer, stack in sorted(stacks.items()):
        unreached = [str(index) for index, norm in enumerate(stack.norms) if norm is None]
        spread = f"{min(stack.tokens):,} - {max(stack.tokens):,}" if stack.tokens else NOTHING
        told = f"{len(unreached)}: {', '.join(unreached)}" if unreached else ""
        table.add_row(str(layer), str(len(stack.norms)), spread, Text(shorten(told, 40)))
    return table


def _probe(probe: ProbeSettings) -> list[tuple[str, str]]:
    seed = "" if probe.seed is None else f", seed {probe.seed}"
    return [
        ("probe", f"{printable(probe.score)}, {probe.batches} batches of {probe.batch_size}{seed}"),
        ("", f"{probe.tokens:,} tokens, {probe.labelled_tokens:,} with a label, {probe.dtype} on {probe.device}"),
        ("", f"mean loss {human_loss(probe.mean_loss)} nats per token, {human_seconds(probe.seconds)}"),
    ]


def _render_plan(plan: Plan) -> RenderableType:
    settings, predicted = plan.settings, plan.predicted
    share = human_percent(predicted.captured_importance)
    head = _head(
        "Plan",
        plan.model.name,
        [
            *([("target", plan.reason.removeprefix("target "))] if plan.reason else []),
            ("policy", _policy(settings)),
            ("layers", f"{len(plan.layers)} of {plan.layer_count}: {layer_ranges(plan.layers)}"),
            *([("early", _early(plan))] if plan.early_layers else []),
            ("boundary", f"{plan.boundary}, the lowest layer that learns to the end"),
            ("ranks", f"{settings.ranks}: {rank_summary(plan.adapters)}"),
            ("alpha", alpha_summary(settings)),
            ("trainable", f"{human_count(plan.trainable_parameters)} parameters"),
            ("importance", f"{share} of the summed layer scores captured"),
            (
                "predicted",
                f"steps {human_ratio(predicted.speedup)} as fast as uniform LoRA in plain PEFT, "
                f"{human_ratio(predicted.cached_speedup)} from a filled cache"
                + (f", {human_ratio(predicted.run_speedup)} over the run" if predicted.run_speedup else ""),
            ),
            ("", _predicted_seconds(predicted)),
        ],
    )
    parts: list[RenderableType] = [head, Text(), *_plan_layers(plan)]
    return Group(*parts)


def _early(plan: Plan) -> str:
    """What only learns at first."""
    step = plan.predicted.relative_early_step_time
    speed = f", steps {human_ratio(1 / step)}" if step else ""
    share = human_percent(plan.freeze_after)
    return f"{layer_ranges(plan.early_layers)} in the first {share} of the steps{speed}, then frozen"


def _predicted_seconds(predicted: Prediction) -> str:
    """The same in seconds, or that it was only counted."""
    baseline = predicted.baseline_step_seconds
    if baseline is None:
        return "counted in operations, not measured"
    times = (baseline / predicted.speedup, baseline / predicted.cached_speedup, baseline)
    ours, stored, plain = (human_seconds(time) for time in times)
    return f"{ours} per step, {stored} cached, against {plain} (measured in parts)"


def _policy(settings: PlanSettings) -> str:
    share = "" if settings.policy == "uniform" else f", {settings.percent:g} %"
    seed = f", seed {settings.seed}" if settings.policy == "random" else ""
    return f"{settings.policy}{share}{seed}"


def _plan_layers(plan: Plan) -> list[RenderableType]:
    """Two tables of equal columns, the frozen prefix and the rest, with the boundary between them."""
    suffix = _plan_table(plan, range(plan.boundary, plan.layer_count), header=plan.boundary == 0)
    if plan.boundary == 0:
        return [suffix]
    text = f" boundary {plan.boundary}: no backward pass above this line "
    line = Text(f"──{text}".ljust(78, "─"), style=_ACCENT)
    return [_plan_table(plan, range(plan.boundary), header=True), line, suffix]


def _plan_table(plan: Plan, layers: range, header: bool) -> Table:
    by_layer: dict[int, list[Adapter]] = {}
    for adapter in plan.adapters:
        by_layer.setdefault(adapter.layer, []).append(adapter)
    highest = max(plan.layer_scores)
    table = _table(
        ("layer", 5, "right"),
        ("score", 10, "right"),
        ("", _BAR_WIDTH, "left"),
        ("", 1, "left"),
        ("LoRA ranks", 28, "left"),
        header=header,
    )
    for layer in layers:
        adapters = by_layer.get(layer, [])
        style = _ACCENT if adapters else "dim"
        table.add_row(
            str(layer),
            _score(plan.layer_scores[layer]),
            Text(bar(plan.layer_scores[layer], highest, _BAR_WIDTH), style=style),
            Text("●" if adapters else "", style=style),
            Text(rank_summary(adapters)),
        )
    return table


def _render_run(run: Run) -> RenderableType:
    metrics, plan = run.metrics, run.plan
    seconds, settings = metrics.seconds, metrics.settings
    phases = ", ".join(f"{name} {human_seconds(getattr(seconds, name))}" for name in PHASES if getattr(seconds, name))
    size = f" ({human_bytes(metrics.cache_bytes)})" if metrics.cache_bytes else ""
    per_second = f"{human_count(round(metrics.tokens / seconds.train))} tokens/s" if seconds.train else NOTHING
    data = [("data", printable(metrics.data.name))] if metrics.data else []
    head = _head(
        "Run",
        f"{run.name}: {metrics.model.name}",
        [
            *data,
            ("plan", f"{plan.settings.policy}, {len(plan.layers)} of {plan.layer_count} layers"),
            ("boundary", str(metrics.boundary)),
            *(
                [("early", f"{layer_ranges(plan.early_layers)}, {metrics.early_steps} steps")]
                if plan.early_layers
                else []
            ),
            ("trainable", f"{human_count(metrics.trainable_parameters)} parameters, {rank_summary(plan.adapters)}"),
            ("steps", f"{metrics.steps:,} of batch {settings.batch_size}, learning rate {settings.learning_rate:g}"),
            ("kept", kept_point(metrics)),
            ("tokens", f"{metrics.tokens:,}, {metrics.labelled_tokens:,} with a label"),
            ("time", f"{human_seconds(seconds.total)}: {phases}"),
            ("speed", f"{step_time(metrics)} per step, {per_second}"),
            ("cache", f"{settings.cache}{size}{': ' + metrics.cache_reason if metrics.cache_reason else ''}"),
            ("memory", f"{human_bytes(metrics.peak_memory_bytes)} at peak"),
            *([("start", printable(metrics.went_on_from.name))] if metrics.went_on_from else []),
            ("numbers", f"{settings.dtype} on {settings.device}, seed {settings.seed}"),
        ],
    )
    before, after = human_loss(metrics.held_out_loss_before), human_loss(metrics.held_out_loss_after)
    over = f"{metrics.held_out_rows:,} rows, {metrics.held_out_tokens:,} tokens"
    title = Text.assemble("Held-out loss ", (f"{before} → {after}", "bold"), f" nats per token over {over}")
    return Group(head, Text(), title, _held_out_table(run))


def _held_out_table(run: Run) -> Table:
    points = held_out_points(run.metrics)
    highest = max(point.loss for point in points)
    table = _table(("step", 7, "right"), ("train time", 12, "right"), ("loss", 8, "right"), ("", 40, "left"))
    for point in points:
        is_kept = point.step == run.metrics.kept_step
        line = Text.assemble((bar(point.loss, highest, 34), _ACCENT), " kept" if is_kept else "")
        table.add_row(f"{point.step:,}", human_seconds(point.train_seconds), human_loss(point.loss), line)
    return table


def _head(kind: str, name: str, facts: Sequence[tuple[str, str]]) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in facts:
        grid.add_row(label, Text(value))
    return Group(Text.assemble((kind, f"bold {_ACCENT}"), "  ", (printable(name), "bold"), overflow="fold"), grid)


def _table(*columns: tuple[str, int, str], header: bool = True) -> Table:
    """Fixed widths, so that tables of one listing line up and fit 80 columns."""
    table = Table(box=None, show_header=header, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for name, width, justify in columns:
        table.add_column(name, width=width, overflow="fold", justify="right" if justify == "right" else "left")
    return table


def _score(score: float) -> str:
    """Four digits; scores of different models differ by powers of ten."""
    return f"{score:#.4g}"
