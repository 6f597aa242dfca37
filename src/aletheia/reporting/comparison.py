"""Several runs side by side as plain data: distinct names, ratios between comparable runs, differences."""

import shlex
from collections.abc import Container, Sequence
from dataclasses import dataclass

from aletheia.errors import ArtifactError
from aletheia.names import printable
from aletheia.planning.plan import layer_ranges
from aletheia.reporting.format import (
    NOTHING,
    human_bytes,
    human_count,
    human_loss,
    human_percent,
    human_ratio,
    human_seconds,
    rank_summary,
)
from aletheia.runs.adapter_folder import AdapterFolder
from aletheia.runs.schema import HeldOutPoint, Metrics, Run, UsedSettings

NO_INTERVAL = (
    "Each time is a single measurement with no interval; other work may have slowed the machine. "
    "For a claim about speed, repeat the runs with several seeds."
)
# Conditions of the same work on the same machine. If one differs, a ratio of times means nothing.
SAME_WORK = (
    *("model", "tokenizer", "data", "held-out rows", "steps", "batch size", "gradient accumulation", "max length"),
    *("start", "dtype", "quantization", "processes", "device", "machine", "torch version"),
)
SAME_LOSS = ("model", "tokenizer", "held-out rows", "max length")  # if one differs, losses are not comparable


@dataclass(frozen=True)
class Row:
    """One line of the comparison: a label and a cell per run. A ``note`` explains the label."""

    label: str
    cells: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """Rows under one heading."""

    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Speed:
    """Seconds of a run and of the reference; ``is_alike`` if both did the same work on the same machine."""

    seconds: float
    reference_seconds: float
    is_alike: bool = True

    @property
    def speedup(self) -> float | None:
        """t_ref / t; None when nothing was timed, or the runs are not comparable."""
        return self.reference_seconds / self.seconds if self._compares else None

    @property
    def time_saved(self) -> float | None:
        """1 - t / t_ref; negative when the run took longer; None as above."""
        return 1 - self.seconds / self.reference_seconds if self._compares else None

    @property
    def _compares(self) -> bool:
        return self.is_alike and self.seconds > 0 and self.reference_seconds > 0


def train_speed(run: Run, reference: Run) -> Speed:
    """The times of the optimizer steps alone."""
    alike = not differences([reference, run], SAME_WORK)
    return Speed(run.metrics.seconds.train, reference.metrics.seconds.train, alike)


def total_speed(run: Run, reference: Run) -> Speed:
    """The times of everything from loading to the last held-out evaluation."""
    alike = not differences([reference, run], SAME_WORK)
    return Speed(run.metrics.seconds.total, reference.metrics.seconds.total, alike)


def run_labels(runs: Sequence[Run | AdapterFolder]) -> tuple[str, ...]:
    """The folder names; equal ones get their parent folder, and a number if those are equal, too.

    Raises:
        ArtifactError: no runs.
    """
    if not runs:
        raise ArtifactError("no runs to report; give at least one folder written by 'aletheia train'")
    labels = [printable(run.name) for run in runs]
    repeated = {label for label in labels if labels.count(label) > 1}
    parents = [printable(run.path.resolve().parent.name) for run in runs]
    labels = [
        f"{parent}/{label}" if label in repeated else label for parent, label in zip(parents, labels, strict=True)
    ]
    taken = set(labels)
    distinct: list[str] = []
    for label in labels:
        candidate, number = label, 1
        while candidate in distinct or (number > 1 and candidate in taken):
            number += 1
            candidate = f"{label} ({number})"
        distinct.append(candidate)
    return tuple(distinct)


def differences(runs: Sequence[Run], among: Container[str] | None = None) -> tuple[str, ...]:
    """Conditions besides the plan in which the runs differ, e.g. ``steps (150, 300)``; empty if comparable.

    ``among`` names those that count, by default all.
    """
    found = []
    for name, values in _conditions(runs).items():
        if among is not None and name not in among:
            continue
        keys = [key for key, _ in values]
        if len(set(keys)) > 1:
            shown = list(dict.fromkeys(printable(text) for _, text in values))
            found.append(f"{name} ({', '.join(shown)})" if len(shown) > 1 else f"{name} (other content)")
    return tuple(found)


