"""Feed a process, read a limited part of its output, and end it with all its children. No torch."""

import contextlib
import json
import os
import select
import selectors
import signal
import subprocess
import time
from collections.abc import Callable
from typing import BinaryIO, Literal, NamedTuple

_TICK_SECONDS = 0.02  # longest delay until the end of a program with a closed output is seen
_DEATH_SECONDS = 5.0  # SIGKILL takes milliseconds; a process that is stuck in the kernel is not awaited for ever


class Ended(NamedTuple):
    """``exit_code`` as :class:`subprocess.Popen` gives it; ``output`` is cut at the limit."""

    exit_code: int
    killed_by: Literal["wall time", "cpu time", "output"] | None
    seconds: float
    output: bytes


class Namespace:
    """The process namespace of one bubblewrap process, identified by its first process."""

    def __init__(self, process: subprocess.Popen[bytes], status: BinaryIO) -> None:
        """Read the id of the first process from bubblewrap's status pipe, which has it before the program runs."""
        self._process = process
        self._status = status
        self._pidfd = _pidfd_of_child(_number(status.readline(), "child-pid"), process.pid)

    def kill(self) -> None:
        """End every process in the namespace and return when the last is gone; does nothing if all are gone."""
        self._process.kill()
        self._process.wait()
        if self._pidfd is None:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        # the first process of a namespace becomes reapable only after all others in it are dead
        select.select([self._pidfd], [], [], _DEATH_SECONDS)
        os.close(self._pidfd)
        self._pidfd = None

    def started_program(self) -> bool:
        """Whether bubblewrap started the program; only valid after its end."""
        return any(_number(line, "exit-code") is not None for line in self._status.read().splitlines())


def _number(line: bytes, key: str) -> int | None:
    try:
        found = json.loads(line).get(key)
    except (ValueError, AttributeError):  # bubblewrap died before it wrote that
        return None
    return found if isinstance(found, int) else None


def _pidfd_of_child(pid: int | None, parent: int) -> int | None:
    """A handle on the process, or None if it is gone; its parent is checked, as ids are reused."""
    if pid is None:
        return None
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    try:
        with open(f"/proc/{pid}/stat", "rb") as handle:
            found_parent = int(handle.read().rpartition(b")")[2].split()[1])
    except OSError:
        found_parent = -1
    if found_parent == parent:
        return descriptor
    os.close(descriptor)
    return None


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """End a process group and its leader."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # macOS reports a group of zombies as the latter
        process.kill()
    process.wait()


def until_end(
    process: subprocess.Popen[bytes],
    stdin: bytes,
    wall_seconds: float,
    output_bytes: int,
    kill: Callable[[], None],
) -> Ended:
    """Watch a process until it ends or exceeds a limit; ``kill`` is called in either case, and on an exception."""
    started = time.monotonic()
    output = bytearray()
    try:
        killed_by = _exchange(process, stdin, started + wall_seconds, output_bytes, output)
    finally:
        kill()
    seconds = time.monotonic() - started
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    with process.stdout:
        while killed_by is None and (chunk := _read(process.stdout.fileno())):  # what was written last
            output += chunk
            killed_by = "output" if len(output) > output_bytes else None
    return Ended(process.returncode, killed_by, seconds, bytes(output[:output_bytes]))


def _exchange(
    process: subprocess.Popen[bytes], stdin: bytes, deadline: float, output_bytes: int, output: bytearray
) -> Literal["wall time", "output"] | None:
    """Write and read until the process ends (None) or exceeds a limit, which is returned."""
    assert process.stdin is not None
    assert process.stdout is not None
    to_send = memoryview(stdin)
    with selectors.DefaultSelector() as ready:
        for pipe, event in ((process.stdin, selectors.EVENT_WRITE), (process.stdout, selectors.EVENT_READ)):
            os.set_blocking(pipe.fileno(), False)
            ready.register(pipe, event)
        while process.poll() is None:
            left = deadline - time.monotonic()
            if left <= 0:
                return "wall time"
            for key, _ in ready.select(min(left, _TICK_SECONDS)):
                if key.fileobj is process.stdin:
                    to_send = to_send[_write(key.fd, to_send) :]
                    if not to_send:
                        ready.unregister(process.stdin)
                        process.stdin.close()
                elif chunk := _read(key.fd):
                    output += chunk
                    if len(output) > output_bytes:
                        return "output"
                else:
                    ready.unregister(process.stdout)
    return None


def _write(descriptor: int, content: memoryview) -> int:
    """Number of bytes written; all of them if nobody reads any more."""
    try:
        return os.write(descriptor, content[: 1 << 16])
    except BlockingIOError:
        return 0
    except BrokenPipeError:
        return len(content)


def _read(descriptor: int) -> bytes:
    """Available bytes; empty at the end, or if there are none yet (called when there are some, or at the end)."""
    try:
        return os.read(descriptor, 1 << 16)
    except BlockingIOError:
        return b""
