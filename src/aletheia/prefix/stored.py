"""A forward pass that starts at a layer from stored hidden states; the layers below pass their inputs through.

Shapes: B rows of the batch, T tokens of its longest row, D model width.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from aletheia.anatomy.access import base_of, input_weight
from aletheia.anatomy.layerwise import (
    Call,
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

INPUTS = ("input_ids", "attention_mask", "position_ids")
OF_PACKS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")  # where packed rows start
PREFIX = "prefix_BTD"  # key of the stored hidden states in a batch
Source = Callable[[Mapping[str, Any]], torch.Tensor | None]


@torch.no_grad()
def prefix_output(model: nn.Module, boundary: int, batch: Mapping[str, Any]) -> torch.Tensor:
    """Hidden states [B, T, D] that enter layer ``boundary``; nothing above the prefix runs.

    The model keeps its present mode, and its own hooks are not called, so a hook may call this function. ``batch``
    holds ``input_ids`` and whatever else the prefix depends on: ``attention_mask`` or ``position_ids``, each [B, T],
    and where packed rows start.

    Raises:
        TrainingError: the model never calls the layer.
    """
    _, layers = find_layers(model)
    inputs = {name: batch[name] for name in (*INPUTS, *OF_PACKS) if name in batch}
    call = layer_call(model.forward, layers[boundary], inputs)
    if call is None:
        raise TrainingError(
            f"{type(model).__name__} never calls its layer {boundary}; expected a call per layer; set `cache` off"
        )
    return hidden_states(*call)


class Shortcut:
    """Lets forward passes of a model start at a layer; meanwhile the layers below it return their inputs.

    The layer list keeps its length, so masks, positions, layer types and adapter names stay correct.
    """

    def __init__(self, model: nn.Module, boundary: int) -> None:
        """Prepare layer ``boundary``, which is above 0; nothing changes before :meth:`begin`."""
        self._model, self._boundary = model, boundary
        self._layers = find_layers(model)[1]
        self._own: list[nn.Module] = []
        self._passing: list[PassThrough] = []
        self._given: list[torch.Tensor] = []
        # the first of the layer's hooks, so that all others see the stored states
        self._hook = self._layers[boundary].register_forward_pre_hook(self._put, with_kwargs=True, prepend=True)

    def begin(self, hidden_BTD: torch.Tensor) -> None:
        """Start the next forward pass from these states [B, T, D]."""
        if not self._passing:
            outputs = _layer_outputs(self._model, self._layers[: self._boundary])
            below = zip(self._layers[: self._boundary], outputs, strict=True)
            self._passing = [PassThrough(layer, count) for layer, count in below]
        self._given[:] = [hidden_BTD]
        if not self._own:
            self._own = list(self._layers[: self._boundary])
            for index, layer in enumerate(self._passing):
                self._layers[index] = layer.train(self._model.training)

    def end(self) -> None:
        """Put the layers back."""
        self._given.clear()
        for index, layer in enumerate(self._own):
            self._layers[index] = layer
        self._own.clear()

    def drop(self) -> None:
        """Release the layers below permanently, and the embedding unless it is tied to the head."""
        self._own.clear()
        _drop_embedding(base_of(self._model))

    def close(self) -> None:
        """Restore the model, except for what was dropped."""
        self.end()
        self._hook.remove()

    def _put(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        return with_hidden_states(args, kwargs, self._given.pop()) if self._given else None


@contextmanager
def stored_prefix(model: nn.Module, boundary: int, free: bool = False, source: Source | None = None) -> Iterator[None]:
    """Let the model start at layer ``boundary`` from hidden states [B, T, D] that were computed before.

    They come with the batch, under the key ``prefix_BTD``, or from ``source``. If neither has them, all layers run.

    Args:
        model: the adapted model.
        boundary: the layer that gets the stored hidden states; above 0.
        free: drop the layers below the boundary, and the embedding unless it is tied to the head. Their memory is
            freed once nothing else refers to them. From then on the model always needs stored states.
        source: called with the arguments of the model's forward pass; returns the states, or None without them.

    Raises:
        TrainingError: from a forward pass without stored states, where the layers are dropped or there is no
            ``source``.
    """
    shortcut = Shortcut(model, boundary)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        hidden_BTD = kwargs.pop(PREFIX, None)
        if hidden_BTD is None and source is not None:
            hidden_BTD = source(kwargs if not args else {"input_ids": args[0]} | kwargs)
        if hidden_BTD is not None:
            shortcut.begin(hidden_BTD)
        elif free or source is None:
            raise TrainingError(
                f"the batch has no {PREFIX!r}; expected the stored hidden states that enter layer {boundary}; add them "
                "with aletheia.prefix.cache.collate_with_prefix"
            )
        return args, kwargs

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not free:
            shortcut.end()

    with ExitStack() as stack:
        if free:
            shortcut.begin(torch.empty(0))
            shortcut.drop()
        else:
            stack.callback(shortcut.close)
        stack.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(after, always_call=True).remove)
        try:
            yield
        finally:
            if free:
                model.register_forward_pre_hook(_refuse)


def _drop_embedding(base: PreTrainedModel) -> None:
    """Free the input embedding, unless the head holds the same weights."""
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    weight = input_weight(base)
    if head is not None and head.weight is not weight:
        replace_module(base, embedding, NoEmbedding(weight))


def _refuse(module: nn.Module, args: tuple[Any, ...]) -> None:
    raise TrainingError("the layers below the boundary were freed for training; expected a whole model; load it again")


@torch.no_grad()
def _layer_outputs(model: nn.Module, layers: nn.ModuleList) -> list[int]:
    """Length of the tuple that each layer returns, or 0 for a tensor, from one forward pass over two tokens."""
    seen: dict[int, int] = {}
    with ExitStack() as stack:
        for index, layer in enumerate(layers):

            def see(module: nn.Module, args: tuple[Any, ...], output: Any, index: int = index) -> None:
                seen[index] = len(output) if isinstance(output, tuple | list) else 0

            stack.callback(layer.register_forward_hook(see).remove)
        ids = torch.zeros((1, 2), dtype=torch.int64, device=next(model.parameters()).device)
        stack.enter_context(in_mode(model, training=False))
        prefix_output(model, len(layers), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return [seen[index] for index in range(len(layers))]
