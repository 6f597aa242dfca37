"""From scores to a plan: choose the layers, give their modules ranks, predict the cost."""

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from aletheia.anatomy.schema import Module
from aletheia.errors import PlanError
from aletheia.files import package_versions
from aletheia.planning.cost import LayerCosts, layer_costs, measured_costs
from aletheia.planning.frontier import FrontierPoint, frontier, point
from aletheia.planning.memory import known_weights, lowest_boundary, training_bytes
from aletheia.planning.plan import Adapter, Plan, PlanSettings, Policy, Prediction, RankMode
from aletheia.planning.policies import layer_share, select_layers
from aletheia.planning.ranks import ranks_by_role, ranks_by_score, ranks_uniform
from aletheia.probing.scores import Scores

PAPER_MLP_RANK = 64  # asymmetric ranks of the published method: attention 16, MLP 64
PAPER_SPEEDUP = 1.30  # 23.1 % of the time saved, its mean over 14 models


def plan(
    scores: Scores,
    policy: Policy = "depth-aware",
    percent: float = 50,
    rank: int = 16,
    ranks: RankMode = "uniform",
    attention_rank: int | None = None,
    mlp_rank: int | None = None,
    alpha: float | None = None,
    seed: int = 0,
    speedup: float | None = None,
    quality_first: bool = False,
    epochs: float = 1.0,
    routers: bool = False,
    max_memory: int | None = None,
    batch_tokens: int = 4096,
    labelled_share: float = 1.0,
    freeze_after: float = 0.0,
) -> Plan:
    """Choose layers and ranks for the model that ``scores`` were measured on.

    Args:
        scores: what a probe measured.
        policy: how layers are chosen, see :func:`aletheia.planning.policies.select_layers`.
        percent: share of the layers, in (0, 100]; for ``depth-aware`` the time of adapting the last such share.
        rank: LoRA rank; for ``by-score`` it sets the parameter budget.
        ranks: ``uniform``, ``by-role`` (attention 16, MLP 64 unless given) or ``by-score``.
        attention_rank: rank of attention modules; implies ``by-role``.
        mlp_rank: rank of all other modules; implies ``by-role``.
        alpha: alpha at ``rank``, by default 2 x rank; every adapter keeps the ratio alpha / rank.
        seed: of the ``random`` policy.
        speedup: for ``depth-aware``: the most importance at this predicted speed-up over uniform LoRA in plain PEFT.
        quality_first: the most importance at the published method's mean saving, a ``speedup`` of 1.30.
        epochs: passes over the data that the time is counted for; after the first, the prefix comes from its cache.
        routers: adapt the routers of a mixture of experts, too, where they are modules that LoRA can adapt.
        max_memory: bytes that training may take in all, from a filled prefix cache: bounds the lowest adapted layer.
        batch_tokens: tokens of the largest training batch, for ``max_memory``.
        labelled_share: the most of them that carry a label, for ``max_memory``.
        freeze_after: share of a run's steps in which all other layers learn, too, before they freeze as they are, in
            [0, 1). ``aletheia train`` and :func:`aletheia.train` follow that; other loops adapt them to the end.

    Raises:
        PlanError: a setting is out of range, settings contradict each other, or no plan is as fast as asked.
    """
    if quality_first:
        if speedup is not None:
            raise PlanError("--speedup and --quality-first are both given; expected one of them")
        speedup = PAPER_SPEEDUP
    settings = _settings(policy, percent, rank, ranks, attention_rank, mlp_rank, alpha, seed, speedup, epochs)
    settings = settings.model_copy(update={"routers": routers})
    anatomy = scores.anatomy
    adaptable = anatomy.adaptable(routers)
    costs = _costs(scores, settings, _nominal_ranks(adaptable, settings))
    lowest = 0 if max_memory is None else _lowest(scores, settings, adaptable, max_memory, batch_tokens, labelled_share)
    _check_freeze(freeze_after, lowest)
    settings = settings.model_copy(update={"freeze_after": freeze_after})
    rest, later_speedup = _after_freeze(scores, costs, settings, lowest)
    layers = select_layers(policy, scores.layers, percent, seed, costs, rest, later_speedup, lowest)
    every = range(anatomy.layer_count)
    early = tuple(layer for layer in every if layer not in layers) if freeze_after else ()
    wanted = {*layers, *early}
    chosen = [module for module in adaptable if module.layer in wanted]
    by_name = _allocate(chosen, scores, settings)
    actual = _costs(scores, settings, {**_nominal_ranks(adaptable, settings), **by_name})
    made = point(scores.layers, actual, layers, rest)
    return Plan(
        model=scores.model,
        data=scores.data,
        probe=scores.probe,
        packages=package_versions(),
        settings=settings,
        layer_count=anatomy.layer_count,
        layers=layers,
        early_layers=early,
        predicted=Prediction(
            relative_step_time=made.relative_step_time,
            relative_cached_step_time=made.relative_cached_step_time,
            relative_early_step_time=actual.step(every) / actual.baseline if early else None,
            baseline_step_seconds=actual.baseline if scores.timings else None,
            captured_importance=made.captured_importance,
        ),
        layer_scores=scores.layers,
        adapters=tuple(_adapter(module, by_name[module.name], settings) for module in chosen),
    )


