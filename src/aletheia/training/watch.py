"""What happens beside the optimizer: recording losses and times, the held-out loss, the progress bar."""

import math
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from aletheia.errors import TrainingError
from aletheia.runs.schema import HeldOutPoint, TrainPoint


class Watch(TrainerCallback):
    """Record every step's loss and time, and the held-out loss at even intervals, with a progress bar.

    The clock stands still during evaluation, so ``train_seconds`` is optimizer steps alone.
    """

    def __init__(self, evaluate: Callable[[], float], evaluations: int, show_progress: bool) -> None:
        """``evaluate`` returns the held-out loss; it is called ``evaluations`` times, the last after the end."""
        self.train_curve: list[TrainPoint] = []
        self.held_out_curve: list[HeldOutPoint] = []
        self.eval_seconds = 0.0
        self.train_seconds = 0.0
        self.turn: tuple[int, Callable[[], None]] | None = None  # what to do once after a step, the clock stopped
        self._evaluate = evaluate
        self._evaluations = evaluations
        self._show = show_progress
        self._resumed_at = 0.0
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def measure(self, step: int) -> float:
        """Take the held-out loss now and add it to the curve.

        Raises:
            TrainingError: it is not finite.
        """
        started = time.perf_counter()
        loss = self._evaluate()
        self.eval_seconds += time.perf_counter() - started
        if not math.isfinite(loss):
            raise TrainingError(f"the held-out loss is {loss} after step {step}; try --dtype float32 or bfloat16")
        self.held_out_curve.append(HeldOutPoint(step=step, loss=loss, train_seconds=self.train_seconds))
        return loss

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Start the clock and the bar."""
        if self._show and state.is_world_process_zero:
            self._progress = Progress(
                TextColumn("train"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[loss]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._progress.add_task("train", total=state.max_steps, loss="")
            self._progress.start()
        self._resumed_at = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Stop the clock until the step is logged and, where due, evaluated."""
        if args.device.type != "cpu":
            torch.accelerator.synchronize()  # or the clock would stop before the device does
        self.train_seconds += time.perf_counter() - self._resumed_at
        self._resumed_at = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Record the step; evaluate when an interval is over."""
        if not logs or "loss" not in logs:
            return
        step, loss = state.global_step, float(logs["loss"])
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {step}; nothing was saved; try a lower --learning-rate or --dtype float32"
            )
        self.train_curve.append(TrainPoint(step=step, loss=loss, train_seconds=self.train_seconds))
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, loss=self._describe(loss))
        if step in due_steps(state.max_steps, self._evaluations):
            held_out = self.measure(step)
            if self._progress is not None:
                self._progress.console.print(
                    f"step {step}: held-out loss {held_out:.4f} after {self.train_seconds:.0f} s of training",
                    highlight=False,
                )
        if self.turn is not None and step == self.turn[0]:
            if self._progress is not None:
                self._progress.stop()  # others may draw theirs
            self.turn[1]()
            if self._progress is not None:
                self._progress.start()
        self._resumed_at = time.perf_counter()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Close the bar, after an error too."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _describe(self, loss: float) -> str:
        seconds = self.train_seconds / len(self.train_curve)
        held_out = f", held-out {self.held_out_curve[-1].loss:.3f}" if self.held_out_curve else ""
        return f"loss {loss:.3f}{held_out}, {seconds:.2f} s/step"


def due_steps(steps: int, evaluations: int) -> set[int]:
    """The steps after which the held-out loss is taken: evenly spaced, the last step among them."""
    count = min(evaluations, steps)
    return {round(steps * number / count) for number in range(1, count + 1)}
