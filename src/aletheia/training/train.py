"""Training with a Trainer that has everything attached, and the run folder it writes."""

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel

from aletheia.adapters.adapt import check_adapters
from aletheia.adapters.correction import ROWS, Correction, rows_to_measure
from aletheia.anatomy.access import text_config
from aletheia.anatomy.checkpoint import Checkpoint
from aletheia.data.batches import collate
from aletheia.data.examples import Example, Examples
from aletheia.errors import SettingsError, TrainingError
from aletheia.execution.backend import compile_seconds, entered, layer_ways
from aletheia.execution.peak_memory import reset_peak_memory
from aletheia.planning.plan import Plan, layer_ranges
from aletheia.prefix.cache import DiskCache, PrefixCache
from aletheia.prefix.choose import CacheDecision, CachePlace, open_cache
from aletheia.prefix.exact import why_not_exact
from aletheia.prefix.fill import fill
from aletheia.progress import Say, say_as_asked, say_nothing
from aletheia.runs.folder import RunFolder, save, save_so_far
from aletheia.runs.manifest import TrainingCheckpoint, newest_checkpoint
from aletheia.runs.schema import Run, StartingAdapter
from aletheia.training.attach import Attachment, AttachSettings, prefix_computed_as
from aletheia.training.checkpoints import trustworthy_checkpoints
from aletheia.training.forecast import outlook
from aletheia.training.interrupts import Interrupts, SaveInTime, interrupts
from aletheia.training.learning_rate import default_learning_rate, warm_up_steps
from aletheia.training.loop import (
    RowTrainer,
    device_arguments,
    evaluations_of,
    planned_passes,
    planned_steps,
    rows_of_steps,
    rows_per_step,
    steps_per_epoch,
    training_arguments,
)
from aletheia.training.measured import metrics_of
from aletheia.training.outcome import digest_of_b, whole_adapter
from aletheia.training.packing import packs, recorded_tokens
from aletheia.training.processes import Launch
from aletheia.training.race import FACTORS, race_rates, race_steps, summary
from aletheia.training.recorder import Recorder
from aletheia.training.rescale import rescale
from aletheia.training.settings import WITHOUT_INFLUENCE, TrainSettings
from aletheia.training.sharded import is_sharded


@dataclass(frozen=True)
class Prepared:
    """What is ready before training starts.

    Attributes:
        prefix: a cache that holds every row already, for a model of which only the upper layers are loaded
            (:meth:`aletheia.Checkpoint.suffix`).
        unquantized: the checkpoint that a 4-bit base was made from, for ``correct_quantization``.
        seconds: time already spent, by phase (``load``, ``probe``, ``plan``, ``cache``).
        about: values that identify this run, by name, beyond those that :func:`train` knows. An interrupted run
            resumes only if all of them are the same.
        went_on_from: the adapter that ``model`` was loaded with, from whose weights training starts.
        checkpoint: the checkpoint to resume from; by default the newest complete one of an interrupted run in ``out``.
    """

    prefix: PrefixCache | None = None
    unquantized: Checkpoint | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    went_on_from: StartingAdapter | None = None
    checkpoint: TrainingCheckpoint | None = None


def train(
    model: PeftModel,
    data: Examples,
    plan: Plan,
    out: str | Path | RunFolder,
    held_out: Examples,
    settings: TrainSettings | None = None,
    prepared: Prepared | None = None,
    show_progress: bool | Say = True,
    **options: Any,
) -> Run:
    """Train the adapters of ``model`` and leave a run folder: a standard PEFT adapter, the plan and the metrics.

    It runs transformers' Trainer with the plan attached (:func:`aletheia.attach`). Only adapters learn. Where the plan
    has early layers, they learn first and then freeze as they are. The held-out loss is measured before training and
    ``evaluations`` times during training. The run stops when the loss no longer falls, and keeps the adapter of its
    lowest point. An interrupted run resumes from its last checkpoint, and on a CPU ends with the same bytes.
    Sets the global random seeds, as Trainer does.

    Args:
        model: the adapted model, from :func:`aletheia.adapt`.
        data: rows to train on; their order depends on the seed alone.
        plan: the plan the model was adapted with.
        out: path of the run folder, or a folder that is claimed already.
        held_out: rows for the held-out loss.
        settings: how to train; or give its fields by name.
        prepared: what was computed before training.
        show_progress: print progress on stderr, or call this function with each line.
        options: fields of :class:`aletheia.TrainSettings`, in place of ``settings``.

    Raises:
        AdapterError: the model is not adapted as planned.
        PlanError: the rows come from another tokenizer than those that the plan was made from.
        ArtifactError: ``out`` is taken or cannot be written.
        CacheError: the cache asked for is not possible.
        Interrupted: a signal ended the run; a checkpoint was saved.
        SettingsError: a setting is out of range.
        TrainingError: a loss is not finite, or a checkpoint belongs to another run or cannot be written.
    """
    if settings is not None and options:
        raise SettingsError(f"`settings` and `{next(iter(options))}` are both given; expected one of them")
    settings = settings or TrainSettings(**options)
    training_arguments(settings, "")  # refuses what Trainer does not take, before anything else
    if not len(data):
        raise TrainingError(f"{data.identity.name}: found no rows to train on; expected at least one")
    plan.check_tokenizer(data.tokenizer)
    check_adapters(model, plan)
    bytes_needed = 4 * plan.trainable_parameters * (2 if settings.correct_quantization else 1)
    with ExitStack() as stack:
        folder = out if isinstance(out, RunFolder) else stack.enter_context(RunFolder.claim(out))
        folder.check_room(bytes_needed)
        prepared = prepared or Prepared()
        packed, reason = packs(model, data, settings, prepared.prefix is not None)
        settings = settings.model_copy(update={"packing": "on" if packed else "off"})
        job = Job(model, data, plan, held_out, settings, prepared, folder, show_progress)
        if reason is not None:
            job.say(f"note: batches are padded: {reason}")
        return job.run()


