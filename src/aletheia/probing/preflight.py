"""Before hours of float16: one forward pass, and another way to compute if a value is not finite.

float16 ends at 65,504. The unscaled scores of GPT-NeoX's eager attention exceed that, and so do activations of some
families; then the loss is NaN.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from aletheia.anatomy.load import Loaded, load, pick_dtype
from aletheia.anatomy.read import find_layers, layer_index
from aletheia.anatomy.settings import Attention
from aletheia.data.batches import collate, on_device_of
from aletheia.data.examples import Examples
from aletheia.errors import ProbeError
from aletheia.probing.tally import Batch


def preflight(base: Loaded, data: Examples) -> tuple[Loaded, str | None]:
    """The model and None if its longest row passes; else a model that passes, and a line that says what changed.

    Only float16 is checked: bfloat16 and float32 have enough range. The alternatives, in order: sdpa instead of eager
    attention, then the checkpoint loaded again, in bfloat16 where the device computes in it, or in float32. For the
    latter the given model is emptied first, unless it is quantized.

    Raises:
        ModelError: the model cannot be loaded again.
        ProbeError: no alternative helps, so the checkpoint itself is broken.
    """
    model = base.model
    if model.dtype != torch.float16:
        return base, None
    batch = collate([max(data.examples, key=len)], data.pad_token_id)
    broken = first_broken_layer(model, batch)
    if broken is None:
        return base, None
    path, _ = find_layers(model)
    attention: Attention = model.config._attn_implementation
    what = f"layer {broken} ({path}.{broken}) gives values that are not finite in float16 with {attention} attention"
    if attention == "eager":
        model.set_attn_implementation("sdpa")
        if first_broken_layer(model, batch) is None:
            return base, f"{what}; sdpa attention is used instead"
        model.set_attn_implementation(attention)
    name, device = model.name_or_path, model.device
    if base.quantize is None:
        model.to("meta")  # it is not needed any more, and both may not fit
    for dtype in ("bfloat16", "float32") if pick_dtype(device) == torch.bfloat16 else ("float32",):
        again = load(name, dtype, str(device), base.quantize, attention, base.trust_remote_code, base.allow_pickle)
        if first_broken_layer(again.model, batch) is None:
            return again, f"{what}; {dtype} is used instead"
    raise ProbeError(f"{what}, and in float32 too; expected finite weights; fetch the checkpoint again")


def first_broken_layer(model: nn.Module, batch: Batch) -> int | None:
    """Index of the first layer whose output is not finite in a plain forward pass; None if all are finite."""
    path, layers = find_layers(model)
    broken = _broken_outputs(model, batch, {f"{path}.{index}": layer for index, layer in enumerate(layers)})
    return min((layer_index(name, path) for name in broken), default=None)


def broken_output(model: nn.Module, batch: Batch) -> str | None:
    """Where a plain forward pass first gives a non-finite value: layer and innermost module, in words; else None."""
    path, _ = find_layers(model)
    broken = _broken_outputs(model, batch, dict(model.named_modules()))
    return f"the output of {describe_place(broken[0], path)}" if broken else None


def describe_place(name: str, layer_path: str) -> str:
    """``layer 2 (model.layers.2.mlp.down_proj)`` for a module or parameter; only its name outside the layers."""
    inside = name.startswith(f"{layer_path}.")
    for of_peft in ("base_model.model.", ".base_layer", ".default"):
        name = name.replace(of_peft, "")
    own_path = layer_path.replace("base_model.model.", "")
    return f"layer {layer_index(name, own_path)} ({name})" if inside else name


@torch.no_grad()
def _broken_outputs(model: nn.Module, batch: Batch, watched: dict[str, nn.Module]) -> list[str]:
    """Names of modules whose output is not finite, in the order in which they finish: inner before outer."""
    broken: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            first = output[0] if isinstance(output, tuple | list) and output else output
            if isinstance(first, torch.Tensor) and first.is_floating_point() and not torch.isfinite(first).all():
                broken.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in watched.items() if name]
    try:
        model(**on_device_of(model, batch), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return broken
