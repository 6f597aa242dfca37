"""What bitsandbytes quantizes of a model's layers: only linear layers, by their class.

It silently skips subclasses of torch's Linear, and experts, which are one 3-D weight. But it would quantize weights
that a layer passes straight to a kernel, past the module that could unpack them; these are excluded here.
"""

from collections import Counter

from torch import nn

from aletheia.anatomy.read import find_layers, matrices_of
from aletheia.anatomy.trial import INDEX, read_past
from aletheia.errors import ModelError

NOTED = 0.01  # share of the layers' weights


def names_to_skip(model: nn.Module) -> list[str] | None:
    """For ``llm_int8_skip_modules``: the name endings of modules that cannot be quantized; None if all can.

    Args:
        model: on the meta device, before anything is quantized.
    """
    path, layers = find_layers(model)
    names = read_past(model, matrices_of(layers, path))
    if not names:
        return None
    head = getattr(model, "get_output_embeddings", lambda: None)()  # skipped by default; a list replaces the default
    heads = [name for name, module in model.named_modules() if module is head]
    return [*dict.fromkeys(_inside(name.removeprefix(f"{path}.")) for name in names), *heads]


def check_quantized(name: str, model: nn.Module, kind: str) -> None:
    """Refuse a model none of whose layers was quantized.

    Args:
        name: MODEL, for the error.
        model: the loaded model.
        kind: the requested quantization, ``nf4`` or ``int8``.

    Raises:
        ModelError: names the classes of its matrices.
    """
    _, layers = find_layers(model)
    if not any(_is_quantized(weight) for weight in layers.parameters()):
        classes = sorted({type(module).__name__ for module in matrices_of(layers).values()})
        raise ModelError(
            f"`quantize` {kind} quantizes no layer of {name}: bitsandbytes takes only Linear and Conv1D, and the "
            f"layers hold {', '.join(classes) or 'neither'}; leave `quantize` out"
        )


def unquantized_note(model: nn.Module) -> str | None:
    """A note on weights of the layers that are not quantized; None if they are below 1 % each."""
    _, layers = find_layers(model)
    total, left = 0, Counter[str]()
    for name, weight in layers.named_parameters():
        if weight.dim() > 1:
            packed = getattr(weight, "quant_state", None)
            size = weight.numel() if packed is None else packed.shape.numel()
            total += size
            if not _is_quantized(weight):
                left[_inside(name).removesuffix(".weight")] += size
    named = [name for name, size in left.items() if size >= NOTED * total]
    if not named:
        return None
    return (
        f"{left.total() / total:.0%} of the layers' weights are not quantized: {', '.join(named)}; `quantize` takes "
        "only linear layers, and none whose weight its layer may read itself"
    )


def _is_quantized(weight: nn.Parameter) -> bool:
    return not weight.is_floating_point() or getattr(weight, "quant_state", None) is not None


def _inside(name: str) -> str:
    """A name inside the layers without the layer's index, with a star for any other index."""
    return INDEX.sub("*", name.partition(".")[2])
