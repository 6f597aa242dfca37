"""A job of a behaviour campaign: fine-tune with one arm (or not at all), then evaluate, task by task.

What a killed job has finished stays in its folder, and the next attempt resumes it: the run, and evaluations item by
item.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from aletheia.adapters.adapt import adapt
from aletheia.anatomy.fingerprint import identify
from aletheia.anatomy.load import Loaded, load
from aletheia.data.examples import Examples
from aletheia.data.tokenizer import identify_tokenizer
from aletheia.errors import ArtifactError, CacheError
from aletheia.files import package_versions
from aletheia.lab.campaign.grid import Row, model_named
from aletheia.lab.campaign.models import model_source
from aletheia.lab.campaign.shared_rows import held_out_rows, training_rows
from aletheia.lab.campaign.spec import BASE, Arm, BehaviourCampaign, BenchmarkName
from aletheia.lab.campaign.speed_job import arm_plan
from aletheia.lab.evaluation.evaluate import Origin, eval_settings, evaluate
from aletheia.lab.evaluation.journal import OtherEvaluationError
from aletheia.lab.evaluation.measures import MEASURES
from aletheia.lab.evaluation.row_loss import row_losses
from aletheia.lab.evaluation.work import sha256_of
from aletheia.planning.plan import Plan
from aletheia.probing.resident import probe
from aletheia.probing.scores import Scores
from aletheia.runs.folder import RunFolder
from aletheia.runs.saved import load_adapter
from aletheia.runs.schema import METRICS_FILE, SCORES_FILE, Run
from aletheia.training.settings import CacheKind
from aletheia.training.train import train

RUN = "run"
CACHES = "caches"


@dataclass(frozen=True)
class _RowJob:
    """One row to compute: ``source`` is where its model is loaded from, ``place`` the folder of the job."""

    campaign: BehaviourCampaign
    row: Row
    source: str
    data_dir: Path
    folder: Path
    place: Path

    def load(self) -> Loaded:
        """The base model as it was before any training."""
        return load(self.source, self.campaign.dtype)


def run_behaviour(
    campaign: BehaviourCampaign, row: Row, data_dir: Path, folder: Path, place: Path
) -> dict[str, Mapping[str, Any]]:
    """The ``result`` of one row by its arm: how it was trained, and its items, benchmark by benchmark."""
    job = _RowJob(campaign, row, model_source(model_named(campaign, row.model), folder), data_dir, folder, place)
    adapter = None if row.arm == BASE else place / RUN
    if adapter is not None and not (adapter / METRICS_FILE).exists():  # written last
        _train(job, adapter)
    base = job.load()
    origin = Origin(identify(base.model))
    result: dict[str, Any] = {}
    if adapter is not None:
        result |= _trained(Run.read(adapter))
        tokenizer = identify_tokenizer(base.tokenizer)
        base = replace(base, model=load_adapter(base.model, adapter, tokenizer))  # type: ignore[arg-type]
    items = {"heldout": _held_out(campaign, base, data_dir)}
    versions = {}
    for name, settings in campaign.tasks.items():
        if row.arm == BASE or settings.seeds is None or row.seed in settings.seeds:
            items[name], versions[name] = _task(job, name, base, origin, adapter)
    result |= {"items": items, "versions": versions}
    return {row.arm: {"result": result}}


def _train(job: _RowJob, out: Path) -> None:
    """One run of the row's arm."""
    campaign, seed, base = job.campaign, job.row.seed, job.load()
    arm = next(arm for arm in campaign.arms if arm.name == job.row.arm)
    data = training_rows(campaign, job.data_dir, base.tokenizer)
    held_out = held_out_rows(campaign, job.data_dir, base.tokenizer)
    scores, kept = _scores(job, base, data)
    made = arm_plan(arm, scores, seed, campaign.epochs)
    steps = _steps(campaign, arm, made, scores, seed)

    def attempt(model: nn.Module, cache: CacheKind, resume: Literal["auto", "never"]) -> None:
        """Train from new adapters, or from the last checkpoint of a killed job."""
        with RunFolder.claim(out, overwrite=True, resume=resume) as claimed:
            train(
                adapt(model, made, seed),
                data,
                made,
                claimed,
                held_out,
                steps=steps,
                batch_size=campaign.batch_size,
                learning_rate=arm.learning_rate,
                evaluations=campaign.evaluations,
                early_stop=False,  # exactly the steps of the campaign
                averaging="off",  # arms are compared with the weights that the optimizer left
                rescale=False,
                seed=seed,
                cache=cache,
                cache_dir=job.folder / CACHES,
                show_progress=False,
            )

    shared = made.boundary > 0 and not made.early_layers  # arms and seeds with one boundary share a cache on disk
    with suppress(CacheError):  # not exact, or no room for it
        attempt(base.model, "disk" if shared else "auto", "auto" if kept else "never")
        return
    del base
    attempt(job.load().model, "off", "never")


