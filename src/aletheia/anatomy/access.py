"""Typed access to what transformers puts on a model: to torch's types any attribute of a module may be a tensor."""

from typing import Any, cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


def base_of(model: nn.Module) -> PreTrainedModel:
    """The model of transformers inside an adapted one, or the model itself."""
    held = cast(Any, model)
    base: PreTrainedModel = held.get_base_model() if hasattr(model, "get_base_model") else held
    return base


def text_config(model: nn.Module) -> PretrainedConfig:
    """The configuration of the language model, where it is one part of several, too."""
    config: PretrainedConfig = cast(Any, model.config).get_text_config()
    return config


def input_weight(model: nn.Module) -> torch.Tensor:
    """The weight [V, D] of the input embedding, adapted models included."""
    weight: torch.Tensor = cast(Any, model).get_input_embeddings().weight
    return weight
