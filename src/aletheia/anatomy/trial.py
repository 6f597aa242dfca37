"""Which weights LoRA can adapt, by a trial with PEFT, which refuses some by family, and by the code that uses them.

The trial runs on copies of the modules that share their weights, one of each kind, with adapters on the meta device:
nothing is computed, and the model does not change. An adapter wraps its module. Some layers, such as Mamba's, pass
``self.out_proj.weight`` to a kernel instead of calling ``self.out_proj``. There an adapter would have no effect, or an
effect on one device only.
"""

import ast
import copy
import functools
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, cast

from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from aletheia.anatomy.access import base_of

QUANTIZED = ("is_loaded_in_8bit", "is_loaded_in_4bit")  # PEFT chooses its layer classes by these marks
PAST = "its layer may read the weight itself, past an adapter"
SETTING_UP = re.compile(r"_*(init|reset)")  # methods that initialize weights
INDEX = re.compile(r"(?<=\.)\d+(?=\.)")


def refused(
    model: nn.Module, matrices: Mapping[str, nn.Module], stacks: Mapping[str, tuple[nn.Module, str]]
) -> dict[str, str]:
    """By full name, the weights that LoRA cannot adapt, each with the reason in a few words.

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
    found = dict.fromkeys(read_past(model, matrices), PAST)
    tried = [names[0] for names in kinds.values()]
    if _reason(model, tried, matrices, stacks) is None:
        return found
    for names in kinds.values():
        if (reason := _reason(model, names[:1], matrices, stacks)) is not None:
            found.update(dict.fromkeys(names, reason))
    return found


def read_past(model: nn.Module, matrices: Mapping[str, nn.Module]) -> list[str]:
    """The matrices whose weight is read by the module that holds them."""
    found = []
    for name in matrices:
        path, _, own_name = name.rpartition(".")
        owner: Any = type(model.get_submodule(path))
        if own_name in _weights_read(owner):
            found.append(name)
    return found


@functools.cache
def _weights_read(owner: type) -> frozenset[str]:
    """Names N for which a class uses ``self.N.weight`` as a whole, not an attribute or a slice of it."""
    found = set()
    for kind in owner.__mro__:
        if kind.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        for node in _methods(kind):
            inner = {id(part.value) for part in ast.walk(node) if isinstance(part, ast.Attribute | ast.Subscript)}
            found |= {
                part.value.attr
                for part in ast.walk(node)
                if isinstance(part, ast.Attribute)
                and part.attr == "weight"
                and id(part) not in inner
                and isinstance(part.value, ast.Attribute)
                and isinstance(part.value.value, ast.Name)
                and part.value.value.id == "self"
            }
    return frozenset(found)


def _methods(kind: type) -> list[ast.FunctionDef]:
    """The methods in the source of a class, except those that set it up; empty without a source."""
    try:
        source = inspect.getsource(sys.modules[kind.__module__])
    except (OSError, TypeError, KeyError):
        return []
    if not re.search(r"self\.\w+\.weight\b", source):
        return []
    written = (
        node for node in ast.walk(_parsed(source)) if isinstance(node, ast.ClassDef) and node.name == kind.__name__
    )
    return [
        node
        for found in written
        for node in found.body
        if isinstance(node, ast.FunctionDef) and not SETTING_UP.match(node.name)
    ]


@functools.lru_cache(maxsize=4)
def _parsed(source: str) -> ast.Module:
    return ast.parse(source)


def _reason(
    model: nn.Module,
    names: Sequence[str],
    matrices: Mapping[str, nn.Module],
    stacks: Mapping[str, tuple[nn.Module, str]],
) -> str | None:
    """Why PEFT cannot adapt all of these at once; None if it can."""
    stand_in, kept = _stand_in(model, names, matrices, stacks)
    config = LoraConfig(
        r=1,
        target_modules=[name for name in names if name in matrices],
        target_parameters=[name for name in names if name in stacks] or None,
    )
    before = [(parameter, parameter.requires_grad) for module in kept for parameter in module.parameters()]
    try:
        inject_adapter_in_model(config, stand_in, low_cpu_mem_usage=True)
    except Exception as error:  # a ValueError is a refusal; unknown kinds of modules raise anything
        family = getattr(getattr(base_of(model), "config", None), "model_type", "this family")
        return (
            f"PEFT refuses it in {family}" if "incompatible" in str(error) else f"PEFT cannot adapt a {_kind(kept[0])}"
        )
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
    """A model of only these modules, copied with shared weights at the same paths; and the copies."""
    base = base_of(model)
    root = cast(Any, nn.Module())
    root.config = base.config
    for mark in QUANTIZED:
        if hasattr(base, mark):
            setattr(root, mark, getattr(base, mark))
    owners = {name.rpartition(".")[0]: stacks[name][0] for name in names if name in stacks}
    leaves = owners | {name: matrices[name] for name in names if name in matrices}
    copies = {}
    for path in sorted(leaves, key=lambda path: path.count(".")):  # an owner before its children
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
    """A shallow copy that shares the parameters and has no child modules."""
    copied = copy.copy(module)
    copied._parameters = dict(module._parameters)
    copied._modules = {}
    return copied
