"""Read a model's anatomy from its structure alone; works on the meta device and reads no weight values.

The decoder layers are the ``ModuleList`` with the most parameters, within the language model where that is one part of
several. Its modules are every Linear and Conv1D, and every stack of experts, a 3-D parameter. Roles come from names.
A trial marks what LoRA cannot adapt; see :mod:`aletheia.anatomy.trial`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from aletheia.anatomy.access import base_of, text_config
from aletheia.anatomy.kept import read_kept
from aletheia.anatomy.schema import Anatomy, LeftOut, Module, SharedWeight, role_of
from aletheia.anatomy.trial import refused
from aletheia.errors import ModelError

ACTIVE_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
EXPERT_NAMES = re.compile(r"expert|moe", re.IGNORECASE)


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder layers; index 0 is next to the embedding.

    Raises:
        ModelError: no list of layers was found.
    """
    best: tuple[str, nn.ModuleList] | None = None
    most = 0
    place, inside = _language_model(model)
    for name, module in inside.named_modules(prefix=place):  # outer lists come first and count inner ones
        if isinstance(module, nn.ModuleList) and (size := _parameters(module)) > most:
            best, most = (name, module), size
    if best is None:
        raise ModelError(
            f"found no list of decoder layers in {type(model).__name__}; expected a torch ModuleList with parameters"
        )
    return best


def _language_model(model: nn.Module) -> tuple[str, nn.Module]:
    """Path and module of the language model, also where it is one part of several, as with a vision tower."""
    base = base_of(model)
    config = getattr(base, "config", None)
    if config is None or config.get_text_config() is config:
        return "", model
    decoder = base.get_decoder()
    path = next((name for name, module in model.named_modules() if module is decoder), None)
    return ("", model) if path is None else (path, decoder)


def adaptable_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every Linear and Conv1D inside the decoder layers by full name, in the model's order."""
    path, layers = find_layers(model)
    return matrices_of(layers, path)


