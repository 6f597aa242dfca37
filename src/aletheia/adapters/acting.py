"""Which adapters of a module act, and how strongly: what a stored or recorded result depends on besides its weights."""

from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn


def adapted_in(module: nn.Module) -> list[LoraLayer]:
    """The modules with adapters in ``module``."""
    return [part for part in module.modules() if isinstance(part, LoraLayer)]


def acting(module: LoraLayer) -> tuple[Any, ...]:
    """The adapters that act in ``module``, which are merged, and their scales; equal if its function is the same."""
    return (*module.active_adapters, module.disable_adapters, *module.merged_adapters, *module.scaling.values())
