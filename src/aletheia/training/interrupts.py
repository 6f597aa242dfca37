"""Checkpoints besides those of Trainer's settings: at intervals of time, and when a signal ends the run."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from aletheia.errors import Interrupted
from aletheia.runs.manifest import checkpoint_folders, step_of
from aletheia.training.processes import Agreement

AT_MOST_SECONDS = 600.0  # most work that a killed run loses
AT_LEAST_SECONDS = 60.0
SAVES_PER_TIME = 100  # saves may take a hundredth of the time
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class SaveInTime(TrainerCallback):
    """Asks for checkpoints by time: a killed run loses at most ten minutes, and saves take a hundredth of the time.

    The interval is 100 times the duration of a save and at least a minute, but at most ten minutes minus the longest
    step. It asks for none after the last step. Add this after other callbacks: their work when a step is logged would
    count as saving.
    """

    def __init__(self, at_most_seconds: float = AT_MOST_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` returns the time in seconds; with several processes, the first one's clock counts."""
        self._at_most, self._clock = at_most_seconds, clock
        self._saved_at = self._step_began = self._step_done = clock()
        self._longest_step = self._save_seconds = 0.0
        self._agreement = Agreement()

    @property
    def interval_seconds(self) -> float:
        """Seconds between two checkpoints, from the measurements so far."""
        return min(self._at_most - self._longest_step, max(AT_LEAST_SECONDS, SAVES_PER_TIME * self._save_seconds))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the interval: there is nothing to lose yet."""
        self._agreement.open()
        self._saved_at = self._clock()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock of the step."""
        self._step_began = self._clock()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for a checkpoint where one is due."""
        now = self._step_done = self._clock()
        self._longest_step = max(self._longest_step, now - self._step_began)
        is_due = self._agreement.of_first(now - self._saved_at >= self.interval_seconds)
        if is_due and state.global_step < state.max_steps:
            control.should_save = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """What comes next may be a save."""
        self._step_done = self._clock()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """What comes next may be a save."""
        self._step_done = self._clock()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A checkpoint was written, whoever asked for it."""
        self._saved_at = self._clock()
        self._save_seconds = self._saved_at - self._step_done


class Interrupts(TrainerCallback):
    """Handles signals: during training, the step is completed and saved first. See :func:`interrupts`.

    ``signal`` is the number of the signal that came, or None. ``saved_step`` is the step of the newest checkpoint. Set
    it where a run resumes, or set ``checkpoints``, the folder where there may be one.
    """

    def __init__(self) -> None:
        """No signal yet."""
        self.signal: int | None = None
        self.saved_step: int | None = None
        self.checkpoints: Path | None = None
        self._step = self._steps = 0
        self._is_training = False
        self._owner = os.getpid()
        self._agreement = Agreement()

    def error(self, more: str = "") -> Interrupted:
        """The error to raise if ``signal`` is set after ``trainer.train()``; its message says how to resume."""
        if self.saved_step is None and self.checkpoints is not None:
            self.saved_step = max(map(step_of, checkpoint_folders(self.checkpoints)), default=None)
        where = f"interrupted after step {self._step} of {self._steps}" if self._step else "interrupted"
        if self.saved_step is None:
            text = f"{where} before the first checkpoint; the same command starts again from the beginning"
        else:
            there = "there" if self.saved_step == self._step > 0 else f"step {self.saved_step}"
            text = f"{where}; the same command resumes from {there}"
        return Interrupted(text + more, self.signal or signal.SIGINT)

    @contextmanager
    def put_off(self) -> Iterator[None]:
        """Only note a signal within this context, while results are written: that takes a moment and should finish."""
        self._is_training = True
        try:
            yield
        finally:
            self._is_training = False

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if os.getpid() != self._owner:  # a forked worker: it also receives Ctrl-C, which its parent handles
            if signum != signal.SIGINT:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            return
        if self.signal is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal = signum
            if not self._is_training:
                raise self.error()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """From now on, a signal lets the step finish."""
        self._agreement.open()
        self._is_training = True
        self._step, self._steps = state.global_step, state.max_steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save and stop if any process received a signal, unless this was the last step."""
        self._step, self._steps = state.global_step, state.max_steps
        self.signal = self._agreement.largest(self.signal or 0) or None
        if self.signal is not None and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note the step of the new checkpoint."""
        self.saved_step = state.global_step

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """From now on, a signal ends the run at once."""
        self._is_training = False


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Handle SIGTERM and Ctrl-C during a run; add the object it yields to the callbacks of the Trainer.

    During training, the first signal lets the step finish, saves a checkpoint and stops. ``train()`` then returns, and
    ``signal`` is set. Outside training, a signal raises :class:`~aletheia.errors.Interrupted` at once. A second Ctrl-C
    raises KeyboardInterrupt. Outside the main thread, signals are not handled.
    """
    interrupted = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    earlier = {signum: signal.signal(signum, interrupted.handle) for signum in SIGNALS}
    try:
        yield interrupted
    except Interrupted:
        raise
    except Exception as error:  # a library may wrap the Interrupted that was raised inside it
        if interrupted.signal is not None and not interrupted._is_training:
            raise interrupted.error() from error
        raise
    finally:
        for signum, handler in earlier.items():
            signal.signal(signum, handler)
