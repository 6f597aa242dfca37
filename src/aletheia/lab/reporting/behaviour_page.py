"""The page of a behaviour campaign."""

import math
from collections.abc import Sequence
from statistics import fmean

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
from aletheia.lab.reporting.figures_of_campaigns import CurvePanels, Scale
from aletheia.lab.statistics.results import Estimate
from aletheia.reporting.blocks import Block, Card, Figure, Page, Panels, Table
from aletheia.reporting.format import human_count, human_seconds

UNITS = {HELD_OUT: "nats per token", "wikitext": "nats per word"}
NAMES = {HELD_OUT: "Held-out loss"}
VERDICTS = {"cannot be shown at this size": "too few items"}  # short forms for a table column
INTERVAL = "difference (95 % interval)"
POINTS = "points"  # percentage points, for shares of right answers


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
    """Each arm against the baseline with its margin, then the pairs to compare, whatever the result is."""
    on = " on {}" if len(summary.campaign.models) > 1 else ""
    extra = [found for found in summary.extra if found.task == HELD_OUT and found.margin is not None]
    asked = [found for found in summary.asked if found.task == HELD_OUT]
    sentences = [*_against_baseline(extra, on), *(_sentence(found, on.format(found.model)) for found in asked)]
    return " ".join(sentences) or "No two arms have finished yet."


def _against_baseline(extra: Sequence[Difference], on: str) -> list[str]:
    """For each model, the question about the margin, and the verdict on each arm."""
    sentences = []
    for model in dict.fromkeys(found.model for found in extra):
        own = [found for found in extra if found.model == model]
        margin = next(found.margin.margin for found in own if found.margin is not None)
        sentences.append(
            f"Is an arm worse than {own[0].other}{on.format(model)} by at most {_size_of(HELD_OUT, margin)} nats of "
            "held-out loss per token?"
        )
        for verdict in dict.fromkeys(found.margin_verdict for found in own):
            arms = ", ".join(found.arm for found in own if found.margin_verdict == verdict)
            sentences.append(f"{verdict.capitalize()}: {arms}.")
    return sentences


def _sentence(found: Difference, on: str) -> str:
    if found.same_layers == found.seeds:
        same = "chose the same layers in every run, so selection explains no difference"
        return f"{found.arm} and {found.other} {same}{on}."
    if found.estimate.interval is None:
        return f"{found.arm} against {found.other}{on} has no interval: {found.estimate.reason}."
    if not found.is_clear:
        sizes = f"{found.estimate.n} rows and {_seeds(found.seeds)}"
        return f"{sizes} show no difference between {found.arm} and {found.other}{on}."
    return f"{found.arm} is {'better' if found.gain > 0 else 'worse'} than {found.other}{on}."


def _blocks(summary: BehaviourSummary) -> list[Block]:
    campaign = summary.campaign
    matched = "as many steps" if campaign.match == "steps" else "as many steps as the FLOPs of the baseline's run allow"
    items = "Differences are paired by item. Intervals are over items and seeds, or over items alone with one seed"
    blocks: list[Block] = [
        _curves(summary),
        _against_baseline_by_task(summary.extra, campaign.baseline),
        _scores(
            summary,
            f"Every arm takes {matched}. Mean over seeds and items with 95 % intervals.{_single_answers(summary)}",
        ),
        _differences(
            "Forgetting",
            summary.forgetting,
            f"Tuned minus base; below zero (above, for losses) is forgetting. {items}, clustered by subject for MMLU.",
        ),
        _differences(
            "Arms against each other", summary.asked, f"{items}. There is no correction for several comparisons."
        ),
    ]
    return [*blocks, *layer_blocks(summary.chosen), _training(summary)]


def _curves(summary: BehaviourSummary) -> Panels:
    """A panel per model and arm, sorted by their last loss, the lowest first."""
    panels = []
    for at, model in enumerate(dict.fromkeys(curve.model for curve in summary.curves)):
        own = [curve for curve in summary.curves if curve.model == model]
        ends = {
            arm: fmean(curve.points[-1][2] for curve in own if curve.arm == arm)
            for arm in dict.fromkeys(curve.arm for curve in own)
        }
        drawing = CurvePanels(own, f"curves-{at}")
        on = f" on {model}" if len(summary.campaign.models) > 1 else ""
        panels += [
            Figure(f"{arm}{on}", drawing.svg(arm, is_first=order == 0), f"{ends[arm]:.3f} at the end")
            for order, arm in enumerate(sorted(ends, key=lambda arm: ends[arm]))
        ]
    scores = [score for score in summary.scores if (score.arm, score.task) == (BASE, HELD_OUT)]
    before = ", ".join(f"{score.estimate.value:.3f} ({score.model})" for score in scores)
    note = (
        "Nats per token by optimizer step, a line per seed. Grey lines show all arms of the model. The axis does not "
        "start at zero and leaves out the loss before training" + (f": {before}." if before else ".")
    )
    return Panels("Held-out loss while training", panels, note)


