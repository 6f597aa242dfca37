"""Arms of the benchmark of a GPU: whole steps of real trainers, and of ours, over the same rows."""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from gpu_models import Work
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import is_liger_kernel_available

import aletheia
from aletheia.data.batches import collate, on_device_of
from aletheia.data.examples import NO_LOSS, Example
from aletheia.data.order import training_batches
from aletheia.execution.backend import compile_seconds
from aletheia.execution.fast import bfloat16_autocast
from aletheia.execution.peak_memory import peak_memory_bytes, reset_peak_memory
from aletheia.lab.campaign.steps import StepKind, prepared
from aletheia.planning.plan import Plan
from aletheia.prefix.cache import MemoryCache, collate_with_prefix
from aletheia.prefix.fill import fill
from aletheia.training.attach import Attachment, AttachSettings
from aletheia.training.loop import RowTrainer, training_arguments
from aletheia.training.packing import packs
from aletheia.training.recorder import Recorder
from aletheia.training.settings import TrainSettings

Batch = dict[str, torch.Tensor]
Collate = Callable[[list[Any]], Batch]


@dataclass
class Measured:
    """Steps of one arm, warm-up left out; one entry per step.

    ``tokens`` are real ones, ``places`` count padding, too; ``operations`` is what a step must compute at least.
    """

    name: str
    step_seconds: list[float]
    tokens: list[int]
    places: list[int]
    operations: list[float]
    peak_bytes: int
    notes: list[str] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Real tokens over all steps."""
        return sum(self.tokens) / sum(self.step_seconds)

    @property
    def median_seconds(self) -> float:
        """Of a step."""
        return statistics.median(self.step_seconds)

    def share(self, limit_flops: float) -> float:
        """Of the time that the least operations take at ``limit_flops`` per second, in the time that was taken."""
        return sum(self.operations) / limit_flops / sum(self.step_seconds)


class Clock(TrainerCallback):
    """Ends of steps, as the device sees them: nothing waits for it in between. ``peaks`` has a number per epoch."""

    def __init__(self, device: str) -> None:
        self._device, self._is_gpu = torch.device(device), device == "cuda"
        self._marks: list[Any] = []
        self.peaks: list[int] = []
        reset_peak_memory(self._device)

    def mark(self) -> None:
        """Now, on the device."""
        if self._is_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def on_train_begin(self, *given: Any, **named: Any) -> None:
        self.mark()

    def on_step_end(self, *given: Any, **named: Any) -> None:
        self.mark()

    def on_epoch_end(self, *given: Any, **named: Any) -> None:
        self.peaks.append(peak_memory_bytes(self._device))
        reset_peak_memory(self._device)

    def seconds(self) -> list[float]:
        """Between marks."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if not self._is_gpu:
            return [after - before for before, after in pairs]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairs]


class Counted:
    """A collator that counts what is in each batch: real tokens, those with a loss, and all places."""

    def __init__(self, own: Collate) -> None:
        self._own = own
        self.batches: list[tuple[int, int, int]] = []

    def __call__(self, rows: list[Any]) -> Batch:
        batch = self._own(rows)
        places = batch["input_ids"].numel()
        is_padded = "attention_mask" in batch and "cu_seq_lens_q" not in batch
        tokens = int(batch["attention_mask"].sum()) if is_padded else places
        self.batches.append((tokens, int((batch["labels"][:, 1:] != NO_LOSS).sum()), places))
        return batch


def measured(
    work: Work, name: str, plan: Plan, done: tuple[Clock, Counted], steps: slice, cached: bool = False
) -> Measured:
    """The result of an arm, of the steps in ``steps``; its peak memory is that of all its epochs."""
    clock, counted = done
    tokens, labelled, places = map(list, zip(*counted.batches[steps], strict=True))
    least = [work.operations.of(real, lost, plan.boundary, cached) for real, lost in zip(tokens, labelled, strict=True)]
    return Measured(name, clock.seconds()[steps], tokens, places, least, max(clock.peaks))


def trained(work: Work, trainer: Trainer) -> tuple[Clock, Counted]:
    """Run ``trainer`` with a clock and a count."""
    clock, counted = Clock(work.device), Counted(trainer.data_collator)
    trainer.data_collator = counted
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock, counted


