"""From a plan to a PEFT model, and the check that the model is adapted exactly as planned."""

import re
from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping

from aletheia.anatomy.access import base_of
from aletheia.anatomy.fingerprint import identify
from aletheia.anatomy.read import is_matrix, read_anatomy
from aletheia.anatomy.schema import Anatomy, ModelIdentity, Module
from aletheia.errors import AdapterError, PlanError
from aletheia.planning.plan import Adapter, Plan, check_dropout


def adapt(model: nn.Module, plan: Plan, seed: int = 0, identity: ModelIdentity | None = None) -> PeftModel:
    """Put LoRA on exactly the modules of ``plan``; the base model is modified in place, as PEFT does.

    Args:
        model: the base model that the plan was made for.
        plan: which modules, with which rank and alpha.
        seed: seed of the random initial A matrices; the global random state stays as it is.
        identity: identity of the whole model, where ``model`` holds only its upper layers.

    Raises:
        PlanError: the plan belongs to another model, was edited so that it no longer fits, or asks for dropout where
            PEFT supports none.
        AdapterError: the model is adapted already, or the adapted set differs from the plan.
    """
    if isinstance(model, PeftModel) or any(isinstance(module, LoraLayer) for module in model.modules()):
        raise AdapterError("the model has LoRA adapters already; expected a base model; merge or unload them first")
    config = config_of(plan, model, identity)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    check_adapters(adapted, plan)
    return adapted


def config_of(plan: Plan, model: nn.Module, identity: ModelIdentity | None = None) -> LoraConfig:
    """The PEFT configuration of a plan, checked against the model, which does not change.

    Args:
        plan: which modules, with which rank and alpha.
        model: the base model that the plan was made for.
        identity: identity of the whole model, where ``model`` holds only its upper layers.

    Raises:
        PlanError: the plan belongs to another model, was edited so that it no longer fits, or asks for dropout where
            PEFT supports none.
    """
    anatomy = read_anatomy(model)
    plan.check_model(identity or identify(model, anatomy))
    check_names(plan, anatomy)
    settings = plan.settings
    own = {adapter.name: (adapter.rank, adapter.alpha) for adapter in plan.adapters}
    config = lora_config(plan.adapters, model, settings.rank, settings.common_alpha, own)
    check_dropout(settings.dropout, config.target_parameters or ())
    config.lora_dropout, config.use_rslora = settings.dropout, settings.rslora
    return config


def check_names(plan: Plan, anatomy: Anatomy) -> None:
    """Check a plan, which may have been edited, against the model's modules before anything changes.

    Raises:
        PlanError: the plan names an unknown module or one that LoRA cannot adapt, or has a wrong layer or parameter
            count.
    """
    modules = {module.name: module for module in anatomy.modules}
    for adapter in plan.adapters:
        module = modules.get(adapter.name)
        if module is None:
            raise PlanError(
                f"the plan adapts {adapter.name}, but the model has no such module; "
                "'aletheia inspect' lists its modules, and 'aletheia plan' writes the plan again"
            )
        if module.refused:
            raise PlanError(
                f"the plan adapts {adapter.name}, which LoRA cannot adapt here ({anatomy.notes[0]}); expected a plan "
                "without it; write the plan again with 'aletheia plan'"
            )
        if (adapter.layer, adapter.parameters) != (module.layer, module.lora_parameters(adapter.rank)):
            raise PlanError(
                f"the plan puts {adapter.name} in layer {adapter.layer} with {adapter.parameters:,} parameters; "
                f"expected layer {module.layer} and, at rank {adapter.rank}, "
                f"{module.lora_parameters(adapter.rank):,}; correct the plan or write it again with 'aletheia plan'"
            )


