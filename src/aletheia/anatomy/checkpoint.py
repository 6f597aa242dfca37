"""A checkpoint read part by part: for models larger than memory.

The parts are the decoder layers, by index, the ``embedding``, the ``head``, and what else lies ``around`` the layers
(norms, positions), which is small and stays in memory. Shapes: B rows, T tokens, D model width.
"""

import copy
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.quantizers.auto import get_hf_quantizer
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from aletheia.anatomy.layerwise import NoEmbedding, PassThrough, replace_module
from aletheia.anatomy.load import explained, load_config, pick, pick_device
from aletheia.anatomy.read import find_layers, layer_index, read_anatomy
from aletheia.anatomy.schema import Anatomy
from aletheia.errors import ModelError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
STREAMED_QUANTIZERS = ("bitsandbytes",)  # whose layers can be loaded one by one
Part = int | Literal["embedding", "head", "around"]


@dataclass(frozen=True)
class _Stored:
    """One tensor of the checkpoint: its file, its key there, and its bytes in memory once loaded."""

    path: str
    key: str
    size_bytes: int


class Checkpoint:
    """A causal language model on disk whose weights are loaded a part at a time.

    ``model`` is its skeleton: it knows the config, computes masks and positions and calls its layers, which pass
    hidden states through; the embedding gives zeros. ``anatomy`` is that of the whole model.
    """

    def __init__(self, name: str, dtype: str = "auto", device: str | None = None) -> None:
        """Read the config, the headers of the shards, and the weights around the layers.

        Args:
            name: hub id or local folder with safetensors.
            dtype: as for :func:`aletheia.anatomy.load.load`.
            device: as there.

        Raises:
            ModelError: the checkpoint is missing, damaged or incomplete, or of a kind that cannot be read in parts.
        """
        if name.endswith(".gguf"):
            raise ModelError(f"{name} is a GGUF file, which is read as a whole; expected safetensors to stream from")
        self.name = name
        self.device = torch.device(device) if device else pick_device()
        self.dtype = pick(dtype, self.device)
        config = load_config(name)
        with explained(name):
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
        self._whole, self._quantizer = self._empty(config)
        self.anatomy: Anatomy = read_anatomy(self._whole)
        self.layer_path, layers = find_layers(self._whole)
        self._pristine = list(layers)
        self._names = self._group_names()
        self._stored = self._group_stored()
        self.model = copy.deepcopy(self._whole)
        self._embedding = self.model.get_input_embeddings()
        self.layers: nn.ModuleList = self.model.get_submodule(self.layer_path)
        for index, layer in enumerate(self._pristine):
            self.layers[index] = PassThrough(layer, 0)
        self._fill(self.model, "around")
        self.model.requires_grad_(False)
        self._blank = NoEmbedding(self._embedding.weight.shape[1], self.dtype)
        replace_module(self.model, self._embedding, self._blank)

    @property
    def layer_count(self) -> int:
        """How many decoder layers."""
        return len(self._pristine)

    @property
    def vocab_size(self) -> int:
        """Tokens that the model has an embedding for."""
        return self.anatomy.vocab_size

    @property
    def size_bytes(self) -> int:
        """Memory that the whole model would take."""
        return sum(self.part_bytes(part) for part in self._stored)

    def part_bytes(self, part: Part) -> int:
        """Memory that a part takes once loaded."""
        return sum(stored.size_bytes for stored in self._stored[part])

    def largest_tensor_bytes(self, part: Part) -> int:
        """Memory that the largest tensor of a part takes once loaded."""
        return max((stored.size_bytes for stored in self._stored[part]), default=0)

    @property
    def state(self) -> list[tuple[str, int, int]]:
        """Name, bytes and time of change (ns) of each shard: what tells that the files are still the same."""
        paths = sorted({stored.path for part in self._stored.values() for stored in part})
        return [(Path(path).name, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths]

    def _empty(self, config: Any) -> tuple[PreTrainedModel, Any]:
        """The model on the meta device, buffers that its checkpoint does not hold computed, and its quantizer."""
        with explained(self.name):
            quantizer, config, _ = get_hf_quantizer(config, None, {"": self.device}, True, {})
            if quantizer is not None:
                method = str(getattr(quantizer.quantization_config.quant_method, "value", "unknown"))
                if method not in STREAMED_QUANTIZERS:
                    raise ModelError(
                        f"{self.name} is quantized with {method}; expected plain or bitsandbytes weights to stream from"
                    )
            with init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
                if quantizer is not None:
                    quantizer.preprocess_model(model=model, dtype=self.dtype, device_map={"": self.device})
            model.tie_weights()
        model.config._name_or_path = self.name
        model.name_or_path = self.name
        for owner in model.modules():
            owner._buffers.update({name: buffer.to(self.device) for name, buffer in owner.named_buffers(recurse=False)})
        return model.eval().requires_grad_(False), quantizer

    def _group_names(self) -> dict[Part, set[str]]:
        """The state-dict keys of each part; those of tied weights count once, under the name that is stored."""
        owners: dict[Part, nn.Module | None] = {
            "embedding": self._whole.get_input_embeddings(),
            "head": self._whole.get_output_embeddings(),
        }
        special = {
            id(value): part
            for part in ("head", "embedding")  # a tied head's weight is the embedding's
            if (owner := owners[part]) is not None
            for value in owner.parameters()
        }
        tied = set(getattr(self._whole, "all_tied_weights_keys", None) or ())
        names: dict[Part, set[str]] = {part: set() for part in (*range(self.layer_count), *owners, "around")}
        for name, value in self._whole.state_dict(keep_vars=True).items():
            if name.startswith(f"{self.layer_path}."):
                names[layer_index(name, self.layer_path)].add(name)
            elif name not in tied:
                names[special.get(id(value), "around")].add(name)
        return names

    def _group_stored(self) -> dict[Part, list[_Stored]]:
        """Which tensors of which files make up each part; complete and of the right shape, or refused."""
        expected = self._whole.state_dict()
        transforms = get_model_conversion_mapping(self._whole, None, self._quantizer)
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        found: dict[str, list[_Stored]] = {}
        prefix = self._whole.base_model_prefix
        for path in _shards(self.name):
            with _opened(path) as shard:
                for key in shard.keys():  # noqa: SIM118 - no dictionary
                    view = shard.get_slice(key)
                    shape = view.get_shape()
                    target, pattern = rename_source_key(key, renamings, converters, prefix, expected)
                    if target not in expected and key in expected:
                        target, pattern = key, None
                    wanted = expected.get(target)
                    is_plain = pattern is None and self._quantizer is None
                    if wanted is not None and is_plain and wanted.shape != torch.Size(shape):
                        raise ModelError(
                            f"{key} in {path} is {_by(shape)}; expected {_by(wanted.shape)} by the config; "
                            "fetch or convert the checkpoint again"
                        )
                    item = _item_bytes(view.get_dtype(), self.dtype)
                    found.setdefault(target, []).append(_Stored(path, key, item * torch.Size(shape).numel()))
        absent = sorted(set().union(*self._names.values()) - found.keys() - self._may_be_absent())
        if absent:
            raise ModelError(
                f"{self.name} has {len(absent)} missing keys, first {absent[0]}; expected a weight for every parameter "
                "of its config; fetch or convert the checkpoint again"
            )
        return {
            part: [stored for name in sorted(names & found.keys()) for stored in found[name]]
            for part, names in self._names.items()
        }

    def _may_be_absent(self) -> set[str]:
        """Buffers that an older checkpoint may lack: they were computed."""
        return {name for name, _ in self._whole.named_buffers()}

    def layer(self, index: int) -> nn.Module:
        """Layer ``index`` with its weights, frozen and in eval mode, to be thrown away after use.

        Raises:
            ModelError: its weights cannot be read, do not fit the config, or are not finite.
        """
        _, layers = find_layers(self._whole)
        fresh = copy.deepcopy(self._pristine[index])
        layers[index] = fresh
        try:
            self._fill(self._whole, index)
        finally:
            layers[index] = self._pristine[index]
        return fresh.requires_grad_(False)

    def read_layers(self, order: Sequence[int], ahead: bool = True) -> Iterator[tuple[int, nn.Module]]:
        """Index and layer, one after another; with ``ahead`` the next is read while this one is in use.

        Raises:
            ModelError: as :meth:`layer`.
        """
        if not ahead or not order:
            for index in order:
                yield index, self.layer(index)
            return
        with ThreadPoolExecutor(1) as reader:
            pending = reader.submit(self.layer, order[0])
            for index, following in zip(order, [*order[1:], None], strict=True):
                layer = pending.result()
                pending = None if following is None else reader.submit(self.layer, following)
                yield index, layer
                del layer  # before the one after the next is read

    def run(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        """The hidden states [B, T, D] that a layer returns; the stand-ins learn the form of its output."""
        output = layer(*args, **kwargs)
        self.set_outputs(len(output) if isinstance(output, tuple) else 0)
        return output[0] if isinstance(output, tuple) else output

    def set_outputs(self, outputs: int) -> None:
        """Let the stand-ins return a tuple of that length, or a tensor for 0."""
        for stand_in in self.layers:
            stand_in.outputs = outputs

    @contextmanager
    def embedding(self) -> Iterator[PreTrainedModel]:
        """The skeleton with the weights of its embedding, which are dropped afterwards.

        Raises:
            ModelError: as :meth:`layer`.
        """
        before = [(values, dict(values)) for module in self.model.modules() for values in _values(module)]
        before += [(values, dict(values)) for module in self._embedding.modules() for values in _values(module)]
        replace_module(self.model, self._blank, self._embedding)
        try:
            self._fill(self.model, "embedding")
            self.model.tie_weights()
            self.model.requires_grad_(False)
            yield self.model
        finally:
            for values, saved in before:
                values.clear()
                values.update(saved)
            replace_module(self.model, self._embedding, self._blank)

    @contextmanager
    def head(self) -> Iterator[PreTrainedModel]:
        """The skeleton with the weights of its head, which are dropped afterwards.

        Raises:
            ModelError: as :meth:`layer`.
        """
        if not self._names["head"]:  # tied
            with self.embedding() as model:
                yield model
            return
        head = self.model.get_output_embeddings()
        before = [(values, dict(values)) for module in head.modules() for values in _values(module)]
        try:
            self._fill(self.model, "head")
            self.model.requires_grad_(False)
            yield self.model
        finally:
            for values, saved in before:
                values.clear()
                values.update(saved)

    def _fill(self, model: PreTrainedModel, part: Part) -> None:
        """Load a part's tensors into ``model``, converted, quantized and cast as transformers does it."""
        with explained(self.name), ExitStack() as stack:
            stored = self._stored[part]
            files = {path: stack.enter_context(_opened(path)) for path in {tensor.path for tensor in stored}}
            slices = {tensor.key: files[tensor.path].get_slice(tensor.key) for tensor in stored}
            settings = LoadStateDictConfig(
                device_map={"": self.device},
                dtype=self.dtype,
                dtype_plan=model._get_dtype_plan(self.dtype),
                hf_quantizer=self._quantizer,
                weight_mapping=get_model_conversion_mapping(model, None, self._quantizer),
            )
            found, _ = convert_and_load_state_dict_in_model(model, slices, settings)
        if found.mismatched_keys:
            key, shape, wanted = sorted(found.mismatched_keys)[0]
            raise ModelError(
                f"{key} in {self.name} is {_by(shape)}; expected {_by(wanted)} by the config; "
                "fetch or convert the checkpoint again"
            )
        for name in sorted(self._names[part]):
            owner, _, own_name = name.rpartition(".")
            value = getattr(model.get_submodule(owner), own_name)
            if value.is_meta:
                reason = found.conversion_errors or "no reason given"
                raise ModelError(f"{name} in {self.name} was not loaded ({reason}); convert the checkpoint again")
            if value.is_floating_point() and value.numel() and not all(map(torch.isfinite, torch.aminmax(value))):
                raise ModelError(f"{name} in {self.name} holds values that are not finite; fetch the checkpoint again")


def weights_bytes(name: str, dtype: torch.dtype) -> int | None:
    """Memory that the weights of MODEL would take in ``dtype``, from the size of its shards; None where it has none.

    Raises:
        ModelError: MODEL cannot be found or its config cannot be read.
    """
    if name.endswith(".gguf"):
        return None
    config = load_config(name)
    try:
        stored = sum(os.stat(path).st_size for path in _shards(name))
    except ModelError:  # another format, which is loaded as a whole
        return None
    if getattr(config, "quantization_config", None) is not None:
        return stored
    return stored * dtype.itemsize // (config.dtype or torch.float32).itemsize


def _values(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return module._parameters, module._buffers


def _shards(name: str) -> list[str]:
    """The safetensors files of a folder or hub id, all there.

    Raises:
        ModelError: there are none, or some are missing.
    """
    with explained(name):
        quiet = {"_raise_exceptions_for_missing_entries": False}
        index = cached_file(name, INDEX, **quiet)
        files = get_checkpoint_shard_files(name, index)[0] if index else [cached_file(name, SINGLE, **quiet)]
    if files == [None]:
        raise ModelError(f"{name} holds neither {SINGLE} nor {INDEX}; expected safetensors to stream from")
    for path in files:
        if not Path(path).is_file():
            raise ModelError(f"{name} lacks the shard {Path(path).name} that its index names; fetch it again")
    return files


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """A shard whose tensors are read when asked for, without mapping the file into memory."""
    try:
        with safe_open(path, framework="pt", backend="pread") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise ModelError(f"cannot read {path}: {error}; fetch it again") from error


def _item_bytes(stored: str, dtype: torch.dtype) -> int:
    """Bytes of an element in memory: floating-point weights are cast, others stay as they are stored."""
    if stored in ("F64", "F32", "F16", "BF16"):
        return dtype.itemsize
    return {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}.get(stored, 1)


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
