"""The training loop: transformers' Trainer on an adapted model, measured."""

import math
import os
import tempfile
import time
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from aletheia.adapters.adapt import check_adapters
from aletheia.adapters.correction import Correction
from aletheia.adapters.initial import ROWS, Init, align_with_gradient
from aletheia.anatomy.checkpoint import Checkpoint
from aletheia.anatomy.load import quantization_of
from aletheia.data.examples import Example, Examples
from aletheia.data.order import training_batches
from aletheia.errors import TrainingError
from aletheia.execution.peak_memory import peak_memory_bytes, reset_peak_memory
from aletheia.execution.recompute import Recompute
from aletheia.files import package_versions
from aletheia.planning.plan import Plan, layer_ranges
from aletheia.prefix.cache import PrefixCache
from aletheia.prefix.fill import CacheKind
from aletheia.prefix.stored import PREFIX
from aletheia.runs.folder import claim_output, save
from aletheia.runs.schema import Metrics, PhaseSeconds, Run, TrainSettings
from aletheia.training.held_out import held_out_loss
from aletheia.training.stage import Stage
from aletheia.training.watch import Watch

WARMUP_SHARE = 0.05
SHORT_RUN_STEPS = 200
GRADIENT_START_RATE = 0.5  # of the rate for a random start
CORRECTION_TOKENS = 4096  # at most, beyond the first row
EVALUATIONS = 4  # held-out losses during training, after the one before it
LAUNCHERS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # how many processes there are


