"""When to save besides Trainer's own steps: in time, and when a signal asks the run to end."""

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

AT_MOST_SECONDS = 600.0  # of work that a killed run loses
AT_LEAST_SECONDS = 60.0
SAVES_PER_TIME = 100  # a save may take a hundredth of the time
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class SaveInTime(TrainerCallback):
    """Ask for a checkpoint by time: a killed run loses ten minutes at most, and a hundredth of the time goes to saves.

    The interval is 100 times what a save takes and at least a minute, unless that is more than ten minutes less the
    longest step. Nothing is asked for after the last step. Add it after other callbacks: what they do when a step is
    logged would count as saving.
    """

    def __init__(self, at_most_seconds: float = AT_MOST_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` tells the time in seconds; of several processes, that of the first counts."""
        self._at_most, self._clock = at_most_seconds, clock
        self._saved_at = self._step_began = self._step_done = clock()
        self._longest_step = self._save_seconds = 0.0
        self._agreement = Agreement()

    @property
    def interval_seconds(self) -> float:
        """Time between two checkpoints, by what was measured so far."""
        return min(self._at_most - self._longest_step, max(AT_LEAST_SECONDS, SAVES_PER_TIME * self._save_seconds))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Nothing is learned yet that could be lost."""
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
    """A signal that came: during training the step is ended and saved first. See :func:`interrupts`.

    ``signal`` is its number, or None. ``saved_step`` is that of the newest checkpoint; set it where a run goes on from
    an earlier one, or set ``checkpoints``, the folder in which there may be one.
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
        """The error to raise after ``trainer.train()`` has returned and ``signal`` is set; says how to go on."""
        if self.saved_step is None and self.checkpoints is not None:
            self.saved_step = max(map(step_of, checkpoint_folders(self.checkpoints)), default=None)
        where = f"interrupted after step {self._step} of {self._steps}" if self._step else "interrupted"
        if self.saved_step is None:
            text = f"{where} before the first checkpoint; the same command begins anew"
        else:
            there = "there" if self.saved_step == self._step > 0 else f"step {self.saved_step}"
            text = f"{where}; the same command goes on from {there}"
        return Interrupted(text + more, self.signal or signal.SIGINT)

    @contextmanager
    def put_off(self) -> Iterator[None]:
        """While what is done is being written, a signal is only noted: that takes moments, and stopping it more."""
        self._is_training = True
        try:
            yield
        finally:
            self._is_training = False

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Take a signal."""
        if os.getpid() != self._owner:  # a forked worker: Ctrl-C reaches it too, and is its parent's affair
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
        """From now on there are steps to end."""
        self._agreement.open()
        self._is_training = True
        self._step, self._steps = state.global_step, state.max_steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save and stop if any process got a signal; after the last step there is nothing to stop."""
        self._step, self._steps = state.global_step, state.max_steps
        self.signal = self._agreement.largest(self.signal or 0) or None
        if self.signal is not None and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """There is a checkpoint to go on from."""
        self.saved_step = state.global_step

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """From now on a signal ends the run at once."""
        self._is_training = False


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Take SIGTERM and Ctrl-C while a run goes on; add what it yields to the callbacks of the Trainer.

    During training the first signal lets the step end, saves and stops; ``train()`` returns, and ``signal`` says so.
    Outside of training it raises :class:`~aletheia.errors.Interrupted` at once. A second Ctrl-C raises
    KeyboardInterrupt. Away from the main thread signals are left as they are.
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
    except Exception as error:  # a library may wrap what was raised inside it
        if interrupted.signal is not None and not interrupted._is_training:
            raise interrupted.error() from error
        raise
    finally:
        for signum, handler in earlier.items():
            signal.signal(signum, handler)
