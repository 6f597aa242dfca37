"""The page of a behaviour campaign."""

import math
from collections.abc import Sequence

from aletheia.lab.campaign.behaviour_summary import (
    HELD_OUT,
    LOSSES,
    BehaviourSummary,
    Difference,
    Score,
    summarize_behaviour,
)
from aletheia.lab.campaign.spec import BASE, BehaviourCampaign
from aletheia.lab.campaign.store import Record
from aletheia.lab.reporting.chosen_layers import layer_blocks
from aletheia.lab.reporting.figures_of_campaigns import curves_svg
from aletheia.lab.statistics.results import Estimate
from aletheia.reporting.blocks import Block, Card, Figure, Page, Table
from aletheia.reporting.format import human_count, human_seconds

UNITS = {HELD_OUT: "nats per token", "wikitext": "nats per word"}
POINTS = "points"  # of 100, for shares of right answers


def behaviour_page(campaign: BehaviourCampaign, records: Sequence[Record]) -> Page:
    """Verdict, scores, forgetting, arms against each other, and what cannot be shown at these sizes."""
    summary = summarize_behaviour(campaign, records)
    done = sum(record.status == "done" for record in records)
    on = " on {}" if len(campaign.models) > 1 else ""
    cards = [Card("Rows", f"{done}", f"of {len(records)} done")]
    cards += [
        Card(
            f"{found.arm} against {found.other}{on.format(found.model)}",
            _amount(found.task, found.estimate.value),
            "held-out loss, nats",
        )
        for found in summary.asked
        if found.task == HELD_OUT
    ]
    return Page(f"Campaign {campaign.name}: behaviour", _verdict(summary), tuple(cards), tuple(_blocks(summary)))


def _verdict(summary: BehaviourSummary) -> str:
    """Each arm against the baseline with its margin, then the pairs that were asked about, whatever the answer is."""
    extra = [found for found in summary.extra if found.task == HELD_OUT and found.margin is not None]
    asked = [found for found in summary.asked if found.task == HELD_OUT]
    return " ".join([*_against_baseline(extra), *map(_sentence, asked)]) or "No two arms have finished yet."


def _against_baseline(extra: Sequence[Difference]) -> list[str]:
    """One sentence a model: who is not worse by more than the margin."""
    told = []
    for model in dict.fromkeys(found.model for found in extra):
        own = [found for found in extra if found.model == model]
        arms = ", ".join(
            f"{found.arm} {_amount(found.task, found.estimate.value)} ({found.margin_verdict})" for found in own
        )
        margin = next(found.margin.margin for found in own if found.margin is not None)
        told.append(
            f"No worse than {own[0].other} on {model} by more than {_size_of(HELD_OUT, margin)} nats of held-out loss "
            f"per token: {arms}."
        )
    return told


def _sentence(found: Difference) -> str:
    named = f"{found.arm} against {found.other} on {found.model}"
    told = f"{_amount(found.task, found.estimate.value)} nats of held-out loss per token"
    interval = found.estimate.interval
    if interval is None:
        same = "; both chose the same layers in every run" if found.same_layers == found.seeds else ""
        return f"{named}: {told} ({found.estimate.reason}{same})."
    between = f"{_amount(found.task, interval.low)} to {_amount(found.task, interval.high)}"
    if found.same_layers == found.seeds:
        same = "both chose the same layers in every run, so it is not selection that differs"
        return f"{named}: {told} ({between}); {same}."
    if not found.is_clear:
        return (
            f"{named}: {told} ({between}), so {found.estimate.n} rows and {found.seeds} "
            f"seed{'s' if found.seeds > 1 else ''} cannot tell them apart."
        )
    return f"{named}: {told} ({between}), so {found.arm} is {'better' if found.gain > 0 else 'worse'}."


def _blocks(summary: BehaviourSummary) -> list[Block]:
    campaign = summary.campaign
    matched = "as many steps" if campaign.match == "steps" else "as many steps as cost what the baseline's cost"
    items = "Differences are paired by item; intervals are over items and seeds, with one seed over items alone"
    blocks: list[Block] = [
        Figure(
            "Held-out loss against steps",
            curves_svg(summary.curves, "behaviour-steps", "steps"),
            f"A line per run, the same colour per arm{_before(summary)}.",
        ),
        Figure(
            "Held-out loss against wall-clock",
            curves_svg(summary.curves, "behaviour-seconds", "seconds"),
            "Seconds of the optimizer steps alone. Every arm takes the fast step here, the baseline too, and rows that "
            "run side by side slow each other down: the speed campaign is what measures time.",
        ),
        _scores(
            summary,
            f"Every arm takes {matched}. Mean over seeds and items with 95 % intervals.{_single_answers(summary)}",
        ),
        _differences(
            "Forgetting",
            summary.forgetting,
            f"Tuned minus base; below zero (above, for losses) is forgetting. {items}, clustered by subject for MMLU.",
        ),
        _margins(summary.extra, campaign.baseline),
        _differences("Arms against each other", summary.asked, f"{items}. No correction for asking several."),
    ]
    return [*blocks, *layer_blocks(summary.chosen), _training(summary)]


