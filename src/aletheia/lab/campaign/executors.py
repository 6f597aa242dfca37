"""Where jobs run: in a pool of processes on this machine, or on a Ray cluster."""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Protocol

from pydantic import model_validator

from aletheia.errors import CampaignError
from aletheia.lab.campaign.process import COMMAND, Ending, run_process, stop_processes
from aletheia.settings import MOST_WORKERS, Settings, option

RETRIES = 3  # of a job whose Ray worker died


class ExecutorSettings(Settings):
    """Where the jobs of a campaign run."""

    executor: Literal["local", "ray"] = option(
        "local", "Where jobs run: local (on this machine) or ray (on a Ray cluster)."
    )
    workers: int | None = option(
        None, "Jobs to run at the same time on this machine, each on its own GPU. (default: 1)", ge=1, le=MOST_WORKERS
    )
    address: str | None = option(None, "Address of the Ray cluster to join. (default: start one on this machine)")
    gpus: float | None = option(None, "GPUs of each job on a Ray cluster. (default: 0)", ge=0)
    cpus: float | None = option(None, "CPUs of each job on a Ray cluster. (default: 1)", ge=0)

    @model_validator(mode="after")
    def _of_this_executor(self) -> "ExecutorSettings":
        others = ("workers",) if self.executor == "ray" else ("address", "gpus", "cpus")
        for name in others:
            if getattr(self, name) is not None:
                raise ValueError(
                    f"`{name}` is not for the {self.executor} executor; leave it out, or choose another `executor`"
                )
        return self


def make_executor(settings: ExecutorSettings) -> "Executor":
    """The executor of these settings.

    Raises:
        CampaignError: Ray is not installed, or the cluster cannot be reached.
    """
    if settings.executor == "local":
        return LocalPool(settings.workers or 1)
    return RayCluster(settings.address, 1 if settings.cpus is None else settings.cpus, settings.gpus or 0)


class Executor(Protocol):
    """Runs jobs, each given by its folder; the future holds how the job ended."""

    def submit(self, folder: Path) -> "Future[Ending]":
        """Start a job, or queue it."""

    def close(self) -> None:
        """Stop the running jobs."""


class LocalPool:
    """Jobs on this machine, ``workers`` at a time; a single worker keeps their order.

    With several workers and several NVIDIA GPUs (those in ``CUDA_VISIBLE_DEVICES``, by default all), worker i sees only
    GPU ``i mod GPUs``. Workers share the processor's threads, unless ``OMP_NUM_THREADS`` sets the number of each.
    """

    def __init__(self, workers: int = 1, command: Sequence[str] = COMMAND) -> None:
        """Start the pool.

        Raises:
            CampaignError: ``workers`` is less than 1.
        """
        if workers < 1:
            raise CampaignError(f"`workers` is {workers}; expected at least 1")
        self._pool = ThreadPoolExecutor(workers)
        self._command = command
        self._free = list(range(workers))
        self._devices = devices() if workers > 1 else []
        share = max(1, (os.cpu_count() or 1) // workers)
        self._environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(share))} if workers > 1 else {}

    def submit(self, folder: Path) -> "Future[Ending]":
        """Queue a job."""
        return self._pool.submit(self._run, folder)

    def _run(self, folder: Path) -> Ending:
        worker = self._free.pop()  # pop and append are atomic under the interpreter's lock
        try:
            environment = dict(self._environment)
            if self._devices:
                environment["CUDA_VISIBLE_DEVICES"] = self._devices[worker % len(self._devices)]
            return run_process(folder, self._command, environment)
        finally:
            self._free.append(worker)

    def close(self) -> None:
        """Stop the running jobs and drop the waiting ones."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        stop_processes()
        self._pool.shutdown()


def devices() -> list[str]:
    """The NVIDIA GPUs of this machine, or those of them in ``CUDA_VISIBLE_DEVICES``."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name]
    return sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))


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
                "`executor` is ray, and Ray is not installed; install it with: pip install 'aletheia-tune[ray]'"
            ) from error
        self._ray = ray
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False, configure_logging=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise CampaignError(f"cannot reach a Ray cluster at {address}: {error}") from error
        self._command = tuple(command)
        self._remote = ray.remote(_run_remotely).options(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)

    def submit(self, folder: Path) -> "Future[Ending]":
        """Queue a job with the cluster."""
        future: Future[Ending] = self._remote.remote(str(folder.resolve()), self._command).future()
        return future

    def close(self) -> None:
        """Leave the cluster, or stop the one that was started."""
        self._ray.shutdown()


def _run_remotely(folder: str, command: Sequence[str]) -> Ending:
    return run_process(Path(folder), command)
