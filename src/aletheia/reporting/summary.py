"""The sentences and numbers at the head of a report: the outcome of a run, and how it compares with another."""

from collections.abc import Sequence

from aletheia.planning.plan import layer_ranges
from aletheia.reporting.comparison import SAME_LOSS, Speed, differences, total_speed, train_speed
from aletheia.reporting.format import (
    human_bytes,
    human_count,
    human_loss,
    human_percent,
    human_ratio,
    human_seconds,
    rank_summary,
)
from aletheia.reporting.times import learning_layers
from aletheia.runs.schema import Metrics, Run


def alone(run: Run) -> str:
    """One run in a few sentences."""
    metrics = run.metrics
    before, after = metrics.held_out_loss_before, metrics.held_out_loss_after
    moved = "fell" if after < before else "rose" if after > before else "stayed"
    change = f"from {human_loss(before)} to {human_loss(after)}" if after != before else f"at {human_loss(before)}"
    sentences = [
        f"The held-out loss {moved} {change} nats per token.",
        f"{_layers(run)} learned for {metrics.steps:,} steps.",
    ]
    if early := learning_layers(run)[1]:
        sentences.append(f"Layers {layer_ranges(early)} learned in the first {metrics.early_steps:,} only.")
    if metrics.steps_saved:
        planned = metrics.planned_steps or metrics.steps
        sentences.append(f"Training ended before the planned {planned:,} steps, because the loss no longer fell.")
    if metrics.kept_step not in (None, metrics.steps) or metrics.kept_scale != 1:
        strength = f" at {metrics.kept_scale:g} of its strength" if metrics.kept_scale != 1 else ""
        sentences.append(f"The adapter of step {metrics.kept_step or metrics.steps:,} was kept{strength}.")
    total = human_seconds(metrics.seconds.total)
    sentences.append(f"The run took {total} in all, {human_seconds(metrics.seconds.train)} of it training.")
    return " ".join(sentences)


def _layers(run: Run) -> str:
    count, lasting = run.plan.layer_count, learning_layers(run)[0]
    if len(lasting) == count:
        return f"All {count} layers"
    return f"Layer{'s' * (len(lasting) > 1)} {layer_ranges(lasting)} of {count}"


def against(run: Run, reference: Run, label: str, other: str) -> str:
    """One run compared with the reference. A ratio is given only if both did the same work on the same machine."""
    return f"{_times(run, reference, label, other)} {_losses(run.metrics, reference.metrics, [reference, run])}"


def _times(run: Run, reference: Run, label: str, other: str) -> str:
    training, total = train_speed(run, reference), total_speed(run, reference)
    if not training.is_alike:
        took = f"{label} trained in {human_seconds(training.seconds)}."
        return f"{took} No ratio to {other} is given, because the two runs are not comparable."
    if training.speedup is None:
        return f"{label} trained in {human_seconds(training.seconds)}. No ratio is given: a run was not timed."
    return (
        f"{label} trained {_how_fast(training)} as {other}: {_seconds(training)}. "
        f"With everything counted it took {_seconds(total)}, {_how_fast(total)}."
    )


def _how_fast(speed: Speed) -> str:
    """``1.58 times as fast``, or for a slower run ``1.33 times as long``, which nobody reads as a gain."""
    ratio = speed.speedup or 1.0
    return f"{ratio:.2f} times as fast" if ratio >= 1 else f"{1 / ratio:.2f} times as long"


def _seconds(speed: Speed) -> str:
    return f"{human_seconds(speed.seconds)} against {human_seconds(speed.reference_seconds)}"


def _losses(metrics: Metrics, goal: Metrics, runs: Sequence[Run]) -> str:
    before, after = human_loss(metrics.held_out_loss_before), human_loss(metrics.held_out_loss_after)
    if differences(runs, SAME_LOSS):
        return f"Its held-out loss went from {before} to {after} nats per token."
    against = human_loss(goal.held_out_loss_after)
    return f"It ended at a held-out loss of {after} against {against} nats per token, from {before} before training."


def warning(run: Run) -> str | None:
    """Why the adapter is useless; None if it is not."""
    metrics = run.metrics
    before, after = human_loss(metrics.held_out_loss_before), human_loss(metrics.held_out_loss_after)
    if metrics.verdict == "worse":
        return (
            f"training made the model worse. Its held-out loss rose from {before} to {after} nats per token. "
            "Try a lower learning rate, fewer steps or more rows."
        )
    if metrics.verdict == "nothing":
        return (
            f"nothing was learned in {metrics.steps:,} steps. The held-out loss is {after} nats per token, as before. "
            "Try more steps or a higher learning rate."
        )
    return None


def chosen_words(run: Run) -> str:
    """How many layers a plan adapts, by which policy, and their share of the score."""
    plan, (lasting, early) = run.plan, learning_layers(run)
    total = sum(plan.layer_scores)
    words = f"{_layers(run)} learn to the end."
    if total and len(lasting) < plan.layer_count:
        words += f" They hold {human_percent(sum(plan.layer_scores[n] for n in lasting) / total)} of the summed score."
    if early:
        words += f" Layers {layer_ranges(early)} learn in the first {run.metrics.early_steps:,} steps, then freeze."
    if lasting[0]:
        words += f" No backward pass runs below layer {lasting[0]}{' from then on' if early else ''}."
    return f"{words} Policy: {plan.settings.policy}."


def cards(runs: Sequence[Run], labels: Sequence[str]) -> list[dict[str, str]]:
    """The numbers to see first: of a single run, or of the second run against the first; none for more runs."""
    last = runs[-1].metrics
    loss = {"name": "Held-out loss", "value": human_loss(last.held_out_loss_after)}
    trainable = {"name": "Trainable parameters", "value": human_count(last.trainable_parameters)}
    if len(runs) == 1:
        steps = f"{last.steps:,} steps" + (f", {last.steps_saved:,} saved" if last.steps_saved else "")
        training = f"{human_seconds(last.seconds.train)} of it training, {steps}"
        return [
            loss | {"note": f"from {human_loss(last.held_out_loss_before)}, nats per token"},
            {"name": "Total time", "value": human_seconds(last.seconds.total), "note": training},
            trainable | {"note": rank_summary(runs[0].plan.adapters)},
            {"name": "Peak memory", "value": human_bytes(last.peak_memory_bytes), "note": last.settings.device},
        ]
    training_speed, total = train_speed(runs[1], runs[0]), total_speed(runs[1], runs[0])
    if len(runs) > 2 or training_speed.speedup is None:
        return []
    first = runs[0].metrics
    return [
        loss | {"note": f"against {human_loss(first.held_out_loss_after)} for {labels[0]}"},
        {"name": "Training speed", "value": human_ratio(training_speed.speedup), "note": _seconds(training_speed)},
        {"name": "Overall speed", "value": human_ratio(total.speedup), "note": _seconds(total)},
        trainable | {"note": f"against {human_count(first.trainable_parameters)} for {labels[0]}"},
    ]
