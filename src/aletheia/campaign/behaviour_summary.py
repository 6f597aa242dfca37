"""What a behaviour campaign found, from its store alone: scores, forgetting, arms against arms. Torch-free.

Values of an item are averaged over the seeds that both sides have, so an interval is over items (clustered where they
come in groups), and what seeds do beyond that is shown beside it, never mixed in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aletheia.campaign.spec import BASE, BehaviourCampaign
from aletheia.campaign.speed_summary import Chosen, chosen_layers
from aletheia.campaign.store import Record
from aletheia.statistics.margins import NonInferiority, non_inferiority, non_inferiority_of_items
from aletheia.statistics.means import mean
from aletheia.statistics.results import Estimate, Floats

HELD_OUT = "heldout"
LOSSES = (HELD_OUT, "wikitext")  # lower is better: nats per token, and per word


@dataclass(frozen=True)
class Score:
    """A benchmark's figure for one arm: mean over items and seeds, its interval over items, and seed by seed."""

    model: str
    arm: str
    task: str
    estimate: Estimate
    by_seed: tuple[float, ...]


@dataclass(frozen=True)
class Difference:
    """``arm`` minus ``other`` on a benchmark, paired by item; ``better`` says which way is better.

    ``margin`` is the verdict on the margin that the campaign file fixed, where it fixed one.
    """

    model: str
    task: str
    arm: str
    other: str
    estimate: Estimate
    seeds: int
    margin: NonInferiority | None = None

    @property
    def gain(self) -> float:
        """The difference turned so that above zero is better."""
        return -self.estimate.value if self.task in LOSSES else self.estimate.value

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        interval = self.estimate.interval
        return interval is not None and not interval.low <= 0 <= interval.high


@dataclass(frozen=True)
class Curve:
    """Held-out loss of one run: (step, seconds of training, nats per token)."""

    model: str
    arm: str
    seed: int
    points: tuple[tuple[int, float, float], ...]


@dataclass(frozen=True)
class BehaviourSummary:
    """Everything that the report of a behaviour campaign shows."""

    campaign: BehaviourCampaign
    scores: tuple[Score, ...]
    forgetting: tuple[Difference, ...]
    extra: tuple[Difference, ...]
    asked: tuple[Difference, ...]
    curves: tuple[Curve, ...]
    chosen: tuple[Chosen, ...]
    records: tuple[Record, ...]


@dataclass(frozen=True)
class _Items:
    """Values of a benchmark, one per item: 0 or 1, or a loss; ``weight`` is what a loss is summed over."""

    value: Floats
    weight: Floats
    cluster: tuple[str, ...] | None

    @property
    def score(self) -> float:
        return float(self.value.sum() / self.weight.sum())


def summarize_behaviour(campaign: BehaviourCampaign, records: Sequence[Record]) -> BehaviourSummary:
    """Scores per arm, and differences to the base, to the baseline, and between the arms that were asked about."""
    found = {record.row: record.result for record in records if record.result is not None}
    by_arm: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for row, result in found.items():
        by_arm.setdefault((row.model, row.arm), {})[row.seed] = result
    tasks = [HELD_OUT, *campaign.tasks]
    items = {(model, arm, task): _items(by_arm[model, arm], task) for model, arm in by_arm for task in tasks}
    models = list(dict.fromkeys(model for model, _ in by_arm))
    trained = [arm.name for arm in campaign.arms]
    others = [name for name in trained if name != campaign.baseline]

    def compare(arms: Sequence[tuple[str, str]], with_margins: bool = False) -> tuple[Difference, ...]:
        wanted = [(model, task, arm, other) for arm, other in arms for model in models for task in tasks]
        made = [
            _difference(campaign, model, task, arm, other, items, with_margins) for model, task, arm, other in wanted
        ]
        return tuple(difference for difference in made if difference is not None)

    return BehaviourSummary(
        campaign,
        tuple(_score(*key, values) for key, values in items.items() if values),
        compare([(arm, BASE) for arm in trained]),
        compare([(arm, campaign.baseline) for arm in others], with_margins=True),
        compare(campaign.comparisons),
        tuple(_curve(row.model, row.arm, row.seed, result) for row, result in found.items() if row.arm != BASE),
        tuple(chosen_layers(arm, model, results) for (model, arm), results in by_arm.items() if arm != BASE),
        tuple(records),
    )


def _items(results: Mapping[int, Mapping[str, Any]], task: str) -> dict[int, _Items]:
    """By seed; seeds that did not run the task are left out."""
    found = {}
    for seed, result in results.items():
        told = result["items"].get(task)
        if told is not None:
            value = np.asarray(told["value"], dtype=np.float64)
            weight = np.asarray(told.get("weight", np.ones(len(value))), dtype=np.float64)
            clusters = tuple(told.get("cluster", ()))
            found[seed] = _Items(value, weight, clusters if len(set(clusters)) > 1 else None)
    return found


def _score(model: str, arm: str, task: str, values: Mapping[int, _Items]) -> Score:
    first = next(iter(values.values()))
    summed = np.mean([items.value for items in values.values()], axis=0)
    share = first.weight.mean()
    ratio = float(summed.sum() / first.weight.sum())
    # a ratio of sums, linearised: its spread is that of what rows deviate from it
    spread = mean((summed - ratio * first.weight) / share + ratio, first.cluster)
    return Score(model, arm, task, spread, tuple(items.score for items in values.values()))


def _difference(
    campaign: BehaviourCampaign,
    model: str,
    task: str,
    arm: str,
    other: str,
    items: Mapping[tuple[str, str, str], Mapping[int, _Items]],
    with_margin: bool,
) -> Difference | None:
    """Paired by item; a base has one seed, which stands for all."""
    ours, theirs = items.get((model, arm, task), {}), items.get((model, other, task), {})
    seeds = [seed for seed in ours if seed in theirs or other == BASE]
    if not seeds or not theirs:
        return None
    base = next(iter(theirs.values()))
    pairs = [(ours[seed], theirs.get(seed, base)) for seed in seeds]
    weight = base.weight.mean()
    changes = np.mean([(mine.value - yours.value) / weight for mine, yours in pairs], axis=0)
    estimate = mean(changes, base.cluster)
    margin = campaign.held_out_margin if task == HELD_OUT else campaign.tasks[task].margin  # type: ignore[index]
    verdict = None
    if with_margin and margin is not None:
        if task not in LOSSES and len(pairs) == 1:
            verdict = non_inferiority_of_items(pairs[0][1].value, pairs[0][0].value, margin, base.cluster)
        else:
            verdict = non_inferiority(-changes if task in LOSSES else changes, margin, base.cluster)
    return Difference(model, task, arm, other, estimate, len(seeds), verdict)


def _curve(model: str, arm: str, seed: int, result: Mapping[str, Any]) -> Curve:
    points = tuple((int(step), float(seconds), float(loss)) for step, seconds, loss in result["held_out_curve"])
    return Curve(model, arm, seed, points)
