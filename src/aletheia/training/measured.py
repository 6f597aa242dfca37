"""The record of a run: its settings, what it took, and its results."""

import time
from typing import TYPE_CHECKING

import torch

from aletheia.anatomy.access import base_of
from aletheia.anatomy.families import class_name
from aletheia.anatomy.load import quantization_of
from aletheia.anatomy.versions import processor
from aletheia.execution.backend import compile_seconds
from aletheia.execution.peak_memory import peak_memory_bytes
from aletheia.files import package_versions
from aletheia.runs.schema import Metrics, PhaseSeconds, UsedSettings
from aletheia.training.attach import Attachment
from aletheia.training.loop import RowTrainer, evaluations_of
from aletheia.training.outcome import verdict

if TYPE_CHECKING:
    from aletheia.training.train import Job


def metrics_of(job: "Job", trainer: RowTrainer, attachment: Attachment) -> Metrics:
    """All measurements of a finished run."""
    model, data, recorder = job.model, job.data, job.recorder
    steps = trainer.state.global_step
    seen = job.batches(steps)
    before, kept = recorder.held_out_curve[0].loss, trainer.kept_step
    after = recorder.loss_at(kept) if job.scaled_loss is None else job.scaled_loss
    return Metrics(
        model=job.plan.model,
        data=data.identity,
        tokenizer=data.tokenizer,
        held_out_data=job.held_out.identity,
        held_out_rows=len(job.held_out),
        held_out_tokens=job.held_out.labelled_tokens,
        packages=package_versions(),
        settings=used_settings(job, trainer, attachment),
        went_on_from=job.prepared.went_on_from,
        rate_race=recorder.race,
        rows_truncated=data.truncated,
        rows_skipped=data.skipped,
        steps=steps,
        planned_steps=trainer.args.max_steps,
        kept_step=kept,
        kept_scale=job.scale,
        tokens=sum(len(row) for batch in seen for row in batch),
        labelled_tokens=sum(row.labelled_tokens for batch in seen for row in batch),
        boundary=job.plan.boundary,
        early_steps=min(job.plan.early_steps(trainer.args.max_steps), steps),
        trainable_parameters=job.plan.trainable_parameters,
        seconds=_seconds(job),
        peak_memory_bytes=peak_memory_bytes(model.device),
        cache_bytes=attachment.decision.size_bytes,
        cache_reason=attachment.decision.reason,
        steps_computed_by=attachment.ways,
        compile_seconds=compile_seconds() - job.compiled_before,
        held_out_loss_before=before,
        held_out_loss_after=after,
        verdict=verdict(job.has_learned, before, after),
        train_curve=tuple(recorder.train_curve),
        held_out_curve=tuple(recorder.held_out_curve),
    )


def _seconds(job: "Job") -> PhaseSeconds:
    """Seconds by phase; ``other`` is the time that no phase counted."""
    seconds = {"other": 0.0, **job.seconds, **job.recorder.seconds}
    seconds["other"] += max(0.0, time.perf_counter() - job.started - sum(seconds.values()))
    return PhaseSeconds(**seconds)


def used_settings(job: "Job", trainer: RowTrainer, attachment: Attachment) -> UsedSettings:
    """The settings of the run besides its plan."""
    model, data, settings = job.model, job.data, job.settings
    return UsedSettings(
        batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        processes=job.processes,
        learning_rate=trainer.args.learning_rate,
        max_length=data.max_length,
        dtype=str(model.dtype).removeprefix("torch."),
        device=model.device.type,
        machine=_machine(model.device),
        seed=settings.seed,
        packing=settings.packing == "on",
        order=settings.order,
        compile_layers=settings.compile_layers,
        cuda_graphs=settings.cuda_graphs,
        liger=settings.liger,
        gradient_checkpointing=settings.recompute,
        cache=attachment.decision.kind,
        loaded_by=class_name(base_of(model).config),
        quantization=quantization_of(base_of(model)),
        quantization_corrected=bool(job.correction),
        attention=getattr(model.config, "_attn_implementation", None),
        keep=settings.keep,
        evaluations=evaluations_of(len(data), settings, job.processes) or None,
        early_stopping_patience=settings.patience,
        rescale=job.scaled_loss is not None,
        averaging="off" if trainer.average is None else "on",
    )


def _machine(device: torch.device) -> str:
    """The device that computes the steps: the GPU's name, or the kind of CPU and the threads in use."""
    name, threads = processor(device), torch.get_num_threads()
    return f"{name} with {threads} thread{'s' if threads > 1 else ''}" if device.type == "cpu" else name
