"""Compiled decoder layers: small operations are fused, which takes far fewer kernel launches on a GPU."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.callback import callback_handler

from aletheia.anatomy.access import lowest_that_learns
from aletheia.anatomy.read import find_layers
from aletheia.errors import TrainingError

VARIANTS = 64  # most compiled variants of a layer: by kind of layer, training mode, gradient mode and range of shapes
_spent = [0.0]


def compile_seconds() -> float:
    """Seconds that this process has spent compiling so far."""
    return _spent[0]


@contextmanager
def compiled_layers(model: nn.Module) -> Iterator[None]:
    """Run the lowest decoder layer with trainable parameters, and those above it, as compiled code.

    Layers of one kind share the code, whatever their weights and the batch's shape; the first step of a kind compiles
    it. Hooks of a layer stay outside. Calls with a key-value cache, as in generation, run uncompiled. So does code on
    which the compiler fails; it then prints a warning.

    Raises:
        TrainingError: the plan adapts experts. PEFT makes a new class for them in each call, and each would be compiled
            again.
    """
    layers = _learning_layers(model)
    if any(isinstance(module, ParamWrapper) for layer in layers for module in layer.modules()):
        raise TrainingError(
            "`compile_layers` is on, but the plan adapts experts, which cannot be compiled; expected it off"
        )
    with (
        dynamo_config.patch(recompile_limit=VARIANTS, suppress_errors=True),
        _timed_compilation(),
        _replaced(layers),
    ):
        yield


def _learning_layers(model: nn.Module) -> Sequence[nn.Module]:
    """The lowest layer with a trainable parameter, and all above it."""
    _, layers = find_layers(model)
    boundary = lowest_that_learns(layers)
    return [] if boundary is None else list(layers[boundary:])


@contextmanager
def _replaced(layers: Sequence[nn.Module]) -> Iterator[None]:
    own = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = _Compiled(layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


class _Compiled:
    """A layer's forward, compiled unless a call fills a key-value cache."""

    def __init__(self, forward: Any) -> None:
        self._plain, self._compiled = forward, torch.compile(forward, dynamic=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        caches = any(kwargs.get(name) is not None for name in ("past_key_values", "past_key_value", "layer_past"))
        return (self._plain if caches else self._compiled)(*args, **kwargs)


@contextmanager
def _timed_compilation() -> Iterator[None]:
    """Measure the seconds of compilation."""
    since: list[float] = []

    def start(*_: Any) -> None:
        since.append(time.perf_counter())

    def end(*_: Any) -> None:
        _spent[0] += time.perf_counter() - since.pop()

    callback_handler.register_start_callback(start)
    callback_handler.register_end_callback(end)
    try:
        yield
    finally:
        callback_handler.remove_start_callback(start)
        callback_handler.remove_end_callback(end)
