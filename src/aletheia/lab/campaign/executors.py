"""Where jobs run: in a pool of processes on this machine, or on a Ray cluster."""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from aletheia.errors import CampaignError
from aletheia.lab.campaign.process import COMMAND, run_process, stop_processes
from aletheia.lab.campaign.spec import BehaviourCampaign, SpeedCampaign

RETRIES = 3  # of a job whose Ray worker died


class Executor(Protocol):
    """Takes the folder of a job; the future holds why the job failed, or None."""

    def submit(self, folder: Path) -> "Future[str | None]":
        """Start a job, or queue it."""

    def close(self) -> None:
        """Stop what still runs."""


class LocalPool:
    """Jobs on this machine, ``workers`` at a time; one is in order.

    With several workers and several NVIDIA GPUs (those in ``CUDA_VISIBLE_DEVICES``, by default all), worker i sees GPU
    ``i mod GPUs`` alone. Workers share the processor's threads, unless ``OMP_NUM_THREADS`` says how many each has.
    """

    def __init__(self, workers: int = 1, command: Sequence[str] = COMMAND) -> None:
        """Raises CampaignError: no worker."""
        if workers < 1:
            raise CampaignError(f"--workers is {workers}; expected at least 1")
        self._pool = ThreadPoolExecutor(workers)
        self._command = command
        self._free = list(range(workers))
        self._devices = _devices() if workers > 1 else []
        share = max(1, (os.cpu_count() or 1) // workers)
        self._environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(share))} if workers > 1 else {}

    def submit(self, folder: Path) -> "Future[str | None]":
        """Queue a job."""
        return self._pool.submit(self._run, folder)

    def _run(self, folder: Path) -> str | None:
        worker = self._free.pop()  # lists change whole under the interpreter's lock
        try:
            environment = dict(self._environment)
            if self._devices:
                environment["CUDA_VISIBLE_DEVICES"] = self._devices[worker % len(self._devices)]
            return run_process(folder, self._command, environment)
        finally:
            self._free.append(worker)

    def close(self) -> None:
        """Stop what still runs, and what waits."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        stop_processes()
        self._pool.shutdown()


def _devices() -> list[str]:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name]
    return sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))


def check_workers(campaign: SpeedCampaign | BehaviourCampaign, executor: str, workers: int, gpus: float | None) -> None:
    """Refuse jobs that would be timed while another one uses the same device.

    Raises:
        CampaignError: a speed campaign with more workers than devices, or on Ray with less than a GPU for a job.
    """
    if not isinstance(campaign, SpeedCampaign):
        return
    devices = max(1, len(_devices()))
    if executor == "ray" and (gpus or 0) < 1:
        raise CampaignError(
            "a speed campaign on Ray needs a device of its own for every job, or jobs would time each other; expected "
            "--gpus 1, or --executor local"
        )
    if executor == "local" and workers > devices:
        raise CampaignError(
            f"--workers is {workers} with {devices} device{'s' * (devices > 1)}, and this campaign measures times; "
            "expected a device of its own for every worker"
        )


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