def _conditions(runs: Sequence[Run]) -> dict[str, list[tuple[object, str]]]:
    every = [run.metrics for run in runs]
    settings = [metrics.settings for metrics in every]
    held_out = [(_data_key(metrics), metrics.held_out_rows, metrics.held_out_tokens) for metrics in every]
    torch = [metrics.packages.get("torch", NOTHING) for metrics in every]
    return {
        "model": [(metrics.model.fingerprint, metrics.model.name) for metrics in every],
        "tokenizer": [
            (
                (metrics.tokenizer.vocabulary, metrics.tokenizer.chat_template) if metrics.tokenizer else None,
                metrics.tokenizer.name if metrics.tokenizer else NOTHING,
            )
            for metrics in every
        ],
        "data": [
            (metrics.data.fingerprint if metrics.data else None, metrics.data.name if metrics.data else NOTHING)
            for metrics in every
        ],
        "held-out rows": list(zip(held_out, [str(metrics.held_out_rows) for metrics in every], strict=True)),
        "steps": [((metrics.planned_steps or metrics.steps, metrics.steps), _steps(metrics)) for metrics in every],
        "batch size": [(setting.batch_size, str(setting.batch_size)) for setting in settings],
        "gradient accumulation": [
            (setting.gradient_accumulation_steps, str(setting.gradient_accumulation_steps)) for setting in settings
        ],
        "max length": [(setting.max_length, str(setting.max_length)) for setting in settings],
        "batches": [(setting.order, setting.order) for setting in settings],
        "packing": [(setting.packing, "on" if setting.packing else "off") for setting in settings],
        "averaging": [(setting.averaging, setting.averaging) for setting in settings],
        "rescaling": [(setting.rescale, "on" if setting.rescale else "off") for setting in settings],
        "checkpointing": [(setting.gradient_checkpointing, setting.gradient_checkpointing) for setting in settings],
        "start": [
            (metrics.went_on_from.sha256, metrics.went_on_from.name) if metrics.went_on_from else (None, "new adapters")
            for metrics in every
        ],
        "seed": [(setting.seed, str(setting.seed)) for setting in settings],
        "learning rate": [(setting.learning_rate, f"{setting.learning_rate:g}") for setting in settings],
        "dtype": [(setting.dtype, setting.dtype) for setting in settings],
        "quantization": [
            ((setting.quantization, setting.quantization_corrected), _quantization(setting) or NOTHING)
            for setting in settings
        ],
        "attention": [(setting.attention, setting.attention or NOTHING) for setting in settings],
        "processes": [(setting.processes, str(setting.processes)) for setting in settings],
        "device": [(setting.device, setting.device) for setting in settings],
        "machine": [(setting.machine, setting.machine or "not recorded") for setting in settings],
        "torch version": [(version, version) for version in torch],
    }


def _steps(metrics: Metrics) -> str:
    return f"{metrics.steps} of {metrics.planned_steps}" if metrics.steps_saved else str(metrics.steps)


def _data_key(metrics: Metrics) -> str | None:
    return metrics.held_out_data.fingerprint if metrics.held_out_data else None


def held_out_points(metrics: Metrics) -> tuple[HeldOutPoint, ...]:
    """The held-out curve with its first and last point, which the record also keeps on their own."""
    points = {point.step: point for point in metrics.held_out_curve}
    first = HeldOutPoint(step=0, loss=metrics.held_out_loss_before, train_seconds=0.0)
    last = HeldOutPoint(step=metrics.steps, loss=metrics.held_out_loss_after, train_seconds=metrics.seconds.train)
    points.setdefault(0, first)
    points.setdefault(metrics.steps, last)
    return tuple(points[step] for step in sorted(points))


def seconds_to_loss(metrics: Metrics, loss: float) -> float | None:
    """Train seconds until the first held-out evaluation at or below ``loss``; None if it was not reached."""
    reached = [point.train_seconds for point in held_out_points(metrics) if point.loss <= loss]
    return min(reached, default=None)


def comparison_sections(runs: Sequence[Run]) -> tuple[Section, ...]:
    """The table of the report, one column per run, the first run the reference."""
    return (
        Section("Plan", _plan_rows(runs)),
        Section("Time", _speed_rows(runs)),
        Section("Held-out loss", _loss_rows(runs)),
        Section("Settings", _setting_rows(runs)),
    )


