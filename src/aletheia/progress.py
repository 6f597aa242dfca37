"""Lines for people while work goes on, and how far it is: a bar in a terminal, else a line at least every 30 seconds.

Whoever calls the library gets the lines by a function of their own, a :data:`Say`. Imports nothing of ours but names.
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

EVERY_SECONDS = 30.0  # between two lines of a piece of work, at most
FORETOLD_AFTER = 2  # parts that are done; the first one often takes longer than the rest
WORTH_SAYING_SECONDS = 10.0  # what is left by then, if it is to be said at once
BAR_WIDTH = 10  # characters; what stands beside it in training fits 80 columns then


class Stderr:
    """A :data:`Say` that writes to stderr, so that stdout stays clean for results; it draws bars in a terminal."""

    def __init__(self, shown: Callable[[str], str] = printable, stream: TextIO | None = None) -> None:
        """``shown`` makes a line fit to be printed; ``stream`` is what stderr was before somebody exchanged it."""
        self._shown, self._stream = shown, stream

    @property
    def stream(self) -> TextIO | None:
        """Where lines and bars go now."""
        return self._stream or sys.stderr

    def __call__(self, line: str) -> None:
        """Write a line, at once and as a whole."""
        print(self._shown(line) + "\n", end="", file=self.stream, flush=True)


to_stderr = Stderr()


def say_nothing(line: str) -> None:
    """For processes other than the first, and for whoever asks for silence."""


def say_as_asked(show_progress: bool | Say) -> Say:
    """Where lines go: to a function that was given, or to stderr, or nowhere."""
    if callable(show_progress):
        return show_progress
    return to_stderr if show_progress else say_nothing


class Progress:
    """A piece of work while it goes on; a context manager.

    In a terminal a bar shows it. Elsewhere a thread says a line whenever ``EVERY_SECONDS`` have passed without one, so
    the work itself never waits for an output. After the first parts a line says how long the rest will take, unless
    that is short.
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
        """Nothing is shown before the context is entered.

        Args:
            name: what is done, in a word, as lines begin.
            total: how many parts the work has; 0 where that is not known.
            unit: what the parts are, such as ``layers``.
            show_progress: where to; a function gets lines, some of them from another thread.
            done: parts that were done before.
            clock: tells the time in seconds.
        """
        self.name, self.total, self.done = name, total, done
        self.note = ""  # what else is known, such as the loss
        self.seconds_left: float | None = None  # if the work knows better than by its parts
        self._unit, self._say, self._clock = unit, say_as_asked(show_progress), clock
        self._started, self._done_before = clock(), done
        self._said_at = self._started
        self._is_foretold = False
        self._over = threading.Event()
        self._speaker: threading.Thread | None = None
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        """Begin to show it."""
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
        """Show no more of it, after an error too."""
        self._over.set()
        if self._speaker is not None:
            self._speaker.join()
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._speaker = None

    def advance(self, parts: int = 1, note: str | None = None, seconds_left: float | None = None) -> None:
        """So many more parts are done."""
        self.done += parts
        self.seconds_left = self.seconds_left if seconds_left is None else seconds_left
        self.note = self.note if note is None else note
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=self.note, left=_colon(self.left()))
        elif not self._is_foretold and self.done - self._done_before >= FORETOLD_AFTER:
            self._is_foretold = True
            if (self.left() or 0.0) >= WORTH_SAYING_SECONDS:
                self.say()

    def skip(self, parts: int) -> None:
        """So many parts were done before, by a call that was interrupted."""
        self.done += parts
        self._done_before += parts

    def left(self) -> float | None:
        """Seconds until the work is done, by those of the parts so far; None where that cannot be known."""
        if self.seconds_left is not None:
            return self.seconds_left
        parts = self.done - self._done_before
        if not parts or not self.total:
            return None
        return (self._clock() - self._started) / parts * (self.total - self.done)

    def say(self, more: str = "") -> None:
        """Say how far it is, ``more`` first."""
        self._said_at = self._clock()
        self._say(f"{self.name:<6} {', '.join(filter(None, (more, self._told())))}")

    def speak(self, wait: Callable[[float], bool]) -> None:
        """Say a line whenever one is due, until ``wait``, for so many seconds, returns that the work is over."""
        before = self._said_at
        while not wait(max(0.0, before + EVERY_SECONDS - self._clock())):
            if self._said_at == before:  # else something was said meanwhile
                self.say()
            before = self._said_at

    def _told(self) -> str:
        left = self.left()
        if left is None or self.done == self.total:
            how_long = f"{human_duration(self._clock() - self._started)} so far"
        else:
            how_long = f"about {human_duration(left)} left"
        far = f"{self.done:,} of {self.total:,} {self._unit}" if self.total else ""
        return ", ".join(filter(None, (far, self.note, how_long)))


def human_duration(seconds: float) -> str:
    """A time that is only known roughly: ``8 s``, ``50 s``, ``1 min 30 s``, ``12 min``, ``2 h 10 min``."""
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
    """For a bar: ``-:--``, ``0:42``, ``1:02:05``."""
    if seconds is None:
        return "-:--"
    whole = math.ceil(seconds)
    minutes, hours = whole // 60 % 60, whole // 3600
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _bar(progress: Progress, stream: TextIO) -> tuple[Any, Any]:
    """Rich's bar for it, and the task in it."""
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
