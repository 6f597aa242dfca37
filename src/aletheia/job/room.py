"""Whether training fits in memory: what it is predicted to take, how much there is, and notes about it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from aletheia.anatomy.access import input_weight
from aletheia.anatomy.checkpoint import Checkpoint
from aletheia.anatomy.device_memory import (
    free_memory_bytes,
    own_memory_bytes,
    total_memory_bytes,
    usable_memory_bytes,
    usable_share,
)
from aletheia.anatomy.read import read_anatomy
from aletheia.data.examples import Examples
from aletheia.execution.recompute import recomputations
from aletheia.job.settings import JobSettings
from aletheia.job.source import Source
from aletheia.planning.activations import Step
from aletheia.planning.memory import training_bytes
from aletheia.planning.plan import Plan
from aletheia.probing import resident
from aletheia.probing import streamed as by_layer
from aletheia.training.loop import fixed_size, held_out_batches, largest_batch
from aletheia.training.packing import packs
from aletheia.training.processes import Launch
from aletheia.training.settings import Recompute, TrainSettings


@dataclass(frozen=True)
class Room:
    """The memory that training may take: what was asked for, else a fixed share of all memory, free or not."""

    device: torch.device
    max_memory: int | None
    kinds: tuple[Recompute, ...] = ("off",)  # of gradient checkpointing to choose from, the cheapest first

    @property
    def usable_bytes(self) -> int:
        """Bytes in total, weights included."""
        return usable_memory_bytes(self.device) if self.max_memory is None else self.max_memory

    @property
    def about(self) -> str:
        """Where that limit comes from, in words."""
        if self.max_memory is not None:
            return f"`max_memory` of {_gigabytes(self.max_memory)}"
        total = _gigabytes(total_memory_bytes(self.device))
        return f"{_gigabytes(self.usable_bytes)} ({usable_share(self.device):.0%} of {total} in total)"

    def why_no_early_layers(self, every_bytes: int | None, is_streamed: bool) -> str | None:
        """Why the lower layers cannot learn at first, in a few words; None if they can."""
        if is_streamed:
            return "the model is streamed, so they are not in memory"
        if every_bytes is None:
            return "the scores file holds no weight sizes"
        if every_bytes <= self.usable_bytes:
            return None
        return f"training every layer is predicted to take {_gigabytes(every_bytes)}, more than {self.about}"

    def fitting(self, step: Step, needed: Callable[[Step], int | None]) -> Step:
        """The step with the cheapest gradient checkpointing that fits; ``step`` itself if none fits.

        Evaluation computes nothing again, so training alone has to fit.
        """

        def fits(one: Step) -> bool:
            return (needed(replace(one, held_out=None)) or 0) <= self.usable_bytes

        return next((one for one in self.steps(step) if fits(one)), step)

    def steps(self, step: Step) -> list[Step]:
        """The step with each kind of gradient checkpointing to choose from."""
        return [replace(step, recompute=kind) for kind in self.kinds]

    def about_recomputation(self, kind: Recompute, plain_bytes: int, taken_bytes: int) -> str:
        """A note that gradient checkpointing was switched on to save memory."""
        return (
            f"note: training is predicted to take {_gigabytes(plain_bytes)}, more than {self.about}; "
            f"`gradient_checkpointing` {kind} is used and takes {_gigabytes(taken_bytes)}"
        )

    def warning(self, predicted_bytes: int, evaluated: Step | None = None) -> str | None:
        """A note if a plan may not fit, alone or next to other programs; None if it fits.

        ``evaluated`` is the largest held-out batch, where training fits without it.
        """
        if predicted_bytes > self.usable_bytes and evaluated is not None:
            return (
                f"note: evaluating held-out rows of up to {evaluated.row_tokens:,} tokens is predicted to take "
                f"{_gigabytes(predicted_bytes)}, more than {self.about}; set a lower `max_length` or use smaller "
                "batches if memory runs out"
            )
        if predicted_bytes > self.usable_bytes:
            return (
                f"note: training is predicted to take {_gigabytes(predicted_bytes)}, more than {self.about}; use "
                "smaller batches, shorter rows or `gradient_checkpointing` if memory runs out"
            )
        now = free_memory_bytes(self.device) + own_memory_bytes(self.device)
        if predicted_bytes <= now:
            return None
        return (
            f"note: training is predicted to take {_gigabytes(predicted_bytes)}, and {_gigabytes(now)} are free now; "
            "close other programs if memory runs out"
        )


def room_for(base: Source, data: Examples, held_out: Examples, settings: JobSettings) -> tuple[Room, Step]:
    """The memory that training may take, and its largest step, with the gradient checkpointing that was asked for.

    The step brings along the largest held-out batch.
    """
    training, limit = settings.training, settings.model.max_memory
    asked = training.gradient_checkpointing
    if isinstance(base, Checkpoint):
        step = largest_step(data, training, base.dtype, base.device, resident=False, held_out=held_out)
        return Room(base.device, limit, (training.recompute,)), step
    model = base.model
    if packs(model, data, training)[0]:
        training = training.model_copy(update={"packing": "on"})
    step = largest_step(data, training, input_weight(model).dtype, model.device, resident=True, held_out=held_out)
    is_open = asked == "auto" and limit is None  # a given limit bounds the number of layers instead
    kinds = recomputations(model, training.compile_layers) if is_open else (training.recompute,)
    return Room(model.device, limit, kinds), step


def bytes_by(base: Source, plan: Plan) -> Callable[[Step], int]:
    """A function from the largest step to the bytes that training by ``plan`` takes at most."""
    if isinstance(base, Checkpoint):
        anatomy, weights = base.anatomy, by_layer.weight_bytes(base)
    else:
        anatomy, weights = read_anatomy(base.model), resident.weight_bytes(base.model)
    ranks = {adapter.name: adapter.rank for adapter in plan.adapters}
    return partial(training_bytes, anatomy, weights, (*plan.layers, *plan.early_layers), ranks)


def largest_step(
    data: Examples,
    training: TrainSettings,
    dtype: torch.dtype,
    device: torch.device,
    resident: bool,
    held_out: Examples | None = None,
) -> Step:
    """The largest batch, with the largest share of a row that is labelled, and the largest batch of ``held_out``.

    With padding, that is a batch of the longest rows. With packing, it is the largest batch of the run, filled up if
    layers are recorded.
    """
    processes = Launch.here().processes
    tokens = most = largest_batch(data, training, processes)
    keeps = training.packing == "on" and training.cuda_graphs
    if keeps:  # graphs keep their memory, also while a larger batch runs without them
        recorded = fixed_size(data, training, processes).tokens
        tokens = recorded + (most if most > recorded else 0)
    step = Step(
        tokens=tokens,
        row_tokens=max(len(row) for row in data.examples),
        labelled_share=max(row.labelled_tokens / len(row) for row in data.examples),
        dtype=str(dtype).removeprefix("torch."),
        recompute=training.recompute,
        on_gpu=device.type == "cuda",
        resident=resident,
        keeps=keeps,
    )
    return step if held_out is None else replace(step, held_out=_evaluated(step, held_out, training, most))


def _evaluated(step: Step, held_out: Examples, training: TrainSettings, most_tokens: int) -> Step:
    """A held-out batch of the tokens, labels and row length of the largest ones."""
    batches = held_out_batches(held_out, training, most_tokens)
    packed = training.packing == "on"
    tokens = max(sum(map(len, rows)) if packed else len(rows) * max(map(len, rows)) for rows in batches)
    return replace(
        step,
        tokens=tokens,
        row_tokens=max(len(row) for row in held_out.examples),
        labelled_share=max(sum(row.labelled_tokens for row in rows) for rows in batches) / tokens,
        recompute="off",
        keeps=False,
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
