"""From a plan to a PEFT model, and the proof that the model is adapted exactly as planned."""

import re

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from aletheia.anatomy.fingerprint import identify
from aletheia.anatomy.read import read_anatomy
from aletheia.anatomy.schema import Anatomy
from aletheia.errors import AdapterError, PlanError
from aletheia.planning.plan import Plan


def adapt(model: nn.Module, plan: Plan, seed: int = 0) -> PeftModel:
    """Put LoRA on exactly the modules of ``plan``; the base model is modified in place, as PEFT does.

    Args:
        model: the base model that the plan was made for.
        plan: which modules, with which rank and alpha.
        seed: of the random initial A matrices; the global random state is left alone.

    Raises:
        PlanError: the plan belongs to another model, or was edited into one that does not fit.
        AdapterError: the model is adapted already, or the adapted set differs from the plan.
    """
    if isinstance(model, PeftModel) or any(isinstance(module, LoraLayer) for module in model.modules()):
        raise AdapterError("the model carries LoRA adapters already; expected a base model (merge or unload it first)")
    anatomy = read_anatomy(model)
    plan.check_model(identify(model, anatomy))
    check_names(plan, anatomy)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, lora_config(plan))
    check_adapters(adapted, plan)
    return adapted


def check_names(plan: Plan, anatomy: Anatomy) -> None:
    """Compare a plan, which may have been edited, with the modules there are, before anything is modified.

    Raises:
        PlanError: an unknown module, or a wrong layer or parameter count.
    """
    modules = {module.name: module for module in anatomy.modules}
    for adapter in plan.adapters:
        module = modules.get(adapter.name)
        if module is None:
            raise PlanError(
                f"the plan adapts {adapter.name}, which this model has not; "
                "'aletheia inspect' lists its modules, 'aletheia plan' writes the plan again"
            )
        if (adapter.layer, adapter.parameters) != (module.layer, module.lora_parameters(adapter.rank)):
            raise PlanError(
                f"the plan puts {adapter.name} in layer {adapter.layer} with {adapter.parameters:,} parameters; "
                f"it is in layer {module.layer} and rank {adapter.rank} has {module.lora_parameters(adapter.rank):,}; "
                "correct the plan or write it again with 'aletheia plan'"
            )


def lora_config(plan: Plan) -> LoraConfig:
    """The PEFT configuration with every module named in full.

    PEFT takes the first pattern that matches, as a regular expression, and ignores unmatched ones silently: so
    names are escaped, complete, and compared after injection.
    """
    common = plan.settings.rank
    return LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=[adapter.name for adapter in plan.adapters],
        r=common,
        lora_alpha=_integral(plan.settings.alpha),
        rank_pattern={re.escape(a.name): a.rank for a in plan.adapters if a.rank != common},
        alpha_pattern={re.escape(a.name): _integral(a.alpha) for a in plan.adapters if a.alpha != plan.settings.alpha},
    )


def _integral(alpha: float) -> int | float:
    """Whole alphas as integers: PEFT's files and their readers expect them so."""
    return int(alpha) if float(alpha).is_integer() else alpha


def adapted_modules(model: nn.Module) -> dict[str, tuple[int, float]]:
    """Rank and alpha of every adapted module, by its full name in the base model."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            for adapter, rank in module.r.items():
                base_name = name.removeprefix("base_model.model.")
                found[base_name] = (rank, float(module.lora_alpha[adapter]))
    return found


def check_adapters(model: nn.Module, plan: Plan) -> None:
    """Compare the adapted set, ranks, alphas and trainable parameters with the plan.

    Raises:
        AdapterError: any difference; names the first module concerned.
    """
    planned = {adapter.name: (adapter.rank, adapter.alpha) for adapter in plan.adapters}
    found = adapted_modules(model)
    differing = sorted(name for name in planned.keys() | found.keys() if planned.get(name) != found.get(name))
    if differing:
        name = differing[0]
        raise AdapterError(
            f"{len(differing)} module(s) differ from the plan, first {name}: planned (rank, alpha) "
            f"{planned.get(name, 'nothing')}, adapted {found.get(name, 'nothing')}; "
            "please report this with the model's name and the PEFT version"
        )
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if trainable != plan.trainable_parameters:
        raise AdapterError(
            f"{trainable:,} parameters are trainable, the plan has {plan.trainable_parameters:,}; "
            "expected everything but the adapters to be frozen"
        )
