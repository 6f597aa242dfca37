"""What a run would do and need, without training or writing: ``aletheia train --dry-run``."""

import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal

import torch

from aletheia.anatomy.access import input_weight, text_config
from aletheia.anatomy.checkpoint import Checkpoint
from aletheia.anatomy.device_memory import free_memory_bytes
from aletheia.anatomy.read import read_anatomy
from aletheia.anatomy.settings import LoadSettings
from aletheia.data.preview import shown_row
from aletheia.data.settings import DataSettings
from aletheia.errors import ArtifactError, ModelError
from aletheia.files import free_bytes, nearest_existing
from aletheia.job.fine_tune import Job
from aletheia.job.ready import Ready
from aletheia.job.room import bytes_by, room_for
from aletheia.job.settings import JobSettings
from aletheia.job.source import NOTE
from aletheia.planning.cost import LayerCosts, measured_costs
from aletheia.planning.outlook import DryRun, training_seconds
from aletheia.planning.plan import Plan, PlanSettings
from aletheia.prefix.cache import check_space, distinct_tokens
from aletheia.prefix.cache_folders import default_cache_dir
from aletheia.prefix.choose import MEMORY_SHARE
from aletheia.probing.timings import Timings
from aletheia.progress import Say, say_nothing, to_stderr
from aletheia.runs.folder import ADAPTER_FILES, CARD_FILE, CONFIG_FILE, RunFolder, check_out, save_tokenizer
from aletheia.runs.manifest import MANIFEST_FILE
from aletheia.runs.schema import METRICS_FILE, PLAN_FILE, REPORT_FILE, SCORES_FILE
from aletheia.training.calibrate import calibrate
from aletheia.training.interrupts import Interrupts
from aletheia.training.loop import (
    evaluations_of,
    planned_passes,
    planned_steps,
    rows_per_step,
    takes_average,
    training_arguments,
)
from aletheia.training.processes import Launch
from aletheia.training.race import FACTORS, race_steps
from aletheia.training.settings import Recompute, TrainSettings

VALUE_BYTES, MOMENTS_BYTES = 4, 8  # per trainable parameter: a value (or its average), and AdamW's two moments


def dry_run(
    model: str | Mapping[str, Any] | LoadSettings,
    data: str | Mapping[str, Any] | DataSettings,
    out: str | Path,
    plan: str | Path | Mapping[str, Any] | PlanSettings | None = None,
    training: Mapping[str, Any] | TrainSettings | None = None,
    overwrite: bool = False,
    resume: Literal["auto", "never"] | str | Path = "auto",
    say: Say | None = None,
) -> DryRun:
    """What :func:`aletheia.fine_tune` would do with the same arguments, without training and without writing.

    The same as ``aletheia train --dry-run``. It loads the model, probes it unless a plan is given, and times a few
    training steps. Streamed models are not timed. Errors that would end the run are raised here.

    Args:
        model: as for :func:`aletheia.fine_tune`, like all other arguments.
        data: rows to learn from.
        out: the run folder; it is checked but not created.
        plan: a plan file, or how to plan.
        training: how to train.
        overwrite: whether a finished run in ``out`` would be replaced.
        resume: what would be done with an interrupted run in ``out``.
        say: receives a line for each phase; by default, lines go to stderr.

    Returns:
        The plan, a row as the model sees it, and predicted time, memory and disk space.

    Raises:
        AletheiaError: the model, the rows, the plan, a setting or the folder is wrong, or the disk is too small.
    """
    started = time.perf_counter()
    settings = JobSettings.of(model, data, plan, training)
    training_arguments(settings.training, "")  # Trainer's own checks
    out = Path(out)
    state = check_out(out, overwrite)
    _check_rights(out)
    notes: list[str] = []
    with ExitStack() as stack:
        launch = stack.enter_context(Launch.join())
        output = (say or to_stderr) if launch.is_first else say_nothing

        def listen(line: str) -> None:
            if line.startswith(NOTE):
                notes.append(line.removeprefix(NOTE))
            else:
                output(line)

        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aletheia-")))
        folder = RunFolder.of_another_process(out, resumes=state == "interrupted" and resume != "never")
        job = Job(settings, folder, launch, listen, Interrupts(), work=work / "probe")
        ready = job.ready(None if resume in ("auto", "never") else Path(resume), shows_row=False)
        return _outlook(job, ready, notes, started)


def _tokenizer_files(tokenizer: Any) -> list[str]:
    """Names of the files that the tokenizer is saved in; none if it cannot be saved."""
    with tempfile.TemporaryDirectory(prefix="aletheia-") as folder, suppress(ModelError):
        return save_tokenizer(tokenizer, Path(folder))
    return []


def _check_rights(out: Path) -> None:
    """Raise ArtifactError for a folder that cannot be written, without writing to it."""
    place = nearest_existing(out)
    if not os.access(place, os.W_OK):
        raise ArtifactError(f"cannot write to {place}: permission denied; choose another `out`")


