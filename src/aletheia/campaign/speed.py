"""A job of a speed campaign: probe a model, plan every arm, and time their steps interleaved."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aletheia.anatomy.load import load
from aletheia.campaign.grid import Row, model_named
from aletheia.campaign.models import model_source
from aletheia.campaign.rows import training_rows
from aletheia.campaign.spec import Arm, SpeedCampaign
from aletheia.campaign.steps import StepKind, interleaved_steps
from aletheia.errors import AletheiaError
from aletheia.planning.make import plan
from aletheia.planning.plan import Plan
from aletheia.probing.resident import probe
from aletheia.probing.scores import Scores


def run_speed(campaign: SpeedCampaign, rows: list[Row], data_dir: Path, folder: Path) -> dict[str, Mapping[str, Any]]:
    """What came of each arm: its ``result``, or the ``reason`` why there is none."""
    seed = rows[0].seed
    base = load(model_source(model_named(campaign, rows[0].model), folder), campaign.dtype)
    data = training_rows(campaign, data_dir, base.tokenizer)
    scores = probe(base.model, data, seed=seed)
    found: dict[str, Mapping[str, Any]] = {}
    plans: dict[str, Plan] = {}
    for arm in campaign.arms:
        try:
            plans[arm.name] = arm_plan(arm, scores, seed, campaign.epochs)
        except AletheiaError as error:
            found[arm.name] = {"reason": str(error)}
    kinds = [kind for arm in campaign.arms if arm.name in plans for kind in _kinds(arm, plans[arm.name])]
    started = time.perf_counter()
    seconds = interleaved_steps(base.model, kinds, data, campaign.batch_size, campaign.rounds)
    spent = time.perf_counter() - started
    for arm in campaign.arms:
        if arm.name in plans:
            result = _result(campaign, arm, plans[arm.name], scores, seconds)
            found[arm.name] = {"result": result | {"job_seconds": spent / len(plans)}}
    return found


def arm_plan(arm: Arm, scores: Scores, seed: int, epochs: float) -> Plan:
    """The plan of an arm; what it draws depends on the seed."""
    return plan(
        scores,
        arm.policy,
        arm.percent,
        arm.rank,
        arm.ranks,
        seed=seed,
        epochs=epochs,
        freeze_after=arm.freeze_after,
    )


def _kinds(arm: Arm, made: Plan) -> list[StepKind]:
    """The kinds of steps that the run of an arm is made of."""
    if arm.execution == "plain":
        return [StepKind(arm.name, made)]
    later = made.model_copy(
        update={
            "early_layers": (),
            "adapters": tuple(adapter for adapter in made.adapters if adapter.layer in made.layers),
        }
    )
    kinds = [StepKind.fast(arm.name, later, cached=later.boundary > 0)]
    if later.boundary:
        kinds.append(StepKind(f"{arm.name} prefix", later, grouped=True, only_prefix=True))
    if made.early_layers:
        every = made.model_copy(update={"early_layers": (), "layers": tuple(range(made.layer_count))})
        kinds.append(StepKind.fast(f"{arm.name} early", every))
    return kinds


def _result(
    campaign: SpeedCampaign, arm: Arm, made: Plan, scores: Scores, seconds: dict[str, list[float]]
) -> dict[str, Any]:
    """What is recorded: seconds round by round, and what a run pays once."""
    return {
        "layers": list(made.layers),
        "layer_count": made.layer_count,
        "early_steps": made.early_steps(campaign.steps),
        "trainable_parameters": made.trainable_parameters,
        "predicted_speedup": made.predicted.cached_speedup if arm.execution == "fast" else made.predicted.speedup,
        "step_seconds": seconds[arm.name],
        "early_step_seconds": seconds.get(f"{arm.name} early", []),
        "prefix_seconds": seconds.get(f"{arm.name} prefix", []),
        "probe_seconds": scores.probe.seconds if made.uses_scores else 0.0,
        "model": made.model.model_dump(mode="json"),
        "data": scores.data.model_dump(mode="json") if scores.data else None,
        "model_parameters": scores.anatomy.parameters,
    }
