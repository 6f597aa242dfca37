"""Attach a plan to an existing Trainer: phases, prefix cache and fast steps."""

import functools
import hashlib
import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from aletheia.adapters.acting import adapted_in
from aletheia.adapters.adapt import check_adapters
from aletheia.data.examples import NO_LOSS, Example
from aletheia.data.tokenizer import identify_tokenizer
from aletheia.errors import CacheError, TrainingError
from aletheia.execution.backend import Reads, Way, entered, layer_ways, step_ways
from aletheia.planning.plan import Plan
from aletheia.prefix.boundary import frozen_prefix
from aletheia.prefix.cache import DiskCache, PrefixCache, SpillingCache
from aletheia.prefix.choose import CacheDecision, CachePlace, open_cache, prefix_key
from aletheia.prefix.source import PrefixSource, Use, row_states
from aletheia.prefix.stored import stored_prefix
from aletheia.progress import say_nothing
from aletheia.settings import Settings, option
from aletheia.training.checkpoints import TrustworthyCheckpoints, trustworthy_checkpoints
from aletheia.training.feed import kept_on_host
from aletheia.training.freezing import adapters_below, freeze_below, layers_below
from aletheia.training.phases import Phase, is_last_epoch, phase_at, phases, rows_come_back
from aletheia.training.settings import CacheKind, Recompute
from aletheia.training.sharded import group_of, is_sharded, load_frozen

logger = logging.getLogger(__name__)


UNFIT = {
    "torch_compile": "hooks that change from phase to phase break it; use `compile_layers` of AttachSettings instead",
    "use_liger_kernel": "its loss replaces the one of fast steps; `liger` of AttachSettings uses its other kernels",
}


class AttachSettings(Settings):
    """What :func:`attach` adds besides the phases of the plan."""

    cache: CacheKind = option("auto", "Where to keep the output of the frozen layers: auto, memory, disk or off.")
    cache_dir: Path | None = option(None, "Folder for a cache on disk. (default: $ALETHEIA_CACHE or your cache folder)")
    fast_steps: bool = option(True, "Compute steps at less cost, with the same results up to rounding.")
    compile_layers: bool = option(False, "With `fast_steps`: compile the layers that learn.")
    liger: bool = option(True, "With `fast_steps`, on a GPU: use Liger's kernels where they are installed.")
    whole_checkpoints: bool = option(
        True, "Write each checkpoint with a manifest, completely or not at all, and resume only from these."
    )


def attach(
    trainer: Trainer,
    plan: Plan,
    settings: AttachSettings | None = None,
    notify: Callable[[str], None] = logger.info,
) -> "Attachment":
    """Let ``trainer.train()`` follow ``plan``: its phases, a frozen prefix that is computed once, and fast steps.

    It works with transformers' ``Trainer`` and its subclasses, such as TRL's ``SFTTrainer``. The model must have the
    adapters of the plan, from :func:`aletheia.adapt` or ``peft_config=plan.lora_config(model)``. Losses and gradients
    stay the same up to rounding. Nothing changes before training starts, and the model is restored when it ends, even
    by an error. All else stays with the trainer: evaluation, checkpoints, loggers, several processes. Checkpoints have
    a manifest, and ``resume_from_checkpoint=True`` takes the newest one that matches it.

    Args:
        trainer: a trainer that is not training yet.
        plan: the plan that its model is adapted with.
        settings: settings of cache and steps; by default :class:`AttachSettings`.
        notify: called with a line for each decision that a user may want to know.

    Returns:
        The attachment, which also records what it did.

    Raises:
        AdapterError: the trainer's model is not adapted as planned.
        PlanError: the trainer has another tokenizer than the plan was made with.
        TrainingError: this kind of trainer is not supported, or a plan is attached already.
    """
    if getattr(trainer, "is_deepspeed_enabled", False):
        raise TrainingError("the trainer runs under DeepSpeed; expected one process, DDP or FSDP2")
    if trainer.args.n_gpu > 1:
        raise TrainingError(
            f"Trainer would split batches over {trainer.args.n_gpu} GPUs in one process (DataParallel); expected one "
            "process per GPU; use torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES=0 for one GPU"
        )
    for field, reason in UNFIT.items():
        if getattr(trainer.args, field, False):
            raise TrainingError(f"the trainer has {field} on; expected it off: {reason}")
    if is_sharded(trainer) and not trainer.accelerator.is_fsdp2:
        raise TrainingError("the trainer runs under FSDP 1; expected FSDP2; set version 2 in fsdp_config")
    if not isinstance(trainer.model, PeftModel):
        raise TrainingError(
            f"the trainer's model is a {type(trainer.model).__name__} without adapters; expected the adapters of the "
            "plan; add them with aletheia.adapt(model, plan) or peft_config=plan.lora_config(model)"
        )
    if any(isinstance(callback, Attachment) for callback in trainer.callback_handler.callbacks):
        raise TrainingError("a plan is attached to this trainer already; expected one plan; make a new trainer")
    check_adapters(trainer.model, plan)
    if hasattr(tokenizer := trainer.processing_class, "get_vocab"):  # no template: rows may be rendered elsewhere
        plan.check_tokenizer(identify_tokenizer(tokenizer).without_template())
    settings = settings or AttachSettings()
    if settings.whole_checkpoints:
        trustworthy_checkpoints(trainer, {"plan_fingerprint": plan.fingerprint})
    attachment = Attachment(trainer, plan, settings, notify)
    attachment.install()
    return attachment