def _check_freeze(share: float, lowest: int) -> None:
    if not 0 <= share < 1:
        raise PlanError(f"--freeze-after is {share:g}; expected a share of the steps, at least 0 and below 1")
    if share > 0 and lowest > 0:
        raise PlanError(
            f"--freeze-after is {share:g}, but layers below {lowest} cannot be trained in --max-memory; expected 0 here"
        )


def _after_freeze(scores: Scores, costs: LayerCosts, settings: PlanSettings, lowest: int) -> tuple[float, float | None]:
    """Passes over the data that are left once the early layers freeze, and the speed-up those steps must have."""
    share, speedup = settings.freeze_after, settings.speedup
    rest = settings.epochs * (1 - share)
    if speedup is None:
        return rest, None
    early = share * costs.step(range(scores.anatomy.layer_count)) / costs.baseline
    fastest = frontier(scores.layers, costs, rest, lowest)[0].relative_run_time
    if early + (1 - share) * fastest > (1 + 1e-9) / speedup:
        told = f" after {share:.0%} of the steps with every layer" if share else ""
        raise PlanError(
            f"--speedup is {speedup:g}; the fastest choice of layers{told} is predicted at "
            f"{1 / (early + (1 - share) * fastest):.2f}x; expected at most that"
        )
    return rest, (1 - share) / (1 / speedup - early)


def _lowest(
    scores: Scores,
    settings: PlanSettings,
    adaptable: Sequence[Module],
    max_memory: int,
    batch_tokens: int,
    labelled_share: float,
) -> int:
    """The lowest layer from which on the model can be trained in ``max_memory``."""
    given = scores.anatomy, known_weights(scores)
    if batch_tokens < 1:
        raise PlanError(f"--batch-tokens is {batch_tokens}; expected at least 1")
    ranks = _nominal_ranks(adaptable, settings)
    found = lowest_boundary(*given, ranks, batch_tokens, labelled_share, max_memory)
    if found is None:
        least = training_bytes(*given, [scores.anatomy.layer_count - 1], ranks, batch_tokens, labelled_share)
        raise PlanError(
            f"--max-memory is {max_memory / 1e9:.1f} GB; the last layer alone takes {least / 1e9:.1f} GB to train; "
            "expected at least that; take smaller batches, shorter rows or less rank"
        )
    return found


def plan_frontier(
    scores: Scores,
    rank: int = 16,
    ranks: RankMode = "uniform",
    attention_rank: int | None = None,
    mlp_rank: int | None = None,
    epochs: float = 1.0,
    routers: bool = False,
    max_memory: int | None = None,
    batch_tokens: int = 4096,
    freeze_after: float = 0.0,
) -> list[FrontierPoint]:
    """Every undominated choice of layers, fastest first: predicted time of ``epochs`` passes against importance.

    Arguments are those of :func:`plan`.

    Raises:
        PlanError: a setting is out of range.
    """
    settings = _settings("depth-aware", 100, rank, ranks, attention_rank, mlp_rank, None, 0, None, epochs)
    settings = settings.model_copy(update={"freeze_after": freeze_after})
    adaptable = scores.anatomy.adaptable(routers)
    costs = _costs(scores, settings, _nominal_ranks(adaptable, settings))
    lowest = 0 if max_memory is None else _lowest(scores, settings, adaptable, max_memory, batch_tokens, 1.0)
    _check_freeze(freeze_after, lowest)
    rest, _ = _after_freeze(scores, costs, settings, lowest)
    early = freeze_after * costs.step(range(scores.anatomy.layer_count)) / costs.baseline
    return [
        replace(choice, relative_run_time=early + (1 - freeze_after) * choice.relative_run_time)
        for choice in frontier(scores.layers, costs, rest, lowest)
    ]


