"""The frozen prefix: no backward below the boundary.

The boundary is the lowest layer with a trainable parameter. The embedding and the layers below it are the prefix.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from aletheia.anatomy.access import lowest_that_learns
from aletheia.anatomy.layerwise import Call, hidden_states
from aletheia.anatomy.read import find_layers
from aletheia.errors import AdapterError

ABOVE_NAMES = re.compile(r"head|embed_out|^((?!embed).)*(norm|ln_f)", re.IGNORECASE)  # modules above the layers


def lowest_trainable_layer(model: nn.Module) -> int:
    """The boundary of a model: the index of its lowest decoder layer with a trainable parameter.

    Raises:
        AdapterError: no parameter in the layers is trainable.
    """
    _, layers = find_layers(model)
    boundary = lowest_that_learns(layers)
    if boundary is None:
        raise AdapterError("no decoder layer has a trainable parameter; expected an adapted model")
    return boundary


@contextmanager
def frozen_prefix(model: nn.Module) -> Iterator[int]:
    """Keep backward, recomputation and stored activations out of the layers below the boundary; yields the boundary.

    It works in any loop: ``with aletheia.frozen_prefix(model): trainer.train()``. Without gradient checkpointing,
    autograd stops at the boundary by itself. Checkpointing undoes that, because transformers, PEFT and TRL make the
    embedding output require a gradient. Here the input of the prefix is detached, and the prefix is never
    checkpointed, whoever switches checkpointing on. Where re-entrant checkpointing needs an input that requires a
    gradient, the boundary layer gets one. Losses and adapter gradients stay the same.

    Raises:
        AdapterError: no parameter in the layers is trainable, or one below the boundary is.
    """
    boundary = lowest_trainable_layer(model)
    _, layers = find_layers(model)
    if boundary:
        _check_nothing_trains_below(model, layers)
    below = layers[:boundary]
    flags: dict[nn.Module, Any] = {
        layer: layer.gradient_checkpointing for layer in below if hasattr(layer, "gradient_checkpointing")
    }

    def give_back() -> None:
        switched_on = bool(boundary) and getattr(layers[boundary], "gradient_checkpointing", False)
        for layer, before in flags.items():  # as the loop has set the boundary layer
            _set_checkpointing(layer, before or switched_on)

    with ExitStack() as stack:
        stack.callback(give_back)
        for layer in below:
            stack.callback(layer.register_forward_pre_hook(_without_graph, with_kwargs=True).remove)
        if boundary:
            stack.callback(layers[boundary].register_forward_pre_hook(_start_graph, with_kwargs=True).remove)
        yield boundary


def _check_nothing_trains_below(model: nn.Module, layers: nn.ModuleList) -> None:
    """Check that, outside the layers, only modules above them train: the final norm, and a head that is not tied."""
    inside = {id(parameter) for parameter in layers.parameters()}
    get_embedding = getattr(model, "get_input_embeddings", None)
    embedding = get_embedding() if get_embedding else None
    below = {id(parameter) for parameter in embedding.parameters()} if embedding is not None else set()
    for name, parameter in model.named_parameters():
        is_above = id(parameter) in inside or (id(parameter) not in below and ABOVE_NAMES.search(name))
        if parameter.requires_grad and not is_above:
            raise AdapterError(f"{name} is trainable and may be below the layers; expected it to be frozen; freeze it")


def _without_graph(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Pre-hook of a layer below the boundary: detach its inputs, and switch its checkpointing off.

    Raises:
        AdapterError: a parameter of the layer requires a gradient by now; it would never get one.
    """
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in layer.parameters()):
        raise AdapterError(
            "a layer below the boundary became trainable inside frozen_prefix or fast_steps; expected that only before "
            "entering; leave the context and enter it again"
        )
    if getattr(layer, "gradient_checkpointing", False):
        _set_checkpointing(layer, False)
    return tuple(_detached(value) for value in args), {name: _detached(value) for name, value in kwargs.items()}


def _set_checkpointing(layer: Any, on: Any) -> None:
    layer.gradient_checkpointing = on


def _start_graph(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Pre-hook of the boundary layer. It runs outside the checkpoint, so the checkpoint sees the inputs it sets."""
    args, kwargs = tuple(_detached(value) for value in args), {name: _detached(value) for name, value in kwargs.items()}
    if torch.is_grad_enabled() and _is_reentrant(layer):
        hidden_states(args, kwargs).requires_grad_(True)
    return args, kwargs


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) and value.requires_grad else value


def _is_reentrant(layer: nn.Module) -> bool:
    """Whether this layer is about to run under re-entrant checkpointing, which is torch's default."""
    if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
        return False
    settings = getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", {})
    return settings.get("use_reentrant") is not False