def _before(summary: BehaviourSummary) -> str:
    """What the loss was before training, which the lines leave out for their ends to be told apart."""
    scores = [score for score in summary.scores if (score.arm, score.task) == (BASE, HELD_OUT)]
    told = ", ".join(f"{score.estimate.value:.3f} ({score.model})" for score in scores)
    return f". Before training: {told}" if told else ""


def _single_answers(summary: BehaviourSummary) -> str:
    """Which arms' accuracy says little."""
    on = " on {}" if len(summary.campaign.models) > 1 else ""
    told = [
        f"{found.arm}{on.format(found.model)} answers {found.told} of {found.task}" for found in summary.single_answers
    ]
    return f" Accuracy says little where nearly all items get one answer: {'; '.join(told)}." if told else ""


def _scores(summary: BehaviourSummary, note: str) -> Table:
    tasks = [HELD_OUT, *summary.campaign.tasks]
    by_key = {(score.model, score.arm, score.task): score for score in summary.scores}
    pairs = list(dict.fromkeys((score.model, score.arm) for score in summary.scores))
    rows = [
        (model, arm, *(_score_words(by_key.get((model, arm, task)), task) for task in tasks)) for model, arm in pairs
    ]
    columns = ("model", "arm", *(f"{task} ({UNITS.get(task, '%')})" for task in tasks))
    return Table("Scores before and after", columns, rows, note)


def _score_words(score: Score | None, task: str) -> str:
    """``0.712 (0.690 to 0.734), 192 items, 3 seeds``."""
    if score is None:
        return "not run"
    found, digits, scale = score.estimate, 3 if task in LOSSES else 1, 1 if task in LOSSES else 100
    value = f"{scale * found.value:.{digits}f}"
    if task == "wikitext":
        value = f"{value} (perplexity {math.exp(min(found.value, 700)):.1f})"
    interval = found.interval
    bounds = f" ({scale * interval.low:.{digits}f} to {scale * interval.high:.{digits}f})" if interval else ""
    seeds = len(score.by_seed)
    return f"{value}{bounds}, {found.n} items, {seeds} seed{'s' if seeds > 1 else ''}"


def _differences(title: str, differences: Sequence[Difference], note: str) -> Table:
    has_layers = any(found.other != BASE for found in differences)  # a base adapts none
    rows = [
        (
            found.task,
            found.model,
            found.arm,
            found.other,
            f"{_amount(found.task, found.estimate.value)} {UNITS.get(found.task, POINTS)}",
            _bounds(found.task, found.estimate),
            _size(found),
            *([f"{found.same_layers} of {found.seeds}"] if has_layers else []),
        )
        for found in differences
    ]
    columns = ("task", "model", "arm", "against", "difference", "95 % interval", "items x seeds")
    return Table(title, (*columns, "same layers") if has_layers else columns, rows, note)


def _margins(differences: Sequence[Difference], baseline: str) -> Table:
    rows = []
    for found in differences:
        verdict = found.margin
        limits = ("no margin was fixed", "", "")
        if verdict is not None:
            smallest = "" if verdict.smallest_margin is None else _size_of(found.task, verdict.smallest_margin)
            limits = (_size_of(found.task, verdict.margin), found.margin_verdict, smallest)
        rows.append(
            (
                found.task,
                found.model,
                found.arm,
                f"{_amount(found.task, found.estimate.value)} {UNITS.get(found.task, POINTS)}",
                _bounds(found.task, found.estimate),
                _size(found),
                *limits,
            )
        )
    columns = (
        *("task", "model", "arm", f"difference to {baseline}", "95 % interval", "items x seeds", "margin"),
        *("not worse by more", "smallest margin that this size can show"),
    )
    note = (
        f"Tuned with the arm minus tuned with {baseline}, which is extra forgetting turned round. The margin was fixed "
        "in the campaign file; each verdict is one-sided at 95 %, not corrected for there being several."
    )
    return Table("Extra forgetting, and whether it stays within the margin", columns, rows, note)


def _amount(task: str, value: float) -> str:
    """Signed: nats with four decimals, or points of 100 with one."""
    return f"{value:+.4f}" if task in LOSSES else f"{100 * value:+.1f}"


def _size_of(task: str, value: float) -> str:
    return f"{value:.4f}" if task in LOSSES else f"{100 * value:.1f}"


def _bounds(task: str, found: Estimate) -> str:
    if found.interval is None:
        return found.reason
    return f"{_amount(task, found.interval.low)} to {_amount(task, found.interval.high)}"


def _size(found: Difference) -> str:
    return f"{found.estimate.n} x {found.seeds}"


def _training(summary: BehaviourSummary) -> Table:
    rows = [
        (
            record.row.model,
            record.row.arm,
            str(record.row.seed),
            str(record.result["steps"]),
            str(record.result["early_steps"]),
            human_count(record.result["trainable_parameters"]),
            f"{record.result['learning_rate']:.2g}",
            record.result["cache"],
            *(human_seconds(record.result["seconds"][phase]) for phase in ("probe", "cache", "train")),
        )
        for record in summary.records
        if record.result is not None and "steps" in record.result
    ]
    columns = (
        "model",
        "arm",
        "seed",
        "steps",
        "early",
        "parameters",
        "rate",
        "cache",
        "probe",
        "filling",
        "train",
    )
    return Table("Training", columns, rows, "A cache that an earlier row has filled costs the next one nothing.")
