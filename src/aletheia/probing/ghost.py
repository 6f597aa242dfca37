"""Ghost gradient norms: the norm of a weight gradient without computing that gradient.

Shapes: N tokens of the batch (B x T), I input features, O output features.
"""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import nn

from aletheia.errors import ProbeError

CANCELLATION = 1e-4  # below this share of ||X||^2 ||dY||^2 the Gram form's float32 rounding may exceed 1e-3


class LayerInput:
    """One activation that feeds one or several modules (query, key and value share theirs).

    Its Gram matrix is computed at most once, when a module first needs it.
    """

    def __init__(self, activation: torch.Tensor) -> None:
        """Keep ``activation`` [..., I], flattened to tokens."""
        self.source = activation
        self.input_NI = activation.detach().flatten(0, -2)
        self._version = activation._version
        self._gram_NN: torch.Tensor | None = None

    def check_unchanged(self, name: str) -> None:
        """Refuse an activation that was overwritten between the forward and the backward pass.

        Raises:
            ProbeError: names the module.
        """
        if self.source._version != self._version:
            raise ProbeError(
                f"the input of {name} was modified in place after use; the probe needs the original; "
                "load the model with another attention or kernel implementation"
            )

    @property
    def has_gram(self) -> bool:
        """Whether the Gram matrix is already computed."""
        return self._gram_NN is not None

    @property
    def gram_NN(self) -> torch.Tensor:  # noqa: N802
        """``X Xt`` [N, N] in at least float32."""
        if self._gram_NN is None:
            input_NI = at_least_float32(self.input_NI)
            self._gram_NN = input_NI @ input_NI.T
        return self._gram_NN


def ghost_norm(layer_input: LayerInput, grad_out: torch.Tensor) -> torch.Tensor:
    """Frobenius norm of ``dYt X`` [O, I], the gradient of a weight matrix, as a 0-d tensor.

    ``||dYt X||_F^2 = sum((X Xt) * (dY dYt))`` [Goodfellow 2015; Li et al. 2022, sec. 4]. The Gram form on the right
    costs ``N^2 (I + O)`` multiply-adds, the plain form on the left ``N I O``. The cheaper one is used, or the plain
    one where cancellation between tokens would lose digits. Both are exact up to rounding.
    """
    grad_NO = at_least_float32(grad_out.detach().flatten(0, -2))
    tokens, out_features = grad_NO.shape
    in_features = layer_input.input_NI.shape[1]
    gram_cost = tokens * (out_features + (0 if layer_input.has_gram else in_features))
    if gram_cost < in_features * out_features:
        grad_gram_NN = grad_NO @ grad_NO.T
        summed = torch.float32 if grad_NO.device.type == "mps" else torch.float64  # MPS has no float64
        squared = (layer_input.gram_NN * grad_gram_NN).sum(dtype=summed)
        # gradients of tokens that cancel leave a small difference of large terms; as a share of
        # ||X||_F^2 ||dY||_F^2 (the traces) it may be too small for float32
        if squared >= CANCELLATION * layer_input.gram_NN.trace() * grad_gram_NN.trace():
            return squared.sqrt().to(grad_NO.dtype)
    norm: torch.Tensor = torch.linalg.matrix_norm(grad_NO.T @ at_least_float32(layer_input.input_NI))
    return norm


class GhostRecorder:
    """Hooks on modules that turn one forward and backward pass into one gradient norm per module.

    A context manager; after each backward pass ``pop()`` returns the norms and starts over.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        """Prepare for ``modules`` by full name."""
        self._modules = modules
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._norms: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._last_input: LayerInput | None = None

    def __enter__(self) -> "GhostRecorder":
        """Install the hooks."""
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._forward_hook(name)))
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove the hooks and drop all activations, after an error too."""
        for handle in self._handles:
            handle.remove()
        self.pop()

    def pop(self) -> dict[str, torch.Tensor]:
        """Norms by module since the last call; for a module used several times, the sum of its norms."""
        norms = {name: torch.stack(values).sum() for name, values in self._norms.items()}
        self._norms.clear()
        self._last_input = None
        return norms

    def _forward_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if not output.requires_grad:
                return
            if self._last_input is None or self._last_input.source is not args[0]:
                self._last_input = LayerInput(args[0])
            layer_input = self._last_input

            def score(grad_out: torch.Tensor) -> None:
                layer_input.check_unchanged(name)
                self._norms[name].append(ghost_norm(layer_input, grad_out))

            output.register_hook(score)

        return hook


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, converted to float32 if it is half precision."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
