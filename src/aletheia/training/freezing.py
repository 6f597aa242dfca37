"""Freeze the adapters of lower layers as they are."""

from collections.abc import Callable, Sequence

from torch import nn

from aletheia.adapters.acting import acting, adapted_in
from aletheia.anatomy.read import find_layers


def layers_below(model: nn.Module, boundary: int) -> Sequence[nn.Module]:
    """The layers below ``boundary``."""
    return list(find_layers(model)[1][:boundary])


def freeze_below(model: nn.Module, boundary: int) -> Callable[[], None]:
    """Freeze the adapters below ``boundary`` as they are, and switch their dropout off; returns the undo function."""
    frozen = [parameter for layer in layers_below(model, boundary) for parameter in layer.parameters()]
    frozen = [parameter for parameter in frozen if parameter.requires_grad]
    dropouts = [
        (module.lora_dropout, name, dropout)
        for layer in layers_below(model, boundary)
        for module in adapted_in(layer)
        for name, dropout in module.lora_dropout.items()
    ]
    for parameter in frozen:
        parameter.requires_grad_(False)
        parameter.grad = None
    for owner, name, _ in dropouts:
        owner[name] = nn.Identity()

    def undo() -> None:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for owner, name, dropout in dropouts:
            owner[name] = dropout

    return undo


def adapters_below(model: nn.Module, boundary: int) -> Callable[[], object]:
    """A function that returns which adapters act below ``boundary``: a reference pass may switch them."""
    adapted = [module for layer in layers_below(model, boundary) for module in adapted_in(layer)]
    return lambda: [acting(module) for module in adapted]