def _settings(
    policy: Policy,
    percent: float,
    rank: int,
    ranks: RankMode,
    attention_rank: int | None,
    mlp_rank: int | None,
    alpha: float | None,
    seed: int,
    speedup: float | None,
    epochs: float,
) -> PlanSettings:
    if policy not in get_args(Policy):
        raise PlanError(f"unknown policy {policy!r}; expected one of {', '.join(get_args(Policy))}")
    if ranks not in get_args(RankMode):
        raise PlanError(f"unknown rank mode {ranks!r}; expected one of {', '.join(get_args(RankMode))}")
    layer_share(1, percent)
    for flag, value in (("--rank", rank), ("--attention-rank", attention_rank), ("--mlp-rank", mlp_rank)):
        if value is not None and value < 1:
            raise PlanError(f"{flag} is {value}; expected at least 1")
    if alpha is not None and not 0 < alpha < float("inf"):
        raise PlanError(f"--alpha is {alpha:g}; expected a positive number")
    for flag, amount, least in (("--speedup", speedup, 0.0), ("--epochs", epochs, 0.0)):
        if amount is not None and not least < amount < float("inf"):
            raise PlanError(f"{flag} is {amount:g}; expected a positive number")
    if speedup is not None and policy != "depth-aware":
        raise PlanError(f"--speedup and --quality-first go with '--policy depth-aware', not with {policy}")
    if attention_rank is not None or mlp_rank is not None:
        if ranks == "by-score":
            raise PlanError("--attention-rank and --mlp-rank go with '--ranks by-role', not with by-score")
        ranks = "by-role"
    if ranks == "by-role":
        attention_rank = attention_rank or rank
        mlp_rank = mlp_rank or PAPER_MLP_RANK
    return PlanSettings(
        policy=policy,
        percent=percent,
        ranks=ranks,
        rank=rank,
        attention_rank=attention_rank,
        mlp_rank=mlp_rank,
        alpha=2 * rank if alpha is None else alpha,
        seed=seed,
        speedup=speedup,
        epochs=epochs,
    )


def _nominal_ranks(modules: Sequence[Module], settings: PlanSettings) -> dict[str, int]:
    """Ranks before scores are looked at, for the cost of layers not chosen yet."""
    if settings.attention_rank is not None and settings.mlp_rank is not None:
        return ranks_by_role(modules, settings.attention_rank, settings.mlp_rank)
    return ranks_uniform(modules, settings.rank)


def _allocate(chosen: Sequence[Module], scores: Scores, settings: PlanSettings) -> dict[str, int]:
    if settings.ranks == "by-score":
        budget_params = sum(module.lora_parameters(settings.rank) for module in chosen)
        return ranks_by_score(chosen, scores.modules, budget_params)
    return _nominal_ranks(chosen, settings)


def _tokens_per_row(scores: Scores) -> float:
    return scores.probe.tokens / (scores.probe.batches * scores.probe.batch_size)


def _costs(scores: Scores, settings: PlanSettings, ranks: dict[str, int]) -> LayerCosts:
    """Seconds where the probe was calibrated, operations otherwise."""
    if scores.timings is not None:
        return measured_costs(scores.anatomy, ranks, settings.rank, scores.timings)
    labelled = scores.probe.labelled_tokens / scores.probe.tokens
    return layer_costs(scores.anatomy, ranks, settings.rank, _tokens_per_row(scores), labelled)


def _adapter(module: Module, rank: int, settings: PlanSettings) -> Adapter:
    return Adapter(
        name=module.name,
        layer=module.layer,
        role=module.role,
        rank=rank,
        alpha=settings.alpha * rank / settings.rank,
        fused=module.fused,
        parameters=module.lora_parameters(rank),
    )
