"""Gradient norms of fused experts, one stack at a time: backward measures each gradient and frees it.

Shapes: E experts, N tokens, K experts per token.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from aletheia.probing.ghost import at_least_float32


class _Look(torch.autograd.Function):
    """Pass a frozen weight through; backward shows its gradient to ``look`` and stops there."""

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, anchor: torch.Tensor, look: Callable[[torch.Tensor], None]
    ) -> torch.Tensor:
        ctx.look = look
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None, None]:
        ctx.look(grad)
        return None, None, None


class ExpertRecorder:
    """Hooks on the owners of 3-D parameters: per stack, the gradient norm and the token count of each expert.

    It does not matter how the owner computes (expert by expert, grouped, batched): during its forward pass an
    attribute of the same name shadows the parameter, and the gradient passes through it. ``anchor`` must be among the
    inputs of ``torch.autograd.grad``, else autograd does not reach the stacks.
    """

    def __init__(self, parameters: Mapping[str, tuple[nn.Module, str]]) -> None:
        """Prepare for ``parameters``: full name -> owner and name there."""
        self.anchor = torch.zeros((), requires_grad=True)
        self.mask_N: torch.Tensor | None = None  # 1 for tokens that are not padding
        self._parameters = dict(parameters)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._norms: dict[str, torch.Tensor] = {}
        self._tokens: dict[str, torch.Tensor] = {}

    def __enter__(self) -> "ExpertRecorder":
        """Install the hooks."""
        owners: dict[nn.Module, dict[str, str]] = {}
        for name, (owner, own_name) in self._parameters.items():
            owners.setdefault(owner, {})[own_name] = name
        for owner, names in owners.items():
            self._handles.append(owner.register_forward_pre_hook(self._shadow(names), with_kwargs=True))
            self._handles.append(owner.register_forward_hook(self._uncover(names), always_call=True))
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def pop(self) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
        """By parameter, the norms [E] and tokens [E] (None if the routing was not seen) since the last call."""
        found = {name: (norms, self._tokens.get(name)) for name, norms in self._norms.items()}
        self._norms, self._tokens = {}, {}
        return found

    def _shadow(self, names: dict[str, str]) -> Callable[..., None]:
        def hook(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not torch.is_grad_enabled():
                return
            for own_name, name in names.items():
                weight = owner._parameters[own_name]
                assert weight is not None
                owner.__dict__[own_name] = _Look.apply(weight, self.anchor.to(weight.device), self._record(name))
                routed = _routing([*args, *kwargs.values()], len(weight), self.mask_N)
                if routed is not None:
                    self._tokens[name] = self._tokens.get(name, 0) + routed

        return hook

    @staticmethod
    def _uncover(names: dict[str, str]) -> Callable[..., None]:
        def hook(owner: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            for own_name in names:
                owner.__dict__.pop(own_name, None)

        return hook

    def _record(self, name: str) -> Callable[[torch.Tensor], None]:
        def look(grad: torch.Tensor) -> None:
            norms_E = torch.linalg.vector_norm(at_least_float32(grad).flatten(1), dim=1)
            self._norms[name] = self._norms.get(name, 0) + norms_E

        return look


def _routing(given: list[Any], experts: int, mask_N: torch.Tensor | None) -> torch.Tensor | None:
    """Tokens per expert [E] without padding, from the indices [N, K] among the owner's arguments; else None."""
    for value in given:
        if isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.int32) and value.dim() >= 2:
            index_NK = value.flatten(0, -2)
            if mask_N is not None and len(mask_N) == len(index_NK):
                index_NK = index_NK[mask_N.to(index_NK.device).bool()]
            return torch.bincount(index_NK.flatten().clamp(max=experts), minlength=experts + 1)[:experts]
    return None
