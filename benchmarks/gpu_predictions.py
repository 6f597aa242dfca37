"""Predicted and measured: what a step takes, by a calibration on the card, and its peak memory, by formula."""

import statistics
from typing import Any

import torch
from gpu_arms import Measured, measured, ours
from gpu_models import Work

import aletheia
from aletheia.job.room import largest_step
from aletheia.planning.memory import GPU_BYTES, known_weights, training_bytes
from aletheia.planning.plan import Plan
from aletheia.training.packing import packs
from aletheia.training.settings import TrainSettings

KINDS: dict[str, dict[str, Any]] = {
    "every layer": {"policy": "uniform"},
    "every layer, rank 64": {"policy": "uniform", "rank": 64},
    "half, by score": {"policy": "top-percent", "percent": 50},
    "upper half": {"policy": "last", "percent": 50},
    "upper half, rank 64": {"policy": "last", "percent": 50, "rank": 64},
    "upper quarter": {"policy": "last", "percent": 25},
}


def predictions(work: Work, how: str = "", **settings: Any) -> list[Measured]:
    """Steps of several plans, in the first epoch and from the cache, each with what was predicted for it.

    ``how`` tells ``settings`` that are no defaults; the steps that are timed for the prediction have them, too.
    """
    size = work.shape.batch_size
    timings = aletheia.calibrate(work.model(), work.data, batch_size=size, averaging="off", **settings)
    scores = work.scores.model_copy(update={"timings": timings})
    found: list[Measured] = []
    for name, options in KINDS.items():
        plan = aletheia.plan(scores, freeze_after=0, **options)
        ran, _ = ours(work, plan, 3, settings)
        room = predicted_bytes(work, plan, settings)
        first = measured(work, f"predicted{how}: {name}", plan, ran, slice(work.warm_up, work.steps))
        first.peak_bytes = ran.peaks[0]
        found.append(compared(work, first, plan, plan.predicted.relative_step_time, room))
        if plan.boundary:
            later = measured(work, f"predicted{how}: {name}, cached", plan, ran, work.last_steps, cached=True)
            later.peak_bytes = ran.peaks[-1]
            found.append(compared(work, later, plan, plan.predicted.relative_cached_step_time, room))
    found[0].notes.append(f"calibrated in {timings.seconds:.1f} s, by {', '.join(timings.computed_by)}")
    return found


def predicted_bytes(work: Work, plan: Plan, options: dict[str, Any]) -> int:
    """Peak memory of a run of ``plan``, by the formula that decides what fits."""
    base = work.model()
    settings = TrainSettings(epochs=3, batch_size=work.shape.batch_size, **options)
    settings = settings.model_copy(update={"packing": "on" if packs(base, work.data, settings)[0] else "off"})
    step = largest_step(work.data, settings, torch.bfloat16, torch.device(work.device), resident=True)
    ranks = {adapter.name: adapter.rank for adapter in plan.adapters}
    return training_bytes(work.scores.anatomy, known_weights(work.scores), plan.layers, ranks, step)


def compared(work: Work, found: Measured, plan: Plan, relative: float, room: int) -> Measured:
    """The same with what was predicted, and the ratios."""
    assert plan.predicted.baseline_step_seconds is not None
    seconds = relative * plan.predicted.baseline_step_seconds
    mean, peak = statistics.fmean(found.step_seconds), found.peak_bytes + (GPU_BYTES if work.device == "cuda" else 0)
    found.notes.append(
        f"predicted {1000 * seconds:.1f} ms, measured {1000 * mean:.1f} ms ({seconds / mean:.2f}); predicted "
        f"{room / 1e9:.1f} GB, measured {peak / 1e9:.1f} GB ({room / peak:.2f})"
    )
    print("   ", found.notes[-1], flush=True)
    return found