def _outlook(job: Job, ready: Ready, notes: list[str], started: float) -> DryRun:
    plan, training, data = ready.plan, job.settings.training, ready.data
    processes = job.launch.processes
    room, step = room_for(ready.base, data, ready.held_out, job.settings)
    recompute = job.recompute(ready)
    step = next((one for one in room.steps(step) if one.recompute == recompute), step)
    steps = planned_steps(len(data), training, processes)
    cache, cache_bytes = _cache(ready, training)
    disk = _disk_bytes(plan, training, len(data), cache_bytes if cache == "disk" else 0)
    job.folder.check_room(disk["adapter"])
    if disk["adapter"] + disk["checkpoints"] > free_bytes(job.folder.path):
        notes.append(
            "the disk of `out` may be too small for the checkpoints; set `save_total_limit` to 1, or choose another "
            "`out`"
        )
    seconds, why = _seconds(job, ready, steps, cache != "off", recompute)
    return DryRun(
        model=job.settings.model.model,
        out=str(job.folder.path),
        plan=plan,
        row=shown_row(data[0], 1, ready.base.tokenizer, data.max_length),
        rows=len(data),
        held_out_rows=len(ready.held_out),
        tokens=sum(len(row) for row in data.examples),
        steps=steps,
        rows_per_step=rows_per_step(training, processes),
        passes=planned_passes(len(data), training, processes),
        evaluations=evaluations_of(len(data), training, processes),
        resumed_step=ready.found.step if ready.found else 0,
        seconds=seconds,
        why_no_seconds=why,
        device=torch.cuda.get_device_name(room.device) if room.device.type == "cuda" else room.device.type,
        memory_bytes=bytes_by(ready.base, plan)(step),
        usable_memory_bytes=room.usable_bytes,
        recompute=recompute,
        disk_bytes=disk,
        cache=cache,
        free_disk_bytes=free_bytes(job.folder.path),
        files=(
            *(*ADAPTER_FILES, PLAN_FILE, *([SCORES_FILE] if ready.scores else []), METRICS_FILE),
            *(CONFIG_FILE, REPORT_FILE, CARD_FILE, MANIFEST_FILE, *_tokenizer_files(ready.base.tokenizer)),
        ),
        notes=tuple(dict.fromkeys(notes)),
        measured_seconds=time.perf_counter() - started,
    )


def _cache(ready: Ready, training: TrainSettings) -> tuple[Literal["memory", "disk", "off"], int]:
    """Where the output of the frozen layers will be cached, as far as is known beforehand, and its size in bytes.

    Raises:
        CacheError: the disk is too small for it.
    """
    if training.cache == "off" or ready.plan.boundary == 0:
        return "off", 0
    width, base = text_config(ready.base.model).hidden_size, ready.base
    dtype = base.dtype if isinstance(base, Checkpoint) else input_weight(base.model).dtype
    size = distinct_tokens([*ready.data.examples, *ready.held_out.examples]) * width * dtype.itemsize
    if training.cache == "disk" or isinstance(base, Checkpoint):
        check_space(training.cache_dir or default_cache_dir(), size)
        return "disk", size
    fits = training.cache == "memory" or size <= MEMORY_SHARE * free_memory_bytes()
    return ("memory" if fits else "disk"), size


def _disk_bytes(plan: Plan, training: TrainSettings, rows: int, cache_bytes: int) -> dict[str, int]:
    """Upper bounds: the adapter, the checkpoints that exist at the same time (the best one is kept), and the cache."""
    trainable = plan.trainable_parameters * (2 if training.correct_quantization else 1)
    values = 2 if takes_average(rows, training, Launch.here().processes) else 1
    kept = training.save_total_limit + (training.keep == "best")
    checkpoint = trainable * (values * VALUE_BYTES + MOMENTS_BYTES)
    return {"adapter": VALUE_BYTES * trainable, "checkpoints": kept * checkpoint, "cache": cache_bytes}


def _seconds(job: Job, ready: Ready, steps: int, is_cached: bool, recompute: Recompute) -> tuple[dict[str, float], str]:
    """Predicted seconds by phase, from a few timed training steps; or the reason why there are none."""
    if isinstance(ready.base, Checkpoint):
        return {}, "the model is streamed, layer by layer"
    if ready.adapted is not None:
        return {}, "an adapter is trained further, and steps are timed on a base model only"
    if job.launch.processes > 1:
        return {}, "several processes train, and steps are timed in one"
    data, plan = ready.data, ready.plan
    training = job.settings.training.model_copy(update={"gradient_checkpointing": recompute})
    job.say(f"time   a few training steps of {training.batch_size} rows")
    try:
        timings = calibrate(ready.base.model, data, training, rounds=1, show_progress=job.say)
    except torch.OutOfMemoryError:
        return {}, "a step of plain LoRA, the baseline of the prediction, does not fit in memory"
    ranks = {adapter.name: adapter.rank for adapter in plan.adapters}
    costs = measured_costs(read_anatomy(ready.base.model), ranks, plan.settings.rank, timings)
    left = steps - (ready.found.step if ready.found else 0)
    batches, passes = (
        steps * training.gradient_accumulation_steps,
        planned_passes(len(data), training, job.launch.processes),
    )
    whole = training_seconds(plan, costs, batches, passes, is_cached)
    racing = len(FACTORS) * race_steps(steps) * costs.step(plan.layers) if training.learning_rate == "auto" else 0.0
    seconds = {name: job.seconds.get(name, 0.0) for name in ("load", "probe")} | {
        "race": racing * training.gradient_accumulation_steps,
        "training": whole * left / steps,
        "evaluation": _evaluation_seconds(ready, training, costs, timings),
    }
    return {name: value for name, value in seconds.items() if value}, ""


def _evaluation_seconds(ready: Ready, training: TrainSettings, costs: LayerCosts, timings: Timings) -> float:
    """Seconds of all held-out evaluations, the first one included: forward passes over all layers."""
    tokens = sum(len(row) for row in ready.held_out.examples)
    taken = evaluations_of(len(ready.data), training, Launch.here().processes) or 1
    times = 1 + taken + training.rescale
    return times * tokens / timings.tokens * (sum(costs.forward) + costs.head / 3)
