"""A job in a process of its own: started and waited for here, run in ``job.py``. Torch-free.

The folder of a job holds ``job.json`` (what to do), ``log.txt`` (what it said) and, once it is through,
``result.json``. The process reads its standard input and ends when that closes, so no job outlives whoever waits.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

JOB_FILE, RESULT_FILE, LOG_FILE = "job.json", "result.json", "log.txt"
COMMAND = (sys.executable, "-m", "aletheia.lab.campaign.job")
REASON_CHARACTERS = 500


def run_process(
    folder: Path, command: Sequence[str] = COMMAND, environment: dict[str, str] | None = None
) -> str | None:
    """Run the job in ``folder`` to its end; why it failed, or None.

    A job is through when its ``result.json`` is there, however the process ended.
    """
    with open(folder / LOG_FILE, "ab") as log:
        process = subprocess.Popen(
            [*command, str(folder)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | (environment or {}),
            start_new_session=True,  # Ctrl-C is the coordinator's to handle
        )
        _RUNNING.processes.append(process)
        try:
            code = process.wait()
        finally:
            process.stdin.close()  # type: ignore[union-attr]
            _RUNNING.processes.remove(process)
    if (folder / RESULT_FILE).exists():
        return None
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{how}: {_last_line(folder / LOG_FILE)}"


@dataclass
class _Running:
    """Processes of this one, so that it can end them."""

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


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "it said nothing")[:REASON_CHARACTERS]
