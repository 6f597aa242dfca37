"""The page of a speed campaign."""

from collections.abc import Sequence

from aletheia.lab.campaign.spec import SpeedCampaign
from aletheia.lab.campaign.speed_summary import Comparison, SpeedSummary, summarize_speed
from aletheia.lab.campaign.store import Record
from aletheia.lab.reporting.chosen_layers import layer_blocks
from aletheia.lab.reporting.figures_of_campaigns import Scale
from aletheia.lab.statistics.results import Estimate
from aletheia.reporting.blocks import Block, Card, Page, Panels, Table
from aletheia.reporting.format import human_count, human_percent, human_ratio, human_seconds

SUBJECT = "depth-aware"  # the arm that the verdict is about, if the campaign has it
PAPER = "23.1 % of the time saved on average, 15 to 28 %, faster on 14 of 14 models, p < 0.001 (200 steps, 3 seeds)"


def speed_page(campaign: SpeedCampaign, records: Sequence[Record]) -> Page:
    """The verdict, speed tables, a table per model, and the chosen layers."""
    summary = summarize_speed(campaign, records)
    arms = [arm.name for arm in campaign.arms if arm.name != campaign.baseline]
    subject = SUBJECT if SUBJECT in arms else (arms[-1] if arms else campaign.baseline)
    step = next((found for found in summary.step_comparisons if found.arm == subject), None)
    run = next((found for found in summary.run_comparisons if found.arm == subject), None)
    return Page(
        f"Campaign {campaign.name}: speed",
        _verdict(summary, subject, step, run),
        _cards(summary, step, run),
        tuple(_blocks(summary)),
    )


def _verdict(summary: SpeedSummary, subject: str, step: Comparison | None, run: Comparison | None) -> str:
    baseline = summary.campaign.baseline
    if step is None or run is None:
        return f"No arm can be compared with {baseline}: no model has rows of both."
    wins = round(step.wins.value * step.models)
    random = len({r.row.model for r in summary.records if r.result and r.result["random_weights"]})
    sentences = [
        f"{subject} takes a step {ratio_words(step.speedup)} times as fast as {baseline} over {step.models} models.",
        f"A whole run of {summary.campaign.steps} steps, probe and cache counted, is {ratio_words(run.speedup)} times "
        "as fast.",
        f"It is faster on {wins} of {step.models} models, {p_words(step.corrected)} after Holm's correction.",
        *([f"{random} of the models are small, with random weights."] if random else []),
    ]
    return " ".join(sentences)


def _cards(summary: SpeedSummary, step: Comparison | None, run: Comparison | None) -> tuple[Card, ...]:
    done = sum(record.status == "done" for record in summary.records)
    cards = [Card("Rows", f"{done}", f"of {len(summary.records)} done")]
    if step and run:
        cards += [
            Card("Step time saved", human_percent(step.time_saved.value), percent_interval(step.time_saved)),
            Card("Run time saved", human_percent(run.time_saved.value), percent_interval(run.time_saved)),
            Card("The paper's", "23.1 %", "15 to 28 % over its 14 models"),
        ]
    return tuple(cards)


def _blocks(summary: SpeedSummary) -> list[Block]:
    campaign = summary.campaign
    blocks: list[Block] = [
        _comparisons(
            f"Steps, against {campaign.baseline}",
            summary.step_comparisons,
            f"Geometric mean over models of the step time of {campaign.baseline} divided by the arm's. "
            f"Right of the line is faster. The paper: {PAPER}. "
            f"Times come from {campaign.rounds} rounds per seed in one process; each arm takes one step per round.",
            is_titled=True,
        ),
        _comparisons(
            f"Whole runs, against {campaign.baseline}",
            summary.run_comparisons,
            f"{campaign.steps} steps over {campaign.rows} rows, computed from measured parts: the steps, the probe if "
            "the arm needs scores and, if it reads a cache, the layers below the boundary once per row.",
            is_titled=True,
        ),
        _models(summary),
    ]
    if summary.asked_steps:
        note = "No correction for several comparisons. If both chose the same layers, only their training differs."
        blocks.append(_comparisons("Arms against each other: steps", summary.asked_steps, note))
        blocks.append(_comparisons("Arms against each other: whole runs", summary.asked_runs, note))
    random = "Random weights know no task: the layers chosen in random models say nothing about real ones."
    return [*blocks, *layer_blocks(summary.chosen, random)]


