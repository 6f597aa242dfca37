"""What a speed campaign found, from its store alone: ratios with intervals, tests over models, layers. Torch-free."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aletheia.lab.campaign.spec import SpeedCampaign
from aletheia.lab.campaign.store import Record
from aletheia.lab.statistics.means import geometric_mean_of_few, mean
from aletheia.lab.statistics.paired import holm, sign_flip_test, wilcoxon_test
from aletheia.lab.statistics.rates import win_rate
from aletheia.lab.statistics.ratios import geometric_mean, ratio_of_times
from aletheia.lab.statistics.results import Estimate

FEW = 8  # ratios; with fewer, a bootstrap gives no interval


@dataclass(frozen=True)
class ModelSpeed:
    """An arm on one model, against the baseline in the same rounds.

    ``step`` is the ratio of step times and ``run`` the ratio of whole runs, both as means over seeds. ``once_seconds``
    are the one-off costs of a run (probe, cache), ``run_seconds`` its whole time.
    """

    model: str
    arm: str
    step: Estimate
    run: Estimate
    predicted: float
    once_seconds: float
    run_seconds: float


@dataclass(frozen=True)
class Comparison:
    """One arm against another over models: how many times faster, and how certain.

    ``speedup`` is the geometric mean over models, ``time_saved`` the mean of ``1 - 1 / speed-up``, ``wins`` the share
    of models on which the arm is faster. ``sign_flip`` and ``wilcoxon`` are two-sided p-values over models;
    ``corrected`` is the first after Holm over the arms (None for a single comparison). ``same_layers`` counts the
    ``runs`` in which both chose the same layers; there, selection cannot explain a difference.
    """

    arm: str
    other: str
    models: int
    speedup: Estimate
    time_saved: Estimate
    wins: Estimate
    sign_flip: float
    wilcoxon: float
    corrected: float | None
    same_layers: int
    runs: int


@dataclass(frozen=True)
class Chosen:
    """Layers that an arm chose on a model, seed by seed, and the mean Jaccard index over pairs of seeds."""

    model: str
    arm: str
    layer_count: int
    layers: tuple[tuple[int, ...], ...]
    stability: float | None


@dataclass(frozen=True)
class SpeedSummary:
    """Everything that the report of a speed campaign shows."""

    campaign: SpeedCampaign
    models: tuple[ModelSpeed, ...]
    step_comparisons: tuple[Comparison, ...]
    run_comparisons: tuple[Comparison, ...]
    asked_steps: tuple[Comparison, ...]
    asked_runs: tuple[Comparison, ...]
    chosen: tuple[Chosen, ...]
    records: tuple[Record, ...]


Results = dict[tuple[str, str], dict[int, Mapping[str, Any]]]  # by (model, arm), then seed


def results_by_arm(records: Iterable[Record]) -> Results:
    """The results of finished rows."""
    found: Results = {}
    for record in records:
        if record.result is not None:
            found.setdefault((record.row.model, record.row.arm), {})[record.row.seed] = record.result
    return found


def summarize_speed(campaign: SpeedCampaign, records: Sequence[Record]) -> SpeedSummary:
    """Ratios per model and arm, and over models."""
    by_pair = results_by_arm(records)
    plain = {arm.name for arm in campaign.arms if arm.execution == "plain"}
    models, steps, runs = [], {}, {}
    for (model, arm), results in by_pair.items():
        baseline = by_pair.get((model, campaign.baseline), {})
        seeds = [seed for seed in results if seed in baseline]
        if not seeds:
            continue
        pairs = [(baseline[seed], results[seed]) for seed in seeds]
        step = geometric_mean_of_few(
            [ratio_of_times(base["step_seconds"], round_seconds(own, campaign.steps)).value for base, own in pairs]
        )
        totals = [(run_seconds(campaign, base), run_seconds(campaign, own)) for base, own in pairs]
        run = geometric_mean_of_few([base / own for base, own in totals])
        steps[model, arm], runs[model, arm] = step.value, run.value
        models.append(
            ModelSpeed(
                model,
                arm,
                step,
                run,
                predicted=_average(_predicted(base, own, arm in plain) for base, own in pairs),
                once_seconds=_average(once_seconds(campaign, own) for _, own in pairs),
                run_seconds=_average(own for _, own in totals),
            )
        )
    others = [arm.name for arm in campaign.arms if arm.name != campaign.baseline]
    return SpeedSummary(
        campaign,
        tuple(models),
        _corrected([_compare(steps, by_pair, name, campaign.baseline) for name in others]),
        _corrected([_compare(runs, by_pair, name, campaign.baseline) for name in others]),
        tuple(asked for pair in campaign.comparisons if (asked := _compare(steps, by_pair, *pair)) is not None),
        tuple(asked for pair in campaign.comparisons if (asked := _compare(runs, by_pair, *pair)) is not None),
        tuple(chosen_layers(arm, model, results) for (model, arm), results in by_pair.items()),
        tuple(records),
    )


def _predicted(base: Mapping[str, Any], own: Mapping[str, Any], is_plain: bool) -> float:
    """The predicted speed-up; plans count labelled-token logits, which neither plain steps nor the baseline use."""
    return float(own["predicted_speedup"] / (base["predicted_speedup"] if is_plain else 1.0))


def round_seconds(result: Mapping[str, Any], steps: int) -> list[float]:
    """Mean seconds of a step of the run, for each round: early and later steps in their shares."""
    early, later = result["early_step_seconds"], result["step_seconds"]
    if not early:
        return list(later)
    share = result["early_steps"] / steps
    return [share * first + (1 - share) * second for first, second in zip(early, later, strict=True)]


def once_seconds(campaign: SpeedCampaign, result: Mapping[str, Any]) -> float:
    """One-off seconds of a run: probe, and the layers below the boundary over every row for the cache."""
    batches = math.ceil(campaign.rows / campaign.batch_size)
    prefix = result["prefix_seconds"]
    return float(result["probe_seconds"] + (sum(prefix) / len(prefix) * batches if prefix else 0.0))


def run_seconds(campaign: SpeedCampaign, result: Mapping[str, Any]) -> float:
    """Seconds of a whole run, computed from its measured parts."""
    return _average(round_seconds(result, campaign.steps)) * campaign.steps + once_seconds(campaign, result)


def _compare(ratios: Mapping[tuple[str, str], float], by_pair: Results, arm: str, other: str) -> Comparison | None:
    """A comparison over the models that have both arms; ``ratios`` are against the baseline."""
    models = [model for model, name in ratios if name == arm and (model, other) in ratios]
    if not models:
        return None
    against = [ratios[model, arm] / ratios[model, other] for model in models]
    logs = [math.log(ratio) for ratio in against]
    layers = [
        by_pair[model, arm][seed]["layers"] == by_pair[model, other][seed]["layers"]
        for model in models
        for seed in by_pair[model, arm]
        if seed in by_pair[model, other]
    ]
    return Comparison(
        arm,
        other,
        len(models),
        (geometric_mean if len(against) >= FEW else geometric_mean_of_few)(against),
        mean([1 - 1 / ratio for ratio in against]),
        win_rate(logs),
        sign_flip_test(logs).p_value,
        wilcoxon_test(logs).p_value,
        None,
        sum(layers),
        len(layers),
    )


def _corrected(comparisons: Sequence[Comparison | None]) -> tuple[Comparison, ...]:
    """The comparisons with Holm-corrected p-values over the arms."""
    present = [comparison for comparison in comparisons if comparison is not None]
    adjusted = holm({comparison.arm: comparison.sign_flip for comparison in present})
    return tuple(Comparison(**vars(comparison) | {"corrected": adjusted[comparison.arm]}) for comparison in present)


def chosen_layers(arm: str, model: str, results: Mapping[int, Mapping[str, Any]]) -> Chosen:
    """The layers that an arm chose on a model, from its results by seed."""
    layers = [frozenset(results[seed]["layers"]) for seed in sorted(results)]
    pairs = [
        len(first & second) / len(first | second)
        for index, first in enumerate(layers)
        for second in layers[index + 1 :]
    ]
    count = next(iter(results.values()))["layer_count"]
    return Chosen(model, arm, count, tuple(tuple(sorted(some)) for some in layers), _average(pairs) if pairs else None)


def _average(values: Iterable[float]) -> float:
    return statistics.fmean(values)
