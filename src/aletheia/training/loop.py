"""transformers' Trainer over tokenised rows, with a fixed order of rows and the held-out loss as its evaluation."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from peft import PeftModel
from torch import nn
from torch.utils.data import BatchSampler, Sampler
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from aletheia.data.batches import (
    Collator,
    PackSize,
    collate,
    collate_packed,
)
from aletheia.data.examples import Example, Examples
from aletheia.data.order import batches_within, epoch_order, training_batches
from aletheia.data.sources import one_line
from aletheia.errors import SettingsError, TrainingError
from aletheia.execution.backend import is_behind
from aletheia.training.averaging import WeightAverage
from aletheia.training.finite import Finite
from aletheia.training.held_out import loss_over
from aletheia.training.recorder import Recorder
from aletheia.training.settings import EVALUATIONS, TrainSettings
from aletheia.training.sharded import is_sharded
from aletheia.training.walks import few_walks, learning

NEVER = 10**9  # steps
FIXED_SHARE = 0.95  # of batches; larger ones keep their own size
FIXED_MORE = 1.1  # times that size: so much larger it may be for all of them
FIXED_MULTIPLE = 64  # tokens: packed batches of a fixed size are rounded up to it
LOOKED_AT_EVERY = 10  # steps between two logs, where no step waits for its own results


def steps_per_epoch(rows: int, settings: TrainSettings, processes: int = 1) -> int:
    """Optimizer steps of one pass over ``rows``, as Trainer counts them."""
    batches = math.ceil(math.ceil(rows / settings.batch_size) / processes)
    return math.ceil(batches / settings.gradient_accumulation_steps)


def planned_steps(rows: int, settings: TrainSettings, processes: int = 1) -> int:
    """Optimizer steps planned for a run over ``rows``; it may end earlier."""
    return settings.steps or math.ceil((settings.epochs or 1.0) * steps_per_epoch(rows, settings, processes))


def planned_passes(rows: int, settings: TrainSettings, processes: int = 1) -> float:
    """Passes over ``rows`` planned for a run."""
    if settings.steps is None:
        return settings.epochs or 1.0
    return settings.steps * rows_per_step(settings, processes) / rows


def evaluations_of(rows: int, settings: TrainSettings, processes: int = 1) -> int:
    """How often the held-out loss is measured: evenly, the last time after the last step. 0: Trainer decides."""
    if evaluates_by_itself(settings):
        return 0
    return settings.evaluations or max(1, round(EVALUATIONS * planned_passes(rows, settings, processes)))


def takes_average(rows: int, settings: TrainSettings, processes: int = 1) -> bool:
    """Whether the weights of a run over ``rows`` are averaged: ``averaging`` auto is for more than one pass."""
    if settings.averaging == "auto":
        return planned_steps(rows, settings, processes) > steps_per_epoch(rows, settings, processes)
    return settings.averaging == "on"


def rows_per_step(settings: TrainSettings, processes: int = 1) -> int:
    """Rows that an optimizer step sees, over all processes."""
    return settings.batch_size * settings.gradient_accumulation_steps * processes


def rows_of_steps(data: Examples, settings: TrainSettings, steps: int, processes: int = 1) -> list[list[Example]]:
    """The rows of each of the first ``steps`` steps of a run."""
    lengths = [len(row) for row in data.examples]
    per_step = settings.gradient_accumulation_steps * processes
    batches = training_batches(lengths, settings.batch_size, steps, settings.seed, settings.order, per_step)
    return [[data[row] for row in batch] for batch in batches]


def batch_tokens(data: Examples, settings: TrainSettings, processes: int = 1) -> list[int]:
    """Tokens of the rows of each batch of a run, over all processes."""
    lengths = [len(row) for row in data.examples]
    per_step, per_epoch = settings.gradient_accumulation_steps, steps_per_epoch(len(data), settings, processes)
    left, epoch = planned_steps(len(data), settings, processes), 0
    found: list[int] = []
    while left > 0:
        rows = epoch_order(lengths, settings.batch_size, settings.seed, epoch, settings.order, per_step * processes)
        whole = BatchSampler(rows, settings.batch_size, drop_last=False)
        # accelerate fills the last batches up with rows of the first ones
        shards = [BatchSamplerShard(whole, processes, rank) for rank in range(processes)] if processes > 1 else [whole]
        seen = (batch for shard in shards for batch in islice(shard, left * per_step))
        found += [sum(lengths[row] for row in batch) for batch in seen]
        left, epoch = left - per_epoch, epoch + 1
    return found


def largest_batch(data: Examples, settings: TrainSettings, processes: int = 1) -> int:
    """Tokens of the largest training batch: with padding, one of the longest rows; packed, the largest of the run."""
    if settings.packing == "on":
        return max(batch_tokens(data, settings, processes))
    return settings.batch_size * max(len(row) for row in data.examples)


def held_out_batches(held_out: Examples, settings: TrainSettings, most_tokens: int) -> list[list[Example]]:
    """The held-out rows in batches of at most ``most_tokens``, those of :func:`largest_batch`; a longer row is alone.

    Padded batches have at most ``batch_size`` rows. Packed ones take as many as there is room for.
    """
    rows = None if settings.packing == "on" else settings.batch_size
    batches = batches_within([len(row) for row in held_out.examples], most_tokens, rows)
    return [[held_out[row] for row in batch] for batch in batches]


def fixed_size(data: Examples, settings: TrainSettings, processes: int = 1) -> PackSize:
    """The size that a run's packed batches fit into, in tokens a multiple of 64.

    Where a few are far larger, it is one that 95 % fit into: otherwise all others would be mostly filler.
    """
    found = sorted(batch_tokens(data, settings, processes))
    usual = found[math.ceil(FIXED_SHARE * len(found)) - 1]
    largest = found[-1] if found[-1] <= FIXED_MORE * usual else usual
    return PackSize(math.ceil(largest / FIXED_MULTIPLE) * FIXED_MULTIPLE, settings.batch_size)


def training_arguments(settings: TrainSettings, output_dir: str, **given: Any) -> TrainingArguments:
    """Trainer's arguments for ``settings``; ``given`` are those that depend on the model.

    Raises:
        SettingsError: Trainer does not know a field, or refuses a value.
    """
    extra = dict(settings.model_extra or {})
    if unknown := sorted(set(extra) - {field.name for field in fields(TrainingArguments)}):
        raise SettingsError(
            f"unknown setting `{unknown[0]}`; expected one of aletheia or a field of transformers' TrainingArguments"
        )
    by_steps = settings.save_steps is not None
    by_trainer = by_steps or settings.keep == "best"  # it then saves after the last step, too
    ours: dict[str, Any] = {
        "output_dir": output_dir,
        "use_cpu": not torch.accelerator.is_available(),  # otherwise several processes on CPUs do not find each other
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "warmup_steps": settings.warmup_steps,
        "optim": settings.optim,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "seed": settings.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # shows a loss that is not finite instead of hiding it
        "eval_strategy": "steps",
        "eval_steps": NEVER,
        "save_strategy": "steps" if by_trainer else "no",
        "save_steps": settings.save_steps if by_steps else NEVER,
        "save_total_limit": settings.save_total_limit,
        "report_to": list(settings.report_to) or "none",
        "push_to_hub": False,  # the finished run is uploaded, not its checkpoints
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }
    try:
        arguments = TrainingArguments(**ours | extra | given)
    except (ValueError, TypeError, ImportError) as error:
        raise SettingsError(f"Trainer refuses these settings: {one_line(error, 2000)}") from error
    _check_loggers(settings.report_to)
    arguments.metric_for_best_model, arguments.greater_is_better = "loss", False
    arguments.load_best_model_at_end = settings.keep == "best"
    arguments.restore_callback_states_from_checkpoint = settings.early_stop
    arguments._n_gpu = min(arguments.n_gpu, 1)  # otherwise Trainer splits every batch over all GPUs it sees
    return arguments


def device_arguments(model: PreTrainedModel | PeftModel, processes: int = 1) -> dict[str, Any]:
    """Trainer's arguments that follow from where a model is, and from its dtype.

    Raises:
        TrainingError: the model is on another GPU than Trainer would use.
    """
    device, on_gpu = model.device, model.device.type == "cuda"
    if on_gpu and device.index and processes == 1:
        raise TrainingError(
            f"the model is on {device}, but Trainer uses the first GPU it sees; expected it on cuda:0; set "
            f"CUDA_VISIBLE_DEVICES={device.index}"
        )
    return {
        "fp16": model.dtype == torch.float16,
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": on_gpu,
        "accelerator_config": {"non_blocking": on_gpu},  # a copy does not wait for earlier steps
    }


def _check_loggers(names: Sequence[str]) -> None:
    """Check that every logger is known and installed."""
    try:
        for callback in get_reporting_integration_callbacks(list(names)):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise SettingsError(f"`report_to` is {', '.join(names)}: {one_line(error, 2000)}") from error


def evaluates_by_itself(settings: TrainSettings) -> bool:
    """Whether the user set Trainer's own fields for when to evaluate."""
    return bool({"eval_strategy", "eval_steps"} & set(settings.model_extra or {}))