def lora_config(
    weights: Sequence[Adapter | Module],
    model: nn.Module,
    rank: int,
    alpha: float,
    own: Mapping[str, tuple[int, float]] | None = None,
) -> LoraConfig:
    """The PEFT configuration with every module and every stack of experts named in full.

    PEFT treats names as regular expressions, takes the first that matches, and silently ignores the others. So names
    are complete and escaped here, and :func:`check_adapters` compares the result.

    Args:
        weights: the weights to adapt.
        model: the base model.
        rank: the common rank.
        alpha: the common alpha.
        own: rank and alpha, by full name, of weights that differ from the common ones.
    """
    modules = [weight.name for weight in weights if not weight.fused]
    as_parameter = {name: f"{name}.weight" for name in _rewritten(modules, model)}
    stacks = [weight.name for weight in weights if weight.fused]
    patterns = {re.escape(as_parameter.get(name, name)): pair for name, pair in (own or {}).items()}
    return LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=[name for name in modules if name not in as_parameter],
        target_parameters=[*stacks, *as_parameter.values()] or None,
        r=rank,
        lora_alpha=_integral(alpha),  # type: ignore[arg-type]  # PEFT takes any number
        rank_pattern={name: own_rank for name, (own_rank, _) in patterns.items() if own_rank != rank},
        alpha_pattern={name: _integral(own_alpha) for name, (_, own_alpha) in patterns.items() if own_alpha != alpha},
    )


def _rewritten(names: list[str], model: nn.Module) -> list[str]:
    """The modules that PEFT would mistake for experts as older checkpoints name them.

    In some mixtures of experts PEFT replaces every ``gate_proj``, ``up_proj`` and ``down_proj``, even a full name, by
    the stacks of all layers. Dense layers and shared experts have modules of these names, too. Their weights are
    therefore named as parameters, which PEFT leaves alone.
    """
    trial = LoraConfig(task_type="CAUSAL_LM", target_modules=list(names))
    try:
        convert_peft_config_for_transformers(trial, model, get_model_conversion_mapping(base_of(model)))
    except ValueError:  # it finds one part of a stack but not the other
        leaves = {"gate_proj", "up_proj", "down_proj"}
        return [name for name in names if name.rpartition(".")[2] in leaves]
    return [name for name in names if name not in (trial.target_modules or ())]


def _integral(alpha: float) -> int | float:
    """``alpha`` as an integer where it is whole, as PEFT's files and their readers expect it."""
    return int(alpha) if float(alpha).is_integer() else alpha


def adapted_modules(model: nn.Module) -> dict[str, tuple[int, float]]:
    """Rank and alpha of every adapted module and stack of experts, by its full name in the base model."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            # the wrapper of a parameter encloses its owner, and any wrappers of the owner's other parameters
            base_name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            if isinstance(module, ParamWrapper) and not is_matrix(module.get_base_layer()):
                base_name = f"{base_name}.{module.parameter_name}"
            for adapter, rank in module.r.items():
                found[base_name] = (rank, float(module.lora_alpha[adapter]))
    return found


def check_adapters(model: nn.Module, plan: Plan) -> None:
    """Compare the adapted set, ranks, alphas and trainable parameters with the plan.

    Raises:
        AdapterError: something differs. The message names the first module.
    """
    planned = {adapter.name: (adapter.rank, adapter.alpha) for adapter in plan.adapters}
    found = adapted_modules(model)
    differing = sorted(name for name in planned.keys() | found.keys() if planned.get(name) != found.get(name))
    if differing:
        name = differing[0]
        raise AdapterError(
            f"{len(differing)} module(s) differ from the plan, first {name}: expected (rank, alpha) "
            f"{planned.get(name, 'nothing')}, found {found.get(name, 'nothing')}; "
            "please report this with the model's name and the PEFT version"
        )
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if trainable != plan.trainable_parameters:
        raise AdapterError(
            f"{trainable:,} parameters are trainable, but the plan has {plan.trainable_parameters:,}; "
            "expected everything except the adapters to be frozen; freeze the other parameters"
        )
