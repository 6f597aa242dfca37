"""Scores, plans and runs as tables and bars for a terminal of 80 columns or more."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from aletheia.names import printable
from aletheia.planning.plan import Adapter, Plan, layer_ranges
from aletheia.probing.scores import ProbeSettings, Scores
from aletheia.probing.timings import Timings
from aletheia.reporting.adapter_facts import adapter_facts
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
    bar,
    human_bytes,
    human_count,
    human_loss,
    human_percent,
    human_seconds,
    model_name,
    shorten,
)
from aletheia.reporting.plan_text import plan_sentences, plan_view, ranks_text
from aletheia.reporting.times import PART_NAMES
from aletheia.runs.adapter_folder import AdapterFolder
from aletheia.runs.schema import PHASES, Metrics, Run

TOP_MODULES = 10
_BAR_WIDTH = 26
_ACCENT = "cyan"
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
_DEVICES = {"cpu": "the processor", "cuda": "a GPU (CUDA)", "mps": "a GPU (Apple MPS)"}
_HELD_OUT_NAMES = {"Before": "Held-out loss before", "After": "Held-out loss after"}


def render(artifact: Scores | Plan | Run | AdapterFolder) -> RenderableType:
    """The view that ``aletheia show`` prints for an artefact."""
    if isinstance(artifact, Scores):
        return _render_scores(artifact)
    if isinstance(artifact, Plan):
        return _render_plan(artifact)
    if isinstance(artifact, AdapterFolder):
        return _render_adapter(artifact)
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


def _render_scores(scores: Scores) -> RenderableType:
    total = sum(scores.layers) or 1.0
    highest = max(scores.layers)
    table = _table(("layer", 5, "right"), ("score", 10, "right"), ("", _BAR_WIDTH, "left"), ("share", 8, "right"))
    for layer, score in enumerate(scores.layers):
        line = Text(bar(score, highest, _BAR_WIDTH), style=_ACCENT)
        table.add_row(str(layer), _score(score), line, human_percent(score / total))
    data = [("data", printable(scores.data.name))] if scores.data else []
    head = _head("Scores", model_name(scores.model.name), [*data, *_probe(scores.probe), *_timings(scores.timings)])
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
        *([("", ", ".join(timings.computed_by))] if timings.computed_by else []),
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
    """How the probe's tokens spread over the experts of each layer, and which experts got none."""
    table = _table(
        ("layer", 5, "right"), ("experts", 7, "right"), ("tokens each", 14, "right"), ("no token", 40, "left")
    )
    layers = {module.name: module.layer for module in scores.anatomy.modules}
    stacks = {
        layers[name]: stack for name, stack in scores.experts.items()
    }  # all stacks of a layer get the same tokens
    for layer, stack in sorted(stacks.items()):
        unreached = [str(index) for index, norm in enumerate(stack.norms) if norm is None]
        spread = f"{min(stack.tokens):,} - {max(stack.tokens):,}" if stack.tokens else NOTHING
        listed = f"{len(unreached)}: {', '.join(unreached)}" if unreached else ""
        table.add_row(str(layer), str(len(stack.norms)), spread, Text(shorten(listed, 40)))
    return table


def _probe(probe: ProbeSettings) -> list[tuple[str, str]]:
    seed = "" if probe.seed is None else f", seed {probe.seed}"
    return [
        ("probe", f"{printable(probe.score)}, {probe.batches} batches of {probe.batch_size}{seed}"),
        ("", f"{probe.tokens:,} tokens, {probe.labelled_tokens:,} with a label, {probe.dtype} on {probe.device}"),
        ("", f"mean loss {human_loss(probe.mean_loss)} nats per token, {human_seconds(probe.seconds)}"),
    ]


def _render_plan(plan: Plan) -> RenderableType:
    data = [("data", printable(plan.data.name))] if plan.data else []
    return plan_view(plan, _head("Plan", model_name(plan.model.name), data))


