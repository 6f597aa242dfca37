"""A plan in words and as a short table: what learns and why, what it gives up, and what it saves."""

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from aletheia.planning.plan import Adapter, Plan, layer_ranges, leaf
from aletheia.reporting.format import alpha_summary, human_count, human_percent, human_ratio, human_seconds

WHY = {
    "depth-aware": "they hold the most score for the time they take",
    "top-percent": "they have the highest scores",
    "bottom": "they have the lowest scores",
    "last": "they are the last of the model",
    "first": "they are the first of the model",
    "random": "they were drawn at random",
}
WORTH_EXPLAINING = 1.01  # a speed-up that needs a reason when every layer learns


def plan_sentences(plan: Plan) -> tuple[str, str]:
    """A sentence about what was chosen and why, and one about what that gives up."""
    learning, others = layer_ranges(plan.layers), set(range(plan.layer_count)) - set(plan.layers)
    share, rest = human_percent(_share(plan, plan.layers)), human_percent(_share(plan, others))
    if plan.reason:
        chosen = plan.reason
    elif not others:
        chosen = "Every layer learns to the end."
    elif plan.early_layers:
        first = human_percent(plan.freeze_after)
        chosen = f"Every layer learns for the first {first} of the steps, then only layers {learning}."
    else:
        chosen = f"Only layers {learning} learn: {WHY.get(plan.settings.policy or '', 'as given')}."
    if not others:
        return chosen, "It gives up nothing."
    what = "freeze then" if plan.early_layers else "never learn"
    return chosen, f"Layers {learning} hold {share} of the score. The others, with {rest}, {what}."


def speed_sentence(plan: Plan) -> str:
    """The predicted speed against plain LoRA, and where it comes from if every layer learns."""
    predicted = plan.predicted
    run = predicted.run_speedup or predicted.speedup
    text = f"Predicted: {human_ratio(run)} as fast as uniform LoRA in plain PEFT and Trainer over the run."
    if len(plan.layers) < plan.layer_count or run < WORTH_EXPLAINING:
        return text
    if predicted.baseline_step_seconds is None:
        return f"{text} That comes from the language model head, which is computed at labelled tokens only."
    return (
        f"{text} That comes from shortcuts, not from the choice of layers: logits at labelled tokens only, batches of "
        "rows of similar length, adapters in fewer operations."
    )


def plan_view(plan: Plan, head: RenderableType) -> RenderableType:
    """``head``, the sentences, a row per group of layers that learn alike, and predicted step times."""
    settings = plan.settings
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    parts = f"alpha {alpha_summary(settings)}; {human_count(plan.trainable_parameters)} trainable parameters"
    grid.add_row("policy", Text(_policy(plan)))
    grid.add_row("adapters", Text(parts))
    chosen, given_up = plan_sentences(plan)
    text = Text(f"{chosen} {given_up} {speed_sentence(plan)}")
    return Group(head, Text(), text, Text(), _layers(plan), Text(), _steps(plan), Text(), grid)


def ranks_text(adapters: Iterable[Adapter]) -> str:
    """Ranks and the modules that have them: ``16: q, k, v, o; 64: gate, up, down``."""
    by_leaf: dict[str, set[int]] = {}
    for adapter in adapters:
        by_leaf.setdefault(leaf(adapter.name).removesuffix("_proj"), set()).add(adapter.rank)
    by_rank: dict[tuple[int, int], list[str]] = {}
    for name, ranks in by_leaf.items():
        by_rank.setdefault((min(ranks), max(ranks)), []).append(name)
    return "; ".join(
        f"{low if low == high else f'{low}-{high}'}: {', '.join(names)}" for (low, high), names in by_rank.items()
    )


def _layers(plan: Plan) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("layers", "score", "learn", "rank: modules"):
        table.add_column(name, justify="right" if name == "score" else "left", overflow="fold")
    never = sorted(set(range(plan.layer_count)) - {*plan.layers, *plan.early_layers})
    early = f"first {human_percent(plan.freeze_after)} of the steps"
    for layers, when in ((plan.layers, "to the end"), (plan.early_layers, early), (never, "never")):
        if layers:
            own = [adapter for adapter in plan.adapters if adapter.layer in layers]
            share = human_percent(_share(plan, layers))
            table.add_row(layer_ranges(layers), share, when, Text(ranks_text(own)))
    return table


def _steps(plan: Plan) -> Table:
    """A table of the predicted time of each kind of step."""
    predicted = plan.predicted
    kinds: list[tuple[str, float | None]] = [
        ("while every layer learns", predicted.relative_early_step_time),
        ("first pass over the rows" if plan.boundary else "every step", predicted.relative_step_time),
        ("later passes, from the cache", predicted.relative_cached_step_time if plan.boundary else None),
        ("uniform LoRA in plain PEFT", 1.0),
    ]
    seconds = predicted.baseline_step_seconds
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("predicted step" + ("" if seconds else ", by operations"))
    table.add_column("time" if seconds else "", justify="right")
    table.add_column("speed", justify="right")
    for name, relative in kinds:
        if relative is not None:
            table.add_row(name, human_seconds(relative * seconds) if seconds else "", human_ratio(1 / relative))
    return table


def _share(plan: Plan, layers: Iterable[int]) -> float:
    """The share of the summed scores in ``layers``."""
    total = sum(plan.layer_scores)
    listed: Sequence[int] = list(layers)
    return sum(plan.layer_scores[layer] for layer in listed) / total if total else len(listed) / plan.layer_count


def _policy(plan: Plan) -> str:
    settings = plan.settings
    share = "" if settings.policy == "uniform" else f", {settings.percent:g} %"
    seed = f", seed {settings.seed}" if settings.policy == "random" else ""
    return f"{settings.policy}{share}{seed}; ranks {settings.ranks}"
