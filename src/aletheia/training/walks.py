"""Steps that do not walk over all modules: in a large model, each walk takes a host milliseconds of every step."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import Trainer


def learning(trainer: Trainer) -> list[nn.Parameter]:
    """The parameters that the optimizer holds; no others ever have a gradient."""
    assert trainer.optimizer is not None
    return [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]


@contextmanager
def few_walks(trainer: Trainer) -> Iterator[None]:
    """Meanwhile ``model.train()`` visits no module that it has set already, and ``model.zero_grad()`` no frozen one.

    Trainer calls both at each step.
    """
    model = trainer.model
    assert model is not None
    own_train, own_zero_grad = model.train, model.zero_grad
    all_train = False

    def train(mode: bool = True) -> nn.Module:
        nonlocal all_train
        if not (mode and all_train and model.training):
            own_train(mode)
        all_train = mode
        return model

    def zero_grad(set_to_none: bool = True) -> None:
        if not set_to_none or trainer.optimizer is None:
            own_zero_grad(set_to_none)
            return
        for parameter in learning(trainer):
            parameter.grad = None

    model.train, model.zero_grad = train, zero_grad  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.train, model.zero_grad
