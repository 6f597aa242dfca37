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
from aletheia.planning.plan import Plan
from aletheia.reporting import figures
from aletheia.reporting.adapter_page import adapter_page
from aletheia.reporting.blocks import Page, Panels, Pre, Table
from aletheia.reporting.comparison import (
    NO_INTERVAL,
    SAME_LOSS,
    SAME_WORK,
    Row,
    Section,
    comparison_sections,
    differences,
    held_out_points,
    repeat_command,
    run_labels,
)
from aletheia.reporting.format import (
    NOTHING,
    alpha_summary,
    human_percent,
    human_ratio,
    human_seconds,
    model_name,
    rank_summary,
)
from aletheia.reporting.summary import against, alone, cards, chosen_words, warning
from aletheia.reporting.svg import DESK, HALF, line_key, run_class
from aletheia.reporting.times import learning_layers, time_table
from aletheia.runs.adapter_folder import AdapterFolder
from aletheia.runs.schema import Metrics, Run

_Thing = TypeVar("_Thing")
_MARK = '<meta name="generator" content="aletheia">'
_MARK_WITHIN = 2048  # the mark is in the first lines of our pages


def report(runs: Sequence[Run | AdapterFolder], out: str | Path) -> Path:
    """Write one page about ``runs``; the first is the reference of the comparison. Returns its path.

    The same runs give the same bytes. An existing file is replaced only if it is such a report. If one of ``runs`` is
    an adapter folder of another program, the page shows what all have: layers, ranks and, if recorded, losses.

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
    """Raise ArtifactError if ``out`` exists and is not a report of Aletheia."""
    if not out.exists():
        return
    try:
        with open(out, "rb") as handle:
            ours = _MARK.encode() in handle.read(_MARK_WITHIN)
    except OSError as error:
        raise ArtifactError(f"cannot write {out}: {error.strerror}; choose another `out`") from error
    if not ours:
        raise ArtifactError(f"{out} exists and is not a report of Aletheia; choose another `out` or remove it first")


def page_environment() -> Environment:
    """Templates that escape every name and replace control characters."""
    environment = Environment(
        loader=PackageLoader("aletheia.reporting", package_path="."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # names may hold anything that a file system allows; figures are made here and pass unchanged
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters["lines"] = _lines
    environment.filters["model_name"] = lambda name: printable(model_name(name))
    environment.filters["seconds"] = lambda seconds: NOTHING if seconds is None else human_seconds(seconds)
    return environment


def to_html(page: Page) -> str:
    """One self-contained page without scripts, in dark and light, readable on a phone and in print."""
    kinds = {Table: "table", Panels: "panels", Pre: "pre"}
    blocks = [{"kind": kinds[type(block)], "block": block} for block in page.blocks]
    return page_environment().get_template("campaign.html.j2").render(page=page, blocks=blocks)


def _lines(text: str) -> Markup:
    """Text of several lines, each made printable and escaped."""
    return Markup("\n").join(printable(line) for line in text.splitlines())


def _content(runs: Sequence[Run], labels: Sequence[str]) -> dict[str, Any]:
    first, several = runs[0].metrics, len(runs) > 1
    return {
        "labels": labels,
        "keys": [line_key(index) for index in range(len(runs))],
        "first": first,
        "freezes": any(learning_layers(run)[1] for run in runs),
        "same_loss": not differences(runs, SAME_LOSS),
        "unlike": differences(runs, SAME_WORK),
        "differing": [found for found in differences(runs) if found not in differences(runs, SAME_WORK)],
        "sentences": [against(run, runs[0], label, labels[0]) for run, label in zip(runs[1:], labels[1:], strict=True)]
        or [alone(runs[0])],
        "warnings": [f"{label}: {words}" for label, run in zip(labels, runs, strict=True) if (words := warning(run))],
        "cards": cards(runs, labels),
        "no_interval": NO_INTERVAL,
        "sections": comparison_sections(runs),
        "loss_by_step": figures.loss_figure(runs, labels, "steps", wide=HALF if several else DESK),
        "loss_by_seconds": figures.loss_figure(runs, labels, "seconds", by_seconds=True, wide=HALF),
        "window": figures.smoothing_window(len(first.train_curve)),
        "curves": [(label, held_out_points(run.metrics)) for label, run in zip(labels, runs, strict=True)],
        "plans": [_drawn(run, labels[at], at, HALF if several else DESK) for at, run in enumerate(runs)],
        "times": figures.times_figure(runs, labels, "times"),
        "time_table": time_table(runs),
        "totals": [run.metrics.seconds.total for run in runs],
        "provenance": _provenance(runs),
        "commands": [(label, parts) for label, run in zip(labels, runs, strict=True) if (parts := repeat_command(run))],
    }


def _drawn(run: Run, label: str, index: int, wide: int) -> dict[str, Any]:
    """The layers of one run as a figure, a sentence and a table."""
    plan, metrics = run.plan, run.metrics
    adapters = [[adapter for adapter in plan.adapters if adapter.layer == layer] for layer in range(plan.layer_count)]
    total = sum(plan.layer_scores) or 1.0
    lasting, early = learning_layers(run)
    until = dict.fromkeys(early, metrics.early_steps) | dict.fromkeys(lasting, metrics.steps)
    return {
        "label": label,
        "css": run_class(index),
        "words": chosen_words(run),
        "reason": plan.reason,
        "has_early": bool(early),
        "has_idle": len(until) < plan.layer_count,
        "early_steps": metrics.early_steps,
        "figure": figures.layers_figure(run, label, index, f"layers-{index}", wide),
        "rows": [
            (
                layer,
                f"{score:.4g}",
                human_percent(score / total),
                rank_summary(adapters[layer]) or NOTHING,
                f"{until[layer]:,}" if layer in until else NOTHING,
            )
            for layer, score in enumerate(plan.layer_scores)
        ],
    }


def _provenance(runs: Sequence[Run]) -> tuple[Section, ...]:
    every = [run.metrics for run in runs]
    names = list(dict.fromkeys(name for metrics in every for name in metrics.packages))
    packages = tuple(Row(name, tuple(m.packages.get(name, NOTHING) for m in every)) for name in names)
    return (
        Section("Model", _columns(every, _model)),
        Section("Training data", _columns(every, _training)),
        Section("Held-out data", _columns(every, _held_out)),
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
        return dict.fromkeys(("Name", "Fingerprint", "Form", "Rows in the data"), NOTHING)
    return {"Name": data.name, "Fingerprint": data.fingerprint, "Form": data.form, "Rows in the data": f"{data.rows:,}"}


def _training(metrics: Metrics) -> dict[str, str]:
    data, held_out = metrics.data, metrics.held_out_data
    if data is None:
        return _data(None) | {"Rows trained on": NOTHING}
    is_split = held_out is not None and held_out.fingerprint == data.fingerprint
    left_out = metrics.rows_skipped + (metrics.held_out_rows if is_split else 0)
    return _data(data) | {"Rows trained on": f"{data.rows - left_out:,}"}


def _held_out(metrics: Metrics) -> dict[str, str]:
    used = {"Rows held out": f"{metrics.held_out_rows:,}", "Tokens with a label": f"{metrics.held_out_tokens:,}"}
    return _data(metrics.held_out_data) | used


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
        "Batches": f"{probe.batches} of {probe.batch_size} row{'s' * (probe.batch_size > 1)}",
        "Tokens": f"{probe.tokens:,}, {probe.labelled_tokens:,} with a label",
        "Dtype and device": f"{probe.dtype}, {probe.device}",
        "Seed": NOTHING if probe.seed is None else str(probe.seed),
    }
