"""Work on foreign programs, such as chat templates, in a process of its own with limits of time and memory.

A Jinja template may loop, double a text or divide numbers of a million digits, and a call in C cannot be interrupted
from within. So the work is done in a forked child that has to give a sign of life every few seconds and may take only
so much memory more than its parent. Nothing is imported and nothing is sent to the child, so a fork takes milliseconds.
"""

import contextlib
import os
import pickle
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from aletheia.errors import DataError

T = TypeVar("T")
SECONDS = 3.0  # without a sign of life
MEMORY_BYTES = 1_000_000_000  # beyond what the process has already
_BEAT_EVERY = 0.5  # seconds
_BLOCK = 200  # results sent at once


class Pulse:
    """The child's signs of life; call it after each step that ought to be short."""

    def __init__(self, send: Callable[[Any], None]) -> None:
        """``send`` writes to the parent."""
        self._send = send
        self._last = time.monotonic()

    def __call__(self) -> None:
        """Say that work goes on, at most twice a second."""
        now = time.monotonic()
        if now - self._last > _BEAT_EVERY:
            self._last = now
            self._send(None)


def contained(
    work: Callable[[Callable[[], None]], Iterable[T]], what: str, seconds: float = SECONDS, memory: int = MEMORY_BYTES
) -> Iterator[T]:
    """What ``work`` yields, computed in a child process.

    Where processes cannot be forked (Windows, macOS) the work is done here, without limits.

    Args:
        work: gets a function to call between steps; its results must be picklable.
        what: names the program in the message.
        seconds: how long a step may take.
        memory: bytes that all steps may take together.

    Raises:
        DataError: a limit is passed, or the child ends by itself. Errors of ``work`` are raised as they are.
    """
    if sys.platform != "linux":
        yield from work(lambda: None)
        return
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of other threads: the child waits for none of them
        child = os.fork()
    if child == 0:
        os.close(reading)
        _child(work, writing, memory)
    os.close(writing)
    try:
        yield from _received(reading, what, seconds, memory)
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _received(reading: int, what: str, seconds: float, memory: int) -> Iterator[Any]:
    """Results as they come; the child's last message is an error or the end."""
    advice = "expected a chat template that writes messages and ends; use another with `chat_template`"
    stream = bytearray()
    while True:
        if not select.select([reading], [], [], seconds)[0]:
            raise DataError(f"{what} does not end: nothing came of it for {seconds:g} s; {advice}")
        block = os.read(reading, 1 << 20)
        if not block:
            raise DataError(f"{what} ended the process that it ran in; {advice}")
        stream += block
        while len(stream) >= 8 and len(stream) >= 8 + (size := int.from_bytes(stream[:8], "little")):
            message = pickle.loads(bytes(stream[8 : 8 + size]))  # from our own child: the results of ``work``
            del stream[: 8 + size]
            if isinstance(message, list):
                yield from message
            elif message == "end":
                return
            elif message == "memory":
                raise DataError(f"{what} takes more than {memory / 1e9:g} GB of memory; {advice}")
            elif isinstance(message, BaseException):
                raise message


def _child(work: Callable[[Callable[[], None]], Iterable[Any]], writing: int, memory: int) -> None:
    """Run the work and leave without a trace: no exit handlers, no buffers of the parent flushed."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        _limit(memory)

        def send(message: Any) -> None:
            data = pickle.dumps(message)
            view = memoryview(len(data).to_bytes(8, "little") + data)
            while view:
                view = view[os.write(writing, view) :]

        results: list[Any] = []
        sent = time.monotonic()
        try:
            for result in work(Pulse(send)):
                results.append(result)
                if len(results) == _BLOCK or time.monotonic() - sent > _BEAT_EVERY / 2:
                    send(results)
                    results, sent = [], time.monotonic()
            send(results)
            send("end")
        except MemoryError:
            send("memory")
        except Exception as error:
            send(results)
            send(error)
    finally:
        os._exit(0)


def _limit(memory: int) -> None:
    import resource

    with open("/proc/self/statm") as status:
        held = int(status.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = held + memory if hard == resource.RLIM_INFINITY else min(held + memory, hard)
    if soft == resource.RLIM_INFINITY or limit < soft:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
