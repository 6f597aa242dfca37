"""From scores to a plan: choose the layers, give their modules ranks, predict the cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from aletheia.anatomy.schema import Anatomy, Module
from aletheia.errors import AdapterError, PlanError, SettingsError
from aletheia.files import package_versions
from aletheia.planning.activations import Step
from aletheia.planning.cost import LayerCosts, layer_costs, measured_costs, run_time
from aletheia.planning.frontier import FrontierPoint, point
from aletheia.planning.memory import is_resident, known_weights, lowest_boundary, step_of, training_bytes
from aletheia.planning.plan import PERCENT, Adapter, Plan, PlanSettings, Prediction, check_dropout, leaf
from aletheia.planning.policies import Candidates, layer_share, select_layers
from aletheia.planning.ranks import ranks_by_role, ranks_by_score, ranks_uniform
from aletheia.planning.targets import BALANCED_SHARE, TARGETS, Target
from aletheia.probing.scores import Scores


def plan(
    scores: Scores,
    settings: PlanSettings | None = None,
    *,
    max_memory: int | None = None,
    batch_tokens: int = 4096,
    labelled_share: float = 1.0,
    step: Step | None = None,
    **options: Any,
) -> Plan:
    """Choose layers and ranks for the model that ``scores`` were measured on.

    Args:
        scores: what a probe measured.
        settings: which layers and modules are adapted, and how; None takes every default.
        max_memory: bytes that training may take in all, which bounds the lowest adapted layer. Weights larger than half
            of it are assumed to be streamed, so those below the boundary take no memory.
        batch_tokens: tokens of the largest training batch, for ``max_memory``.
        labelled_share: largest share of these tokens that carries a label, for ``max_memory``.
        step: the whole description of that batch, in place of ``batch_tokens`` and ``labelled_share``.
        options: fields of :class:`aletheia.planning.plan.PlanSettings`, in place of ``settings``:
            ``plan(scores, policy="last", rank=4)``.

    Raises:
        SettingsError: a setting is out of range or unknown, or contradicts another.
        PlanError: the model has no such modules, memory is too small, or no plan is as fast as asked.
    """
    draft = _draft(
        scores, _given(settings, options), _Room(max_memory, step or _step(scores, batch_tokens, labelled_share))
    )
    settings, candidates = draft.settings, draft.candidates
    layers = select_layers(settings, candidates)
    early = tuple(layer for layer in candidates.layers if layer not in layers) if settings.freeze_after else ()
    wanted = {*layers, *early}
    chosen = [module for module in draft.modules if module.layer in wanted]
    check_dropout(settings.dropout, [module.name for module in chosen if module.fused])
    by_name = _allocate(chosen, scores, settings)
    actual = _costs(scores, settings, {**_nominal_ranks(draft.modules, settings), **by_name})
    made = point(scores.layers, actual, layers, candidates.epochs)
    share = (settings.freeze_after or 0.0) if early else 0.0
    return Plan(
        model=scores.model,
        data=scores.data,
        tokenizer=scores.tokenizer,
        probe=scores.probe,
        packages=package_versions(),
        settings=settings,
        layer_count=scores.anatomy.layer_count,
        layers=layers,
        early_layers=early,
        reason=draft.reason,
        predicted=Prediction(
            relative_step_time=made.relative_step_time,
            relative_cached_step_time=made.relative_cached_step_time,
            relative_early_step_time=actual.step(candidates.layers) / actual.baseline if early else None,
            relative_run_time=run_time(actual, candidates.layers, layers, share, settings.epochs or 1.0),
            baseline_step_seconds=actual.baseline if scores.timings else None,
            captured_importance=made.captured_importance,
        ),
        layer_scores=scores.layers,
        adapters=tuple(_adapter(module, by_name[module.name], settings) for module in chosen),
    )


def plan_targets(
    scores: Scores, settings: PlanSettings | None = None, *, batch_tokens: int = 4096
) -> dict[Target, Plan]:
    """The plan for each target, with the other settings as given; arguments and errors as in :func:`plan`."""
    given = settings or PlanSettings()
    return {
        target: plan(scores, given.model_copy(update={"target": target}), batch_tokens=batch_tokens)
        for target in TARGETS
    }


def plan_frontier(
    scores: Scores,
    settings: PlanSettings | None = None,
    *,
    max_memory: int | None = None,
    batch_tokens: int = 4096,
    **options: Any,
) -> list[FrontierPoint]:
    """Every undominated choice of layers, fastest first: predicted time of a run against importance.

    Arguments are those of :func:`plan`; settings that choose the layers have no effect here.

    Raises:
        SettingsError: a setting is out of range or unknown, or contradicts another.
        PlanError: the model has no such modules, or memory is too small.
    """
    given = _given(settings, options).model_copy(update={"speedup": None})
    draft = _draft(scores, given, _Room(max_memory, _step(scores, batch_tokens, 1.0)))
    candidates, share = draft.candidates, draft.settings.freeze_after or 0.0
    early = share * candidates.costs.step(candidates.layers) / candidates.costs.baseline
    return [
        replace(choice, relative_run_time=early + (1 - share) * choice.relative_run_time)
        for choice in candidates.frontier
    ]


def every_layer_bytes(scores: Scores, settings: PlanSettings, step: Step) -> int | None:
    """Peak bytes while all layers that ``settings`` may adapt learn at once; None if weight sizes are not known."""
    if scores.weight_bytes is None:
        return None
    modules = _targeted(scores.anatomy, settings)
    ranks = _nominal_ranks(modules, settings.resolved())
    layers = range(min(module.layer for module in modules), scores.anatomy.layer_count)
    return training_bytes(scores.anatomy, scores.weight_bytes, layers, ranks, step)


def plan_of_adapters(scores: Scores, settings: PlanSettings, adapters: Mapping[str, tuple[int, float]]) -> Plan:
    """The plan that describes existing ``adapters``: rank and alpha by full name. All of them learn to the end.

    Raises:
        AdapterError: an adapter sits outside the matrices of the decoder layers.
    """
    modules = {module.name: module for module in scores.anatomy.modules}
    if outside := sorted(adapters.keys() - modules.keys()):
        raise AdapterError(
            f"the adapter changes {outside[0]}, which is not a matrix of a decoder layer; expected LoRA on those "
            "alone; set `fresh` to merge it into its base"
        )
    settings = settings.resolved()
    ranks = {name: rank for name, (rank, _) in adapters.items()}
    chosen = [module for module in scores.anatomy.modules if module.name in adapters]
    layers = tuple(sorted({module.layer for module in chosen}))
    costs = _costs(scores, settings, {**_nominal_ranks(scores.anatomy.modules, settings), **ranks})
    made = point(scores.layers, costs, layers, settings.epochs or 1.0)
    return Plan(
        model=scores.model,
        data=scores.data,
        probe=scores.probe,
        packages=package_versions(),
        settings=settings,
        layer_count=scores.anatomy.layer_count,
        layers=layers,
        predicted=Prediction(
            relative_step_time=made.relative_step_time,
            relative_cached_step_time=made.relative_cached_step_time,
            captured_importance=made.captured_importance,
        ),
        layer_scores=scores.layers,
        adapters=tuple(
            _adapter(module, ranks[module.name], settings).model_copy(update={"alpha": adapters[module.name][1]})
            for module in chosen
        ),
    )


def _step(scores: Scores, batch_tokens: int, labelled_share: float) -> Step:
    if batch_tokens < 1:
        raise PlanError(f"`batch_tokens` is {batch_tokens}; expected at least 1")
    return step_of(scores, batch_tokens, labelled_share)


@dataclass(frozen=True)
class _Room:
    """The memory that training may take, if bounded, and the step that has to fit."""

    max_memory: int | None
    step: Step

    def lowest(self, scores: Scores, ranks: dict[str, int]) -> int:
        """The lowest layer that, with all layers above it, can be trained in this memory."""
        if self.max_memory is None:
            return 0
        weights = known_weights(scores)
        resident = is_resident(weights, self.max_memory) if self.step.resident is None else self.step.resident
        step = replace(self.step, resident=resident)
        found = lowest_boundary(scores.anatomy, weights, ranks, step, self.max_memory)
        if found is None:
            last = [scores.anatomy.layer_count - 1]
            least = training_bytes(scores.anatomy, weights, last, ranks, step)
            raise PlanError(
                f"`max_memory` is {self.max_memory / 1e9:.1f} GB, but training the last layer alone takes "
                f"{least / 1e9:.1f} GB; expected at least that; use smaller batches, shorter rows or a lower rank"
            )
        return found


@dataclass(frozen=True)
class _Draft:
    """A plan before its layers are chosen: settings with defaults filled in, and what may be adapted."""

    settings: PlanSettings
    modules: Sequence[Module]
    candidates: Candidates
    reason: str


def _given(settings: PlanSettings | None, options: dict[str, Any]) -> PlanSettings:
    if settings is None:
        return PlanSettings(**options)
    if not isinstance(settings, PlanSettings):
        raise SettingsError(
            f"`settings` is {settings!r}; expected PlanSettings, or their fields by name, such as policy='last'"
        )
    if options:
        names = ", ".join(f"`{name}`" for name in options)
        raise SettingsError(f"`settings` and {names} are both given; expected one of them")
    return settings


def _draft(scores: Scores, given: PlanSettings, room: _Room) -> _Draft:
    modules = _targeted(scores.anatomy, given)
    layers = tuple(sorted({module.layer for module in modules}))
    ranks = _nominal_ranks(modules, given.resolved())
    lowest = room.lowest(scores, ranks)
    if lowest > layers[-1]:
        raise PlanError(
            f"`target_modules` are all in layers up to {layers[-1]}, but only layers from {lowest} up fit in "
            "`max_memory`; expected modules in those layers; choose other modules or allow more memory"
        )
    costs = _costs(scores, given.resolved(), ranks)
    upper = layers[-layer_share(len(layers), PERCENT) :]
    epochs = given.epochs or 1.0
    every = run_time(costs, layers, layers, 0.0, epochs)
    saving = 1 - run_time(costs, layers, upper, BALANCED_SHARE, epochs) / every
    fits = lowest <= layers[0]
    settings = given.resolved(fits, saving)
    if settings.freeze_after and lowest > layers[0]:
        raise PlanError(
            f"`freeze_after` is {settings.freeze_after:g}, but training layers below {lowest} does not fit in "
            "`max_memory`; expected 0, or more memory"
        )
    candidates = Candidates(scores.layers, costs, layers, lowest)
    return _Draft(settings, modules, _after_freeze(candidates, settings), given.choice(fits, saving).reason)


def _targeted(anatomy: Anatomy, settings: PlanSettings) -> Sequence[Module]:
    """The modules that may be adapted: all, or those that ``target_modules`` name."""
    modules = anatomy.adaptable(settings.routers)
    leaves = sorted({leaf(module.name) for module in modules})
    for name in settings.target_modules:
        if name not in leaves:
            raise PlanError(
                f"`target_modules` names {name}, but the model has no adaptable module of that name; "
                f"expected some of {', '.join(leaves)}"
            )
    wanted = settings.target_modules or leaves
    return [module for module in modules if leaf(module.name) in wanted]


def _after_freeze(candidates: Candidates, settings: PlanSettings) -> Candidates:
    """The candidates for the rest of a run, once the early layers freeze: its passes, and the speed-up it needs."""
    share, speedup, costs = settings.freeze_after or 0.0, settings.speedup, candidates.costs
    rest = replace(candidates, epochs=(settings.epochs or 1.0) * (1 - share))
    if speedup is None:
        return rest
    early = share * costs.step(candidates.layers) / costs.baseline
    fastest = early + (1 - share) * rest.frontier[0].relative_run_time
    if fastest > (1 + 1e-9) / speedup:
        before = f" after {share:.0%} of the steps with every layer" if share else ""
        raise PlanError(
            f"`speedup` is {speedup:g}, but the fastest choice of layers{before} is predicted at "
            f"{1 / fastest:.2f}x; expected at most that"
        )
    return replace(rest, speedup=(1 - share) / (1 / speedup - early))


def _nominal_ranks(modules: Sequence[Module], settings: PlanSettings) -> dict[str, int]:
    """Ranks without a look at the scores, for the cost of layers before the choice."""
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
    """Costs in seconds where the probe was calibrated, in operations otherwise."""
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
        alpha=settings.alpha_of(rank),
        fused=module.fused,
        parameters=module.lora_parameters(rank),
    )
