"""Borrow a model and give it back unchanged."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from aletheia.anatomy.modes import in_mode


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode with every parameter frozen; restore modes and ``requires_grad`` on exit.

    They are restored after an error too. Gradients in ``.grad`` are not touched.
    """
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with in_mode(model, training=False):
            for parameter in trainable:
                parameter.requires_grad_(False)
            yield
    finally:
        for parameter, mode in trainable.items():
            parameter.requires_grad_(mode)
