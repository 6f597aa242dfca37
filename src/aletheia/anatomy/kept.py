"""What backward keeps of a layer besides inputs and outputs of matrices: by norms, activations and state spaces.

Each kind of module runs once, on a few bfloat16 tokens on the meta device, and what autograd saves is counted. Nothing
is computed, and the model does not change.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from aletheia.anatomy.schema import Kept

NORM = re.compile(r"norm|^ln_", re.IGNORECASE)
ACTIVATION = re.compile(r"act", re.IGNORECASE)
TOKENS, WIDTH = 7, 16  # of a trial; activations take any width
SCANNED_TOKENS = 64  # of a trial of a state space without a chunk size
LIKE_LLAMA = (0.0, 1.0)  # elements in the model's dtype and in float32 that an RMSNorm in plain operations keeps
DROPPED = 1.5  # elements per element of the residual stream that dropout keeps: result and a byte mask
SOFT_CAPPED, SCALED = 3, 2  # copies of the logits where the model changes them after its head
SCALES = ("logits_scaling", "logit_scale", "logits_scale")


def read_kept(text: Any, layers: nn.ModuleList, hidden_size: int, attention_width: int, is_plain: bool) -> Kept:
    """What backward keeps of a model's layers besides inputs and outputs of matrices.

    Args:
        text: config of the language model.
        layers: its decoder layers, on any device.
        hidden_size: width of the residual stream.
        attention_width: heads x head size; a norm that is narrower than the layers' states runs once per head.
        is_plain: whether PEFT computes the adapters of some matrices by its own code.
    """
    known: dict[tuple[type, int], tuple[float, float]] = {}
    scanned: dict[type, tuple[float, float, float]] = {}
    own, wide, states, wide_states, largest, chunk = [], [], [], [], 0.0, 0
    for layer in layers:
        found = [_norm(parent, name, norm, known, hidden_size, attention_width) for parent, name, norm in _norms(layer)]
        dropouts = sum(isinstance(module, nn.Dropout) and module.p > 0 for module in layer.modules())
        scans = [_scan(mixer, scanned, hidden_size) for mixer in _mixers(layer)]
        states.append(sum(elements for elements, _, _ in scans))
        wide_states.append(sum(elements for _, elements, _ in scans))
        largest = max((largest, *(most for _, _, most in scans)))
        chunk = max((chunk, *map(_chunk, _mixers(layer))))
        own.append(sum(elements for elements, _ in found) + DROPPED * dropouts * hidden_size)
        wide.append(sum(elements for _, elements in found))
    activation = max((_saved(module, WIDTH) or (1.0, 0.0) for module in _activations(layers)), default=(1.0, 0.0))
    return Kept(
        norms=tuple(own),
        wide_norms=tuple(wide),
        states=tuple(states),
        wide_states=tuple(wide_states),
        chunk=chunk,
        activation=max(0.0, activation[0] - 1),  # the input is the output of a matrix
        wide_activation=activation[1],
        largest_state=largest,
        heads=_heads(text),
        square_copies=_square_copies(text),
        window=_positive(getattr(text, "sliding_window", None)),
        plain_products=is_plain,
        logit_copies=_logit_copies(text),
    )


def _norms(layer: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Parent, attribute name and module of every norm with a weight vector."""
    for parent in layer.modules():
        for name, module in parent.named_children():
            weight = getattr(module, "weight", None)
            is_norm = NORM.search(type(module).__name__) or NORM.search(name)
            if is_norm and isinstance(weight, torch.Tensor) and weight.ndim == 1:
                yield parent, name, module


def _norm(
    parent: nn.Module,
    name: str,
    norm: nn.Module,
    known: dict[tuple[type, int], tuple[float, float]],
    hidden_size: int,
    attention_width: int,
) -> tuple[float, float]:
    """Elements that a norm keeps for a token: in the model's dtype, and in float32."""
    width = int(norm.weight.shape[0])  # type: ignore[index]
    key = (type(norm), width)
    if key not in known:
        known[key] = _saved(norm, width) or LIKE_LLAMA
    taken = width
    if width < hidden_size and width < attention_width and "_a_" not in name:  # not the norms of latent attention
        projection = getattr(parent, f"{name[0]}_proj", None)  # q_norm, k_norm
        taken = int(getattr(projection, "out_features", attention_width))
    return known[key][0] * taken, known[key][1] * taken