def collator_of(settings: TrainSettings, pad_token_id: int, size: PackSize | None = None) -> Collator:
    """The function that makes a batch of rows: packed where ``packing`` is ``on``, otherwise padded.

    Packed batches that fit into ``size``, if it is given, are filled up to it.
    """
    if settings.packing == "on":
        return partial(_collate_packed, size=size, pad_token_id=pad_token_id)
    return partial(collate, pad_token_id=pad_token_id)


def _looks_back(arguments: TrainingArguments) -> bool:
    """Whether steps do not wait for their own results, which are then read one step later."""
    plain = arguments.optim == "adamw_torch_fused" and not arguments.fp16 and arguments.world_size == 1
    return plain and is_behind(arguments.device)


def _collate_packed(rows: Sequence[Example], size: PackSize | None, pad_token_id: int) -> dict[str, Any]:
    fits = size is not None and sum(map(len, rows)) <= size.tokens
    return collate_packed(rows, size if fits else None, pad_token_id)


class EpochOrder(Sampler[int]):
    """Row indices of the epoch that the run is in."""

    def __init__(self, data: Examples, settings: TrainSettings, trainer: Trainer) -> None:
        """The epoch follows from the number of steps done, so a resumed run needs nothing else."""
        self._lengths = [len(row) for row in data.examples]
        self._settings, self._trainer = settings, trainer
        processes = trainer.args.world_size
        self._per_epoch = steps_per_epoch(len(data), settings, processes)
        self._per_step = settings.gradient_accumulation_steps * processes

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        """Indices of all rows, in the order of the present epoch."""
        epoch = self._trainer.state.global_step // self._per_epoch
        size, seed, order = self._settings.batch_size, self._settings.seed, self._settings.order
        return iter(epoch_order(self._lengths, size, seed, epoch, order, self._per_step))


