"""Which weights LoRA can adapt, asked of PEFT itself before anything is probed: it refuses some by family.

The trial is made on stand-ins of the modules that share their weights, one of each kind, and its adapters stay on the
meta device: nothing is computed, and the model is left as it is.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from aletheia.anatomy.access import base_of

QUANTIZED = ("is_loaded_in_8bit", "is_loaded_in_4bit")  # by these marks PEFT chooses its layers
INDEX = re.compile(r"(?<=\.)\d+(?=\.)")


def refused(
    model: nn.Module, matrices: Mapping[str, nn.Module], stacks: Mapping[str, tuple[nn.Module, str]]
) -> dict[str, str]:
    """By full name, the weights that PEFT does not adapt, each with the reason in a few words.

    Args:
        model: the base model, for its config: PEFT decides by family.
        matrices: the modules that may be adapted, by full name.
        stacks: the stacks of experts, by full name: owner and own name.
    """
    kinds: dict[tuple[str, type], list[str]] = {}
    for name, module in matrices.items():
        kinds.setdefault((INDEX.sub("*", name), type(module)), []).append(name)
    for name, (owner, _) in stacks.items():
        kinds.setdefault((INDEX.sub("*", name), type(owner)), []).append(name)
    tried = [names[0] for names in kinds.values()]
    if _reason(model, tried, matrices, stacks) is None:
        return {}
    found = {}
    for names in kinds.values():
        if (reason := _reason(model, names[:1], matrices, stacks)) is not None:
            found.update(dict.fromkeys(names, reason))
    return found


def _reason(
    model: nn.Module,
    names: Sequence[str],
    matrices: Mapping[str, nn.Module],
    stacks: Mapping[str, tuple[nn.Module, str]],
) -> str | None:
    """Why PEFT does not adapt all of these at once, None if it does."""
    stand_in, kept = _stand_in(model, names, matrices, stacks)
    config = LoraConfig(
        r=1,
        target_modules=[name for name in names if name in matrices],
        target_parameters=[name for name in names if name in stacks] or None,
    )
    before = [(parameter, parameter.requires_grad) for module in kept for parameter in module.parameters()]
    try:
        inject_adapter_in_model(config, stand_in, low_cpu_mem_usage=True)
    except Exception as error:  # it refuses by ValueError, and fails as it may on kinds of modules that it knows not
        told = str(error)
        family = getattr(getattr(base_of(model), "config", None), "model_type", "this family")
        return f"PEFT refuses it in {family}" if "incompatible" in told else f"PEFT cannot adapt a {_kind(kept[0])}"
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
    return None


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def _stand_in(
    model: nn.Module,
    names: Sequence[str],
    matrices: Mapping[str, nn.Module],
    stacks: Mapping[str, tuple[nn.Module, str]],
) -> tuple[nn.Module, list[nn.Module]]:
    """A model that holds copies of these modules alone, weights shared, at the same paths; and those copies."""
    base = base_of(model)
    root = cast(Any, nn.Module())
    root.config = base.config
    for mark in QUANTIZED:
        if hasattr(base, mark):
            setattr(root, mark, getattr(base, mark))
    owners = {name.rpartition(".")[0]: stacks[name][0] for name in names if name in stacks}
    leaves = owners | {name: matrices[name] for name in names if name in matrices}
    copies = {}
    for path in sorted(leaves, key=lambda path: path.count(".")):  # an owner before what lies in it
        *above, own_name = path.split(".")
        held: nn.Module = root
        for part in above:
            if part not in held._modules:
                held.add_module(part, nn.Module())
            held = held.get_submodule(part)
        copies[path] = _without_inner(leaves[path])
        held.add_module(own_name, copies[path])
    return root, list(copies.values())


def _without_inner(module: nn.Module) -> nn.Module:
    """A shallow copy that shares the parameters and holds no other module."""
    copied = copy.copy(module)
    copied._parameters = dict(module._parameters)
    copied._modules = {}
    return copied
