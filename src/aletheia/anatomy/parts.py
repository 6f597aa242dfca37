"""Which tensors of which files make up each part of a checkpoint: layers, embedding, head, and the rest."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from aletheia.anatomy.read import layer_index
from aletheia.anatomy.shards import item_bytes, opened, shard_files
from aletheia.errors import ModelError

Part = int | Literal["embedding", "head", "around"]


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint: its file, its key there, and its bytes there and in memory once loaded.

    ``dtype`` is that of the loaded weight; None if loading does more than cast it.
    """

    path: str
    key: str
    stored_bytes: int
    size_bytes: int
    dtype: torch.dtype | None


def names_of_parts(model: PreTrainedModel, layer_path: str, layer_count: int) -> dict[Part, set[str]]:
    """The state-dict keys of each part; a tied weight counts once, under its stored name."""
    owners: dict[Part, nn.Module | None] = {
        "embedding": model.get_input_embeddings(),
        "head": model.get_output_embeddings(),
    }
    special = {
        id(value): part
        for part in ("head", "embedding")  # a tied head's weight is the embedding's
        if (owner := owners[part]) is not None
        for value in owner.parameters()
    }
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    names: dict[Part, set[str]] = {part: set() for part in (*range(layer_count), *owners, "around")}
    for name, value in model.state_dict(keep_vars=True).items():
        if name.startswith(f"{layer_path}."):
            names[layer_index(name, layer_path)].add(name)
        elif name not in tied:
            names[special.get(id(value), "around")].add(name)
    return names


def stored_parts(
    model: PreTrainedModel, name: str, dtype: torch.dtype, quantizer: Any, names: dict[Part, set[str]]
) -> dict[Part, list[Stored]]:
    """The stored tensors of each part, checked to be complete and of the right shapes.

    Args:
        model: the whole model, without its weights.
        name: hub id or local folder of the checkpoint.
        dtype: of the weights in memory, where loading only casts them.
        quantizer: the transformers quantizer of a quantized checkpoint, else None.
        names: the keys of each part; see :func:`names_of_parts`.

    Raises:
        ModelError: the checkpoint is damaged or incomplete, or contradicts its config.
    """
    expected = model.state_dict()
    transforms = get_model_conversion_mapping(model, None, quantizer)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    found: dict[str, list[Stored]] = {}
    prefix = model.base_model_prefix
    exceptions = model._get_dtype_plan(dtype)  # weights kept in float32
    for path in shard_files(name):
        with opened(path) as shard:
            for key in shard.keys():  # noqa: SIM118 - no dictionary
                view = shard.get_slice(key)
                shape = view.get_shape()
                target, pattern = rename_source_key(key, renamings, converters, prefix, expected)
                if target not in expected and key in expected:
                    target, pattern = key, None
                wanted = expected.get(target)
                is_plain = pattern is None and quantizer is None
                if wanted is not None and is_plain and wanted.shape != torch.Size(shape):
                    raise ModelError(
                        f"{key} in {path} is {by(shape)}; expected {by(wanted.shape)} by the config; "
                        "fetch or convert the checkpoint again"
                    )
                stored, loaded = item_bytes(view.get_dtype(), dtype)
                count = torch.Size(shape).numel()
                becomes = wanted.dtype if wanted is not None and is_plain and not exceptions else None
                found.setdefault(target, []).append(Stored(path, key, stored * count, loaded * count, becomes))
    absent = sorted(set().union(*names.values()) - found.keys() - _may_be_absent(model))
    if absent:
        raise ModelError(
            f"{name} has {len(absent)} missing keys, first {absent[0]}; expected a weight for every parameter "
            "of its config; fetch or convert the checkpoint again, or try `stream=False`"
        )
    _check_tied(model, name, found)
    return {
        part: [stored for key in sorted(own & found.keys()) for stored in found[key]] for part, own in names.items()
    }


def _check_tied(model: PreTrainedModel, name: str, found: dict[str, list[Stored]]) -> None:
    """Refuse tied weights with different stored values, which transformers does not tie."""
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if target in found and source in found:
            with opened(found[target][0].path) as one, opened(found[source][0].path) as other:
                if not torch.equal(one.get_tensor(found[target][0].key), other.get_tensor(found[source][0].key)):
                    raise ModelError(
                        f"{name} ties {target} to {source}, but stores different values for them; set "
                        "tie_word_embeddings to false in its config.json"
                    )


def _may_be_absent(model: PreTrainedModel) -> set[str]:
    """Buffers that a checkpoint may lack, since the model computes them."""
    return {name for name, _ in model.named_buffers()}


def by(shape: Sequence[int]) -> str:
    """A shape for people: ``576 x 49152``."""
    return " x ".join(map(str, shape))
