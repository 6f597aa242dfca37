"""The report: one self-contained HTML page about one or several finished runs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from aletheia.anatomy.schema import DataIdentity
from aletheia.errors import ArtifactError
from aletheia.files import write_text
from aletheia.names import printable
from aletheia.planning.plan import Plan, layer_ranges
from aletheia.reporting import figures
from aletheia.reporting.adapter_page import adapter_page
from aletheia.reporting.blocks import Figure, Page, Pre, Table
from aletheia.reporting.comparison import (
    NO_INTERVAL,
    Row,
    Section,
    Speed,
    comparison_sections,
    counted_speed,
    differences,
    held_out_points,
    kept_point,
    repeat_command,
    run_labels,
    train_speed,
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
)
from aletheia.reporting.svg import run_css_color
from aletheia.runs.adapter_folder import AdapterFolder
from aletheia.runs.schema import Metrics, Run

_Thing = TypeVar("_Thing")
_MARK = '<meta name="generator" content="aletheia">'
_MARK_WITHIN = 2048  # the mark stands in the first lines of our pages


def report(runs: Sequence[Run | AdapterFolder], out: str | Path) -> Path:
    """Write one page about ``runs``; the first is the reference of the comparison. Returns its path.

    The same runs give the same bytes. An existing file is replaced only if it is such a report. With an adapter folder
    of another program among them, the page shows what all of them have: layers, ranks, and losses where there are some.

    Raises:
        ArtifactError: no runs, ``out`` holds something else, or it cannot be written.
    """
    out = Path(out)
    labels = run_labels(runs)
    refuse_foreign(out)
    ours = [run for run in runs if isinstance(run, Run)]
    if len(ours) == len(runs):
        page = page_environment().get_template("report.html.j2").render(_content(ours, labels))
    else:
        folders = [AdapterFolder.of_run(run) if isinstance(run, Run) else run for run in runs]
        page = to_html(adapter_page(folders, labels))
    write_text(out, page)
    return out


def refuse_foreign(out: Path) -> None:
    """Raises ArtifactError where ``out`` is a file that is no report of ours."""
    if not out.exists():
        return
    try:
        with open(out, "rb") as handle:
            ours = _MARK.encode() in handle.read(_MARK_WITHIN)
    except OSError as error:
        raise ArtifactError(f"cannot write {out}: {error.strerror}; choose another place with `out`") from error
    if not ours:
        raise ArtifactError(f"{out} exists and is no report of ours; choose another `out` or remove it first")


def page_environment() -> Environment:
    """Templates that escape every name, and show control characters in none."""
    environment = Environment(
        loader=PackageLoader("aletheia.reporting", package_path="."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # names may hold anything a file system allows; figures are ours and pass as they are
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters["lines"] = _lines
    return environment


def to_html(page: Page) -> str:
    """One self-contained page: no script, nothing loaded, dark and light, readable on a phone and in print."""
    kinds = {Table: "table", Figure: "figure", Pre: "pre"}
    blocks = [
        {"kind": kinds[type(block)], "block": block, "svg": Markup(block.svg) if isinstance(block, Figure) else ""}
        for block in page.blocks
    ]
    return page_environment().get_template("campaign.html.j2").render(page=page, blocks=blocks)


def _lines(text: str) -> Markup:
    """Text of several lines, each printable and escaped."""
    return Markup("\n").join(printable(line) for line in text.splitlines())


def _content(runs: Sequence[Run], labels: Sequence[str]) -> dict[str, Any]:
    first = runs[0].metrics
    commands = [
        {"label": label, "parts": parts}
        for label, run in zip(labels, runs, strict=True)
        if (parts := repeat_command(run))
    ]
    return {
        "labels": labels,
        "colors": [run_css_color(index) for index in range(len(runs))],
        "first": first,
        "differences": differences(runs),
        "others": [_against(run, runs[0], label) for run, label in zip(runs[1:], labels[1:], strict=True)],
        "single": _alone(runs[0]),
        "cards": _cards(runs, labels),
        "no_interval": NO_INTERVAL,
        "sections": comparison_sections(runs),
        "loss_by_step": Markup(figures.loss_by_step_svg(runs, labels, "steps")),
        "loss_by_seconds": Markup(figures.loss_by_seconds_svg(runs, labels, "seconds")),
        "phases": Markup(figures.phases_svg(runs, labels, "phases")),
        "window": figures.smoothing_window(len(first.train_curve)),
        "curves": [
            {"label": label, "points": held_out_points(run.metrics)} for label, run in zip(labels, runs, strict=True)
        ],
        "plans": [_drawn(run.plan, label, index) for index, (run, label) in enumerate(zip(runs, labels, strict=True))],
        "provenance": _provenance(runs),
        "commands": commands,
    }


def _against(run: Run, reference: Run, label: str) -> dict[str, str]:
    """The summary sentence of one run against the reference, in the parts the page sets apart."""
    alone, counted = train_speed(run, reference), counted_speed(run, reference)
    before, after = run.metrics.held_out_loss_before, run.metrics.held_out_loss_after
    goal = reference.metrics.held_out_loss_after
    return {
        "label": label,
        "trained": f"trained in {_seconds_against(alone)} for",
        "speed": f"{_gain(alone)}, probe, planning and cache not counted",
        "counted": f"With these counted it took {_seconds_against(counted)}: {_gain(counted)}",
        "loss": (
            f"It ended at a held-out loss of {human_loss(after)} against {human_loss(goal)} nats per token "
            f"({human_loss(before)} before training)"
        ),
    }


def _seconds_against(speed: Speed) -> str:
    return f"{human_seconds(speed.seconds)} against {human_seconds(speed.reference_seconds)}"


def _gain(speed: Speed) -> str:
    if speed.time_saved is None:
        return "no speed-up can be given"
    if speed.time_saved < 0:
        return f"speed-up {human_ratio(speed.speedup)}, {human_percent(-speed.time_saved)} more time"
    return f"speed-up {human_ratio(speed.speedup)}, {human_percent(speed.time_saved)} of the time saved"


def _alone(run: Run) -> str:
    plan, metrics = run.plan, run.metrics
    before, after = metrics.held_out_loss_before, metrics.held_out_loss_after
    moved = "fell" if after < before else "rose" if after > before else "stayed"
    seconds = metrics.seconds
    parts = [("probe", seconds.probe), ("planning", seconds.plan), ("cache", seconds.cache)]
    if metrics.settings.quantization_corrected:
        parts.append(("correction", seconds.correction))
    if metrics.rate_race is not None:
        parts.append(("race of learning rates", seconds.race))
    others = ", ".join(f"{name} {human_seconds(spent)}" for name, spent in parts)
    return (
        f"trained adapters in {len(plan.layers)} of {plan.layer_count} decoder layers for {metrics.steps:,} steps"
        + (f" (the other layers' in the first {metrics.early_steps:,})" if metrics.early_steps else "")
        + f", kept those of {kept_point(metrics)},"
        + " in "
        f"{human_seconds(seconds.train)} ({others} not counted); "
        f"the held-out loss {moved} from {human_loss(before)} to "
        f"{human_loss(after)} nats per token over {metrics.held_out_rows:,} rows"
    )


def _steps(metrics: Metrics) -> str:
    return f"{metrics.steps:,} steps" + (f", {metrics.steps_saved:,} saved" if metrics.steps_saved else "")


def _cards(runs: Sequence[Run], labels: Sequence[str]) -> list[dict[str, str]]:
    """The figures to see first: of the only run, or of the second against the first; more runs have the table."""
    last = runs[-1].metrics
    loss = {"name": "Held-out loss", "value": human_loss(last.held_out_loss_after)}
    trainable = {"name": "Trainable parameters", "value": human_count(last.trainable_parameters)}
    if len(runs) == 1:
        return [
            {"name": "Train time", "value": human_seconds(last.seconds.train), "note": _steps(last)},
            loss | {"note": f"from {human_loss(last.held_out_loss_before)}, nats per token"},
            trainable | {"note": rank_summary(runs[0].plan.adapters)},
            {"name": "Peak memory", "value": human_bytes(last.peak_memory_bytes), "note": last.settings.device},
        ]
    if len(runs) > 2:
        return []
    first, speed, counted = runs[0].metrics, train_speed(runs[1], runs[0]), counted_speed(runs[1], runs[0])
    saved = NOTHING if speed.time_saved is None else human_percent(speed.time_saved)
    return [
        {
            "name": "Training speed-up",
            "value": human_ratio(speed.speedup),
            "note": f"{human_ratio(counted.speedup)} with probe and plan counted",
        },
        {"name": "Train time saved", "value": saved, "note": f"{_seconds_against(speed)}"},
        loss | {"note": f"against {human_loss(first.held_out_loss_after)} for {labels[0]}"},
        trainable | {"note": f"against {human_count(first.trainable_parameters)} for {labels[0]}"},
    ]


def _drawn(plan: Plan, label: str, index: int) -> dict[str, str]:
    share = human_percent(plan.predicted.captured_importance)
    boundary = f"boundary {plan.boundary}" if plan.boundary else "no frozen prefix"
    return {
        "label": label,
        "headline": f"{len(plan.layers)} of {plan.layer_count} layers, {boundary}, {share} of the summed score"
        + (f"; layers {layer_ranges(plan.early_layers)} at first" if plan.early_layers else ""),
        "scores": Markup(figures.layer_scores_svg(plan, label, index, f"scores-{index}")),
        "ranks": Markup(figures.ranks_svg(plan, label, index, f"ranks-{index}")),
    }


def _provenance(runs: Sequence[Run]) -> tuple[Section, ...]:
    every = [run.metrics for run in runs]
    names = list(dict.fromkeys(name for metrics in every for name in metrics.packages))
    packages = tuple(Row(name, tuple(m.packages.get(name, NOTHING) for m in every)) for name in names)
    return (
        Section("Model", _columns(every, _model)),
        Section("Training data", _columns([metrics.data for metrics in every], _data)),
        Section("Held-out data", _columns([metrics.held_out_data for metrics in every], _data)),
        Section("Plan settings", _columns([run.plan for run in runs], _plan_settings)),
        Section("Probe", _columns([run.plan for run in runs], _probe)),
        Section("Packages", packages),
    )


def _columns(things: Sequence[_Thing], describe: Callable[[_Thing], dict[str, str]]) -> tuple[Row, ...]:
    described = [describe(thing) for thing in things]
    return tuple(Row(name, tuple(each[name] for each in described)) for name in described[0])


def _model(metrics: Metrics) -> dict[str, str]:
    return {"Name": metrics.model.name, "Fingerprint": metrics.model.fingerprint}


def _data(data: DataIdentity | None) -> dict[str, str]:
    if data is None:
        return dict.fromkeys(("Name", "Fingerprint", "Form", "Rows"), NOTHING)
    return {"Name": data.name, "Fingerprint": data.fingerprint, "Form": data.form, "Rows": f"{data.rows:,}"}


def _plan_settings(plan: Plan) -> dict[str, str]:
    settings = plan.settings
    return {
        "Policy": str(settings.policy),
        "Percent": f"{settings.percent:g}",
        "Ranks": f"{settings.ranks}: {rank_summary(plan.adapters)}",
        "Alpha": alpha_summary(settings),
        "Predicted speed-up": f"{human_ratio(plan.predicted.speedup)} over uniform LoRA",
        "Seed": str(settings.seed),
    }


def _probe(plan: Plan) -> dict[str, str]:
    probe = plan.probe
    return {
        "Score": probe.score,
        "Batches": f"{probe.batches} of {probe.batch_size}",
        "Tokens": f"{probe.tokens:,}, {probe.labelled_tokens:,} with a label",
        "Dtype and device": f"{probe.dtype}, {probe.device}",
        "Seed": NOTHING if probe.seed is None else str(probe.seed),
    }
