"""Progress for people: a bar in a terminal, elsewhere a line at least every 30 seconds.

A caller of the library can pass a function, a :data:`Say`, to receive the lines. Imports only names of Aletheia.
"""

import math
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TextIO

from aletheia.names import printable

Say = Callable[[str], None]

EVERY_SECONDS = 30.0  # at most this long between two lines
ESTIMATED_AFTER = 2  # parts; the first one often takes longer than the rest
WORTH_SAYING_SECONDS = 10.0  # a shorter remaining time is not announced
BAR_WIDTH = 10  # characters; with the text of training the line fits 80 columns


class Stderr:
    """A :data:`Say` that writes to stderr and keeps stdout for results; in a terminal it draws bars."""

    def __init__(self, shown: Callable[[str], str] = printable, stream: TextIO | None = None) -> None:
        """``shown`` makes a line safe to print; ``stream`` is the original stderr where that was replaced."""
        self._shown, self._stream = shown, stream

    @property
    def stream(self) -> TextIO | None:
        """Where lines and bars are written."""
        return self._stream or sys.stderr

    def __call__(self, line: str) -> None:
        """Write a whole line and flush it."""
        print(self._shown(line) + "\n", end="", file=self.stream, flush=True)


to_stderr = Stderr()


def say_nothing(line: str) -> None:
    """A :data:`Say` for silence, and for all processes but the first."""


def say_as_asked(show_progress: bool | Say) -> Say:
    """The :data:`Say` for a ``show_progress`` setting: the given function, stderr or nothing."""
    if callable(show_progress):
        return show_progress
    return to_stderr if show_progress else say_nothing


class Progress:
    """The progress of one piece of work; a context manager.

    In a terminal it is a bar. Elsewhere a thread writes a line whenever ``EVERY_SECONDS`` have passed without one, so
    the work itself never waits for output. After the first parts a line says how long the rest takes, unless that is
    short.
    """

    def __init__(
        self,
        name: str,
        total: int,
        unit: str,
        show_progress: bool | Say = True,
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Set it up; nothing is shown before the context is entered.

        Args:
            name: the work in one word; each line begins with it.
            total: number of parts; 0 if unknown.
            unit: name of the parts, such as ``layers``.
            show_progress: True for stderr, False for silence, or a function that gets the lines, some from a thread.
            done: parts that are already done.
            clock: returns the time in seconds.
        """
        self.name, self.total, self.done = name, total, done
        self.note = ""  # more to show, such as the loss
        self.seconds_left: float | None = None  # given by the work where it knows better
        self._unit, self._say, self._clock = unit, say_as_asked(show_progress), clock
        self._started, self._done_before = clock(), done
        self._said_at = self._started
        self._is_estimated = False
        self._over = threading.Event()
        self._speaker: threading.Thread | None = None
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        """Start to show progress."""
        self._started = self._said_at = self._clock()
        if isinstance(self._say, Stderr) and (stream := self._say.stream) is not None and stream.isatty():
            self._bar, self._task = _bar(self, stream)
            self._bar.start()
        elif self._say is not say_nothing:
            self._speaker = threading.Thread(target=self.speak, args=(self._over.wait,), daemon=True)
            self._speaker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop showing progress, after an error too."""
        self._over.set()
        if self._speaker is not None:
            self._speaker.join()
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._speaker = None

    def advance(self, parts: int = 1, note: str | None = None, seconds_left: float | None = None) -> None:
        """Count ``parts`` more as done; ``note`` and ``seconds_left`` replace the earlier ones if given."""
        self.done += parts
        self.seconds_left = self.seconds_left if seconds_left is None else seconds_left
        self.note = self.note if note is None else note
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=self.note, left=_colon(self.left()))
        elif not self._is_estimated and self.done - self._done_before >= ESTIMATED_AFTER:
            self._is_estimated = True
            if (self.left() or 0.0) >= WORTH_SAYING_SECONDS:
                self.say()

    def skip(self, parts: int) -> None:
        """Count ``parts`` that an interrupted call did before, without using them for the estimate."""
        self.done += parts
        self._done_before += parts

    def left(self) -> float | None:
        """Estimated seconds until the work is done, from the parts so far; None where unknown."""
        if self.seconds_left is not None:
            return self.seconds_left
        parts = self.done - self._done_before
        if not parts or not self.total:
            return None
        return (self._clock() - self._started) / parts * (self.total - self.done)

    def say(self, more: str = "") -> None:
        """Write a progress line, ``more`` first."""
        self._said_at = self._clock()
        self._say(f"{self.name:<6} {', '.join(filter(None, (more, self._state())))}")

    def speak(self, wait: Callable[[float], bool]) -> None:
        """Write a line whenever one is due, until ``wait(seconds)`` returns True: the work is over."""
        before = self._said_at
        while not wait(max(0.0, before + EVERY_SECONDS - self._clock())):
            if self._said_at == before:  # else another line was written meanwhile
                self.say()
            before = self._said_at

    def _state(self) -> str:
        left = self.left()
        if left is None or self.done == self.total:
            how_long = f"{human_duration(self._clock() - self._started)} so far"
        else:
            how_long = f"about {human_duration(left)} left"
        far = f"{self.done:,} of {self.total:,} {self._unit}" if self.total else ""
        return ", ".join(filter(None, (far, self.note, how_long)))


def human_duration(seconds: float) -> str:
    """A rounded duration: ``8 s``, ``50 s``, ``1 min 30 s``, ``12 min``, ``2 h 10 min``."""
    if seconds < 20:
        return f"{max(1, round(seconds))} s"
    if seconds < 57.5:
        return f"{5 * round(seconds / 5)} s"
    halves = max(2, round(seconds / 30))
    if halves < 20:
        return f"{halves // 2} min" + (" 30 s" if halves % 2 else "")
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {10 * (minutes % 60 // 10):02d} min"


def _colon(seconds: float | None) -> str:
    """A duration for a bar: ``-:--``, ``0:42``, ``1:02:05``."""
    if seconds is None:
        return "-:--"
    whole = math.ceil(seconds)
    minutes, hours = whole // 60 % 60, whole // 3600
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _bar(progress: Progress, stream: TextIO) -> tuple[Any, Any]:
    """Rich's progress bar, and its task."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    name = TextColumn("{task.description:<6}", markup=False)
    note = TextColumn("{task.fields[note]}", markup=False)
    known = (MofNCompleteColumn(), note, TextColumn("{task.fields[left]}", markup=False))
    columns = known if progress.total else (note, TimeElapsedColumn())
    bar = Bar(name, BarColumn(BAR_WIDTH), *columns, console=Console(file=stream), transient=True)
    total = progress.total or None
    task = bar.add_task(progress.name, total=total, completed=progress.done, note=progress.note, left="-:--")
    return bar, task
