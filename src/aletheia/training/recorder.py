"""Records the losses and times of a run's steps and its held-out losses, and reports its progress."""

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from aletheia.execution.later import Later
from aletheia.progress import Progress, Say, say_as_asked, say_nothing
from aletheia.runs.schema import HeldOutPoint, RateRace, TrainPoint
from aletheia.training.forecast import Outlook

RECENT = 20  # steps from whose time the time left is predicted


class Recorder(TrainerCallback):
    """Records the loss and time of every logged step and every held-out loss, and reports progress.

    The clock stops during evaluation, logging and saving, so ``train_seconds`` covers optimizer steps alone. A resumed
    run continues the curves of the interrupted one (:meth:`restore`).

    With ``looks_back``, nothing waits for the device except where a held-out loss is due. Losses then come through
    :meth:`stepped`. The time of a step is measured on the host, which is at most one step ahead of the device.
    """

    def __init__(self, evaluations: int, show_progress: bool | Say) -> None:
        """``evaluations`` is how often the held-out loss is due, the last time after the last step; 0: never here."""
        self.outlook = Outlook((), ())
        self.train_curve: list[TrainPoint] = []
        self.held_out_curve: list[HeldOutPoint] = []
        self.train_seconds = 0.0
        self.eval_seconds = 0.0
        self.race: RateRace | None = None
        self.race_seconds = 0.0
        self.start = ""  # a hash of the adapters before training
        self._evaluations, self._say = evaluations, say_as_asked(show_progress)
        self._due: set[int] = set()
        self._resumed_at = 0.0
        self.looks_back = False
        self._unread: deque[tuple[int, Later]] = deque()
        self._progress: Progress | None = None
        self._rate: float | None = None
        self._times: list[float] = []
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT)  # steps done, and training seconds so far

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds spent, by phase."""
        return {"race": self.race_seconds, "train": self.train_seconds, "eval": self.eval_seconds}

    def state(self) -> dict[str, Any]:
        """The values that a checkpoint keeps for :meth:`restore`."""
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
        """Continue from the values that a checkpoint kept."""
        self.train_curve = [TrainPoint(**point) for point in kept["train_curve"]]
        self.held_out_curve = [HeldOutPoint(**point) for point in kept["held_out_curve"]]
        self.train_seconds, self.eval_seconds = kept["train_seconds"], kept["eval_seconds"]
        self.race, self.race_seconds = kept["race"] and RateRace(**kept["race"]), kept["race_seconds"]
        self.start = kept["start"]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock and the progress report; the held-out loss before the first step comes next."""
        self._due = due_steps(state.max_steps, self._evaluations) if self._evaluations else {state.max_steps}
        self._times = self.outlook.times_so_far
        self._recent.append((state.global_step, self.train_seconds))
        self.close()  # a trainer that starts again may not have ended
        say = self._say if state.is_world_process_zero else say_nothing
        self._progress = Progress("train", state.max_steps, "steps", say, state.global_step).__enter__()
        self._resumed_at = time.perf_counter()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        if (scheduler := kwargs.get("lr_scheduler")) is not None:
            self._rate = float(scheduler.get_last_lr()[0])
        self._resumed_at = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock; ask for the held-out loss where it is due."""
        is_due = state.global_step in self._due
        if args.device.type != "cpu" and (is_due or not self.looks_back):
            torch.accelerator.synchronize()  # otherwise the clock would stop before the device does
        self.train_seconds += time.perf_counter() - self._resumed_at
        if is_due:
            control.should_evaluate = True
        self._read(0 if is_due else 1)
        if 0 < self.outlook.early_steps == state.global_step < state.max_steps and state.is_world_process_zero:
            self._say(f"freeze {self.outlook.freezes}")

    def stepped(self, step: int, loss: Later) -> None:
        """With ``looks_back``: take the loss of a step, which is on its way from the device."""
        self._unread.append((step, loss))

    def _read(self, left: int) -> None:
        """Record the steps whose loss has not been read, except the last ``left``."""
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
        self._recent.append((step, self.train_seconds))
        if self._progress is not None:
            self._progress.advance(step - self._progress.done, self._note(), self._seconds_left(step))

    def evaluating(self, done: int, of: int) -> None:
        """Report that ``done`` ``of`` so many batches of held-out rows are done."""
        if self._progress is not None:
            self._progress.advance(0, f"held-out loss: batch {done:,} of {of:,}")

    def evaluated(self, step: int, loss: float, seconds: float) -> None:
        """Record a held-out loss that took ``seconds``."""
        self.eval_seconds += seconds
        self.held_out_curve.append(HeldOutPoint(step=step, loss=loss, train_seconds=self.train_seconds))
        if self._progress is not None:
            self._progress.advance(0, self._note(), self._seconds_left(step))
            self._progress.say(f"held-out loss {loss:.4f}")

    def loss_at(self, step: int) -> float:
        """The held-out loss after ``step``, or else the last one that was measured."""
        return next((point.loss for point in self.held_out_curve if point.step == step), self.held_out_curve[-1].loss)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the remaining losses and end the progress report."""
        self._read(0)
        self.close()

    def close(self) -> None:
        """End the progress report; also called after an error."""
        if self._progress is not None:
            self._progress.__exit__(None, None, None)
            self._progress = None

    def _note(self) -> str:
        """The present loss, learning rate and speed."""
        known = [f"loss {self.train_curve[-1].loss:.3f}"] if self.train_curve else []
        if self._rate is not None:
            known.append(f"rate {self._rate:.1e}")
        if len(self._recent) > 1 and self.outlook.tokens:
            (first, before), (last, now) = self._recent[0], self._recent[-1]
            known.append(f"{sum(self.outlook.tokens[first:last]) / max(now - before, 1e-9):,.0f} tokens/s")
        return ", ".join(known)

    def _seconds_left(self, step: int) -> float | None:
        """Seconds of training left, from the last steps and the plan's prediction, and of the evaluations to come."""
        if len(self._recent) < 2 or self._progress is None:
            return None
        (first, before), (last, now) = self._recent[0], self._recent[-1]
        known, total = self._times, self._progress.total
        if total < len(known):
            share = (known[total] - known[step]) / (known[last] - known[first])
        else:
            share = (total - step) / (last - first)
        evaluations = sum(due > step for due in self._due) * self.eval_seconds / max(1, len(self.held_out_curve))
        return (now - before) * share + evaluations


def due_steps(steps: int, evaluations: int) -> set[int]:
    """The steps after which the held-out loss is measured: evenly spaced, the last step included."""
    count = min(evaluations, steps)
    return {round(steps * number / count) for number in range(1, count + 1)}