def _comparisons(title: str, comparisons: Sequence[Comparison], note: str, is_titled: bool = False) -> Table:
    """A table of comparisons, the fastest first; ``is_titled`` if the title names the common reference."""
    ordered = sorted(comparisons, key=lambda found: -found.speedup.value)
    corrected = any(found.corrected is not None for found in ordered)
    columns = (
        *("arm", "speed-up (95 % interval)", "time saved (95 % interval)", "faster on"),
        *("p, sign flips", *(["after Holm"] if corrected else []), "p, Wilcoxon", "same layers"),
    )
    rows = [
        (
            found.arm if is_titled else f"{found.arm} against {found.other}",
            ratio_words(found.speedup),
            percent_words(found.time_saved),
            f"{round(found.wins.value * found.models)} of {found.models} models",
            p_value(found.sign_flip),
            *([p_value(found.corrected)] if corrected else []),
            p_value(found.wilcoxon),
            f"{found.same_layers} of {found.runs} runs",
        )
        for found in ordered
    ]
    scale = Scale.around([found.speedup for found in ordered], equal=1.0)
    drawn = tuple(scale.row(found.speedup, more_is_better=True) for found in ordered)
    return Table(title, columns, rows, note, drawn, scale.head)


def _models(summary: SpeedSummary) -> Panels:
    """A table per model, the fastest arm first, all on one scale."""
    sizes = {
        record.row.model: record.result["model_parameters"] for record in summary.records if record.result is not None
    }
    others = [found for found in summary.models if found.arm != summary.campaign.baseline]
    scale = Scale.around([found.step for found in others], equal=1.0)
    columns = ("arm", "steps (95 % interval)", "predicted", "whole run (95 % interval)", "takes")
    tables = []
    for model in dict.fromkeys(found.model for found in others):
        own = sorted((found for found in others if found.model == model), key=lambda found: -found.step.value)
        rows = [
            (
                found.arm,
                ratio_words(found.step),
                human_ratio(found.predicted).removesuffix("x"),
                ratio_words(found.run),
                human_seconds(found.run_seconds),
            )
            for found in own
        ]
        drawn = tuple(scale.row(found.step, more_is_better=True) for found in own)
        title = f"{model}, {human_count(sizes[model])} parameters"
        tables.append(Table(title, columns, rows, drawn=drawn, scale=scale.head))
    note = (
        f"Speed relative to {summary.campaign.baseline} in the same rounds. Intervals are Student's t on logarithms of "
        f"one ratio per seed, over {len(summary.campaign.seeds)} seeds. 'predicted' comes from counted operations."
    )
    return Panels("Model by model", tables, note)


def ratio_words(found: Estimate) -> str:
    """``2.31 (2.10 to 2.52)``, or the figure and why it has no interval."""
    if found.interval is None:
        return f"{found.value:.2f} (no interval: {found.reason})"
    return f"{found.value:.2f} ({found.interval.low:.2f} to {found.interval.high:.2f})"


def percent_words(found: Estimate) -> str:
    """``23 % (21 to 25)``."""
    return f"{human_percent(found.value)} ({percent_interval(found).replace(' %', '')})"


def percent_interval(found: Estimate) -> str:
    """``21 % to 25 %``, or why not."""
    if found.interval is None:
        return found.reason
    return f"{human_percent(found.interval.low)} to {human_percent(found.interval.high)}"


def p_value(value: float | None) -> str:
    """Two digits, never 0."""
    return "" if value is None else f"{value:.2g}" if value >= 1e-4 else "< 0.0001"


def p_words(value: float | None) -> str:
    """``p = 0.0006``."""
    if value is None:
        return "not corrected"
    return f"p {'< 0.0001' if value < 1e-4 else f'= {value:.2g}'}"
