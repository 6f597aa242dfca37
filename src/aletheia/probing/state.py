"""Borrow a model and give it back as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode with every parameter frozen; restore modes and ``requires_grad`` on the way out.

    Runs its restoration after an error too. Gradients in ``.grad`` are not touched.
    """
    modes = {module: module.training for module in model.modules()}
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, mode in trainable.items():
            parameter.requires_grad_(mode)