def common(work: Work, folder: str) -> dict[str, Any]:
    """Arguments of Trainer that are no default: nothing is written, rows come in their order, and then once more.

    So the timed steps, the last ones, cover every row once, as in all arms that do not say otherwise.
    """
    return {
        "output_dir": folder,
        "max_steps": work.warm_up + work.steps,
        "per_device_train_batch_size": work.shape.batch_size,
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": work.device == "cpu",
    }


def plain(work: Work) -> list[Measured]:
    """PEFT and transformers' Trainer, ``bf16=True``."""
    model = aletheia.adapt(work.model(), work.uniform)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(**common(work, folder), bf16=True, remove_unused_columns=False)
        collator = partial(collate, pad_token_id=work.data.pad_token_id)
        trainer = Trainer(model, arguments, collator, train_dataset=work.data)
        done = trained(work, trainer)
    return [measured(work, "plain PEFT and Trainer", work.uniform, done, work.last_steps)]


def trl(work: Work) -> list[Measured]:
    """SFTTrainer with its defaults, but for ``max_length``: no row is cut."""
    return [measured(work, "TRL, defaults", work.uniform, sft(work), work.last_steps)]


def trl_at_its_best(work: Work) -> list[Measured]:
    """SFTTrainer with packing and Liger's kernels, nothing recomputed. Its steps go over whole blocks, not rows."""
    blocks, tokens = work.shape.packed
    has_liger = is_liger_kernel_available()
    options: dict[str, Any] = {"packing": True, "max_length": tokens, "per_device_train_batch_size": blocks}
    options |= {"gradient_checkpointing": False, "use_liger_kernel": has_liger}
    if hasattr(work.shape.config, "num_experts"):
        options["liger_kernel_config"] = {"swiglu": False}  # its experts would go past the adapters
    found = measured(work, "TRL, packing, Liger", work.uniform, sft(work, **options), work.last_steps)
    found.notes += [f"{blocks} blocks of {tokens} tokens"] + ([] if has_liger else ["Liger is not installed"])
    return [found]


def sft(work: Work, **options: Any) -> tuple[Clock, Counted]:
    """A few steps of SFTTrainer."""
    import trl as library
    from datasets import Dataset

    base = work.model()
    rows = Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in work.data.examples])
    with unpatched(sys.modules[type(base).__module__]), tempfile.TemporaryDirectory() as folder:
        config = library.SFTConfig(**common(work, folder) | {"max_length": work.shape.longest} | options)
        model = aletheia.adapt(base, work.uniform)
        trainer = library.SFTTrainer(model, config, train_dataset=rows, processing_class=some_tokenizer())
        return trained(work, trainer)


