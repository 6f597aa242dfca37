"""Typed access to attributes of transformers models, which torch's types declare as possible tensors."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


def base_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside an adapted one, or the model itself."""
    held = cast(Any, model)
    base: PreTrainedModel = held.get_base_model() if hasattr(model, "get_base_model") else held
    return base


def text_config(model: nn.Module) -> PretrainedConfig:
    """The config of the language model, also where that is one part of several."""
    config: PretrainedConfig = cast(Any, model.config).get_text_config()
    return config


def input_weight(model: nn.Module) -> torch.Tensor:
    """The weight [V, D] of the input embedding, of adapted models too."""
    weight: torch.Tensor = cast(Any, model).get_input_embeddings().weight
    return weight


def stop_ids_of(model: nn.Module) -> tuple[int, ...]:
    """Ids of the tokens at which generation stops by the settings of a model, of adapted models too."""
    base = base_of(model)
    found: dict[int, None] = {}
    for settings in (getattr(base, "generation_config", None), text_config(base)):
        value = getattr(settings, "eos_token_id", None)
        values = value if isinstance(value, list | tuple) else [value]
        found |= {one: None for one in values if isinstance(one, int) and one >= 0}
    return tuple(found)


def computed_in(output: torch.Tensor) -> torch.dtype:
    """The dtype that layers with this output compute in: that of autocast, where it is on."""
    device = output.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else output.dtype


def lowest_that_learns(layers: Iterable[nn.Module]) -> int | None:
    """The index of the first of ``layers`` with a trainable parameter; None if none has one."""
    learn = (any(parameter.requires_grad for parameter in layer.parameters()) for layer in layers)
    return next((index for index, learns in enumerate(learn) if learns), None)