def fused_parameters(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Every stack of experts in the decoder layers: full name -> its module and its name there."""
    path, layers = find_layers(model)
    return stacks_of(layers, path)


def matrices_of(module: nn.Module, path: str = "") -> dict[str, nn.Module]:
    """Every Linear and Conv1D inside ``module``, whose path is ``path``, by full name."""
    return {name: inner for name, inner in module.named_modules(prefix=path) if is_matrix(inner)}


def stacks_of(module: nn.Module, path: str = "") -> dict[str, tuple[nn.Module, str]]:
    """Every stack of experts inside ``module``, whose path is ``path``: full name -> its module and its name there.

    A stack is a 3-D parameter with "expert" or "moe" in its full name, or "Expert" in the class of its module.
    """
    return {
        name: (owner, own_name)
        for name, owner, own_name in _three_dimensional(module, path)
        if EXPERT_NAMES.search(name.removeprefix(path)) or "Expert" in type(owner).__name__
    }


def _three_dimensional(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module, str]]:
    """Full name, owner and own name of every 3-D parameter inside ``module``, convolutions excepted."""
    for prefix, owner in module.named_modules(prefix=path):
        for own_name, parameter in owner.named_parameters(recurse=False):
            if parameter.dim() == 3 and not isinstance(owner, _ConvNd):
                yield f"{prefix}.{own_name}", owner, own_name


def is_matrix(module: nn.Module) -> bool:
    """Whether LoRA can adapt this module: Linear or GPT-2's Conv1D.

    Subclasses of Linear count (quantized ones, Falcon's) unless they return something other than the product, as some
    routers do.
    """
    if isinstance(module, nn.Linear):
        if type(module) not in _RETURNS_PRODUCT:
            _RETURNS_PRODUCT[type(module)] = _returns_product(module)
        return _RETURNS_PRODUCT[type(module)]
    return isinstance(module, Conv1D)


_RETURNS_PRODUCT: dict[type[nn.Linear], bool] = {nn.Linear: True}


def _returns_product(linear: nn.Linear) -> bool:
    """Whether a subclass of Linear returns its product: a trial on the meta device if its weights are plain."""
    if type(linear).forward is nn.Linear.forward or not linear.weight.is_floating_point():
        return True
    meta = {name: parameter.to("meta") for name, parameter in linear.named_parameters()}
    row = torch.empty(1, linear.in_features, device="meta", dtype=linear.weight.dtype)
    try:
        output = torch.func.functional_call(linear, meta, (row,))
    except Exception:  # it needs other arguments
        return False
    return isinstance(output, torch.Tensor)


def adds_router_loss(model: nn.Module) -> bool:
    """Whether the loss includes a router loss of a mixture of experts, which frozen layers contribute to as well."""
    return bool(getattr(text_config(model), "output_router_logits", False))


def read_anatomy(model: nn.Module) -> Anatomy:
    """Take a causal language model apart; it may be on the meta device.

    Raises:
        ModelError: the layers, the config, the embedding or the modules were not found; the message says which.
    """
    path, layers = find_layers(model)
    config = getattr(model, "config", None)
    get_embedding = getattr(model, "get_input_embeddings", None)
    embedding = get_embedding() if get_embedding else None
    if config is None or embedding is None:
        missing = "config" if config is None else "input embedding"
        raise ModelError(f"{type(model).__name__} has no {missing}; expected a transformers causal language model")
    text = config.get_text_config()
    modules, left_out = _modules(model, path, text)
    if not any(not module.refused for module in modules):
        raise ModelError(
            f"{path} of {type(model).__name__} has no module that LoRA can adapt; expected Linear or Conv1D modules"
        )
    hidden_size = _largest(text, "hidden_size")
    if not hidden_size:
        raise ModelError(f"the config of {type(model).__name__} has no hidden_size; expected a plain decoder")
    heads = _largest(text, "num_attention_heads")
    head_size = _largest(text, "head_dim") or (hidden_size // heads if heads else 0)
    is_plain = any(type(module) is not nn.Linear for module in matrices_of(layers).values())
    return Anatomy(
        model_type=str(config.model_type),
        layer_count=len(layers),
        layer_path=path,
        hidden_size=hidden_size,
        vocab_size=int(embedding.weight.shape[0]),
        attention_width=heads * head_size,
        parameters=_parameters(model),
        embedding_parameters=_parameters(embedding),
        layer_parameters=tuple(_parameters(layer) for layer in layers),
        modules=modules,
        left_out=left_out,
        shared=_shared(model, path),
        kept=read_kept(text, layers, hidden_size, heads * head_size, is_plain),
    )


def _largest(config: Any, name: str) -> int:
    """A size from a config, the largest if layers differ; 0 where there is none."""
    try:
        return int(getattr(config, name, None) or 0)
    except Exception:  # transformers raises where layers differ
        return max(int(getattr(own, name, None) or 0) for own in config.per_layer_config)


def layer_index(name: str, layer_path: str) -> int:
    """Index of the decoder layer that the full name ``name`` belongs to."""
    return int(name.removeprefix(f"{layer_path}.").split(".", 1)[0])


def _modules(model: nn.Module, path: str, text: Any) -> tuple[tuple[Module, ...], tuple[LeftOut, ...]]:
    """Matrices and stacks, layer by layer, and the weights that LoRA leaves as they are."""
    matrices, stacks = adaptable_modules(model), fused_parameters(model)
    reasons = refused(model, matrices, stacks) | _in_several_layers(model, path)
    found = [_describe(name, module, path, name in reasons) for name, module in matrices.items()]
    named = (getattr(text, name, None) for name in ACTIVE_EXPERTS)
    active = next((count for count in named if isinstance(count, int) and count > 0), None)
    for name, (owner, own_name) in stacks.items():
        experts, *sizes = getattr(owner, own_name).shape
        # stored as out x in unless the owner says otherwise; PEFT reads the same mark
        out_features, in_features = sizes[::-1] if getattr(owner, "is_transposed", False) else sizes
        role = role_of(name.removeprefix(f"{path}."))
        found.append(
            Module(
                name=name,
                layer=layer_index(name, path),
                role=role if role == "shared_expert" else "expert",
                in_features=in_features,
                out_features=out_features,
                fused=True,
                experts=experts,
                active_experts=min(active or experts, experts),
                refused=name in reasons,
            )
        )
    modules = tuple(sorted(found, key=lambda module: module.layer))  # stable: keeps the model's order within a layer
    return modules, _left_out(model, path, reasons)


def _left_out(model: nn.Module, path: str, reasons: Mapping[str, str]) -> tuple[LeftOut, ...]:
    """Weights that LoRA leaves as they are, those of like name together."""
    why = dict(reasons)
    _, layers = find_layers(model)
    stacks = stacks_of(layers, path)
    for name, owner, own_name in _three_dimensional(layers, path):
        sizes = getattr(owner, own_name).shape
        if name not in stacks and sum(size > 1 for size in sizes) > 1:  # else it is a vector, like a norm
            why[name] = "a 3-D parameter that is not a stack of experts"
    kinds: dict[tuple[str, str], list[int]] = {}
    for name, reason in why.items():
        index = layer_index(name, path)
        kinds.setdefault((name.removeprefix(f"{path}.{index}."), reason), []).append(index)
    return tuple(
        LeftOut(name=name, layers=tuple(sorted(indices)), reason=reason) for (name, reason), indices in kinds.items()
    )


def _in_several_layers(model: nn.Module, path: str) -> dict[str, str]:
    """Modules that several layers share: an adapter there would also change frozen layers."""
    places: dict[nn.Module, list[str]] = {}
    for name, module in find_layers(model)[1].named_modules(prefix=path, remove_duplicate=False):
        if is_matrix(module):
            places.setdefault(module, []).append(name)
    return {
        names[0]: f"one module of layers {', '.join(str(layer_index(name, path)) for name in names)}"
        for names in places.values()
        if len({layer_index(name, path) for name in names}) > 1
    }


def _shared(model: nn.Module, path: str) -> tuple[SharedWeight, ...]:
    """Matrices of several layers that share one weight."""
    places: dict[int, list[str]] = {}
    for name, module in adaptable_modules(model).items():
        places.setdefault(id(module.weight), []).append(name)
    found = []
    for names in places.values():
        layers = tuple(layer_index(name, path) for name in names)
        if len(set(layers)) > 1:
            found.append(SharedWeight(name=names[0].removeprefix(f"{path}.{layers[0]}."), layers=layers))
    return tuple(found)


def _describe(name: str, module: nn.Module, layer_path: str, is_refused: bool) -> Module:
    if isinstance(module, nn.Linear):
        in_features, out_features = module.in_features, module.out_features
    else:
        in_features, out_features = module.weight.shape  # Conv1D stores W as in x out
    return Module(
        name=name,
        layer=layer_index(name, layer_path),
        role=role_of(name.removeprefix(f"{layer_path}.")),
        in_features=in_features,
        out_features=out_features,
        refused=is_refused,
    )


def _parameters(module: nn.Module) -> int:
    """Number of parameters of a module; tied ones count once, packed 4-bit weights by their unpacked size."""
    total = 0
    for parameter in module.parameters():
        quantized = getattr(parameter, "quant_state", None)
        total += quantized.shape.numel() if quantized is not None else parameter.numel()
    return total
