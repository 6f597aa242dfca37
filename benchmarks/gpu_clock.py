"""What is measured at each step of any trainer: its end, its peak memory, and the tokens of its batch."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from aletheia.data.examples import NO_LOSS
from aletheia.execution.peak_memory import peak_memory_bytes, reset_peak_memory

PADDING = 0  # no row has this token; see gpu_models.rows_of
Batch = dict[str, torch.Tensor]
Collate = Callable[[list[Any]], Batch]


@dataclass
class Ran:
    """All steps of a run.

    ``batches`` has real tokens, those with a loss, and all places; ``peaks`` has the bytes of every epoch.
    """

    seconds: list[float]
    batches: list[tuple[int, int, int]]
    peaks: list[int]


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

        tokens = int((batch["input_ids"] != PADDING).sum())
        self.batches.append((tokens, int((batch["labels"][:, 1:] != NO_LOSS).sum()), places))
        return batch


def trained(trainer: Trainer, device: str) -> Ran:
    """Run ``trainer`` with a clock and a count."""
    clock, counted = Clock(device), Counted(trainer.data_collator)
    trainer.data_collator = counted
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    seconds = clock.seconds()
    return Ran(seconds, counted.batches[: len(seconds)], clock.peaks)  # a batch that was made ahead is left out
