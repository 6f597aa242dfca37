"""Rank allocation: which rank each adapted module gets."""

import heapq
from collections.abc import Mapping, Sequence

from aletheia.anatomy.schema import Module
from aletheia.errors import PlanError

RANK_STEP = 4


def ranks_uniform(modules: Sequence[Module], rank: int) -> dict[str, int]:
    """The same rank everywhere."""
    return {module.name: rank for module in modules}


def ranks_by_role(modules: Sequence[Module], attention_rank: int, mlp_rank: int) -> dict[str, int]:
    """The published asymmetric ranks: one for attention, another for everything else [arXiv:2604.15351]."""
    return {module.name: attention_rank if module.role == "attention" else mlp_rank for module in modules}


def ranks_by_score(modules: Sequence[Module], scores: Mapping[str, float | None], budget_params: int) -> dict[str, int]:
    """Ranks proportional to score, multiples of 4, within a budget of trainable parameters.

    Every module starts at rank 4. Steps of 4 then go, one by one, to the module with the highest
    ``score / (rank + 2)``. This is Sainte-Laguë's divisor method, which rounds shares to the nearest step. A module
    stops when its next step exceeds the budget, or when its rank would exceed the smaller side of the matrix.

    Raises:
        PlanError: the budget does not cover rank 4 everywhere.
    """
    ranks = ranks_uniform(modules, RANK_STEP)
    spent = sum(module.lora_parameters(RANK_STEP) for module in modules)
    if spent > budget_params:
        raise PlanError(
            f"rank {RANK_STEP} on every selected module needs {spent:,} parameters, but the budget is "
            f"{budget_params:,}; expected a `rank` of at least {RANK_STEP} where `ranks` is by-score"
        )
    by_name = {module.name: module for module in modules}

    def place(name: str) -> tuple[float, float, str]:
        score = scores[name] or 0.0
        return (
            -score / (ranks[name] + RANK_STEP / 2),
            -score,
            name,
        )  # if both quotients underflow to 0, the larger score

    queue = [place(name) for name in ranks if scores[name]]  # an expert that received no token stays at rank 4
    heapq.heapify(queue)
    while queue:
        *_, name = heapq.heappop(queue)
        module = by_name[name]
        cost = module.lora_parameters(RANK_STEP)
        too_large = ranks[name] + RANK_STEP > min(module.in_features, module.out_features)
        if too_large or spent + cost > budget_params:
            continue  # this module is done: neither limit ever loosens
        ranks[name] += RANK_STEP
        spent += cost
        heapq.heappush(queue, place(name))
    return ranks
