"""Where jobs run: in a pool of processes on this machine, or on a Ray cluster."""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from aletheia.campaign.process import COMMAND, run_process, stop_processes
from aletheia.errors import CampaignError

RETRIES = 3  # of a job whose Ray worker died


class Executor(Protocol):
    """Takes the folder of a job; the future holds why the job failed, or None."""

    def submit(self, folder: Path) -> "Future[str | None]":
        """Start a job, or queue it."""

    def close(self) -> None:
        """Stop what still runs."""


class LocalPool:
    """Jobs on this machine, ``workers`` at a time; one is in order.

    With several workers and several devices in ``CUDA_VISIBLE_DEVICES``, worker i sees device ``i mod devices`` alone.
    """

    def __init__(self, workers: int = 1, command: Sequence[str] = COMMAND) -> None:
        """Raises CampaignError: no worker."""
        if workers < 1:
            raise CampaignError(f"--workers is {workers}; expected at least 1")
        self._pool = ThreadPoolExecutor(workers)
        self._command = command
        self._free = list(range(workers))
        self._devices = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        self._several = workers > 1

    def submit(self, folder: Path) -> "Future[str | None]":
        """Queue a job."""
        return self._pool.submit(self._run, folder)

    def _run(self, folder: Path) -> str | None:
        worker = self._free.pop()  # lists change whole under the interpreter's lock
        try:
            chosen = self._devices[worker % len(self._devices)] if self._several and self._devices else None
            return run_process(folder, self._command, {"CUDA_VISIBLE_DEVICES": chosen} if chosen else None)
        finally:
            self._free.append(worker)

    def close(self) -> None:
        """Stop what still runs, and what waits."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        stop_processes()
        self._pool.shutdown()


class RayCluster:
    """Jobs on the workers of a Ray cluster, which see the campaign's folder under the same path."""

    def __init__(
        self, address: str | None = None, cpus: float = 1, gpus: float = 0, command: Sequence[str] = COMMAND
    ) -> None:
        """Join the cluster at ``address``, or start one on this machine.

        Raises:
            CampaignError: Ray is not installed, or the cluster cannot be reached.
        """
        try:
            import ray
        except ImportError as error:
            raise CampaignError(
                "--executor ray needs Ray, which is not installed; pip install 'aletheia-tune[ray]'"
            ) from error
        self._ray = ray
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False, configure_logging=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise CampaignError(f"no Ray cluster at {address}: {error}") from error
        self._command = tuple(command)
        self._remote = ray.remote(_run_remotely).options(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)

    def submit(self, folder: Path) -> "Future[str | None]":
        """Queue a job with the cluster."""
        future: Future[str | None] = self._remote.remote(str(folder.resolve()), self._command).future()
        return future

    def close(self) -> None:
        """Leave the cluster, or stop the one that was started."""
        self._ray.shutdown()


def _run_remotely(folder: str, command: Sequence[str]) -> str | None:
    return run_process(Path(folder), command)
