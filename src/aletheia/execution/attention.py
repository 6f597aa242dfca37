"""Contexts that replace how a model computes its ``sdpa`` attention; they can be nested."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Attention = Callable[..., tuple[torch.Tensor, None]]
OTHER_WAYS = ("position_bias", "cache", "softcap", "s_aux")  # arguments that the ways here do not support

WAYS = "_aletheia_attention_ways"  # an attribute of modules: a compiler would treat modules in a container as constants
_entered: list[Attention] = []


@contextmanager
def attention_by(model: nn.Module, way: Attention) -> Iterator[None]:
    """Call ``way(inner, module, query, key, value, attention_mask, ...)`` where ``model`` asks for ``sdpa``.

    ``inner`` is the way of the enclosing context; outermost, it is transformers' own function. A function that another
    library has registered as ``sdpa`` stays. With recomputation, backward must run inside the context, as forward does.
    """
    if ALL_ATTENTION_FUNCTIONS["sdpa"] not in (sdpa_attention_forward, _dispatch):
        yield
        return
    modules = list(model.modules())
    _entered.append(way)
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _dispatch
    for module in modules:
        setattr(module, WAYS, (*getattr(module, WAYS, ()), way))
    try:
        yield
    finally:
        for module in modules:
            ways = list(getattr(module, WAYS))
            ways.remove(way)
            if ways:
                setattr(module, WAYS, tuple(ways))
            else:
                delattr(module, WAYS)
        _entered.remove(way)
        if not _entered:
            del ALL_ATTENTION_FUNCTIONS["sdpa"]  # the global registration takes effect again


def sees_backward_only(module: nn.Module, asked: bool | None) -> bool:
    """Whether a query sees no later key: the call decides with ``asked``, else its module."""
    return bool(getattr(module, "is_causal", True)) if asked is None else asked


def _dispatch(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    found: Attention = sdpa_attention_forward
    for way in getattr(module, WAYS, ()):
        found = _on_top(way, found)
    return found(module, *args, **kwargs)


def _on_top(way: Attention, below: Attention) -> Attention:
    return lambda *args, **kwargs: way(below, *args, **kwargs)
