"""What a behaviour campaign found, from its store alone: scores, forgetting, arms against arms. Torch-free.

Items and seeds are both samples: an interval covers variation between items (clustered if they come in groups) and
between runs. With one seed, it holds for this run alone.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from aletheia.errors import CampaignError
from aletheia.lab.campaign.spec import BASE, BehaviourCampaign
from aletheia.lab.campaign.speed_summary import Chosen, chosen_layers, results_by_arm
from aletheia.lab.campaign.store import Record
from aletheia.lab.evaluation.record import single_answer
from aletheia.lab.statistics.margins import NonInferiority, Verdict, non_inferiority_of_items
from aletheia.lab.statistics.means import crossed_mean, linearised
from aletheia.lab.statistics.rates import proportion
from aletheia.lab.statistics.results import Estimate, Floats

HELD_OUT = "heldout"
LOSSES = (HELD_OUT, "wikitext")  # lower is better: nats per token, and per word


@dataclass(frozen=True)
class Score:
    """A benchmark's score for one arm: mean over items and seeds with its interval, and the score of each seed."""

    model: str
    arm: str
    task: str
    estimate: Estimate
    by_seed: tuple[float, ...]


@dataclass(frozen=True)
class Difference:
    """``arm`` minus ``other`` on a benchmark, paired by item; ``gain`` is above zero if ``arm`` is better.

    ``margin`` is the verdict on the margin in the campaign file, if there is one. ``same_layers`` counts the seeds in
    which both arms adapt the same layers to the end.
    """

    model: str
    task: str
    arm: str
    other: str
    estimate: Estimate
    seeds: int
    same_layers: int
    margin: NonInferiority | None = None

    @property
    def gain(self) -> float:
        """The difference, with the sign that makes values above zero better."""
        return -self.estimate.value if self.task in LOSSES else self.estimate.value

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes zero."""
        interval = self.estimate.interval
        return interval is not None and not interval.low <= 0 <= interval.high

    @property
    def margin_verdict(self) -> str:
        """The verdict on the margin: shown, not shown, or worse by more; empty without a margin."""
        if self.margin is None:
            return ""
        interval = self.estimate.interval
        if interval is not None:
            best_gain = -interval.low if self.task in LOSSES else interval.high
            if best_gain < -self.margin.margin:
                return "worse by more"
        return self.margin.verdict


@dataclass(frozen=True)
class Curve:
    """Held-out loss of one run: (step, seconds of training, nats per token)."""

    model: str
    arm: str
    seed: int
    points: tuple[tuple[int, float, float], ...]


@dataclass(frozen=True)
class SingleAnswer:
    """An arm with one answer to nearly all items of a multiple-choice task; ``answer`` says which, and how often."""

    model: str
    arm: str
    task: str
    answer: str


@dataclass(frozen=True)
class BehaviourSummary:
    """Everything that the report of a behaviour campaign shows."""

    campaign: BehaviourCampaign
    scores: tuple[Score, ...]
    forgetting: tuple[Difference, ...]
    extra: tuple[Difference, ...]
    asked: tuple[Difference, ...]
    curves: tuple[Curve, ...]
    single_answers: tuple[SingleAnswer, ...]
    chosen: tuple[Chosen, ...]
    records: tuple[Record, ...]


@dataclass(frozen=True)
class _Items:
    """Values of a benchmark, one per item: 0 or 1, or a summed loss; ``weight`` is its number of tokens or words.

    ``digest`` identifies the items: only equal items are paired.
    """

    value: Floats
    weight: Floats
    cluster: tuple[str, ...] | None
    digest: str

    @property
    def score(self) -> float:
        return float(self.value.sum() / self.weight.sum())

    def less(self, other: "_Items | None" = None) -> Floats:
        """Values, or differences from ``other``, one per item, scaled so that their mean is that of the score."""
        return linearised(self.value - other.value if other else self.value, self.weight)


def summarize_behaviour(campaign: BehaviourCampaign, records: Sequence[Record]) -> BehaviourSummary:
    """Scores per arm, and differences from the base, from the baseline, and between arms to compare.

    Raises:
        CampaignError: the items of two arms differ.
    """
    by_arm = results_by_arm(records)
    tasks = [HELD_OUT, *campaign.tasks]
    items = {(model, arm, task): _items(by_arm[model, arm], task) for model, arm in by_arm for task in tasks}
    layers = {
        pair: {seed: result["layers"] for seed, result in results.items()}
        for pair, results in by_arm.items()
        if pair[1] != BASE
    }
    models = list(dict.fromkeys(model for model, _ in by_arm))
    trained = [arm.name for arm in campaign.arms]
    others = [name for name in trained if name != campaign.baseline]

    def compare(arms: Sequence[tuple[str, str]], with_margins: bool = False) -> tuple[Difference, ...]:
        wanted = [(model, task, *pair) for pair in arms for model in models for task in tasks]
        made = [
            _difference(campaign, model, task, arm, other, items, layers, with_margins)
            for model, task, arm, other in wanted
        ]
        return tuple(difference for difference in made if difference is not None)

    return BehaviourSummary(
        campaign,
        tuple(_score(*key, values) for key, values in items.items() if values),
        compare([(arm, BASE) for arm in trained]),
        compare([(arm, campaign.baseline) for arm in others], with_margins=True),
        compare(campaign.comparisons),
        tuple(
            _curve(model, arm, seed, result)
            for (model, arm), results in by_arm.items()
            for seed, result in results.items()
            if arm != BASE
        ),
        tuple(
            SingleAnswer(model, arm, task, answer)
            for (model, arm), results in by_arm.items()
            for task in tasks
            if (answer := single_answer(_answers(results, task)))
        ),
        tuple(chosen_layers(arm, model, results) for (model, arm), results in by_arm.items() if arm != BASE),
        tuple(records),
    )


def _items(results: Mapping[int, Mapping[str, Any]], task: str) -> dict[int, _Items]:
    """Items of a task by seed; seeds that did not run it are left out."""
    found = {}
    for seed, result in results.items():
        items = result["items"].get(task)
        if items is not None:
            value = np.asarray(items["value"], dtype=np.float64)
            weight = np.asarray(items.get("weight", np.ones(len(value))), dtype=np.float64)
            clusters = tuple(items.get("cluster", ()))
            clusters_or_none = clusters if len(set(clusters)) > 1 else None
            found[seed] = _Items(value, weight, clusters_or_none, items["digest"])
    return found


def _answers(results: Mapping[int, Mapping[str, Any]], task: str) -> Mapping[str, int]:
    """Answers summed over seeds; empty for tasks without choices, and for old rows that did not count them."""
    return sum((Counter(result["items"].get(task, {}).get("answers", {})) for result in results.values()), Counter())


def _score(model: str, arm: str, task: str, values: Mapping[int, _Items]) -> Score:
    first = next(iter(values.values()))
    estimate = crossed_mean([items.less() for items in values.values()], first.cluster)
    if task not in LOSSES and (len(values) == 1 or estimate.interval is None):
        right = np.mean([items.value for items in values.values()], axis=0)
        if first.cluster is None or estimate.interval is None:
            estimate = replace(proportion(round(float(right.sum())), len(right)), value=float(right.mean()))
    return Score(model, arm, task, estimate, tuple(items.score for items in values.values()))


def _difference(
    campaign: BehaviourCampaign,
    model: str,
    task: str,
    arm: str,
    other: str,
    items: Mapping[tuple[str, str, str], Mapping[int, _Items]],
    layers: Mapping[tuple[str, str], Mapping[int, Sequence[int]]],
    with_margin: bool,
) -> Difference | None:
    """The difference of two arms, paired by item; a base has one seed, which is used for all.

    Raises:
        CampaignError: the items differ.
    """
    ours, theirs = items.get((model, arm, task), {}), items.get((model, other, task), {})
    seeds = [seed for seed in ours if seed in theirs or other == BASE]
    if not seeds or not theirs:
        return None
    base = next(iter(theirs.values()))
    pairs = [(ours[seed], theirs.get(seed, base)) for seed in seeds]
    if {mine.digest for mine, _ in pairs} != {yours.digest for _, yours in pairs}:
        raise CampaignError(
            f"{task}: the items of {arm} and {other} on {model} differ, for example because lm-eval was "
            "updated; run the campaign in another folder"
        )
    changes = [mine.less(yours) for mine, yours in pairs]
    estimate = crossed_mean(changes, base.cluster)
    same = sum(layers.get((model, arm), {}).get(seed) == layers.get((model, other), {}).get(seed, ()) for seed in seeds)
    verdict = None
    margin = campaign.held_out_margin if task == HELD_OUT else campaign.tasks[task].margin  # type: ignore[index]
    if with_margin and margin is not None:
        verdict = _verdict(task, estimate, pairs, changes, margin)
    return Difference(model, task, arm, other, estimate, len(seeds), same, verdict)


def _verdict(
    task: str, estimate: Estimate, pairs: Sequence[tuple[_Items, _Items]], changes: Sequence[Floats], margin: float
) -> NonInferiority:
    """Whether the arm is worse by less than ``margin``, one-sided at 95 %.

    The bound is over items and seeds. For right-or-wrong items, the mean of each seed's bound counts if it is lower.
    """
    sign, level = -1.0 if task in LOSSES else 1.0, 0.95
    interval = crossed_mean(changes, pairs[0][1].cluster, 2 * level - 1).interval
    gain = sign * estimate.value
    half = None if interval is None else (interval.high - interval.low) / 2
    method = interval.method if interval else "none"
    if task not in LOSSES:
        seen = [non_inferiority_of_items(yours.value, mine.value, margin, yours.cluster) for mine, yours in pairs]
        halves = [found.difference - found.low for found in seen if found.low is not None]
        by_items = sum(halves) / len(halves)
        half, method = (by_items, "Tango's score") if half is None or by_items > half else (half, method)
    if half is None:
        reason = estimate.reason
        return NonInferiority(
            "cannot be shown at this size", gain, None, margin, None, level, estimate.n, "none", reason
        )
    verdict: Verdict = "cannot be shown at this size" if margin <= half else "not shown"
    if gain - half > -margin:
        verdict = "shown"
    return NonInferiority(verdict, gain, gain - half, margin, half, level, estimate.n, method)


def _curve(model: str, arm: str, seed: int, result: Mapping[str, Any]) -> Curve:
    points = tuple((int(step), float(seconds), float(loss)) for step, seconds, loss in result["held_out_curve"])
    return Curve(model, arm, seed, points)