def train(
    model: PeftModel,
    data: Examples,
    plan: Plan,
    out: str | Path,
    held_out: Examples,
    steps: int | None = None,
    epochs: float = 1.0,
    batch_size: int = 4,
    learning_rate: float | None = None,
    init: Init = "gradient",
    evaluations: int = EVALUATIONS,
    seed: int = 0,
    cache: CacheKind = "auto",
    cache_dir: str | Path | None = None,
    free_prefix: bool = False,
    prefix: PrefixCache | None = None,
    unquantized: Checkpoint | None = None,
    gradient_checkpointing: Recompute = "off",
    group_by_length: bool = True,
    overwrite: bool = False,
    earlier_seconds: Mapping[str, float] | None = None,
    show_progress: bool = True,
) -> Run:
    """Train the adapters of ``model`` and leave a run folder: a standard PEFT adapter, the plan and the metrics.

    AdamW, linear decay after 5 % warm-up, gradient clipping at 1.0, no weight decay. Only adapters are trained; the
    graph starts at the boundary, logits are computed where labels are, and what enters the boundary layer is computed
    once per row where that pays. All of it is exact up to rounding. Where the plan has early layers they learn first,
    then freeze as they are, and the boundary rises. Sets the global random seeds, as Trainer does.

    Args:
        model: the adapted model, from :func:`aletheia.adapt`.
        data: rows to train on; their order depends on ``seed`` alone.
        plan: the plan the model was adapted with.
        out: the run folder.
        held_out: rows for the held-out loss, taken before training and ``evaluations`` times from then on.
        steps: optimizer steps; overrides ``epochs``.
        epochs: passes over ``data``.
        batch_size: sequences per step.
        learning_rate: peak learning rate; by default :func:`default_learning_rate`.
        init: where the A matrices start: ``gradient`` turns them along the loss gradient of the first rows
            (:func:`aletheia.adapters.initial.align_with_gradient`), ``random`` leaves them as they are.
        evaluations: how often the held-out loss is taken from the first step on, evenly, the last time after the last.
        seed: of the order of rows.
        cache: where the prefix cache goes: ``memory``, ``disk``, ``off``, or ``auto``, which measures and decides.
        cache_dir: for a cache on disk; by default ``ALETHEIA_CACHE`` or the user's cache folder.
        free_prefix: with a cache, drop the layers below the boundary from memory for good: the model in hand is
            of no use afterwards, the run folder is complete.
        prefix: a cache that holds every row already, for a model of which only the upper layers are there
            (:meth:`aletheia.Checkpoint.suffix`); ``cache`` and ``cache_dir`` are not looked at then.
        unquantized: the checkpoint that a 4-bit base was made from: each adapter then gets a frozen part of its own
            rank that takes back most of what quantization did (:class:`aletheia.adapters.correction.Correction`).
        gradient_checkpointing: what of the suffix is computed again in backward instead of kept: ``off``,
            ``selective`` (all but the matrix products) or ``full``.
        group_by_length: make batches of rows of like length.
        overwrite: allow ``out`` to hold another run, which is replaced.
        earlier_seconds: time already spent, by phase (``load``, ``probe``, ``plan``, ``cache``), for the record; by
            default the probe's time as the plan tells it.
        show_progress: draw progress bars on stderr.

    Raises:
        AdapterError: the model is not adapted as planned.
        ArtifactError: ``out`` is taken or cannot be written.
        CacheError: the cache asked for is not possible or does not fit.
        TrainingError: a setting is out of range, or a loss is not finite.
    """
    check_settings(steps, epochs, batch_size, learning_rate, cache, gradient_checkpointing, init, evaluations)
    if not len(data):
        raise TrainingError(f"{data.identity.name}: found no rows to train on, expected at least one")
    steps = steps or math.ceil(epochs * math.ceil(len(data) / batch_size))
    if learning_rate is None:
        learning_rate = default_learning_rate(model.config.get_text_config().hidden_size, steps, init)
    if model.device.type == "cuda" and model.device.index:
        raise TrainingError(
            f"the model is on {model.device}, and Trainer takes the first GPU it sees; expected it on cuda:0, "
            f"started with CUDA_VISIBLE_DEVICES={model.device.index}"
        )
    out = claim_output(out, overwrite, 4 * plan.trainable_parameters * (1 if unquantized is None else 2))
    check_adapters(model, plan)
    batches = training_batches([len(example) for example in data.examples], batch_size, steps, seed, group_by_length)
    schedule = [[data[row] for row in batch] for batch in batches]
    early = plan.early_steps(steps)
    if early and prefix is not None:
        raise TrainingError(
            f"the plan adapts layers {layer_ranges(plan.early_layers)} at first, which are not in memory; "
            "expected a plan made with --freeze-after 0"
        )
    stage = Stage(model, plan, held_out, batch_size, free_prefix, gradient_checkpointing)
    where = Path(cache_dir) if cache_dir else None

    def store() -> None:
        """Freeze what only learns early, and go on from a cache where that pays."""
        stage.rise(schedule[early:], cache, where, prefix, evaluations, show_progress)

    watch = Watch(lambda: held_out_loss(model, held_out, batch_size, stage.collate), evaluations, show_progress)
    with stage, Correction() as correction:
        if not early:
            store()
        reset_peak_memory(model.device)
        watch.measure(step=0)
        started = time.perf_counter()
        if unquantized is not None:
            model.eval()
            layers = unquantized.read_layers(sorted({adapter.layer for adapter in plan.adapters}))
            correction.measure(model, layers, stage.collate(_first_rows(schedule)))
        model.train()
        if init == "gradient":
            align_with_gradient(model, (stage.collate(batch) for batch in schedule[: math.ceil(ROWS / batch_size)]))
        init_seconds = time.perf_counter() - started
        arguments = _arguments(learning_rate, steps, seed, model)
        if early:
            watch.turn = (early, store)
        _fit(model, schedule, stage, arguments, watch)
        peak = peak_memory_bytes(model.device)
    check_adapters(model, plan)
    correction.fold(model, plan)
    decision = stage.decision
    settings = TrainSettings(
        batch_size=batch_size,
        learning_rate=learning_rate,
        max_length=data.max_length,
        dtype=str(model.dtype).removeprefix("torch."),
        device=model.device.type,
        seed=seed,
        group_by_length=group_by_length,
        gradient_checkpointing=gradient_checkpointing,
        cache=decision.kind,
        init=init,
        quantization=quantization_of(model.get_base_model()),
        quantization_corrected=bool(correction),
        attention=getattr(model.config, "_attn_implementation", None),
    )
    spent = _earlier(plan) | dict(earlier_seconds or {})
    metrics = Metrics(
        model=plan.model,
        data=data.identity,
        held_out_data=held_out.identity,
        held_out_rows=len(held_out),
        held_out_tokens=held_out.labelled_tokens,
        packages=package_versions(),
        settings=settings,
        rows_truncated=data.truncated,
        rows_skipped=data.skipped,
        steps=len(watch.train_curve),
        tokens=sum(len(row) for batch in schedule for row in batch),
        labelled_tokens=sum(row.labelled_tokens for batch in schedule for row in batch),
        boundary=plan.boundary,
        early_steps=early,
        trainable_parameters=plan.trainable_parameters,
        seconds=PhaseSeconds(
            **{"cache": stage.cache_seconds} | spent,
            init=init_seconds,
            train=watch.train_seconds,
            eval=watch.eval_seconds,
        ),
        peak_memory_bytes=peak,
        cache_bytes=decision.size_bytes,
        cache_reason=decision.reason,
        held_out_loss_before=watch.held_out_curve[0].loss,
        held_out_loss_after=watch.held_out_curve[-1].loss,
        train_curve=tuple(watch.train_curve),
        held_out_curve=tuple(watch.held_out_curve),
    )
    run = Run(out, metrics, plan)
    save(model, run)
    return run


def _first_rows(schedule: list[list[Example]]) -> list[Example]:
    """As many rows as the gradient start takes, or fewer that are long: a batch that fits where training does."""
    first: list[Example] = []
    for row in chain.from_iterable(schedule):
        if first and (len(first) == ROWS or sum(map(len, first)) + len(row) > CORRECTION_TOKENS):
            break
        first.append(row)
    return first


