"""The frozen prefix: no backward below the boundary, and layers that pass stored hidden states through.

Shapes: B rows of the batch, T tokens of its longest row, D model width. The boundary is the lowest layer with a
trainable parameter; the embedding and the layers below it are the prefix.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from aletheia.anatomy.layerwise import (
    NoEmbedding,
    PassThrough,
    hidden_states,
    layer_call,
    replace_module,
    with_hidden_states,
)
from aletheia.anatomy.modes import in_mode
from aletheia.anatomy.read import find_layers
from aletheia.errors import AdapterError, TrainingError

PREFIX = "prefix_BTD"  # key of the stored hidden states in a batch
ABOVE_NAMES = re.compile(r"head|embed_out|^((?!embed).)*(norm|ln_f)", re.IGNORECASE)  # what comes after the layers


def lowest_trainable_layer(model: nn.Module) -> int:
    """Index of the lowest decoder layer with a trainable parameter: the boundary, read off the model itself.

    Raises:
        AdapterError: nothing in the layers is trainable.
    """
    _, layers = find_layers(model)
    for index, layer in enumerate(layers):
        if any(parameter.requires_grad for parameter in layer.parameters()):
            return index
    raise AdapterError("no decoder layer has a trainable parameter; expected an adapted model")


@contextmanager
def frozen_prefix(model: nn.Module) -> Iterator[int]:
    """Keep backward, recomputation and stored activations out of the layers below the boundary; yields the boundary.

    For any loop: ``with aletheia.frozen_prefix(model): trainer.train()``. Without gradient checkpointing autograd
    stops at the boundary by itself. Checkpointing undoes that: transformers, PEFT and TRL make the embedding output
    require a gradient. Here the prefix gets its input detached and is not checkpointed, whoever switches that on and
    when, and the boundary layer gets the input that requires grad where re-entrant checkpointing needs one. Losses and
    adapter gradients stay the same.

    Raises:
        AdapterError: nothing in the layers is trainable, or something below the boundary is.
    """
    boundary = lowest_trainable_layer(model)
    _, layers = find_layers(model)
    if boundary:
        _check_nothing_trains_below(model, layers)
    below = layers[:boundary]
    flags = {layer: layer.gradient_checkpointing for layer in below if hasattr(layer, "gradient_checkpointing")}

    def give_back() -> None:
        switched_on = bool(boundary) and getattr(layers[boundary], "gradient_checkpointing", False)
        for layer, before in flags.items():  # as the loop has left the others
            layer.gradient_checkpointing = before or switched_on

    with ExitStack() as stack:
        stack.callback(give_back)
        for layer in below:
            stack.callback(layer.register_forward_pre_hook(_without_graph, with_kwargs=True).remove)
        if boundary:
            stack.callback(layers[boundary].register_forward_pre_hook(_start_graph, with_kwargs=True).remove)
        yield boundary


def _check_nothing_trains_below(model: nn.Module, layers: nn.ModuleList) -> None:
    """Outside the layers, only what lies above them may train: the final norm, and a head that is not tied."""
    inside = {id(parameter) for parameter in layers.parameters()}
    get_embedding = getattr(model, "get_input_embeddings", None)
    embedding = get_embedding() if get_embedding else None
    below = {id(parameter) for parameter in embedding.parameters()} if embedding is not None else set()
    for name, parameter in model.named_parameters():
        is_above = id(parameter) in inside or (id(parameter) not in below and ABOVE_NAMES.search(name))
        if parameter.requires_grad and not is_above:
            raise AdapterError(f"{name} is trainable and may lie below the layers; expected a frozen embedding")


def _without_graph(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Pre-hook of a layer below the boundary: nothing it gets requires grad, and it is not checkpointed.

    Raises:
        AdapterError: a parameter of the layer has come to require grad since; it would never get one.
    """
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in layer.parameters()):
        raise AdapterError(
            "a layer below the boundary became trainable inside frozen_prefix or fast_steps; expected it to be so "
            "before they are entered: leave and enter again"
        )
    if getattr(layer, "gradient_checkpointing", False):
        layer.gradient_checkpointing = False
    return tuple(_detached(value) for value in args), {name: _detached(value) for name, value in kwargs.items()}