def _scores(job: _RowJob, base: Loaded, data: Examples) -> tuple[Scores, bool]:
    """The row's scores, and whether an earlier attempt made them: checkpoints belong to the plan made from them."""
    file = job.place / SCORES_FILE
    with suppress(ArtifactError):
        found = Scores.read(file)
        if found.packages == package_versions():
            return found, True
    scores = probe(base.model, data, seed=job.row.seed)
    scores.write(file)
    return scores, False


def _steps(campaign: BehaviourCampaign, arm: Arm, made: Plan, scores: Scores, seed: int) -> int:
    """The steps of an arm: the same for all arms, or as many as the operations of the baseline's run allow."""
    if campaign.match == "steps":
        return campaign.steps
    baseline = next(other for other in campaign.arms if other.name == campaign.baseline)
    plain = arm_plan(baseline, scores, seed, campaign.epochs)
    budget = _once(campaign, baseline, plain) + campaign.steps * _per_step(baseline, plain)
    return max(1, round((budget - _once(campaign, arm, made)) / _per_step(arm, made)))


def _per_step(arm: Arm, made: Plan) -> float:
    """Mean operations of a step of the run; a step of uniform LoRA is 1."""
    predicted = made.predicted
    if arm.execution == "plain":
        return predicted.relative_step_time
    later = predicted.relative_cached_step_time or predicted.relative_step_time
    share = made.freeze_after
    return share * (predicted.relative_early_step_time or later) + (1 - share) * later


def _once(campaign: BehaviourCampaign, arm: Arm, made: Plan) -> float:
    """One-off operations of a run, in the same unit: probe, and filling the cache."""
    predicted, size = made.predicted, campaign.batch_size
    probe_rows = made.probe.batches * made.probe.batch_size if made.uses_scores else 0
    fill = 0.0
    if arm.execution == "fast" and predicted.relative_cached_step_time:
        fill = campaign.rows / size * (predicted.relative_step_time - predicted.relative_cached_step_time)
    return probe_rows / size * (predicted.relative_early_step_time or predicted.relative_step_time) + fill


def _trained(run: Run) -> dict[str, Any]:
    """What the report needs of a run."""
    metrics = run.metrics
    return {
        "layers": list(run.plan.layers),
        "layer_count": run.plan.layer_count,
        "early_steps": metrics.early_steps,
        "trainable_parameters": metrics.trainable_parameters,
        "steps": metrics.steps,
        "learning_rate": metrics.settings.learning_rate,
        "seconds": metrics.seconds.model_dump(),
        "cache": metrics.settings.cache,
        "peak_memory_bytes": metrics.peak_memory_bytes,
        "held_out_curve": [[point.step, point.train_seconds, point.loss] for point in metrics.held_out_curve],
        "model": metrics.model.model_dump(mode="json"),
        "data": metrics.data.model_dump(mode="json") if metrics.data else None,
        "adapter": str(run.path),
    }


def _held_out(campaign: BehaviourCampaign, base: Loaded, data_dir: Path) -> dict[str, Any]:
    """Nats and labelled tokens of each held-out row."""
    rows = held_out_rows(campaign, data_dir, base.tokenizer)
    size = campaign.eval_batch_size
    base.model.eval()
    found = [
        pair
        for start in range(0, len(rows), size)
        for pair in row_losses(base.model, rows.examples[start : start + size], rows.pad_token_id)
    ]
    content = [[row.input_ids, row.labels] for row in rows.examples]
    return {
        "value": [nats for nats, _ in found],
        "weight": [tokens for _, tokens in found],
        "digest": sha256_of(content),
    }


def _task(
    job: _RowJob, name: BenchmarkName, base: Loaded, origin: Origin, adapter: Path | None
) -> tuple[dict[str, Any], str]:
    """The main measure of a benchmark item by item, and upstream's version of the benchmark."""
    campaign, settings = job.campaign, job.campaign.tasks[name]
    asked = eval_settings(
        job.data_dir,
        adapter,
        model=job.source,
        tasks=(name,),
        limit=settings.limit,
        max_new_tokens=settings.max_new_tokens,
        batch_size=campaign.eval_batch_size,
        dtype=campaign.dtype,
    )
    out = job.place / f"eval-{name}"
    run = partial(evaluate, base, asked, out, job.data_dir, origin, campaign.unsafe_exec, show_progress=False)
    try:
        done = run()
    except OtherEvaluationError:  # started with other packages
        done = run(overwrite=True)
    measure = MEASURES[name][0]
    rows = done.rows[name]
    found: dict[str, Any] = {
        "value": [row[measure.column] for row in rows],
        "cluster": [row["subject"] for row in rows],
        "digest": sha256_of([row["sha256"] for row in rows]),
    }
    if measure.per:
        found["weight"] = [row[measure.per] for row in rows]
    task = done.evaluation.tasks[0]
    if task.answers:
        found["answers"] = task.answers
    return found, task.version
