"""Call single layers with the arguments their model would pass, and replace absent layers by placeholders.

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
    """The hidden states [B, T, D] among a decoder layer's arguments: the first, or the one of that name."""
    hidden_BTD: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden_BTD


def with_hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any], hidden_BTD: torch.Tensor) -> Call:
    """The arguments of a decoder layer with other hidden states [B, T, D]."""
    return ((hidden_BTD, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden_BTD})


class _Reached(BaseException):
    """Ends the model's forward pass when the layer is called."""


def layer_call(forward: Callable[..., object], layer: nn.Module, batch: Mapping[str, Any]) -> Call | None:
    """The arguments with which a model's ``forward`` calls ``layer``, None if it never does; no later layer runs.

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
    """Turn an unexpected failure of a model's forward pass into one line, from ``begin`` to ``remedy``.

    Raises:
        ModelError: in place of any exception but ModelError and torch.OutOfMemoryError.
    """
    try:
        yield
    except (ModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or "a check of the library fails, no reason given"
        raise ModelError(f"{begin}: {reason} ({type(error).__name__}); {remedy}") from error


def check_order(name: str, path: str, order: list[int]) -> None:
    """Refuse a model that does not call its layers once each, from the first to the last.

    Otherwise the input of a layer could depend on adapters in later layers, and a frozen prefix would be wrong.

    Raises:
        ModelError: names the first layer that is out of order.
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
        """``module`` is not changed."""
        super().__init__()
        for name, value in vars(module).items():
            if not name.startswith("_") and isinstance(value, bool | int | float | str):
                setattr(self, name, value)
        for name, child in module.named_children():
            self.add_module(name, Skeleton(child))


class PassThrough(Skeleton):
    """A placeholder for a decoder layer: returns its input, in the form (tensor or tuple) of the layer's output.

    It keeps the layer's attributes, because models choose masks and positions by them.
    """

    def __init__(self, layer: nn.Module, outputs: int) -> None:
        """``outputs`` is the length of the tuple that ``layer`` returns, 0 if it returns a tensor."""
        super().__init__(layer)
        self.extras: list[Any] | None = [None] * (outputs - 1) if outputs else None  # returned after the hidden states

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The unchanged hidden states [B, T, D], in a tuple if the layer returns one."""
        hidden_BTD = hidden_states(args, kwargs)
        return hidden_BTD if self.extras is None else (hidden_BTD, *self.extras)


class NoEmbedding(nn.Module):
    """A placeholder for an input embedding whose output is replaced anyway; it takes no memory."""

    def __init__(self, weight: torch.Tensor) -> None:
        """``weight`` [V, D] is the embedding's; only its shape and dtype are kept."""
        super().__init__()
        self.weight = torch.empty_like(weight, device="meta", requires_grad=False)
        self.value = 0.0

    def forward(self, input_ids_BT: torch.Tensor) -> torch.Tensor:
        """``value`` [B, T, D] in one element of memory."""
        value = torch.full((), self.value, dtype=self.weight.dtype, device=input_ids_BT.device)
        return value.expand(*input_ids_BT.shape, self.weight.shape[1])
