"""What a campaign will need, before it runs: rows, hours and disk space."""

import statistics
import time
from pathlib import Path

import torch

from aletheia.anatomy.load import inspect, pick, pick_device
from aletheia.anatomy.schema import Anatomy
from aletheia.errors import AletheiaError
from aletheia.files import free_bytes
from aletheia.lab.campaign.grid import Forecast, Row, jobs
from aletheia.lab.campaign.models import build, byte_tokenizer
from aletheia.lab.campaign.spec import BASE, Arm, BehaviourCampaign, ModelEntry, SpeedCampaign
from aletheia.lab.campaign.store import STORE_FILE, Store, check_same
from aletheia.planning.cost import layer_costs

BYTES = 4
STEP_SHARE = 0.5  # of the speed of a large matrix product; training steps of small models reach no more
SETUP_SECONDS = 30.0  # of a process: imports, loading, the probe
# per benchmark: number of items, tokens per prompt, and tokens per answer unless it is cut off
BENCHMARKS = {
    "mmlu": (14042, 120, 0),
    "gsm8k": (1319, 900, 256),
    "humaneval": (164, 150, 512),
    "wikitext": (62, 5000, 0),
}


def forecast(campaign: SpeedCampaign | BehaviourCampaign, folder: Path, workers: int = 1) -> Forecast:
    """Estimate from the finished rows of this campaign, or else from operations and this machine's speed.

    The latter counts the operations of training and evaluation on items of usual length, and is a rough guess.
    """
    planned, anatomies = jobs(campaign), {model.name: _anatomy(model) for model in campaign.models}
    done, spent = _done(campaign, folder)
    rows = sum(len(job.rows) for job in planned)
    if spent:
        seconds = statistics.fmean(spent) * (rows - done)
    else:
        flops = _flops_per_second(campaign.dtype)
        seconds = sum(
            SETUP_SECONDS + sum(_row_flops(campaign, row, anatomies[row.model]) for row in job.rows) / flops
            for job in planned
        )
    unread = tuple(name for name, anatomy in anatomies.items() if anatomy is None)
    disk = sum(_disk_bytes(campaign, model, anatomies[model.name]) for model in campaign.models)
    return Forecast(rows, done, len(planned), seconds / workers / 3600, disk, free_bytes(folder), bool(spent), unread)


def _done(campaign: SpeedCampaign | BehaviourCampaign, folder: Path) -> tuple[int, list[float]]:
    if not (folder / STORE_FILE).exists():
        return 0, []
    store = Store(folder / STORE_FILE)
    check_same(store.campaign, campaign, folder)
    records = [record for record in store.records() if record.result is not None]
    spent = [
        float(record.result["job_seconds"]) for record in records if record.result and "job_seconds" in record.result
    ]
    return len(records), spent


def _row_flops(campaign: SpeedCampaign | BehaviourCampaign, row: Row, anatomy: Anatomy | None) -> float:
    """Operations of a row; its steps count as uniform LoRA over full rows, an upper bound."""
    if anatomy is None:
        return 0.0
    ranks = {module.name: 16 for module in anatomy.adaptable()}
    step = layer_costs(anatomy, ranks, 16, campaign.max_length).baseline * campaign.max_length * campaign.batch_size
    if isinstance(campaign, SpeedCampaign):
        return step * (campaign.rounds + 1)
    trained = row.arm != BASE
    tokens = campaign.held_out_rows * campaign.max_length * (2 + campaign.evaluations if trained else 1)
    for name, settings in campaign.tasks.items():
        if not trained or settings.seeds is None or row.seed in settings.seeds:
            items, prompt, written = BENCHMARKS[name]
            tokens += (settings.limit or items) * (prompt + min(settings.max_new_tokens or written, written))
    return step * campaign.steps * trained + 2.0 * anatomy.parameters * tokens


def _disk_bytes(campaign: SpeedCampaign | BehaviourCampaign, entry: ModelEntry, anatomy: Anatomy | None) -> int:
    """Bytes of random models, and of adapters and caches of a behaviour campaign; an upper bound."""
    if anatomy is None:
        return 0
    made = anatomy.parameters * BYTES if entry.config is not None else 0
    if isinstance(campaign, SpeedCampaign):
        return made
    adapters = sum(_adapter_parameters(arm, anatomy) for arm in campaign.arms) * len(campaign.seeds)
    boundaries = sum(len(campaign.seeds) if arm.policy == "random" else 1 for arm in campaign.arms)  # one cache each
    return made + (adapters + boundaries * campaign.rows * campaign.max_length * anatomy.hidden_size) * BYTES


def _adapter_parameters(arm: Arm, anatomy: Anatomy) -> int:
    return sum(module.lora_parameters(arm.rank) for module in anatomy.adaptable())


def _anatomy(entry: ModelEntry) -> Anatomy | None:
    """The anatomy, read on the meta device; None for a model that is not on this machine yet."""
    from aletheia.anatomy.demo import demo_checkpoint
    from aletheia.anatomy.read import read_anatomy

    if entry.config is not None:
        return read_anatomy(build(entry, byte_tokenizer(), "meta"))
    try:
        return inspect(str(demo_checkpoint()) if entry.path == "demo" else str(entry.path))
    except AletheiaError:
        return None


def _flops_per_second(dtype: str) -> float:
    """Speed of matrix products of a size as in training, on the device and in the dtype of the campaign."""
    device = pick_device()
    a, b = (torch.randn(1024, 1024, device=device, dtype=pick(dtype, device)) for _ in range(2))
    spent = []
    for _ in range(5):
        started = time.perf_counter()
        (a @ b).sum().item()
        spent.append(time.perf_counter() - started)
    return STEP_SHARE * 2 * 1024**3 / min(spent)
