"""Run one untrusted Python program, and return how it ended. No torch.

With bubblewrap: new user, process, network, IPC, host-name and cgroup namespaces; a read-only root that holds Python
and no user files (:mod:`aletheia.lab.evaluation.jail`); a filter of system calls that leaves one process of one
thread (:mod:`aletheia.lab.evaluation.syscalls`); limits on time, memory, files and output. When the program ends, or
this process dies, the kernel ends everything in the process namespace.

``unsafe`` runs a plain subprocess under the same limits: **no security boundary**. It can read and write whatever its
user can, and reach the network. A process that starts a new session outlives it.

A program in the sandbox can still see the interpreter's files and paths, the kernel's version, and the host's load,
mounts and processor in /proc. It can fill up to ``memory_bytes`` plus ``tmp_bytes`` and the inodes of /tmp while it
runs, and use a hole in the kernel. If you can, run it as an ordinary user, not as root.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal

from aletheia.errors import SandboxError
from aletheia.lab.evaluation import jail, supervise
from aletheia.lab.evaluation.syscalls import filter_bytes

LimitName = Literal["wall time", "cpu time", "output"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use. Above the limits of memory and file size it gets an exception, else it is killed."""

    wall_seconds: float = 10.0
    cpu_seconds: int = 10
    memory_bytes: int = 1 << 30  # address space
    tmp_bytes: int = 16 << 20  # all of /tmp; not bounded in unsafe mode
    file_bytes: int = 8 << 20  # each file
    output_bytes: int = 64 << 10  # standard output and error together


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a program ended. ``exit_code`` is 128 + the signal's number after a signal."""

    exit_code: int
    killed_by: LimitName | None
    seconds: float
    output: bytes  # standard output and error in order, cut at the limit

    @property
    def passed(self) -> bool:
        """Whether it ended by itself with exit code 0, whatever it did."""
        return self.exit_code == 0 and self.killed_by is None

    @property
    def timed_out(self) -> bool:
        """Whether it was killed for its wall-clock time or its processor time."""
        return self.killed_by in ("wall time", "cpu time")

    @property
    def text(self) -> str:
        """The output as text; bytes that are not UTF-8 are replaced."""
        return self.output.decode(errors="replace")


def run(
    source: str, *, stdin: bytes = b"", limits: Limits | None = None, name: str = "program", unsafe: bool = False
) -> RunResult:
    """Run a program, in the sandbox unless ``unsafe``; ``name`` is the file that its tracebacks show.

    Raises:
        SandboxError: bubblewrap is not installed or could not start the program.
    """
    limits = limits or Limits()
    file_name = re.sub(r"[^\w.-]", "-", name)[:80] + ".py"
    text = source.encode("utf-8", "surrogatepass")  # so half a surrogate pair becomes a syntax error of the program
    how = _run_unsafe if unsafe else _run_contained
    code, killed_by, seconds, output = how(text, stdin, limits, file_name)
    code = code if code >= 0 else 128 - code
    if killed_by is None and code == 128 + 24:  # SIGXCPU on Linux and macOS
        killed_by = "cpu time"
    return RunResult(code, killed_by, seconds, output)


@cache
def check() -> None:
    """Check once per process that the sandbox works on this machine and holds (about 0.05 s).

    Raises:
        SandboxError: bubblewrap is missing or cannot create namespaces, or a program could do what it must not.
    """
    with tempfile.NamedTemporaryFile(prefix="aletheia-canary-") as canary:
        result = run(_PROBE.format(canary=canary.name), name="self-check")
    if not result.passed or result.output != b"contained\n":
        raise SandboxError(
            f"the sandbox does not hold on this machine: {_last_line(result.text)}; run the evaluation on another "
            "machine, or without a sandbox with `unsafe_exec`"
        )


_PROBE = """
import os, socket
def refused(action, *arguments):
    try:
        action(*arguments)
    except OSError:
        return
    raise SystemExit(f"{{action.__name__}}{{arguments}} was possible")
refused(os.stat, {canary!r})
refused(os.fork)
refused(socket.socket)
refused(os.mkdir, "/aletheia")
refused(open, "/proc/sys/kernel/core_pattern", "a")
if set(os.environ) - {{"PYTHONHASHSEED", "LC_ALL", "PWD"}}:
    raise SystemExit("the environment was visible")
print("contained")
"""


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "the program printed nothing"


def _interpreter_command(path: str, limits: Limits) -> list[str]:
    launcher = resources.files("aletheia.lab.evaluation").joinpath("launch.py").read_text(encoding="utf-8")
    resource_limits = {
        "CPU": limits.cpu_seconds,
        "AS": limits.memory_bytes,
        "FSIZE": limits.file_bytes,
        "NOFILE": 64,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
        # 1, not 0: at 0 the kernel still starts the host's core handler, at 1 it does not (fs/coredump.c)
        "CORE": 1,
    }
    pairs = [f"RLIMIT_{key}={value}" for key, value in resource_limits.items()]
    return [jail.interpreter(), *jail.PYTHON_OPTIONS, "-c", launcher, path, *pairs]


@contextmanager
def _in_memory(content: bytes) -> Iterator[int]:
    descriptor = os.memfd_create("aletheia")
    try:
        with os.fdopen(os.dup(descriptor), "wb") as handle:
            handle.write(content)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def _run_contained(source: bytes, stdin: bytes, limits: Limits, file_name: str) -> supervise.Ended:
    path = f"/program/{file_name}"
    status_read, status_write = os.pipe()
    with (
        os.fdopen(status_read, "rb") as status,
        os.fdopen(status_write, "wb") as status_end,
        _in_memory(source) as program_fd,
        _in_memory(filter_bytes()) as filter_fd,
    ):
        inherited = (program_fd, filter_fd, status_write)
        bwrap = jail.command(
            path, tmp_bytes=limits.tmp_bytes, program_fd=program_fd, filter_fd=filter_fd, status_fd=status_write
        )
        process = subprocess.Popen(
            bwrap + _interpreter_command(path, limits),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            pass_fds=inherited,
            cwd="/",
            env={},  # the sandbox would show bubblewrap's environment in /proc/1/environ
        )
        status_end.close()
        first = supervise.Namespace(process, status)
        ended = supervise.until_end(process, stdin, limits.wall_seconds, limits.output_bytes, first.kill)
        if ended.killed_by is None and not first.started_program():
            raise SandboxError(
                f"bubblewrap could not start a program here ({_last_line(ended.output.decode(errors='replace'))}); "
                "expected bubblewrap 0.7 or newer, and a kernel and container that allow user namespaces; allow them, "
                "or run the code without a sandbox with `unsafe_exec`"
            )
    return ended


def _run_unsafe(source: bytes, stdin: bytes, limits: Limits, file_name: str) -> supervise.Ended:
    with tempfile.TemporaryDirectory(prefix="aletheia-unsafe-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / file_name
        path.write_bytes(source)
        process = subprocess.Popen(
            _interpreter_command(str(path), limits),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            cwd=folder,
            env=jail.ENVIRONMENT | {"TMPDIR": folder},
            start_new_session=True,
        )
        return supervise.until_end(
            process, stdin, limits.wall_seconds, limits.output_bytes, lambda: supervise.kill_session(process)
        )