class RowTrainer(Trainer):
    """Trainer over :class:`aletheia.Examples`; ``evaluate`` gives the held-out loss per token."""

    def __init__(
        self,
        model: PeftModel,
        data: Examples,
        held_out: Examples,
        settings: TrainSettings,
        arguments: TrainingArguments,
        recorder: Recorder,
    ) -> None:
        """Make the trainer; callbacks other than ``recorder`` are added afterwards."""
        self._rows = data
        self._settings, self._recorder = settings, recorder
        self.before_training: Callable[[], AbstractContextManager[None]] = (
            nullcontext  # context of the first evaluation
        )
        self.average: WeightAverage | None = None
        self._flops_per_token: int | None = None
        callbacks: list[TrainerCallback] = [recorder]
        if settings.patience is not None:
            callbacks.append(EarlyStoppingCallback(settings.patience))
        self.most_tokens = largest_batch(data, settings, arguments.world_size)  # in a batch of any kind
        self._held_out_rows = held_out_batches(held_out, settings, self.most_tokens)
        # graphs need batches of one size
        self.size = fixed_size(data, settings, arguments.world_size) if settings.cuda_graphs else None
        self.looks_back = _looks_back(arguments)
        recorder.looks_back = self.looks_back
        if self.looks_back:
            arguments.logging_steps = LOOKED_AT_EVERY
        super().__init__(model, arguments, self._batch, train_dataset=data, eval_dataset=held_out, callbacks=callbacks)
        for noisy in (PrinterCallback, ProgressCallback):
            self.remove_callback(noisy)
        self._finite = Finite(self, self.looks_back)
        self.add_callback(self._finite)

    def begin_average(self) -> None:
        """Average the weights if the settings say so; call this after the attachment, which freezes layers.

        Raises:
            SettingsError: ``averaging`` is on, but layers are sharded over processes.
        """
        assert self.model is not None
        if is_sharded(self):
            if self._settings.averaging == "on":
                raise SettingsError("`averaging` is on, but layers are sharded over processes; expected auto or off")
        elif takes_average(len(self._rows), self._settings, self.args.world_size):
            self.average = WeightAverage(self.model)
            self.add_callback(self.average)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's ``save_model``, with the averages in a second file."""
        self._finite.settle()
        super().save_model(output_dir, _internal_call)
        if self.average is not None and output_dir is not None and self.args.should_save:
            self.average.save(Path(output_dir))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's ``train``, without walks over all modules at each step."""
        with few_walks(self):
            return super().train(*args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Trainer's estimate for a batch, which is in proportion to its tokens; all parameters are counted once."""
        tokens = int(inputs["input_ids"].numel())
        if self._flops_per_token is None:
            self._flops_per_token = int(super().floating_point_ops(inputs)) // tokens
        return self._flops_per_token * tokens

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Trainer's own, over the parameters that learn."""
        if is_sharded(self):
            return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        return self.accelerator.clip_grad_norm_(learning(self), self.args.max_grad_norm)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Trainer's ``training_step``, and a check of its results before they are applied."""
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        of_step = self._finite.after_backward(loss, inputs)
        if of_step is not None:
            self._recorder.stepped(self.state.global_step + 1, of_step)
        return loss

    def _batch(self, rows: Sequence[Example]) -> dict[str, Any]:
        return collator_of(self._settings, self._rows.pad_token_id, self.size)(rows)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return EpochOrder(self._rows, self._settings, self)

    @property
    def kept_step(self) -> int:
        """The step whose adapter is kept after training."""
        return (self._settings.keep == "best" and self.state.best_global_step) or self.state.global_step

    def held_out_loss(self) -> float:
        """The held-out loss of the model with its present weights, in nats per token."""
        assert self.model is not None
        return loss_over(self.model, self._held_out_batches(), self._recorder.evaluating)

    def _held_out_batches(self) -> Iterator[dict[str, Any]]:
        return map(collator_of(self._settings, self._rows.pad_token_id), self._held_out_rows)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the held-out loss, record and log it, and call callbacks; with ``keep`` best, save a new lowest one.

        It is the loss of the averaged weights, where weights are averaged.
        """
        started = time.perf_counter()
        self._finite.settle()
        averaged = self.average.swapped_in() if self.average is not None else nullcontext()
        with averaged, nullcontext() if self.state.global_step else self.before_training():
            loss = self.held_out_loss()
            self._finite.held_out(loss, self._held_out_batches())
        if self.args.device.type != "cpu":
            torch.accelerator.synchronize()
        self._recorder.evaluated(self.state.global_step, loss, time.perf_counter() - started)
        metrics = {f"{metric_key_prefix}_loss": loss}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        best = self.state.best_metric
        if self.args.load_best_model_at_end and self.state.global_step and (best is None or loss < best):
            self.control.should_save = True
        return metrics
