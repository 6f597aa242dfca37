"""From scores to a plan: choose the layers, give their modules ranks, predict the cost."""

from collections.abc import Sequence
from typing import get_args

from aletheia.anatomy.schema import Anatomy, Module
from aletheia.errors import PlanError
from aletheia.files import package_versions
from aletheia.planning.cost import LayerCosts, layer_costs
from aletheia.planning.frontier import FrontierPoint, captured_importance, frontier
from aletheia.planning.plan import Adapter, Plan, PlanSettings, Policy, Prediction, RankMode
from aletheia.planning.policies import layer_share, select_layers
from aletheia.planning.ranks import ranks_by_role, ranks_by_score, ranks_uniform
from aletheia.probing.scores import Scores

PAPER_MLP_RANK = 64  # asymmetric ranks of the published method: attention 16, MLP 64


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
) -> Plan:
    """Choose layers and ranks for the model that ``scores`` were measured on.

    Args:
        scores: what a probe measured.
        policy: how layers are chosen, see :func:`aletheia.planning.policies.select_layers`.
        percent: share of the layers, in (0, 100]; for ``depth-aware`` the step time of the last such share.
        rank: LoRA rank; for ``by-score`` it sets the parameter budget.
        ranks: ``uniform``, ``by-role`` (attention 16, MLP 64 unless given) or ``by-score``.
        attention_rank: rank of attention modules; implies ``by-role``.
        mlp_rank: rank of all other modules; implies ``by-role``.
        alpha: alpha at ``rank``, by default 2 x rank; every adapter keeps the ratio alpha / rank.
        seed: of the ``random`` policy.

    Raises:
        PlanError: a setting is out of range, or settings contradict each other.
    """
    settings = _settings(policy, percent, rank, ranks, attention_rank, mlp_rank, alpha, seed)
    anatomy = scores.anatomy
    costs = _costs(scores, settings)
    layers = select_layers(policy, scores.layers, percent, seed, costs)
    wanted = set(layers)
    chosen = [module for module in anatomy.modules if module.layer in wanted]
    by_name = _allocate(chosen, scores, settings)
    actual = layer_costs(anatomy, {**_nominal_ranks(anatomy.modules, settings), **by_name}, _tokens_per_row(scores))
    return Plan(
        model=scores.model,
        data=scores.data,
        probe=scores.probe,
        packages=package_versions(),
        settings=settings,
        layer_count=anatomy.layer_count,
        layers=layers,
        predicted=Prediction(
            relative_step_time=actual.step(layers) / _uniform_step(scores, settings),
            captured_importance=captured_importance(scores.layers, layers),
        ),
        layer_scores=scores.layers,
        adapters=tuple(_adapter(module, by_name[module.name], settings) for module in chosen),
    )


def plan_frontier(
    scores: Scores,
    rank: int = 16,
    ranks: RankMode = "uniform",
    attention_rank: int | None = None,
    mlp_rank: int | None = None,
) -> list[FrontierPoint]:
    """Every undominated choice of layers, fastest first: predicted step time against captured importance.

    Raises:
        PlanError: a setting is out of range.
    """
    settings = _settings("depth-aware", 100, rank, ranks, attention_rank, mlp_rank, None, 0)
    return frontier(scores.layers, _costs(scores, settings))


def _settings(
    policy: Policy,
    percent: float,
    rank: int,
    ranks: RankMode,
    attention_rank: int | None,
    mlp_rank: int | None,
    alpha: float | None,
    seed: int,
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


def _costs(scores: Scores, settings: PlanSettings) -> LayerCosts:
    return layer_costs(scores.anatomy, _nominal_ranks(scores.anatomy.modules, settings), _tokens_per_row(scores))


def _uniform_step(scores: Scores, settings: PlanSettings) -> float:
    """Cost of a step of the baseline: ``settings.rank`` on every module of every layer."""
    anatomy: Anatomy = scores.anatomy
    return layer_costs(anatomy, ranks_uniform(anatomy.modules, settings.rank), _tokens_per_row(scores)).uniform


def _adapter(module: Module, rank: int, settings: PlanSettings) -> Adapter:
    return Adapter(
        name=module.name,
        layer=module.layer,
        role=module.role,
        rank=rank,
        alpha=settings.alpha * rank / settings.rank,
        parameters=module.lora_parameters(rank),
    )