def _activations(layers: nn.ModuleList) -> Iterator[nn.Module]:
    """One activation of each class."""
    kinds: dict[type, nn.Module] = {}
    for name, module in layers.named_modules():
        is_leaf = not any(True for _ in module.children()) and not any(True for _ in module.parameters())
        if is_leaf and ACTIVATION.search(f"{name.rpartition('.')[2]} {type(module).__name__}"):
            kinds.setdefault(type(module), module)
    yield from kinds.values()


def _saved(module: nn.Module, width: int) -> tuple[float, float] | None:
    """Elements saved per input element: in bfloat16 and in float32; None if the module needs other arguments."""
    saved = _trial(module, torch.empty(TOKENS, width, device="meta", dtype=torch.bfloat16))
    if saved is None:
        return None
    kept = _by_storage(tensor for tensor in saved if tensor.ndim and tensor.shape[0] == TOKENS)
    return _elements(kept, torch.bfloat16), _elements(kept, torch.float32)


def _mixers(layer: nn.Module) -> Iterator[nn.Module]:
    """The state-space modules of a layer: those with a convolution over the tokens."""
    for module in layer.modules():
        if any(isinstance(child, _ConvNd) for child in module.children()):
            yield module


def _scan(
    mixer: nn.Module, known: dict[type, tuple[float, float, float]], hidden_size: int
) -> tuple[float, float, float]:
    """Elements that a state space keeps for a token in the model's dtype and in float32; and of its largest tensor."""
    if type(mixer) not in known:
        known[type(mixer)] = _scanned(mixer, hidden_size)
    return known[type(mixer)]


def _scanned(mixer: nn.Module, width: int) -> tuple[float, float, float]:
    """As :func:`_scan`, by a trial; zeros if the module needs more than hidden states."""
    tokens = _chunk(mixer)
    saved = _trial(mixer, torch.empty(1, tokens, width, device="meta", dtype=torch.bfloat16))
    kept = [] if saved is None else _by_storage(saved)
    own, wide = (
        [tensor.untyped_storage().nbytes() / dtype.itemsize / tokens for tensor in kept if tensor.dtype == dtype]
        for dtype in (torch.bfloat16, torch.float32)
    )
    return sum(own), sum(wide), max(wide, default=0.0)


def _chunk(mixer: nn.Module) -> int:
    return int(getattr(mixer, "chunk_size", SCANNED_TOKENS))


def _trial(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor] | None:
    """The tensors that autograd saves in a forward pass on the meta device, without weights; None if it fails."""
    saved: list[torch.Tensor] = []  # keeps them alive, so that no address is reused

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    tensors = {
        name: value.detach().to("meta", torch.bfloat16)
        for name, value in (*module.named_parameters(), *module.named_buffers())
    }
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            torch.func.functional_call(module, tensors, (x.requires_grad_(True),))
    except Exception:  # it needs more arguments, or another shape
        return None
    weights = {value.untyped_storage()._cdata for value in tensors.values()}
    return [tensor for tensor in saved if tensor.untyped_storage()._cdata not in weights]


def _by_storage(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The first tensor of each storage."""
    found: dict[int, torch.Tensor] = {}
    for tensor in tensors:
        found.setdefault(tensor.untyped_storage()._cdata, tensor)
    return list(found.values())


def _elements(tensors: Iterable[torch.Tensor], dtype: torch.dtype) -> float:
    """Elements of all tensors of that dtype, per element of the trial's input."""
    whole = [tensor for tensor in tensors if tensor.dtype == dtype and tensor.shape[-1] > 1]
    return float(sum(tensor.numel() / tensor.shape[-1] for tensor in whole) / TOKENS)


def _heads(text: Any) -> int:
    try:
        return _positive(getattr(text, "num_attention_heads", None))
    except Exception:  # transformers raises where layers differ
        return max(_positive(getattr(own, "num_attention_heads", None)) for own in text.per_layer_config)


def _positive(value: Any) -> int:
    """A size from a config; 0 where there is none."""
    return value if isinstance(value, int) and value > 0 else 0


def _square_copies(text: Any) -> int:
    if getattr(text, "_attn_implementation", None) != "eager":
        return 0
    return 2 if getattr(text, "attn_logit_softcapping", None) else 1


def _logit_copies(text: Any) -> int:
    if getattr(text, "final_logit_softcapping", None):
        return SOFT_CAPPED
    return SCALED if any(getattr(text, name, None) not in (None, 1.0) for name in SCALES) else 1
