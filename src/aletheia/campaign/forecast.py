"""What a campaign will take: rows, hours and disk, before it runs."""

import statistics
import time
from pathlib import Path

import torch

from aletheia.anatomy.load import inspect
from aletheia.anatomy.schema import Anatomy
from aletheia.campaign.grid import Forecast, jobs
from aletheia.campaign.models import build, byte_tokenizer
from aletheia.campaign.run import free_bytes
from aletheia.campaign.spec import Arm, BehaviourCampaign, ModelEntry, SpeedCampaign
from aletheia.campaign.store import STORE_FILE, Store
from aletheia.errors import AletheiaError
from aletheia.planning.cost import layer_costs

BYTES = 4
STEP_SHARE = 0.5  # of the speed of a large matrix product, which training steps of small models reach at most
SETUP_SECONDS = 30.0  # of a process: imports, loading, the probe


def forecast(campaign: SpeedCampaign | BehaviourCampaign, folder: Path, workers: int = 1) -> Forecast:
    """Estimate from operations and this machine's speed, or from the rows of this campaign that are done.

    Generation and benchmarks are not in the first: expect more for a behaviour campaign.
    """
    planned, anatomies = jobs(campaign), {model.name: _anatomy(model) for model in campaign.models}
    done, spent = _done(folder)
    rows = sum(len(job.rows) for job in planned)
    if spent:
        seconds = statistics.fmean(spent) * (rows - done)
    else:
        flops = _flops_per_second()
        seconds = sum(
            SETUP_SECONDS
            + _step_flops(campaign, anatomies[job.rows[0].model]) * _steps(campaign, len(job.rows)) / flops
            for job in planned
        )
    disk = sum(_disk_bytes(campaign, model, anatomies[model.name]) for model in campaign.models)
    return Forecast(rows, done, len(planned), seconds / workers / 3600, disk, free_bytes(folder), bool(spent))


def _done(folder: Path) -> tuple[int, list[float]]:
    if not (folder / STORE_FILE).exists():
        return 0, []
    records = [record for record in Store(folder / STORE_FILE).records() if record.result is not None]
    spent = [
        float(record.result["job_seconds"]) for record in records if record.result and "job_seconds" in record.result
    ]
    return len(records), spent


def _steps(campaign: SpeedCampaign | BehaviourCampaign, rows: int) -> int:
    return (campaign.rounds + 1) * rows if isinstance(campaign, SpeedCampaign) else campaign.steps


def _step_flops(campaign: SpeedCampaign | BehaviourCampaign, anatomy: Anatomy | None) -> float:
    """Operations of a step of uniform LoRA over full rows: an upper bound."""
    if anatomy is None:
        return 0.0
    ranks = {module.name: 16 for module in anatomy.adaptable()}
    return layer_costs(anatomy, ranks, 16, campaign.max_length).baseline * campaign.max_length * campaign.batch_size


def _disk_bytes(campaign: SpeedCampaign | BehaviourCampaign, entry: ModelEntry, anatomy: Anatomy | None) -> int:
    """Models that are made, and the adapters of a behaviour campaign."""
    if anatomy is None:
        return 0
    made = anatomy.parameters * BYTES if entry.config is not None else 0
    if isinstance(campaign, SpeedCampaign):
        return made
    adapters = sum(_adapter_parameters(arm, anatomy) for arm in campaign.arms) * len(campaign.seeds)
    return made + adapters * BYTES


def _adapter_parameters(arm: Arm, anatomy: Anatomy) -> int:
    return sum(module.lora_parameters(arm.rank) for module in anatomy.adaptable())


def _anatomy(entry: ModelEntry) -> Anatomy | None:
    """Read on the meta device; None for a model that is not here yet."""
    from aletheia.anatomy.demo import demo_checkpoint
    from aletheia.anatomy.read import read_anatomy

    if entry.config is not None:
        return read_anatomy(build(entry, byte_tokenizer(), "meta"))
    try:
        return inspect(str(demo_checkpoint()) if entry.path == "demo" else str(entry.path))
    except AletheiaError:
        return None


def _flops_per_second() -> float:
    """Of matrix products of a size that training has, in float32, on the device that it would use."""
    from aletheia.anatomy.load import pick_device

    device = pick_device()
    a, b = (torch.randn(1024, 1024, device=device) for _ in range(2))
    spent = []
    for _ in range(5):
        started = time.perf_counter()
        (a @ b).sum().item()
        spent.append(time.perf_counter() - started)
    return STEP_SHARE * 2 * 1024**3 / min(spent)
