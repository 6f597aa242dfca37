"""A job of a speed campaign: probe a model, plan every arm, and time their steps interleaved."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from aletheia.anatomy.load import load
from aletheia.errors import AletheiaError
from aletheia.lab.campaign.grid import Row, model_named
from aletheia.lab.campaign.models import model_source
from aletheia.lab.campaign.shared_rows import training_rows
from aletheia.lab.campaign.spec import Arm, SpeedCampaign
from aletheia.lab.campaign.steps import StepKind, interleaved_steps
from aletheia.planning.make import plan
from aletheia.planning.plan import Plan
from aletheia.prefix.exact import why_not_exact
from aletheia.probing.resident import probe
from aletheia.probing.scores import Scores


def run_speed(campaign: SpeedCampaign, rows: list[Row], data_dir: Path, folder: Path) -> dict[str, Mapping[str, Any]]:
    """For each arm its ``result``, or the ``reason`` why there is none."""
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
    boundaries = {made.boundary for made in plans.values()}
    cacheable = {
        boundary
        for boundary in boundaries
        if why_not_exact(base.model, boundary, data.examples, data.pad_token_id)[0] is None
    }
    kinds = [kind for arm in campaign.arms if arm.name in plans for kind in _kinds(arm, plans[arm.name], cacheable)]
    seconds = interleaved_steps(base.model, kinds, data, campaign.batch_size, campaign.rounds, seed)
    for arm in campaign.arms:
        if arm.name in plans:
            result = _result(campaign, rows[0].model, arm, plans[arm.name], scores, seconds)
            found[arm.name] = {"result": result}
    return found


def arm_plan(arm: Arm, scores: Scores, seed: int, epochs: float) -> Plan:
    """The plan of an arm; random layers depend on model and seed, so that models of one depth differ."""
    drawn = hashlib.sha256(f"{scores.model.fingerprint} {seed}".encode()).digest()
    return plan(
        scores,
        policy=arm.policy,
        percent=arm.percent,
        rank=arm.rank,
        ranks=arm.ranks,
        seed=int.from_bytes(drawn[:4], "big"),
        epochs=epochs,
        freeze_after=arm.freeze_after,
    )


def _kinds(arm: Arm, made: Plan, cacheable: set[int]) -> list[StepKind]:
    """The kinds of steps in the run of an arm; ``cacheable`` holds the boundaries at which a cache is exact."""
    if arm.execution == "plain":
        return [StepKind(arm.name, made)]
    early_frozen = bool(made.early_layers)
    cached = made.boundary in cacheable
    kinds = [replace(StepKind.fast(arm.name, made, cached), early_frozen=early_frozen)]
    if cached:
        kinds.append(StepKind.prefix(f"{arm.name} prefix", made, early_frozen))
    if early_frozen:
        kinds.append(StepKind.fast(f"{arm.name} early", made))
    return kinds


def _predicted(arm: Arm, made: Plan) -> float:
    """Speed-up by counted operations over a run, with early and later steps in their shares."""
    if arm.execution == "plain":
        return made.predicted.speedup
    share = made.freeze_after
    early = made.predicted.relative_early_step_time or 0.0
    return 1.0 / (share * early + (1 - share) / made.predicted.cached_speedup)


def _result(
    campaign: SpeedCampaign, model: str, arm: Arm, made: Plan, scores: Scores, seconds: dict[str, list[float]]
) -> dict[str, Any]:
    """The recorded result: seconds of each round, and the one-off costs of a run."""
    return {
        "layers": list(made.layers),
        "layer_count": made.layer_count,
        "early_steps": made.early_steps(campaign.steps),
        "trainable_parameters": made.trainable_parameters,
        "predicted_speedup": _predicted(arm, made),
        "random_weights": model_named(campaign, model).config is not None,
        "step_seconds": seconds[arm.name],
        "early_step_seconds": seconds.get(f"{arm.name} early", []),
        "prefix_seconds": seconds.get(f"{arm.name} prefix", []),
        "probe_seconds": scores.probe.seconds if made.uses_scores else 0.0,
        "model": made.model.model_dump(mode="json"),
        "data": scores.data.model_dump(mode="json") if scores.data else None,
        "model_parameters": scores.anatomy.parameters,
    }
