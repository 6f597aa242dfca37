"""Adapted modules that are given the same tensor, such as queries, keys and values, compute their products together.

A model's code calls them one after another. The first to be called computes the outputs of all. Each of the others
takes its own when it is called with the very same tensor, unchanged; with another tensor it computes its own.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from aletheia.execution.low_rank import Product, products

# modules of one parent that are called with the same tensor in transformers' models. A name that is not here costs
# speed only, and so does a name whose module is given another tensor
NAMES = {
    *("q_proj", "k_proj", "v_proj", "query", "key", "value"),
    *("q_a_proj", "kv_a_proj_with_mqa"),  # latent attention
    *("gate_proj", "up_proj", "w1", "w3", "linear_x", "linear_y"),
    *("in_proj_qkv", "in_proj_qkvz", "in_proj_z", "in_proj_b", "in_proj_a", "in_proj_ba"),  # linear attention
    *("a_proj", "b_proj", "g_proj"),
}


class _Group:
    """Modules that share their input, as far as is known."""

    def __init__(self, modules: Sequence[Any]) -> None:
        self.modules = modules
        self.shares = True


class _Output(NamedTuple):
    """An output that was computed with another module's, and of what."""

    output: torch.Tensor
    product: Product
    versions: tuple[int, ...]


class _Waiting(threading.local):
    """Outputs that were computed with another module's, until their own modules are called; of one group at a time."""

    def __init__(self) -> None:
        self.group: _Group | None = None
        self.x: torch.Tensor | None = None
        self.state: object = None
        self.outputs: dict[nn.Module, _Output] = {}
        self.is_hooked = False

    def drop(self) -> None:
        """Let go of outputs that nobody asked for. Their modules turned out not to share their input.

        Such modules are not computed together again, except where the tensors for backward go through hooks: where
        layers are recomputed, backward has to repeat what forward did.
        """
        if self.group is not None and not self.is_hooked and not _is_hooked():
            self.group.shares = False
        self.group, self.x, self.outputs = None, None, {}


_waiting = _Waiting()
_groups: dict[nn.Module, _Group] = {}


@contextmanager
def shared_inputs(model: nn.Module, covered: Sequence[nn.Module]) -> Iterator[None]:
    """Within this context, the ``covered`` modules of ``model`` are grouped by the input that they share."""
    before, found = {module: _groups[module] for module in covered if module in _groups}, set(covered)
    for parent in model.modules():
        children: list[Any] = [child for name, child in parent.named_children() if name in NAMES]
        modules = [child for child in children if child in found]
        if len(modules) > 1 and len({module.in_features for module in modules}) == 1:
            _groups.update(dict.fromkeys(modules, _Group(modules)))
    try:
        yield
    finally:
        _waiting.drop()
        for module in covered:
            _groups.pop(module, None)
        _groups.update(before)


def take(module: nn.Module, product: Product, x: torch.Tensor) -> torch.Tensor | None:
    """The output of ``module`` for ``x``, if it was computed with another module's, and nothing has changed since."""
    if _waiting.group is None or module not in _groups:
        return None
    found = _waiting.outputs.pop(module, None) if x is _waiting.x and _state(x) == _waiting.state else None
    if found is None or not product.is_same(found.product) or _versions(product) != found.versions:
        _waiting.drop()
        return None
    if not _waiting.outputs:
        _waiting.group = _waiting.x = None
    return found.output


def others(module: nn.Module) -> Sequence[Any]:
    """The modules that are computed together with ``module``."""
    group = _groups.get(module)
    return [other for other in group.modules if other is not module] if group is not None and group.shares else ()


def compute(x: torch.Tensor, members: dict[nn.Module, Product], as_operator: bool) -> torch.Tensor:
    """The output of the first of ``members`` for ``x``; those of the others wait until they are taken."""
    output, *outputs = products(x, list(members.values()), as_operator)
    if outputs:
        module, *rest = members
        _waiting.group, _waiting.x, _waiting.state, _waiting.is_hooked = _groups[module], x, _state(x), _is_hooked()
        waiting = zip(rest, outputs, strict=True)
        _waiting.outputs = {other: _Output(y, members[other], _versions(members[other])) for other, y in waiting}
    return output


def _state(x: torch.Tensor) -> tuple[object, ...]:
    return _version(x), torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def _versions(product: Product) -> tuple[int, ...]:
    return tuple(_version(tensor) for tensor in (product.weight, product.a, product.b))


def _version(tensor: torch.Tensor) -> int:
    """How often it was changed in place; tensors of inference mode do not count that."""
    return 0 if tensor.is_inference() else tensor._version


def _is_hooked() -> bool:
    """Whether tensors for backward go through hooks, as they do where layers are recomputed."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
