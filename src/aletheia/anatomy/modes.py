"""Switch a model between train and eval mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put the model in train or eval mode; on exit each module gets its earlier mode back.

    ``model.train(model.training)`` would not do that: a new PeftModel is in train mode over a base in eval mode.
    """
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