def _single_answers(summary: BehaviourSummary) -> str:
    """A sentence about arms whose accuracy says little."""
    on = " on {}" if len(summary.campaign.models) > 1 else ""
    answers = [
        f"{found.arm}{on.format(found.model)} answers {found.answer} of {found.task}"
        for found in summary.single_answers
    ]
    return f" Accuracy says little if nearly all items get one answer: {'; '.join(answers)}." if answers else ""


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
    return f"{value}{bounds}, {found.n} items, {_seeds(len(score.by_seed))}"


def _differences(title: str, differences: Sequence[Difference], note: str) -> Panels:
    """A table per task and model, the best difference first."""
    tables = []
    on = _on(differences)
    for found in _by_task(differences):
        pairs = any(each.other != BASE for each in found)  # a base adapts no layers
        rows = [
            (
                f"{each.arm} against {each.other}" if pairs else each.arm,
                _words(each),
                *([f"{each.same_layers} of {each.seeds}"] if pairs else []),
            )
            for each in found
        ]
        tables.append(_forest((INTERVAL, *(["same layers"] if pairs else [])), rows, found, on))
    return Panels(title, tables, note)


def _against_baseline_by_task(differences: Sequence[Difference], baseline: str) -> Panels:
    """A table per task and model, the best arm first, with the margin of the campaign file and the verdict on it."""
    tables = []
    on = _on(differences)
    for found in _by_task(differences):
        rows = []
        for each in found:
            limits = ("no margin", "")
            if each.margin is not None:
                smallest = each.margin.smallest_margin
                limits = (
                    VERDICTS.get(each.margin_verdict, each.margin_verdict),
                    "" if smallest is None else _size_of(each.task, smallest),
                )
            rows.append((each.arm, _words(each), *limits))
        margin = found[0].margin
        within = f"worse by {_size_of(found[0].task, margin.margin)} at most" if margin else "margin"
        tables.append(_forest((INTERVAL, within, "could show"), rows, found, on))
    note = (
        f"Tuned with the arm minus tuned with {baseline}. The dotted line is the margin in the campaign file. Each "
        "verdict is one-sided at 95 %, without correction for several verdicts. 'could show' is the smallest margin "
        "that the interval allows."
    )
    return Panels(f"Against {baseline}", tables, note)


def _by_task(differences: Sequence[Difference]) -> list[list[Difference]]:
    """The differences of each task and model, the best gain first."""
    found: dict[tuple[str, str], list[Difference]] = {}
    for each in differences:
        found.setdefault((each.task, each.model), []).append(each)
    return [sorted(own, key=lambda each: -each.gain) for own in found.values()]


def _on(differences: Sequence[Difference]) -> str:
    """How a title names the model; empty if there is only one."""
    return " on {}" if len({each.model for each in differences}) > 1 else ""


def _forest(columns: Sequence[str], rows: Sequence[tuple[str, ...]], found: Sequence[Difference], on: str) -> Table:
    """The differences of one task and model, each drawn with its interval."""
    first = found[0]
    is_loss = first.task in LOSSES
    margin = first.margin.margin * (1 if is_loss else -1) if first.margin else None
    scale = Scale.around([each.estimate for each in found], 0.0, margin, unit=1 if is_loss else 100)
    drawn = tuple(scale.row(each.estimate, more_is_better=not is_loss) for each in found)
    sizes = ", ".join(dict.fromkeys(f"{each.estimate.n} items x {_seeds(each.seeds)}" for each in found))
    task = f"{NAMES.get(first.task, first.task)}{on.format(first.model)}"
    title = f"{task}, {UNITS.get(first.task, POINTS)}: {sizes}"
    return Table(title, ("arm", *columns), rows, drawn=drawn, scale=scale.head)


def _seeds(count: int) -> str:
    return f"{count} seed{'s' if count > 1 else ''}"


def _words(found: Difference) -> str:
    """``+0.0159 (+0.0102 to +0.0216)``, or why there is no interval."""
    return f"{_amount(found.task, found.estimate.value)} ({_bounds(found.task, found.estimate)})"


def _amount(task: str, value: float) -> str:
    """Signed: nats with four decimals, or percentage points with one."""
    return f"{value:+.4f}" if task in LOSSES else f"{100 * value:+.1f}"


def _size_of(task: str, value: float) -> str:
    return f"{value:.4f}" if task in LOSSES else f"{100 * value:.1f}"


def _bounds(task: str, found: Estimate) -> str:
    if found.interval is None:
        return found.reason
    return f"{_amount(task, found.interval.low)} to {_amount(task, found.interval.high)}"


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
    return Table("Training", columns, rows, "A cache that an earlier row filled costs later rows nothing.")
