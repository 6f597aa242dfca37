"""Run foreign programs, such as chat templates, in a child process with limits on time and memory.

A Jinja template may loop, double a text or divide numbers of a million digits, and a call in C cannot be interrupted
from within. So the work runs in a forked child. The child must report every few seconds, and may take only a limited
amount of memory beyond its parent's. It imports and receives nothing, so the fork takes milliseconds.
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
SECONDS = 3.0  # without a report
MEMORY_BYTES = 1_000_000_000  # beyond what the process already uses
_BEAT_EVERY = 0.5  # seconds
_BLOCK = 200  # results sent at once


class Pulse:
    """The child's reports that it still works; call it after each step."""

    def __init__(self, send: Callable[[Any], None]) -> None:
        """``send`` writes to the parent."""
        self._send = send
        self._last = time.monotonic()

    def __call__(self) -> None:
        """Report that the work continues, at most twice a second."""
        now = time.monotonic()
        if now - self._last > _BEAT_EVERY:
            self._last = now
            self._send(None)


def contained(
    work: Callable[[Callable[[], None]], Iterable[T]], what: str, seconds: float = SECONDS, memory: int = MEMORY_BYTES
) -> Iterator[T]:
    """What ``work`` yields, computed in a child process.

    Outside Linux the work runs in this process, without limits.

    Args:
        work: gets a function to call between steps; its results must be picklable.
        what: name of the program, for the error.
        seconds: how long a step may take.
        memory: bytes that all steps together may take.

    Raises:
        DataError: a limit is exceeded, or the child dies. Errors of ``work`` are raised unchanged.
    """
    if sys.platform != "linux":
        yield from work(lambda: None)
        return
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about other threads: the child waits for none of them
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
    advice = "expected a chat template that renders messages and ends; give another as `chat_template`"
    stream = bytearray()
    while True:
        if not select.select([reading], [], [], seconds)[0]:
            raise DataError(f"{what} does not end: no output for {seconds:g} s; {advice}")
        block = os.read(reading, 1 << 20)
        if not block:
            raise DataError(f"{what} ended its process; {advice}")
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
    """Run the work and exit at once: no exit handlers run, no buffers of the parent are flushed."""
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
