"""Layers called by themselves: with the arguments their model would give them, and stand-ins for those left out.

Shapes: B rows of the batch, T tokens of its longest row, D model width.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from aletheia.errors import ModelError

Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and named arguments of a layer


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states [B, T, D] among the arguments of a decoder layer: the first, or the one so named."""
    hidden_BTD: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden_BTD


def with_hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any], hidden_BTD: torch.Tensor) -> Call:
    """The arguments of a decoder layer with other hidden states."""
    return ((hidden_BTD, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden_BTD})


class _Reached(BaseException):
    """The layer was called; the model's forward ends here."""


def layer_call(forward: Callable[..., object], layer: nn.Module, batch: Mapping[str, Any]) -> Call | None:
    """The arguments with which a model's ``forward`` calls ``layer``, None if it never does; nothing above runs.

    ``batch`` holds what the forward pass takes, such as ``input_ids`` and ``attention_mask``, both [B, T].
    """
    caught: list[Call] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args, kwargs))
        raise _Reached

    handle = layer.register_forward_pre_hook(catch, with_kwargs=True, prepend=True)
    try:
        forward(**batch, use_cache=False)
    except _Reached:
        return caught[0]
    finally:
        handle.remove()
    return None


def called_layers(forward: Callable[..., object], layers: nn.ModuleList, batch: Mapping[str, Any]) -> list[int]:
    """The indices of the layers in the order in which a forward pass calls them."""
    order: list[int] = []
    handles = [
        layer.register_forward_pre_hook(lambda *_, index=index: order.append(index))
        for index, layer in enumerate(layers)
    ]
    try:
        forward(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return order


@contextmanager
def explained_pass(begin: str, remedy: str) -> Iterator[None]:
    """One line, from ``begin`` to ``remedy``, where a family fails in a way that nobody foresaw.

    Raises:
        ModelError: whatever was raised but ours and the lack of memory.
    """
    try:
        yield
    except (ModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        told = " ".join(str(error).split())[:200] or "a check of the library fails, no reason given"
        raise ModelError(f"{begin}: {told} ({type(error).__name__}); {remedy}") from error


def check_order(name: str, path: str, order: list[int]) -> None:
    """Refuse a model that does not call its layers once each, from the first to the last.

    What enters a layer would depend on adapters in layers above it, which a frozen prefix takes for granted not to be.

    Raises:
        ModelError: names the first layer out of order.
    """
    for before, index in pairwise(order):
        if index <= before:
            raise ModelError(
                f"{name} calls {path}.{index} after {path}.{before}; expected a model that runs each layer once, from "
                "the first to the last"
            )


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``model`` holds ``old``."""
    for owner in list(model.modules()):
        for name, child in owner._modules.items():
            if child is old:
                owner._modules[name] = new


class Skeleton(nn.Module):
    """The plain attributes of a module and of those inside it, such as ``attention_type``, without any weight."""

    def __init__(self, module: nn.Module) -> None:
        """``module`` is left alone."""
        super().__init__()
        for name, value in vars(module).items():
            if not name.startswith("_") and isinstance(value, bool | int | float | str):
                setattr(self, name, value)
        for name, child in module.named_children():
            self.add_module(name, Skeleton(child))


class PassThrough(Skeleton):
    """Stands in for a decoder layer and returns its input, in the form (tensor or tuple) of the layer's output.

    The attributes stay, because models choose masks and positions by them.
    """

    def __init__(self, layer: nn.Module, outputs: int) -> None:
        """``outputs`` is the length of the tuple that ``layer`` returns, 0 if it returns a tensor."""
        super().__init__(layer)
        self.extras: list[Any] | None = [None] * (outputs - 1) if outputs else None  # what is returned beside them

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The hidden states as they came."""
        hidden_BTD = hidden_states(args, kwargs)
        return hidden_BTD if self.extras is None else (hidden_BTD, *self.extras)


class NoEmbedding(nn.Module):
    """Stands in for an input embedding whose output is replaced anyway; it holds no weights and fills no memory."""

    def __init__(self, weight: torch.Tensor) -> None:
        """``weight`` [V, D] is the embedding's; only its shape and dtype are kept."""
        super().__init__()
        self.weight = torch.empty_like(weight, device="meta", requires_grad=False)
        self.value = 0.0

    def forward(self, input_ids_BT: torch.Tensor) -> torch.Tensor:
        """``value`` [B, T, D] in one element of memory."""
        value = torch.full((), self.value, dtype=self.weight.dtype, device=input_ids_BT.device)
        return value.expand(*input_ids_BT.shape, self.weight.shape[1])