def _plan_rows(runs: Sequence[Run]) -> tuple[Row, ...]:
    plans = [run.plan for run in runs]
    return (
        Row("Policy", tuple(str(plan.settings.policy) for plan in plans)),
        Row("Adapted layers", tuple(f"{len(plan.layers)} of {plan.layer_count}" for plan in plans)),
        Row("Which", tuple(layer_ranges(plan.layers) for plan in plans)),
        *([Row("Frozen on the way", tuple(map(_early, runs)))] if any(plan.early_layers for plan in plans) else []),
        Row("Boundary", tuple(str(run.metrics.boundary) for run in runs), "lowest adapted layer"),
        Row("Ranks", tuple(rank_summary(plan.adapters) for plan in plans)),
        Row("Trainable parameters", tuple(human_count(run.metrics.trainable_parameters) for run in runs)),
    )


def _early(run: Run) -> str:
    """Which layers learned only at first, and for how many steps."""
    if not run.plan.early_layers:
        return NOTHING
    return f"{layer_ranges(run.plan.early_layers)}, {run.metrics.early_steps:,} steps"


def _speed_rows(runs: Sequence[Run]) -> tuple[Row, ...]:
    rows = [
        Row("Train time", tuple(human_seconds(run.metrics.seconds.train) for run in runs), "optimizer steps alone"),
        Row("Step time", tuple(step_time(run.metrics) for run in runs), "train time / steps"),
        Row("Total time", tuple(human_seconds(run.metrics.seconds.total) for run in runs), "from loading to the end"),
    ]
    if len(runs) == 1 or not any(train_speed(run, runs[0]).is_alike for run in runs[1:]):
        return tuple(rows)
    alone, total = ([speed(run, runs[0]) for run in runs[1:]] for speed in (train_speed, total_speed))
    return (
        *rows[:2],
        Row("Time saved", ("reference", *map(_saved, alone)), "of the train time"),
        Row("Speed-up", ("1.00x", *(human_ratio(speed.speedup) for speed in alone)), "of the train time"),
        rows[2],
        Row("Time saved, all counted", ("reference", *map(_saved, total)), "of the total time"),
        Row("Speed-up, all counted", ("1.00x", *(human_ratio(speed.speedup) for speed in total)), "of the total time"),
    )


def _saved(speed: Speed) -> str:
    return NOTHING if speed.time_saved is None else human_percent(speed.time_saved)


def step_time(metrics: Metrics) -> str:
    """Mean train seconds of one optimizer step."""
    return human_seconds(metrics.seconds.train / metrics.steps) if metrics.steps else NOTHING


def kept_point(metrics: Metrics) -> str:
    """Which step's adapter was kept, whether it is an average, its strength, and how many planned steps were saved.

    ``step 150 of 180, weights averaged, at 0.8 of its strength, 60 steps saved``.
    """
    kept = f"step {metrics.kept_step or metrics.steps:,} of {metrics.steps:,}"
    kept += ", weights averaged" if metrics.settings.averaging == "on" else ""
    kept += f", at {metrics.kept_scale:g} of its strength" if metrics.kept_scale != 1 else ""
    return kept + (f", {metrics.steps_saved:,} steps saved" if metrics.steps_saved else "")


def _loss_rows(runs: Sequence[Run]) -> tuple[Row, ...]:
    every = [run.metrics for run in runs]
    rows = [
        Row("Before", tuple(human_loss(metrics.held_out_loss_before) for metrics in every), "nats per token"),
        Row("After", tuple(human_loss(metrics.held_out_loss_after) for metrics in every), "nats per token"),
        Row("Kept", tuple(kept_point(metrics) for metrics in every), "the adapter of this step"),
        Row(
            "Measured on",
            tuple(f"{metrics.held_out_rows:,} rows, {metrics.held_out_tokens:,} tokens" for metrics in every),
        ),
    ]
    if len(runs) > 1 and not differences(runs, SAME_LOSS):
        goal = every[0].held_out_loss_after
        reached = [seconds_to_loss(metrics, goal) for metrics in every]
        rows.append(
            Row(
                f"Train time to {human_loss(goal)}",
                tuple("not reached" if seconds is None else human_seconds(seconds) for seconds in reached),
                "first evaluation at or below the reference's final loss",
            )
        )
    return tuple(rows)


