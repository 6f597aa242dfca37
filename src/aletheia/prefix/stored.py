"""Layers that pass stored hidden states through, so that a model starts at its boundary.

Shapes: B rows of the batch, T tokens of its longest row, D model width.
"""

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
from aletheia.errors import TrainingError

PREFIX = "prefix_BTD"  # key of the stored hidden states in a batch


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
