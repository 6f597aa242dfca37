"""Rows and jobs of a campaign: a row is recorded, a job runs in its own process. Torch-free."""

from dataclasses import dataclass

from aletheia.lab.campaign.spec import BASE, BehaviourCampaign, ModelEntry, SpeedCampaign


@dataclass(frozen=True, order=True)
class Row:
    """The unit that is recorded."""

    model: str
    arm: str
    seed: int


@dataclass(frozen=True)
class Job:
    """The unit that runs: the arms of a model and seed whose steps are interleaved, or one row."""

    name: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Forecast:
    """Numbers of rows and jobs, and the hours and bytes of the pending ones.

    ``measured``: hours come from finished rows. ``unread`` models count in no other number.
    """

    rows: int
    rows_done: int
    jobs: int
    hours: float
    disk_bytes: int
    free_bytes: int
    measured: bool
    unread: tuple[str, ...]


def jobs(campaign: SpeedCampaign | BehaviourCampaign) -> list[Job]:
    """Every job, in the order in which they run: seed by seed, so that a campaign cut short is balanced."""
    found = []
    if isinstance(campaign, BehaviourCampaign):
        found += [_job(Row(model.name, BASE, campaign.seeds[0])) for model in campaign.models]
    for seed in campaign.seeds:
        for model in campaign.models:
            rows = [Row(model.name, arm.name, seed) for arm in campaign.arms]
            if isinstance(campaign, SpeedCampaign):
                found.append(Job(f"{model.name}--{seed}", tuple(rows)))
            else:
                found += [_job(row) for row in rows]
    return found


def _job(row: Row) -> Job:
    return Job(f"{row.model}--{row.arm}--{row.seed}", (row,))


def model_named(campaign: SpeedCampaign | BehaviourCampaign, name: str) -> ModelEntry:
    """The entry of a model."""
    return next(model for model in campaign.models if model.name == name)