def _setting_rows(runs: Sequence[Run]) -> tuple[Row, ...]:
    every = [run.metrics for run in runs]
    settings = [metrics.settings for metrics in every]
    return (
        Row("Steps", tuple(f"{metrics.steps:,}" for metrics in every)),
        Row("Batch size", tuple(str(setting.batch_size) for setting in settings)),
        Row("Max length", tuple(f"{setting.max_length:,}" for setting in settings), "tokens"),
        Row("Prefix cache", tuple(setting.cache for setting in settings)),
        Row("Learning rate", tuple(f"{setting.learning_rate:g}" for setting in settings)),
        Row("Tokens seen", tuple(human_count(metrics.tokens) for metrics in every)),
        Row("with a label", tuple(human_count(metrics.labelled_tokens) for metrics in every)),
        Row("Peak memory", tuple(human_bytes(metrics.peak_memory_bytes) for metrics in every)),
        Row("Dtype", tuple(", ".join(filter(None, (setting.dtype, _quantization(setting)))) for setting in settings)),
        Row("Machine", tuple(setting.machine or setting.device for setting in settings)),
        *(
            [Row("Processes", tuple(str(s.processes) for s in settings))]
            if any(s.processes > 1 for s in settings)
            else []
        ),
        Row("Seed", tuple(str(setting.seed) for setting in settings)),
    )


def _quantization(setting: UsedSettings) -> str | None:
    return f"{setting.quantization}, corrected" if setting.quantization_corrected else setting.quantization


def repeat_command(run: Run) -> tuple[str, ...]:
    """The ``aletheia train`` command that repeats a run from its plan: one part per option, quoted for a shell.

    Empty when the record does not name its data.
    """
    metrics = run.metrics
    if metrics.data is None:
        return ()
    settings, held_out = metrics.settings, metrics.held_out_data
    options = [("--data", name) for name in metrics.data.sources]
    if held_out is not None and held_out.name != metrics.data.name:
        options += [("--eval-data", name) for name in held_out.sources]
    options.append(("--eval-rows", str(metrics.held_out_rows)))
    if metrics.went_on_from is None:  # an adapter folder has its own plan
        options.append(("--plan", f"{run.name}/plan.json"))
    options += [
        ("--steps", str(metrics.planned_steps or metrics.steps)),
        ("--batch-size", str(settings.batch_size)),
        ("--learning-rate", repr(settings.learning_rate)),
        ("--max-length", str(settings.max_length)),
        ("--dtype", settings.dtype),
        ("--seed", str(settings.seed)),
        ("--cache", settings.cache),
        ("--keep", settings.keep),
        ("--averaging", settings.averaging),
        ("--gradient-checkpointing", settings.gradient_checkpointing),
        ("--out", f"{run.name}-again"),
    ]
    if settings.evaluations is not None:
        options.append(("--evaluations", str(settings.evaluations)))
    if settings.early_stopping_patience is not None:
        options.append(("--early-stopping-patience", str(settings.early_stopping_patience)))
    if settings.quantization in ("nf4", "int8"):
        options.append(("--quantize", settings.quantization))
    if settings.attention:
        options.append(("--attention", settings.attention))
    model = metrics.went_on_from.name if metrics.went_on_from else metrics.model.name
    head = f"aletheia train {shlex.quote(model)}"
    if settings.packing or settings.device != "cpu":  # a CPU packs only on request
        options.append(("--packing", "on" if settings.packing else "off"))
    switches = []
    if settings.order != ("balanced" if settings.packing else "grouped"):
        switches.append("--group-by-length" if settings.order == "grouped" else "--no-group-by-length")
    if settings.compile_layers:
        switches.append("--compile-layers")
    if settings.cuda_graphs:
        switches.append("--cuda-graphs")
    if not settings.liger:
        switches.append("--no-liger")
    if settings.early_stopping_patience is None:
        switches.append("--no-early-stop")
    if settings.keep == "best" and not settings.rescale:
        switches.append("--no-rescale")
    if settings.quantization_corrected:
        switches.append("--correct-quantization")
    return (head, *(f"{flag} {shlex.quote(value)}" for flag, value in options), *switches)
