"""Before the probe: a few short passes that show whether a model can be trained, and its prefix stored, at all.

A step must depend only on its rows, a position only on the tokens up to it, and weights must not change.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import get_args

import torch
from torch import nn

from aletheia.anatomy.access import base_of
from aletheia.anatomy.families import is_wrapper
from aletheia.anatomy.layerwise import (
    Call,
    called_layers,
    check_order,
    explained_pass,
    hidden_states,
    with_hidden_states,
)
from aletheia.anatomy.load import Quantize, quantization_of
from aletheia.anatomy.modes import in_mode
from aletheia.anatomy.read import find_layers
from aletheia.data.batches import on_device_of
from aletheia.data.examples import Examples
from aletheia.errors import ModelError
from aletheia.probing.tally import Batch

TOKENS = 24  # of a trial row, at most
SAME, ALIKE = (
    1e-4,
    0.25,
)  # relative, of logits: half precision may route a token to another expert, int8 round otherwise


def check_passes(model: nn.Module, data: Examples) -> None:
    """Refuse a model that cannot be trained as it is, by five short passes over the start of a row.

    Raises:
        ModelError: the model fails on text alone, or because it is quantized; or it runs its layers more than once or
            in another order, keeps state from one pass to the next, changes its weights, or lets positions see later
            tokens. The message says which, and names the place.
    """
    name = str(getattr(model.config, "_name_or_path", "")) or type(model).__name__
    row = max((example.input_ids for example in data.examples), key=len)[:TOKENS]
    first = _batch(row)
    other = _batch(
        [*row[: len(row) // 2], *(row[0] for _ in row[len(row) // 2 :])]
    )  # the same first half, another second half
    versions = {weight: parameter._version for weight, parameter in model.named_parameters()}
    held = dict(_held_tensors(model))
    path, layers = find_layers(model)
    once: list[torch.Tensor] = []
    with _explained(name, model):
        order = called_layers(lambda **_: once.append(_logits(model, first)), layers, {})
    check_order(name, path, order)
    [once_BTV] = once
    with _explained(name, model):
        changed_BTV = _logits(model, other)
        for _ in range(2):
            _train_pass(model, first)
        again_BTV = _logits(model, first)
    for weight, parameter in model.named_parameters():
        if parameter._version != versions[weight]:
            raise ModelError(
                f"a forward pass of {name} writes into {weight}, which its adapters would not follow; expected "
                "weights that do not change (for RWKV set rescale_every to 0 in config.json)"
            )
    is_exact = once_BTV.dtype == torch.float32 and quantization_of(model) is None
    tolerance = SAME if is_exact else ALIKE
    if _differ(once_BTV, again_BTV, tolerance):
        kept = [place for place, value in _held_tensors(model) if held.get(place) is not value]
        where = f" (in {kept[0]})" if kept else ""
        raise ModelError(
            f"{name} keeps state from one forward pass to the next{where}, or is random: the same row gives different "
            "outputs; expected a model whose output depends only on its input"
        )
    half = len(row) // 2
    if half and _differ(once_BTV[:, :half], changed_BTV[:, :half], tolerance):
        raise ModelError(
            f"positions of {name} see the tokens after them; expected a decoder, which sees only earlier tokens"
        )


def _batch(ids: list[int]) -> Batch:
    ids_BT = torch.tensor([ids])
    return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "labels": ids_BT}


@torch.no_grad()
def _logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    with in_mode(model, training=False):
        logits_BTV: torch.Tensor = model(**on_device_of(model, batch), use_cache=False).logits
    return logits_BTV


def _train_pass(model: nn.Module, batch: Batch) -> None:
    """Forward and backward as in a training step, down to the input of the first layer."""
    leaf: list[torch.Tensor] = []

    def start_graph(layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> Call:
        leaf.append(hidden_states(args, kwargs).detach().requires_grad_(True))
        return with_hidden_states(args, kwargs, leaf[0])

    handle = find_layers(model)[1][0].register_forward_pre_hook(start_graph, with_kwargs=True)
    try:
        with in_mode(model, training=True), torch.random.fork_rng(), torch.enable_grad():
            loss = model(**on_device_of(model, batch), use_cache=False).loss
            torch.autograd.grad(loss, leaf)
    finally:
        handle.remove()


def _held_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """By full name, tensors that are plain attributes of modules, neither parameters nor buffers."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield f"{path}.{name}", value


def _differ(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    """Whether two tensors differ by more than ``tolerance``, relative; another check looks for non-finite values."""
    return bool((one.float() - other.float()).norm() > tolerance * one.float().norm())


def _explained(name: str, model: nn.Module) -> AbstractContextManager[None]:
    if (quantized := quantization_of(model)) in get_args(Quantize):
        remedy = "expected layers that compute with such weights; choose another `quantize`, or leave it out"
        return explained_pass(f"{name} does not run in {quantized}", remedy)
    kind = f"a vision-language model ({model.config.model_type}), " if is_wrapper(base_of(model).config) else ""
    remedy = "expected a decoder that takes input_ids, attention_mask and labels"
    return explained_pass(f"{name} is {kind}not to be trained on text alone", remedy)
