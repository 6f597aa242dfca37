"""What a run leaves behind beside its adapter: losses and times of every step, held-out losses, a progress bar."""

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from aletheia.execution.later import Later
from aletheia.runs.schema import HeldOutPoint, RateRace, TrainPoint


class Recorder(TrainerCallback):
    """Record the loss and time of every logged step and every held-out loss; draw a bar.

    The clock stands still during evaluation, logging and saving, so ``train_seconds`` is optimizer steps alone. A run
    that goes on takes up the curves of the one before (:meth:`restore`). With ``looks_back`` nothing waits for the
    device but where a held-out loss is due: losses come by :meth:`stepped`, and a step's time is that between its ends
    as the host sees them, which is at most one step ahead.
    """

    def __init__(self, evaluations: int, show_progress: bool) -> None:
        """``evaluations`` is how often the held-out loss is due, the last time after the last step; 0: never here."""
        self.train_curve: list[TrainPoint] = []
        self.held_out_curve: list[HeldOutPoint] = []
        self.train_seconds = 0.0
        self.eval_seconds = 0.0
        self.race: RateRace | None = None
        self.race_seconds = 0.0
        self.start = ""  # a hash of where the adapters began
        self._evaluations, self._show = evaluations, show_progress
        self._resumed_at = 0.0
        self._evaluating_since: float | None = None
        self.looks_back = False
        self._unread: deque[tuple[int, Later]] = deque()
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    @property
    def seconds(self) -> dict[str, float]:
        """What was spent, by phase."""
        return {"race": self.race_seconds, "train": self.train_seconds, "eval": self.eval_seconds}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps for :meth:`restore`."""
        self._read(0)
        return {
            "train_curve": [point.model_dump() for point in self.train_curve],
            "held_out_curve": [point.model_dump() for point in self.held_out_curve],
            "train_seconds": self.train_seconds,
            "eval_seconds": self.eval_seconds,
            "race": self.race and self.race.model_dump(),
            "race_seconds": self.race_seconds,
            "start": self.start,
        }

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        self.train_curve = [TrainPoint(**point) for point in kept["train_curve"]]
        self.held_out_curve = [HeldOutPoint(**point) for point in kept["held_out_curve"]]
        self.train_seconds, self.eval_seconds = kept["train_seconds"], kept["eval_seconds"]
        self.race, self.race_seconds = kept["race"] and RateRace(**kept["race"]), kept["race_seconds"]
        self.start = kept["start"]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the bar and the clock; the held-out loss before the first step comes now."""
        if self._show and state.is_world_process_zero:
            self._progress = Progress(
                TextColumn("train"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[loss]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._progress.add_task("train", total=state.max_steps, completed=state.global_step, loss="")
            self._progress.start()
        self._resumed_at = time.perf_counter()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._resumed_at = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock; ask for the held-out loss when an interval is over."""
        due = due_steps(state.max_steps, self._evaluations) if self._evaluations else {state.max_steps}
        is_due = state.global_step in due
        if args.device.type != "cpu" and (is_due or not self.looks_back):
            torch.accelerator.synchronize()  # or the clock would stop before the device does
        self.train_seconds += time.perf_counter() - self._resumed_at
        if is_due:
            control.should_evaluate = True
        self._read(0 if is_due else 1)

    def stepped(self, step: int, loss: Later) -> None:
        """With ``looks_back``: the loss of a step, on its way from the device."""
        self._unread.append((step, loss))

    def _read(self, left: int) -> None:
        """Record the steps whose loss is known by now, all but the last ``left``."""
        while len(self._unread) > left:
            step, loss = self._unread.popleft()
            self._record(step, loss.read())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Record a step."""
        if logs and "loss" in logs and not self.looks_back:
            self._record(state.global_step, float(logs["loss"]))

    def _record(self, step: int, loss: float) -> None:
        self.train_curve.append(TrainPoint(step=step, loss=loss, train_seconds=self.train_seconds))
        self._draw(step)

    def evaluated(self, step: int, loss: float, seconds: float) -> None:
        """Record a held-out loss that took ``seconds``."""
        self.eval_seconds += seconds
        self.held_out_curve.append(HeldOutPoint(step=step, loss=loss, train_seconds=self.train_seconds))
        if step and self._progress is not None:
            told = f"step {step}: held-out loss {loss:.4f} after {self.train_seconds:.0f} s of training"
            self._progress.console.print(told, highlight=False)
        self._draw(step)

    def loss_at(self, step: int) -> float:
        """The held-out loss after ``step``, or the last one that was taken."""
        return next((point.loss for point in self.held_out_curve if point.step == step), self.held_out_curve[-1].loss)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        self._read(0)
        self.close()

    def close(self) -> None:
        """Close the bar, after an error too."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _draw(self, step: int) -> None:
        if self._progress is None or self._task is None or not self.train_curve:
            return
        seconds = self.train_seconds / self.train_curve[-1].step
        held_out = f", held-out {self.held_out_curve[-1].loss:.3f}" if self.held_out_curve else ""
        told = f"loss {self.train_curve[-1].loss:.3f}{held_out}, {seconds:.2f} s/step"
        self._progress.update(self._task, completed=step, loss=told)


def due_steps(steps: int, evaluations: int) -> set[int]:
    """The steps after which the held-out loss is taken: evenly spaced, the last step among them."""
    count = min(evaluations, steps)
    return {round(steps * number / count) for number in range(1, count + 1)}
