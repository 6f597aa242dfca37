"""Train and eval mode of a model, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put the model in train or eval mode, and every module back into its own on the way out.

    ``model.train(model.training)`` would not: a PeftModel just made is in train mode over a base in eval mode.
    """
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