def _render_run(run: Run) -> RenderableType:
    metrics, plan = run.metrics, run.plan
    settings = metrics.settings
    size = f" ({human_bytes(metrics.cache_bytes)})" if metrics.cache_bytes else ""
    data = [("data", printable(metrics.data.name))] if metrics.data else []
    early = layer_ranges(plan.early_layers)
    frozen = [("frozen", f"layers {early} after step {metrics.early_steps:,}")] if early else []
    head = _head(
        "Run",
        f"{run.name}: {model_name(metrics.model.name)}",
        [
            *data,
            *(
                [("adapter", f"trained further from {printable(metrics.went_on_from.name)}")]
                if metrics.went_on_from
                else []
            ),
            ("plan", " ".join(plan_sentences(plan))),
            ("trainable", f"{human_count(metrics.trainable_parameters)} parameters, rank {ranks_text(plan.adapters)}"),
            ("steps", f"{metrics.steps:,} of {settings.batch_size} rows, learning rate {settings.learning_rate:.3g}"),
            *frozen,
            ("kept", kept_point(metrics)),
            ("tokens", f"{metrics.tokens:,}, {metrics.labelled_tokens:,} of them labelled"),
            ("cache", f"{settings.cache}{size}{': ' + metrics.cache_reason if metrics.cache_reason else ''}"),
            ("memory", f"{human_bytes(metrics.peak_memory_bytes)} at peak"),
            (
                "computed",
                f"in {settings.dtype} on {_DEVICES.get(settings.device, settings.device)}, seed {settings.seed}",
            ),
        ],
    )
    before, after = human_loss(metrics.held_out_loss_before), human_loss(metrics.held_out_loss_after)
    over = f"{metrics.held_out_rows:,} rows, {metrics.held_out_tokens:,} tokens"
    title = Text.assemble("Held-out loss ", (f"{before} → {after}", "bold"), f" nats per token over {over}")
    return Group(head, Text(), _time_table(metrics), Text(), title, _held_out_table(run))


def _time_table(metrics: Metrics) -> Table:
    """Where the time went, in tenths of a second that add up to the total."""
    seconds = metrics.seconds
    per_second = f", {metrics.tokens / seconds.train:,.0f} tokens/s" if seconds.train else ""
    evaluations = len(metrics.held_out_curve)
    notes = {
        "train": f"{metrics.steps:,} steps, {step_time(metrics)} each{per_second}",
        "eval": f"{evaluations} times",
    }
    spent = {phase: round(getattr(seconds, phase), 1) for phase in PHASES}
    spent[max(PHASES, key=spent.__getitem__)] += round(seconds.total, 1) - sum(spent.values())  # the rest from rounding
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim", overflow="fold")
    for phase, took in spent.items():
        if took:
            table.add_row(PART_NAMES[phase], f"{took:,.1f} s", notes.get(phase, ""))
    table.add_row(Text("Total", style="bold"), Text(f"{seconds.total:,.1f} s", style="bold"))
    return table


def _render_adapter(folder: AdapterFolder) -> RenderableType:
    facts = [(name.lower(), value) for name, value in adapter_facts(folder).items() if value != NOTHING]
    head = _head("Adapter", folder.name, facts)
    by_layer: dict[int, list[Adapter]] = {}
    for adapter in folder.adapters:
        by_layer.setdefault(adapter.layer, []).append(adapter)
    alike: dict[tuple[int, int, str], list[int]] = {}
    for layer, adapters in by_layer.items():
        size = sum(adapter.parameters for adapter in adapters)
        alike.setdefault((len(adapters), size, ranks_text(adapters)), []).append(layer)
    table = _table(("layers", 20, "left"), ("modules", 7, "right"), ("parameters", 10, "right"), ("ranks", 30, "left"))
    for (count, size, ranks), layers in alike.items():
        table.add_row(
            layer_ranges(tuple(layers)), str(count * len(layers)), human_count(size * len(layers)), Text(ranks)
        )
    return Group(head, Text(), table)


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
    """A table with fixed widths, so that tables of one view line up and fit 80 columns."""
    table = Table(box=None, show_header=header, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for name, width, justify in columns:
        table.add_column(name, width=width, overflow="fold", justify="right" if justify == "right" else "left")
    return table


def _score(score: float) -> str:
    """A score with four digits; scores of different models differ by powers of ten."""
    return f"{score:#.4g}"
