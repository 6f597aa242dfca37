"""Checks of a campaign before its first row runs. Torch-free."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aletheia.errors import ArtifactError, CampaignError
from aletheia.files import read_sealed
from aletheia.lab.campaign.executors import ExecutorSettings, devices
from aletheia.lab.campaign.grid import jobs
from aletheia.lab.campaign.process import JOB_FILE
from aletheia.lab.campaign.spec import BehaviourCampaign, SpeedCampaign, parse_campaign
from aletheia.lab.campaign.store import Store, check_same
from aletheia.lab.evaluation.local_data import FILES

JOBS = "jobs"


def check_campaign(campaign: SpeedCampaign | BehaviourCampaign, data_dir: Path, settings: ExecutorSettings) -> None:
    """Refuse faults that show in the campaign file, its data and the settings.

    Raises:
        CampaignError: a data file is missing, or jobs would disturb each other's times.
    """
    check_data(campaign, data_dir)
    check_workers(campaign, settings)


def data_files(campaign: SpeedCampaign | BehaviourCampaign) -> list[str]:
    """Files of rows and benchmarks, relative to ``data_dir``."""
    if isinstance(campaign, SpeedCampaign):
        return [campaign.data]
    benchmarks = [name for task in campaign.tasks for name in FILES[task].values()]
    return list(dict.fromkeys(name for name in (campaign.data, campaign.held_out, *benchmarks) if name))


def check_data(campaign: SpeedCampaign | BehaviourCampaign, data_dir: Path) -> None:
    """Refuse a campaign with missing data.

    Raises:
        CampaignError: names the missing file.
    """
    for name in data_files(campaign):
        if not (data_dir / name).is_file():
            raise CampaignError(f"{data_dir / name} is missing; put it there, or set another `data_dir`")


def check_workers(campaign: SpeedCampaign | BehaviourCampaign, settings: ExecutorSettings) -> None:
    """Refuse jobs that would be timed while another job uses the same device.

    Raises:
        CampaignError: a speed campaign has more workers than devices, or less than one GPU per job on Ray.
    """
    if not isinstance(campaign, SpeedCampaign):
        return
    if settings.executor == "ray":
        if (settings.gpus or 0) < 1:
            raise CampaignError(
                f"`gpus` is {settings.gpus or 0:g}, and jobs of this speed campaign would disturb each other's times "
                "on a shared device; expected 1, or `executor` local"
            )
        return
    workers, there = settings.workers or 1, max(1, len(devices()))
    if workers > there:
        raise CampaignError(
            f"`workers` is {workers} with {there} device{'s' * (there > 1)}, and this campaign measures times; "
            "expected at most one worker per device"
        )


def check_tools(campaign: SpeedCampaign | BehaviourCampaign) -> None:
    """Refuse benchmarks that cannot run on this machine, before the first row runs.

    Raises:
        EvaluationError: lm-eval is not installed.
        SandboxError: HumanEval is among the tasks, and there is no sandbox.
    """
    if not isinstance(campaign, BehaviourCampaign) or not campaign.tasks:
        return
    from aletheia.lab.evaluation import sandbox
    from aletheia.lab.evaluation.upstream import check_installed

    check_installed()
    if "humaneval" in campaign.tasks and not campaign.unsafe_exec:
        sandbox.check()


def check_earlier_jobs(campaign: SpeedCampaign | BehaviourCampaign, folder: Path) -> None:
    """Refuse a folder that has no store but jobs of another campaign.

    Raises:
        CampaignError: names such a job and the first differing key.
    """
    for place in sorted((folder / JOBS).glob("*/")):
        if job := earlier_job(place):
            try:
                earlier = parse_campaign(job.get("campaign", {}), str(place / JOB_FILE))
            except CampaignError as error:
                raise CampaignError(f"{error}; expected a job of this campaign; choose another `out`") from None
            check_same(earlier, campaign, place)


def check_data_unchanged(store: Store, folder: Path, hashes: Mapping[str, str]) -> None:
    """Refuse to mix rows of different data.

    Raises:
        CampaignError: names a file that was changed since a recorded row used it.
    """
    recorded = {record.row for record in store.records() if record.status == "done"}
    for job in jobs(store.campaign):
        if recorded.intersection(job.rows):
            earlier = earlier_job(folder / JOBS / job.name).get("data", {})
            if changed := [name for name in earlier if name in hashes and earlier[name] != hashes[name]]:
                raise CampaignError(
                    f"{changed[0]} was changed since {job.name} ran; expected the same data for every row; "
                    "restore it or choose another `out`"
                )


def earlier_job(place: Path) -> dict[str, Any]:
    """The job file of an earlier attempt; empty if there was none.

    Raises:
        CampaignError: the file was changed after it was written.
    """
    if not (place / JOB_FILE).exists():
        return {}
    try:
        return read_sealed(place / JOB_FILE)
    except ArtifactError as error:
        raise CampaignError(f"{error}, or move {place} away and its job runs again") from error
