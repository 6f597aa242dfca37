"""Programs in processes of their own that begin at once: forked from one that holds nothing but loaded libraries.

To import torch, transformers and PEFT takes seconds, a tiny run takes one. Each process imports Aletheia anew. Tests of
how a process begins or ends start Python itself.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

import pytest

from aletheia.libraries import QUIET

FORKS = multiprocessing.get_context("forkserver")
LIBRARIES = ("torch", "transformers.trainer", "transformers.models.llama.modeling_llama", "peft", "datasets")
FORKS.set_forkserver_preload([*LIBRARIES, "pydantic", "rich.table", "typer.main"])


def processes():
    """``multiprocessing`` whose processes begin at once."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in QUIET.items():  # libraries read them while they are imported
            patched.setenv(name, value)
        forkserver.ensure_running()
    return FORKS


class Forked:
    """``python -c CODE ARGUMENTS`` as ``subprocess.Popen`` starts it; its output goes to the end of two files."""

    def __init__(self, code, arguments, cwd, env, stdout, stderr):
        for output in (stdout, stderr):
            open(output, "ab").close()  # there from the start on, as a pipe is
        given = (code, [str(one) for one in arguments], str(cwd), dict(env), str(stdout), str(stderr))
        self.process = processes().Process(target=_run, args=given)
        self.process.start()

    @property
    def returncode(self):
        """As that of ``Popen``: minus the signal that ended it."""
        return self.process.exitcode

    def poll(self):
        """The exit code, or None while it runs."""
        return self.process.exitcode

    def wait(self, timeout=None):
        """Wait for its end; returns the exit code."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked program", timeout)
        return self.process.exitcode

    def send_signal(self, signum):
        """Send it a signal, if it still runs."""
        if self.process.exitcode is None:
            os.kill(self.process.pid, signum)


def run(code, arguments, cwd, env, timeout=300):
    """``python -c CODE ARGUMENTS`` as ``subprocess.run`` runs it, output captured as text."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        code = Forked(code, arguments, cwd, env, *files).wait(timeout)
        return subprocess.CompletedProcess(arguments, code, *(file.read_text() for file in files))


def _run(code, arguments, cwd, env, *outputs):
    for number, output in enumerate(outputs, start=1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