class Attachment(TrainerCallback):
    """Phases, prefix and fast steps of one trainer. A checkpoint needs no state of it: all follows from the step."""

    def __init__(
        self,
        trainer: Trainer,
        plan: Plan,
        settings: AttachSettings,
        notify: Callable[[str], None],
        recompute: Recompute = "off",
        prefix: PrefixCache | None = None,
        free: bool = False,
        decision: CacheDecision | None = None,
    ) -> None:
        """See :func:`attach`; the arguments from ``recompute`` on are for :func:`aletheia.train`.

        Args:
            trainer: the trainer.
            plan: its plan.
            settings: as for :func:`attach`.
            notify: as for :func:`attach`.
            recompute: what backward computes again.
            prefix: a cache that holds every row already.
            free: with ``prefix``, free the layers below the boundary permanently.
            decision: what to record about ``prefix``.
        """
        self.decision = decision or CacheDecision("off", "training has not started")
        self._decided = decision
        self.ways: tuple[str, ...] = ()
        self.cache_seconds = 0.0
        self.graphed: int | None = None  # tokens of packed batches whose layers are recorded
        self.packed = False  # whether batches come from :func:`aletheia.data.batches.collate_packed`
        self.at_end: Callable[[], None] = lambda: None  # called after the last step, before the model is restored
        self._trainer, self._plan, self._settings = trainer, plan, settings
        self._notify = notify if trainer.is_world_process_zero() else say_nothing
        self._recompute, self._prefix, self._free = recompute, prefix, free
        self._phases: list[Phase] = []
        self._phase: Phase | None = None
        self._steps_per_epoch: int | None = None
        self._source: PrefixSource | None = None
        self._use_for_other_runs: Use = "none"  # what to do with rows that do not come back in this run
        self._stack = ExitStack()

    def install(self) -> None:
        """Add this to the trainer's callbacks, and restore the model after ``train()``, even if it fails."""
        trainer = self._trainer
        trainer.add_callback(self)
        ddp = trainer.accelerator.ddp_handler
        if ddp is not None and self._plan.early_layers:
            ddp.find_unused_parameters = True  # otherwise it waits for gradients of layers that are frozen
        train = trainer.train

        @functools.wraps(train)
        def leaving(resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
            resume = resume_from_checkpoint
            if is_sharded(trainer) and resume:
                checkpoints = getattr(train, "__self__", None)
                if isinstance(checkpoints, TrustworthyCheckpoints):
                    resume = checkpoints.resume_path(resume)
                load_frozen(trainer, resume)
            try:
                return train(resume, *args, **kwargs)
            finally:
                self.leave()

        trainer.train = leaving  # type: ignore[method-assign]  # an error calls no callback

    # --- events of the trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the phase of the next step; a resumed run may be in its last phase already."""
        self.leave()
        self._phases = phases(self._plan, state.max_steps)
        self._steps_per_epoch = _steps_per_epoch(kwargs.get("train_dataloader"), args)
        self._begin(phase_at(self._phases, state.global_step))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Begin the next phase when its first step is next."""
        phase = phase_at(self._phases, state.global_step)
        if phase is not self._phase and state.global_step < state.max_steps:
            self._begin(phase)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Call ``at_end``, then restore the model."""
        self._phase = None  # Trainer may have loaded earlier adapters below, so nothing is read from a cache
        self.at_end()
        self.leave()

    # --- phases

    @property
    def _model(self) -> nn.Module:
        model = self._trainer.model
        assert model is not None
        return model

    def leave(self) -> None:
        """Restore the model; may be called twice. A cache on disk that only this run can use is deleted."""
        with self._stack:
            self._note_size()
        self._phase = None

    def _begin(self, phase: Phase) -> None:
        self._note_size()
        self._stack.close()
        self._phase = phase
        model = self._model
        self._stack.callback(freeze_below(model, phase.boundary))
        self._stack.enter_context(kept_on_host(self._trainer))
        self._source = self._make_source(model, phase)
        # the stored prefix comes first, so that it sees a batch before other hooks do
        if self._prefix is not None or self._source is not None:
            context = stored_prefix(model, phase.boundary, self._free and self._prefix is not None, self._source)
            self._stack.enter_context(context)
        self._stack.enter_context(frozen_prefix(model))
        ways = self._fast_ways() if self._settings.fast_steps else {}
        self._stack.enter_context(entered(model, ways))
        self.ways = tuple(ways)

    def _fast_ways(self) -> dict[str, Way]:
        compiled = self._settings.compile_layers
        if compiled:
            self._notify("compile  the layers that learn; the first steps take longer")
        given = (self._model, reads(self._trainer), self._recompute, self.packed, compiled, self._settings.liger)
        return step_ways(*given, self.graphed, self._notify)

    def _make_source(self, model: nn.Module, phase: Phase) -> PrefixSource | None:
        """The source of stored states in this phase; None where there is no prefix or no cache."""
        if self._prefix is not None:
            cache = self._prefix
            self.decision = self._decided or CacheDecision("disk", "filled layer by layer")
            return PrefixSource(model, phase.boundary, lambda dtype: cache, lambda: "read", trusted=True)
        if phase.boundary == 0:
            reason = "layer 0 is adapted, so there is no frozen prefix"
            self.decision = CacheDecision("off", reason)
            if self._plan.boundary == 0 and self._settings.cache in ("memory", "disk"):
                self._obstacle(reason)
            return None
        if self._settings.cache == "off":
            self.decision = CacheDecision("off", "as asked")
            return None
        self.decision = CacheDecision("off", "no row came back")
        group = group_of(self._trainer)
        # this gathers sharded weights, which is not possible inside a forward pass
        computed_as = prefix_computed_as(self._trainer, self._settings)
        key = prefix_key(model, phase.boundary, computed_as) if is_sharded(self._trainer) else None
        return PrefixSource(
            model,
            phase.boundary,
            functools.partial(self._open, phase, key),
            self._use,
            self._obstacle,
            group,
            state=adapters_below(model, phase.boundary),
        )

    def _open(self, phase: Phase, key: str | None, dtype: torch.dtype) -> PrefixCache | None:
        """The cache of a phase, opened once the first batch has shown that stored states are exact."""
        trainer, model = self._trainer, self._model
        args = trainer.args
        has_own_prefix = any(adapted_in(layer) for layer in layers_below(model, phase.boundary))
        place = CachePlace(
            kind=self._settings.cache,
            folder=self._settings.cache_dir,
            private=_private_name(args.output_dir) if has_own_prefix else None,
            computed_as=prefix_computed_as(trainer, self._settings),
            shared_by=args.world_size,
            key=key,
        )
        seconds = functools.partial(_forward_seconds_per_token, model, phase.boundary)
        try:
            # all processes may share one folder, or each machine may have its own: its first process creates it
            with args.main_process_first(local=False), args.main_process_first(local=True):
                cache, self.decision = open_cache(model, phase.boundary, dtype, place, seconds)
        except CacheError as error:
            self._obstacle(str(error))
            return None
        if isinstance(cache, DiskCache):
            if place.private is None:
                self._use_for_other_runs = "keep" if self._settings.cache == "disk" else "read"
            self._stack.callback(cache.close)
            if place.private is not None:
                self._stack.callback(self._delete, cache)
        self._notify(f"cache  {self.decision.kind}: {self.decision.reason}")
        return cache

    def _delete(self, cache: DiskCache) -> None:
        if self._trainer.is_local_process_zero():
            cache.delete()

    def _obstacle(self, reason: str) -> None:
        """Continue without stored states; fail if the user asked for them and no step has been taken."""
        self.decision = CacheDecision("off", reason)
        asked = self._settings.cache in ("memory", "disk")
        is_read_on = self._source is not None and self._source.cache is not None
        if asked and self._trainer.state.global_step == 0 and not is_read_on:
            raise CacheError(
                f"`cache` is {self._settings.cache}, which is not possible: {reason}; expected off or auto"
            )
        self._notify(f"cache  off: {reason}")

    def _use(self) -> Use:
        """What to do with the rows that pass now: held-out rows come back, those of the last epoch do not."""
        state, phase = self._trainer.state, self._phase
        if phase is None:
            return "none"
        if not self._model.training:
            return "keep" if state.global_step < state.max_steps else "read"
        if not rows_come_back(phase.first_step, state.max_steps, self._steps_per_epoch):
            return self._use_for_other_runs
        assert self._steps_per_epoch is not None
        return "read" if is_last_epoch(state.global_step, state.max_steps, self._steps_per_epoch) else "keep"

    def _note_size(self) -> None:
        """Record the size of the cache of the phase that ends."""
        source = self._source
        if source is not None and source.cache is not None:
            source.settle()
            spilled = isinstance(source.cache, SpillingCache) and source.cache.is_spilled
            kind = "disk" if spilled else self.decision.kind
            self.decision = CacheDecision(kind, self.decision.reason, source.cache.size_bytes)
        if source is not None:
            self.cache_seconds += source.seconds
        self._source = None


def prefix_computed_as(trainer: Trainer, settings: AttachSettings) -> str:
    """What the states of a prefix depend on besides model and dtype; runs that differ in it share no cache."""
    assert trainer.model is not None
    ways = layer_ways(trainer.model, settings.compile_layers, settings.liger)
    return f"{trainer.accelerator.mixed_precision} {sorted(ways) if settings.fast_steps else ''}"


def reads(trainer: Trainer) -> Reads:
    """What the trainer reads of a model's outputs; where it may read any logit, all are computed."""
    own = type(trainer)
    if (
        trainer.compute_loss_func is not None
        or trainer.label_smoother is not None
        or trainer.compute_metrics is not None
        or trainer.preprocess_logits_for_metrics is not None
    ):
        return "logits"
    if own.compute_loss is Trainer.compute_loss and own.prediction_step is Trainer.prediction_step:
        return "loss"
    own_loss = own.compute_loss.__module__, own.compute_loss.__qualname__
    return "sums" if own_loss == ("trl.trainer.sft_trainer", "SFTTrainer.compute_loss") else "logits"


def _steps_per_epoch(loader: object, args: TrainingArguments) -> int | None:
    """Optimizer steps of one pass over the data; None where the data has no length."""
    try:
        batches = len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None
    return max(1, math.ceil(batches / args.gradient_accumulation_steps))


def _private_name(output_dir: str | None) -> str:
    """A folder name for the cache that only the run in ``output_dir`` can use."""
    return "run-" + hashlib.sha256(str(Path(output_dir or ".").resolve()).encode()).hexdigest()[:28]


def _forward_seconds_per_token(model: nn.Module, boundary: int) -> float:
    """Seconds that the prefix takes per token, measured on a row of 128."""
    row = Example([0] * 128, [NO_LOSS] * 128, "a trial")
    row_states(model, boundary, [row])  # warms up
    started = time.perf_counter()
    row_states(model, boundary, [row])[0].cpu()
    return (time.perf_counter() - started) / 128