class _Trainer(Trainer):
    """Trainer that steps through ``schedule`` by number: batches made ahead of time may lack a prefix stored since."""

    def __init__(self, schedule: list[list[Example]], stage: Stage, **given: Any) -> None:
        """``stage`` tells how a batch is made at the time of its step."""
        super().__init__(train_dataset=schedule, data_collator=self._collate, **given)
        self._schedule, self._stage = schedule, stage

    def _collate(self, batches: list[list[Example]]) -> dict[str, torch.Tensor]:
        return self._stage.collate(batches[0])

    def training_step(self, model: nn.Module, inputs: dict[str, torch.Tensor], *given: Any) -> torch.Tensor:
        """One step; a batch without the stored prefix is made anew."""
        if self._stage.cache is not None and PREFIX not in inputs:
            inputs = self._stage.collate(self._schedule[self.state.global_step])
        return super().training_step(model, inputs, *given)


def _fit(
    model: PeftModel, schedule: list[list[Example]], stage: Stage, arguments: TrainingArguments, watch: Watch
) -> None:
    """Run Trainer over the batches as scheduled: to it, each is one item of a data set in order."""
    with tempfile.TemporaryDirectory() as arguments.output_dir:
        trainer = _Trainer(schedule, stage, model=model, args=arguments, callbacks=[watch])
        for noisy in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(noisy)
        try:
            trainer.train()
        finally:
            watch.close()


def _earlier(plan: Plan) -> dict[str, float]:
    """What was spent before this call: a plan that looked at scores owes its probe, whenever that was."""
    return {"load": 0.0, "probe": plan.probe.seconds if plan.uses_scores else 0.0, "plan": 0.0}


def _arguments(learning_rate: float, steps: int, seed: int, model: PeftModel) -> TrainingArguments:
    """Trainer settings; it saves nothing by itself, and shows a loss that is not finite instead of hiding it."""
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),  # nothing is written there
        max_steps=steps,
        per_device_train_batch_size=1,  # one scheduled batch
        train_sampling_strategy="sequential",
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=WARMUP_SHARE,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=seed,
        fp16=model.dtype == torch.float16,
        use_cpu=model.device.type == "cpu",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=model.device.type == "cuda",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # or Trainer splits every batch over all GPUs it sees
    return arguments


def default_learning_rate(hidden_size: int, steps: int, init: Init = "random") -> float:
    """Peak learning rate for LoRA at alpha = 2 x rank: ``5e-5 x m x (2000 / hidden)^0.781``, m from 15 down to 10.

    The fit of Schulman et al., "LoRA Without Regret" (Thinking Machines, 2025), over Llama models: 10 times the best
    rate of full fine-tuning, 15 times in short runs, falling with width, nearly independent of rank. Here m is 15 up
    to 200 steps and ``10 + 1000 / steps`` beyond. 2.0e-3 for a width of 576 and 150 steps, 2.9e-4 for 4,096 and long
    runs. Their fit for Qwen is flatter; the two agree within 2x between widths of 800 and 5,000.

    Half of that where A starts along the gradient: its outputs are then about twice as large as those of random rows,
    so B moves the weights as far at half the rate. Measured on SmolLM2 (docs/log.md, 2026-11-26): as good over 150
    steps, 3 % less loss after three epochs.
    """
    multiplier = 10 + 5 * min(1.0, SHORT_RUN_STEPS / steps)
    return 5e-5 * multiplier * (2000 / hidden_size) ** 0.781 * (GRADIENT_START_RATE if init == "gradient" else 1.0)


def check_settings(
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 1,
    learning_rate: float | None = None,
    cache: str = "auto",
    gradient_checkpointing: str = "off",
    init: str = "gradient",
    evaluations: int = EVALUATIONS,
) -> None:
    """Refuse settings that are out of range, and a distributed launch, where every process would write one folder.

    Raises:
        TrainingError: names the setting, what was found and what is expected.
    """
    if several := [name for name in LAUNCHERS if int(os.environ.get(name, "1")) > 1]:
        raise TrainingError(
            f"found a distributed launch ({several[0]} above 1); expected one process, "
            "this release trains on one device"
        )
    for flag, choice, known in (
        ("--cache", cache, get_args(CacheKind)),
        ("--gradient-checkpointing", gradient_checkpointing, get_args(Recompute)),
        ("--init", init, get_args(Init)),
    ):
        if choice not in known:
            raise TrainingError(f"{flag} is {choice!r}; expected one of {', '.join(known)}")
    limits = (("--steps", steps, 1), ("--batch-size", batch_size, 1), ("--evaluations", evaluations, 1))
    for flag, value, least in limits:
        if value is not None and value < least:
            raise TrainingError(f"{flag} is {value}; expected at least {least}")
    for flag, amount in (("--epochs", epochs), ("--learning-rate", learning_rate)):
        if amount is not None and not 0 < amount < float("inf"):
            raise TrainingError(f"{flag} is {amount:g}; expected a positive number")