def _start_graph(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Pre-hook of the boundary layer; it runs outside the checkpoint, so what it sets is what the checkpoint sees."""
    args, kwargs = tuple(_detached(value) for value in args), {name: _detached(value) for name, value in kwargs.items()}
    if torch.is_grad_enabled() and _is_reentrant(layer):
        hidden_states(args, kwargs).requires_grad_(True)
    return args, kwargs


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) and value.requires_grad else value


def _is_reentrant(layer: nn.Module) -> bool:
    """Whether this layer is about to run under re-entrant checkpointing, torch's default where nothing is said."""
    if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
        return False
    settings = getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", {})
    return settings.get("use_reentrant") is not False


@torch.no_grad()
def prefix_output(model: nn.Module, boundary: int, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Hidden states [B, T, D] that enter layer ``boundary``; nothing above the prefix is computed.

    The model runs in the mode it is in. ``batch`` holds ``input_ids`` and ``attention_mask``, both [B, T].
    """
    _, layers = find_layers(model)
    call = layer_call(model, layers[boundary], batch)
    if call is None:
        raise TrainingError(
            f"layer {boundary} of {type(model).__name__} was never called; --cache off trains without it"
        )
    return hidden_states(*call)


@contextmanager
def stored_prefix(model: nn.Module, boundary: int, free: bool = False) -> Iterator[None]:
    """Let the model start at layer ``boundary`` from the hidden states in its batch, under the key ``prefix_BTD``.

    The layer list stays as long as it is, so masks, positions, layer types and adapter names stay right.

    Args:
        model: the adapted model.
        boundary: the layer that gets the stored hidden states; above 0.
        free: drop the layers below the boundary, and the embedding unless it is tied to the head. Their memory is
            given back once nothing else refers to them; the model then needs ``prefix_BTD`` for good.
    """
    _, layers = find_layers(model)
    outputs = _layer_outputs(model, layers[:boundary])
    kept = list(layers[:boundary])
    for index in range(boundary):
        layers[index] = PassThrough(layers[index], outputs[index]).train(model.training)
    if free:
        kept.clear()
        _drop_embedding(model.get_base_model() if hasattr(model, "get_base_model") else model)
    stored: list[torch.Tensor] = []

    def take(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if PREFIX not in kwargs:
            raise TrainingError(f"the layers below {boundary} are stored, and the batch brings no {PREFIX!r}")
        stored[:] = [kwargs.pop(PREFIX)]
        return args, kwargs

    def put(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return with_hidden_states(args, kwargs, stored.pop())

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(take, with_kwargs=True).remove)
        stack.callback(layers[boundary].register_forward_pre_hook(put, with_kwargs=True, prepend=True).remove)
        try:
            yield
        finally:
            for index, layer in enumerate(kept):
                layers[index] = layer
            if free:
                model.register_forward_pre_hook(_refuse)


def _drop_embedding(base: nn.Module) -> None:
    """Free the input embedding, unless the head holds the same weights."""
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if head is not None and head.weight is not embedding.weight:
        replace_module(base, embedding, NoEmbedding(embedding.weight))


def _refuse(module: nn.Module, args: tuple) -> None:
    raise TrainingError("the layers below the boundary were freed for training; load the model again to use it")


@torch.no_grad()
def _layer_outputs(model: nn.Module, layers: nn.ModuleList) -> list[int]:
    """Length of the tuple that each layer returns, 0 for a tensor: seen in one forward over two tokens."""
    seen: dict[int, int] = {}
    with ExitStack() as stack:
        for index, layer in enumerate(layers):

            def see(module: nn.Module, args: tuple, output: Any, index: int = index) -> None:
                seen[index] = len(output) if isinstance(output, tuple) else 0

            stack.callback(layer.register_forward_hook(see).remove)
        ids = torch.zeros((1, 2), dtype=torch.int64, device=next(model.parameters()).device)
        stack.enter_context(in_mode(model, training=False))
        prefix_output(model, len(layers), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return [seen[index] for index in range(len(layers))]
