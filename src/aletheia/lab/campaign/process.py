"""A job in its own process: started and awaited here, run in ``job.py``. Torch-free.

The folder of a job holds ``job.json`` (what to do), ``log.txt`` (its output) and, once the job has finished,
``result.json``. The process ends when its standard input closes, so no job outlives the process that waits for it.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

JOB_FILE, RESULT_FILE, LOG_FILE = "job.json", "result.json", "log.txt"
COMMAND = (sys.executable, "-m", "aletheia.lab.campaign.job")
REASON_CHARACTERS = 500
DISK_FULL = 74  # exit code of a job that found the disk full, which is not a failure of its rows


@dataclass(frozen=True)
class Ending:
    """How the process of a job ended; ``reason`` says why in one line, unless it finished (``through``)."""

    how: Literal["through", "failed", "killed", "disk full"]
    reason: str = ""


def run_process(folder: Path, command: Sequence[str] = COMMAND, environment: dict[str, str] | None = None) -> Ending:
    """Run the job in ``folder`` and wait for its end.

    A job has finished if its ``result.json`` exists, however the process ended.
    """
    with open(folder / LOG_FILE, "ab") as log:
        start = log.tell()  # of this attempt's output
        process = subprocess.Popen(
            [*command, str(folder)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | (environment or {}),
            start_new_session=True,  # the coordinator handles Ctrl-C
        )
        _RUNNING.processes.append(process)
        try:
            code = process.wait()
        finally:
            process.stdin.close()  # type: ignore[union-attr]
            _RUNNING.processes.remove(process)
    if (folder / RESULT_FILE).exists():
        return Ending("through")
    line = _last_line(folder / LOG_FILE, start)
    if code < 0:
        return Ending("killed", f"killed by {_signal_name(-code)}: {line}")
    return Ending("disk full" if code == DISK_FULL else "failed", f"exit code {code}: {line}")


def _signal_name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
    return f"{name}, as the system does when memory runs out" if name == "SIGKILL" else name


@dataclass
class _Running:
    """Child processes, so that they can be ended."""

    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list)


_RUNNING = _Running()


def stop_processes() -> None:
    """End every job that this process waits for."""
    for process in list(_RUNNING.processes):
        process.terminate()
    for process in list(_RUNNING.processes):
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()


def _last_line(path: Path, start: int) -> str:
    text = path.read_bytes()[start:].decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines()]
    return next((line for line in reversed(lines) if line), "no output")[:REASON_CHARACTERS]
