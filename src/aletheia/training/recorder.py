"""What a run leaves behind beside its adapter: losses and times of every step, held-out losses; and how far it is."""

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from aletheia.execution.later import Later
from aletheia.progress import Progress, Say, say_as_asked, say_nothing
from aletheia.runs.schema import HeldOutPoint, RateRace, TrainPoint
from aletheia.training.outlook import Outlook

RECENT = 20  # steps whose time tells that of the steps to come


class Recorder(TrainerCallback):
    """Record the loss and time of every logged step and every held-out loss; say how far the run is.

    The clock stands still during evaluation, logging and saving, so ``train_seconds`` is optimizer steps alone. A run
    that goes on takes up the curves of the one before (:meth:`restore`). With ``looks_back`` nothing waits for the
    device but where a held-out loss is due: losses come by :meth:`stepped`, and a step's time is that between its ends
    as the host sees them, which is at most one step ahead.
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
        self.start = ""  # a hash of where the adapters began
        self._evaluations, self._say = evaluations, say_as_asked(show_progress)
        self._due: set[int] = set()
        self._resumed_at = 0.0
        self.looks_back = False
        self._unread: deque[tuple[int, Later]] = deque()
        self._progress: Progress | None = None
        self._rate: float | None = None
        self._times: list[float] = []
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT)  # steps done, and training seconds by then

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
        """Start the clock, and to say how far it is; the held-out loss before the first step comes now."""
        self._due = due_steps(state.max_steps, self._evaluations) if self._evaluations else {state.max_steps}
        self._times = self.outlook.times_so_far
        self._recent.append((state.global_step, self.train_seconds))
        self.close()  # a trainer that begins again did not end
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
        """Stop the clock; ask for the held-out loss when an interval is over."""
        is_due = state.global_step in self._due
        if args.device.type != "cpu" and (is_due or not self.looks_back):
            torch.accelerator.synchronize()  # or the clock would stop before the device does
        self.train_seconds += time.perf_counter() - self._resumed_at
        if is_due:
            control.should_evaluate = True
        self._read(0 if is_due else 1)
        if 0 < self.outlook.early_steps == state.global_step < state.max_steps and state.is_world_process_zero:
            self._say(f"freeze {self.outlook.freezes}")

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
        self._recent.append((step, self.train_seconds))
        if self._progress is not None:
            self._progress.advance(step - self._progress.done, self._note(), self._seconds_left(step))

    def evaluating(self, done: int, of: int) -> None:
        """So many batches of held-out rows are done."""
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
        """The held-out loss after ``step``, or the last one that was taken."""
        return next((point.loss for point in self.held_out_curve if point.step == step), self.held_out_curve[-1].loss)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The last step is done."""
        self._read(0)
        self.close()

    def close(self) -> None:
        """Say no more of how far it is, after an error too."""
        if self._progress is not None:
            self._progress.__exit__(None, None, None)
            self._progress = None

    def _note(self) -> str:
        """Loss, learning rate and speed by now."""
        known = [f"loss {self.train_curve[-1].loss:.3f}"] if self.train_curve else []
        if self._rate is not None:
            known.append(f"rate {self._rate:.1e}")
        if len(self._recent) > 1 and self.outlook.tokens:
            (first, before), (last, now) = self._recent[0], self._recent[-1]
            known.append(f"{sum(self.outlook.tokens[first:last]) / max(now - before, 1e-9):,.0f} tokens/s")
        return ", ".join(known)

    def _seconds_left(self, step: int) -> float | None:
        """Of training by the last steps and what the plan predicts, and of the evaluations to come."""
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
    """The steps after which the held-out loss is taken: evenly spaced, the last step among them."""
    count = min(evaluations, steps)
    return {round(steps * number / count) for number in range(1, count + 1)}