def some_tokenizer() -> Any:
    """SFTTrainer wants one for its padding token; the rows are tokens already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@contextmanager
def unpatched(module: Any) -> Iterator[None]:
    """Give a module of transformers its own functions and classes back: Liger puts others in their places."""
    before = dict(vars(module))
    try:
        yield
    finally:
        vars(module).update(before)


def ours_every_layer(work: Work, how: str = "", **settings: Any) -> list[Measured]:
    """Our training with adapters in every layer; ``how`` tells ``settings`` that are no defaults."""
    done, notes = ours(work, work.uniform, 2, settings)
    found = measured(work, f"ours, every layer{how}", work.uniform, done, work.last_steps)
    found.notes += notes
    return [found]


def ours_upper_half(work: Work, how: str = "", **settings: Any) -> list[Measured]:
    """Our training of the upper half: an epoch that fills the cache in memory, later ones that read it.

    The first steps of the first epoch warm up, so it is not over every row.
    """
    done, notes = ours(work, work.half, 3, settings)
    first = measured(work, f"ours, upper half, first epoch{how}", work.half, done, slice(work.warm_up, work.steps))
    later = measured(work, f"ours, upper half, cached{how}", work.half, done, work.last_steps, cached=True)
    first.peak_bytes, later.peak_bytes = done[0].peaks[0], done[0].peaks[-1]
    later.notes += notes
    return [first, later]


def ours_recomputed(work: Work) -> list[Measured]:
    """The same with selective recomputation; its first epoch is not reported."""
    return ours_upper_half(work, ", selective recomputation", gradient_checkpointing="selective")[1:]


def ours_in_nf4(work: Work) -> list[Measured]:
    """Both kinds of step over weights in NF4, by bitsandbytes."""
    with work.quantized():
        return ours_every_layer(work, ", NF4") + ours_upper_half(work, ", NF4")


def ours(work: Work, plan: Plan, epochs: int, options: dict[str, Any]) -> tuple[tuple[Clock, Counted], list[str]]:
    """Epochs over the rows as in ``aletheia train``, without the work around training; and its messages."""
    model = aletheia.adapt(work.model(), plan)
    settings = TrainSettings(
        epochs=epochs, batch_size=work.shape.batch_size, keep="last", early_stop=False, averaging="off", **options
    )
    packed, reason = packs(model, work.data, settings)
    settings = settings.model_copy(update={"packing": "on" if packed else "off"})
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(
            settings, folder, max_steps=epochs * work.steps, learning_rate=1e-4, use_cpu=work.device == "cpu",
            dataloader_pin_memory=work.device == "cuda", accelerator_config={"non_blocking": work.device == "cuda"},
        )  # fmt: skip
        held_out = work.data.subset(range(work.shape.batch_size))
        trainer = RowTrainer(model, work.data, held_out, settings, arguments, Recorder(0, False))
        notes: list[str] = [f"padded: {reason}"] if reason else []
        attached = AttachSettings(cache="memory" if plan.boundary else "off", compile_layers=settings.compile_layers)
        attachment = Attachment(trainer, plan, attached, notes.append, settings.gradient_checkpointing)
        attachment.packed = packed
        attachment.install()
        trainer.ahead = attachment.ahead
        done = trained(work, trainer)
    return done, [*notes, *attachment.ways, f"{compile_seconds():.1f} s spent on compiling so far"]


def plain_alone(work: Work) -> list[Measured]:
    """No trainer around the plain step: what its loop adds is the difference."""
    return [bare(work, StepKind("plain PEFT, no trainer", work.uniform))]


def every_layer_alone(work: Work) -> list[Measured]:
    """No trainer around our step with adapters in every layer."""
    return [bare(work, StepKind.fast("ours, every layer, no trainer", work.uniform))]


def cached_alone(work: Work) -> list[Measured]:
    """No trainer around our step from the cache."""
    return [bare(work, StepKind.fast("ours, upper half, cached, no trainer", work.half, cached=True))]


def bare(work: Work, kind: StepKind) -> Measured:
    """Batch to the device, forward, backward, clipping, fused AdamW."""
    model, data, size = work.model(), work.data, work.shape.batch_size
    lengths = [len(row) for row in data.examples]
    epoch = training_batches(lengths, size, work.steps, 0, "grouped" if kind.grouped else "random")
    cache = MemoryCache()
    if kind.cached:
        with prepared(model, StepKind.prefix("fill", kind.plan, False)) as adapted:
            fill(adapted, kind.plan.boundary, data.examples, cache, size, show_progress=False)
    clock, counted = Clock(work.device), Counted(batch_maker(kind, data.pad_token_id, cache))
    with prepared(model, kind) as adapted:
        parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        clock.mark()
        for rows in (*epoch[: work.warm_up], *epoch):
            batch = on_device_of(adapted, counted([data[row] for row in rows]))
            with nullcontext() if kind.in_place else bfloat16_autocast(adapted):
                loss = adapted(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            clock.mark()
        clock.on_epoch_end()
    return measured(work, kind.name, kind.plan, (clock, counted), work.last_steps, kind.cached)


def batch_maker(kind: StepKind, pad_token_id: int, cache: MemoryCache) -> Collate:
    """What makes a batch of rows for a kind of step."""

    def make(rows: list[Example]) -> Batch:
        if kind.cached:
            return collate_with_prefix(rows, pad_token_id, cache)
        return collate(rows, pad_token_id)

    return make


ARMS: dict[str, Callable[[Work], list[Measured]]] = {
    "plain": plain,
    "trl": trl,
    "trl-best": trl_at_its_best,
    "every-layer": ours_every_layer,
    "upper-half": ours_upper_half,
    "every-layer-compiled": partial(ours_every_layer, how=", compiled", compile_layers=True),
    "upper-half-compiled": partial(ours_upper_half, how=", compiled", compile_layers=True),
    "recomputed": ours_recomputed,
    "every-layer-padded": partial(ours_every_layer, how=", padded", packing="off"),
    "upper-half-padded": partial(ours_upper_half, how=", padded", packing="off"),
    "nf4": ours_in_nf4,
    "cached-alone": cached_alone,
    "plain-alone": plain_alone,
    "every-layer-alone": every_layer_alone,
}