class Job:
    """One call of :func:`train`."""

    def __init__(
        self,
        model: PeftModel,
        data: Examples,
        plan: Plan,
        held_out: Examples,
        settings: TrainSettings,
        prepared: Prepared,
        folder: RunFolder,
        show_progress: bool | Say,
    ) -> None:
        """Keep the arguments; nothing is computed yet."""
        self.model, self.data, self.plan, self.held_out = model, data, plan, held_out
        self.settings, self.prepared, self.folder = settings, prepared, folder
        self.say = say_as_asked(show_progress) if Launch.here().is_first else say_nothing
        probe = plan.probe.seconds if plan.uses_scores else 0.0  # a plan that uses scores counts it, whenever it ran
        self.seconds = {"load": 0.0, "probe": probe, "plan": 0.0} | dict(prepared.seconds)
        self.started = time.perf_counter() - sum(self.seconds.values())
        self.processes = Launch.here().processes
        self.steps = planned_steps(len(data), settings, self.processes)
        self.recorder = Recorder(evaluations_of(len(data), settings, self.processes), self.say)
        self.correction = Correction()
        self.scale = 1.0  # strength of the kept adapter
        self.scaled_loss: float | None = None
        self.stack = ExitStack()  # closed when the run is over
        self.has_learned = False
        self.compiled_before = compile_seconds()  # seconds that this process spent before this run

    def run(self) -> Run:
        """Train, and write the run folder."""
        trainer, attachment = self._trainer()
        found = self.prepared.checkpoint
        if found is None and self.folder.resumes:
            found = newest_checkpoint(self.folder.checkpoints)
        reset_peak_memory(self.model.device)
        with interrupts() as interrupted:
            with self.stack, self.correction:
                attachment.at_end = partial(self._at_end, trainer, interrupted)
                self._train(trainer, found, interrupted)
                is_done = interrupted.signal is None or trainer.state.global_step >= trainer.state.max_steps
                self.has_learned = is_done and digest_of_b(self.model) != self.recorder.start
            check_adapters(self.model, self.plan)
            with interrupted.put_off():
                self.correction.fold(self.model, self.plan)
                if is_done:
                    return self._finish(trainer, attachment)
                so_far = self._keep_so_far(trainer)
        raise interrupted.error(so_far)

    def _train(self, trainer: RowTrainer, found: TrainingCheckpoint | None, interrupted: Interrupts) -> None:
        """Train from the start, or from the checkpoint ``found``, to the last step or a signal."""
        trainer.add_callback(interrupted)
        trainer.add_callback(SaveInTime())
        if found is not None:
            self.recorder.restore(found.manifest.extra)
            self.started -= sum(self.recorder.seconds.values())
            interrupted.saved_step = found.step
            if trainer.average is not None:
                trainer.average.load(found.path)
            self.say(f"resume from step {found.step} of {trainer.args.max_steps}")
        if self.prepared.unquantized is not None:
            self._correct(self.prepared.unquantized, trainer.args.max_steps)
        self.recorder.start = self.recorder.start or digest_of_b(self.model)
        if self.settings.learning_rate == "auto":
            kept = found and found.manifest.about["peak_learning_rate"]  # a resumed run keeps the rate it chose
            trainer.args.learning_rate = kept or self._raced(trainer)
        trustworthy_checkpoints(trainer, self._about(trainer), self.recorder.state, alone=True)
        trainer.args.eval_on_start = found is None
        self._announce(trainer)
        try:
            trainer.train(resume_from_checkpoint=None if found is None else str(found.path))
        finally:
            self.recorder.close()
        state = trainer.state
        if interrupted.signal is None and state.global_step < state.max_steps:
            self.say(
                f"stop   after step {state.global_step} of {state.max_steps}: the held-out loss was lowest after step "
                f"{state.best_global_step}"
            )

    def _announce(self, trainer: RowTrainer) -> None:
        """Say what the steps will be, and give the recorder their outlook."""
        steps, settings = trainer.args.max_steps, self.settings
        per_epoch = steps_per_epoch(len(self.data), settings, self.processes)
        is_filled = self.prepared.prefix is not None
        self.recorder.outlook = outlook(
            self.plan,
            (sum(map(len, rows)) for rows in self.batches(steps)),
            per_epoch,
            reads_cache=is_filled or settings.cache != "off",
            is_filled=is_filled,
        )
        evaluations = evaluations_of(len(self.data), settings, self.processes)
        self.say(
            f"train  {steps:,} steps of {rows_per_step(settings, self.processes)} rows, learning rate "
            f"{trainer.args.learning_rate:.1e}"
            + (f"; held-out loss every {steps / min(evaluations, steps):.0f} steps" if evaluations else "")
        )

    def _at_end(self, trainer: RowTrainer, interrupted: Interrupts) -> None:
        """Put the weights to keep into the model: the average, weakened if that is better."""
        state, settings = trainer.state, self.settings
        if trainer.average is not None:
            trainer.average.leave(state.best_model_checkpoint if settings.keep == "best" else None)
        is_off = not settings.rescale or settings.keep == "last" or self.prepared.went_on_from is not None
        if is_off or is_sharded(trainer) or interrupted.signal is not None:
            return
        started = time.perf_counter()
        full = self.recorder.loss_at(trainer.kept_step)
        self.scale, self.scaled_loss = rescale(self.model, trainer.held_out_loss, full, self.say)
        self.recorder.eval_seconds += time.perf_counter() - started
        if self.scale != 1:
            self.say(
                f"scale  the adapter is kept at {self.scale:g} of its strength: held-out loss {self.scaled_loss:.4f} "
                f"instead of {full:.4f}"
            )

    def _keep_so_far(self, trainer: RowTrainer) -> str:
        """Save the adapter of an interrupted run in its folder; returns what the error message adds about it."""
        state = whole_adapter(self.model)
        is_kept = trainer.is_world_process_zero() and save_so_far(self.model, self.folder, state)
        return f"; {self.folder.path} holds the adapter so far" if is_kept else ""

    def _trainer(self) -> tuple[RowTrainer, Attachment]:
        settings, model, plan = self.settings, self.model, self.plan
        steps = self.steps
        if plan.early_steps(steps) and (self.prepared.prefix is not None or settings.free_prefix):
            raise TrainingError(
                f"the plan adapts layers {layer_ranges(plan.early_layers)} at first, but they are not in memory; "
                "expected a plan made with `freeze_after` 0"
            )
        if len(self.data) < (needed := rows_per_step(settings, self.processes)):
            self.say(f"note: {len(self.data)} rows do not fill a step of {needed}; each pass over them is one step")
        arguments = training_arguments(
            settings,
            str(self.folder.checkpoints),
            max_steps=steps,
            warmup_steps=warm_up_steps(settings.warmup_steps, steps),
            **device_arguments(model, self.processes),
        )
        trainer = RowTrainer(model, self.data, self.held_out, settings, arguments, self.recorder)
        attached = AttachSettings(
            cache=settings.cache,
            cache_dir=settings.cache_dir,
            compile_layers=settings.compile_layers,
            liger=settings.liger,
        )
        prefix, free = self.prepared.prefix, self.prepared.prefix is not None
        decision = None
        if prefix is None and settings.free_prefix:
            prefix, decision = self._filled(steps, trainer, attached)
            free = prefix is not None
        attachment = Attachment(trainer, plan, attached, self.say, settings.recompute, prefix, free, decision)
        attachment.packed = settings.packing == "on"
        attachment.graphed = recorded_tokens(trainer, settings, self.say)
        attachment.install()
        trainer.begin_average()
        rate = settings.learning_rate
        if rate is None or rate == "auto":
            passes = 1.0 if trainer.average else planned_passes(len(self.data), settings, self.processes)
            rate = default_learning_rate(text_config(model).hidden_size, steps, passes)
        trainer.args.learning_rate = rate
        trainer.before_training = self.correction.off
        return trainer, attachment

    def _filled(
        self, steps: int, trainer: RowTrainer, attached: AttachSettings
    ) -> tuple[PrefixCache | None, CacheDecision]:
        """A full cache, in memory or on disk, for a prefix that is freed; None if that is not possible; the reason."""
        rows = [row for batch in self.batches(steps) for row in batch] + [*self.held_out.examples]
        started = time.perf_counter()
        with entered(self.model, layer_ways(self.model, attached.compile_layers, attached.liger)):
            obstacle, dtype = why_not_exact(self.model, self.plan.boundary, rows, self.data.pad_token_id)
            if obstacle is not None:
                return None, CacheDecision("off", obstacle)
            kind: Literal["memory", "disk"] = "disk" if self.settings.cache == "disk" else "memory"
            place = CachePlace(kind, self.settings.cache_dir, computed_as=prefix_computed_as(trainer, attached))
            cache, _ = open_cache(self.model, self.plan.boundary, dtype, place, lambda: 0.0)
            assert cache is not None
            if isinstance(cache, DiskCache):
                self.stack.callback(cache.close)
                for note in cache.notes:
                    self.say(f"note: {note}")
            below = layer_ranges(range(self.plan.boundary))
            self.say(f"cache  computes layers {below} once for each of {len(cache.missing(rows)):,} rows")
            fill(self.model, self.plan.boundary, rows, cache, self.settings.batch_size, self.say, trainer.most_tokens)
        self.seconds["cache"] = time.perf_counter() - started
        return cache, CacheDecision(kind, "filled before the first step", cache.size_bytes)

    def batches(self, steps: int) -> list[list[Example]]:
        """The rows of each of the first ``steps`` steps."""
        return rows_of_steps(self.data, self.settings, steps, self.processes)

    def _correct(self, unquantized: Checkpoint, steps: int) -> None:
        """Compute the correction of quantization; a resumed run computes the same one again."""
        started = time.perf_counter()
        layers = unquantized.read_layers(sorted({adapter.layer for adapter in self.plan.adapters}))
        first = chain.from_iterable(self.batches(min(math.ceil(ROWS / self.settings.batch_size), steps)))
        self.model.eval()
        self.correction.measure(self.model, layers, collate(rows_to_measure(first), self.data.pad_token_id))
        self.seconds["correction"] = time.perf_counter() - started

    def _raced(self, trainer: RowTrainer) -> float:
        """The rate that ``auto`` chooses; with several processes, the first one chooses for all."""
        started = time.perf_counter()
        steps = self.batches(race_steps(trainer.args.max_steps))
        self.say(f"rate   tries {len(FACTORS)} learning rates for {len(steps)} steps each")
        given = trainer, steps, self.held_out, self.plan.boundary, self.prepared.prefix
        race = Launch.here().computed_by_first(
            partial(race_rates, *given, self.settings.recompute, self.settings.liger, self.say)
        )
        self.recorder.race, self.recorder.race_seconds = race, time.perf_counter() - started
        self.say(summary(race))
        return race.chosen

    def _about(self, trainer: RowTrainer) -> dict[str, Any]:
        """What must be the same for an interrupted run to resume."""
        return {
            **self.settings.model_dump(mode="json", exclude=set(WITHOUT_INFLUENCE)),
            **self.prepared.about,
            "order": self.settings.order,
            "tokenizer_vocabulary": str(self.data.tokenizer and self.data.tokenizer.vocabulary),
            "tokenizer_template": str(self.data.tokenizer and self.data.tokenizer.chat_template),
            "model_fingerprint": self.plan.model.fingerprint,
            "data_fingerprint": self.data.identity.fingerprint,
            "rows_fingerprint": self.data.digest(),
            "held_out_fingerprint": self.held_out.digest(),
            "plan_fingerprint": self.plan.fingerprint,
            "steps_in_all": trainer.args.max_steps,
            "peak_learning_rate": trainer.args.learning_rate,
            "computed_in": f"{str(self.model.dtype).removeprefix('torch.')} {trainer.accelerator.mixed_precision}",
            "processes": self.processes,
        }

    def _finish(self, trainer: RowTrainer, attachment: Attachment) -> Run:
        """Write the run folder; remove checkpoints, unless the user asked for them with ``save_steps``."""
        metrics = metrics_of(self, trainer, attachment)
        run = Run(self.folder.path, metrics, self.plan)
        state = whole_adapter(self.model)
        if trainer.is_world_process_zero():
            save(self.model, run, state)
            if self.settings.save_steps is None:
                self.folder.remove_checkpoints()
        if self.processes > 1:
            torch.distributed.barrier()
        return run
