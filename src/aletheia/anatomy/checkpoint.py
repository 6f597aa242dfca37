"""A checkpoint read part by part: for models larger than memory.

The parts are the decoder layers, by index, the ``embedding``, the ``head``, and the weights ``around`` the layers
(norms, positions), which are small and stay in memory. Shapes: B rows, T tokens, D model width.
"""

import copy
import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    convert_and_load_state_dict_in_model,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.quantizers.auto import get_hf_quantizer
from transformers.utils import logging

from aletheia.anatomy.families import model_class
from aletheia.anatomy.faults import explained
from aletheia.anatomy.fingerprint import configuration, identity, sample_embedding, sample_layer
from aletheia.anatomy.layerwise import (
    Call,
    NoEmbedding,
    PassThrough,
    called_layers,
    check_order,
    explained_pass,
    layer_call,
    replace_module,
)
from aletheia.anatomy.load import check_packed, keep_gradients, load_config, load_tokenizer, pick, pick_device
from aletheia.anatomy.parts import Part, by, names_of_parts, stored_parts
from aletheia.anatomy.read import find_layers, read_anatomy
from aletheia.anatomy.schema import Anatomy, ModelIdentity
from aletheia.anatomy.settings import Attention
from aletheia.anatomy.shards import STREAMED_QUANTIZERS, Buffers, Cast, opened, shard_state
from aletheia.anatomy.versions import computing_versions, processor
from aletheia.errors import ModelError
from aletheia.files import whole_path

_Module = TypeVar("_Module", bound=nn.Module)


class Checkpoint:
    """A causal language model on disk whose weights are loaded one part at a time.

    ``model`` is its skeleton: it has the config, computes masks and positions, and calls placeholder layers that pass
    hidden states through; its embedding returns zeros. ``anatomy`` describes the whole model.
    """

    def __init__(
        self,
        name: str,
        dtype: str = "auto",
        device: str | None = None,
        attention: Attention | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Read the config, the headers of the shards and the weights around the layers.

        Args:
            name: hub id or local folder with safetensors.
            dtype: as for :func:`aletheia.anatomy.load.load`.
            device: as there.
            attention: as there.
            trust_remote_code: as there.

        Raises:
            ModelError: the checkpoint is missing, damaged or incomplete, or cannot be read in parts.
        """
        if name.endswith(".gguf"):
            raise ModelError(
                f"{name} is a GGUF file, which can only be read as a whole; expected safetensors to stream from"
            )
        self.name = name
        self.device = torch.device(device) if device else pick_device()
        self.dtype = pick(dtype, self.device)
        config = load_config(name, trust_remote_code)
        if attention is not None:
            config._attn_implementation = attention
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(name, trust_remote_code)
        self._whole, self._quantizer = self._empty(config, trust_remote_code)
        self.anatomy: Anatomy = read_anatomy(self._whole)
        if self.anatomy.shared:
            raise ModelError(
                f"{name} has layers that share weights ({self.anatomy.shared[0].name}), which cannot be read one by "
                "one; load it as a whole with `stream=False`"
            )
        self.layer_path, layers = find_layers(self._whole)
        self._pristine = list(layers)
        self._names = names_of_parts(self._whole, self.layer_path, len(layers))
        self._stored = stored_parts(self._whole, name, self.dtype, self._quantizer, self._names)
        self.model = _copied(self._whole)
        self._embedding = self.model.get_input_embeddings()
        self.layers: nn.ModuleList = self.model.get_submodule(self.layer_path)
        for index, layer in enumerate(self._pristine):
            self.layers[index] = PassThrough(layer, 0)
        self._fill(self.model, "around")
        self._blank = NoEmbedding(self._embedding.weight)
        replace_module(self.model, self._embedding, self._blank)

    @property
    def layer_count(self) -> int:
        """Number of decoder layers."""
        return len(self._pristine)

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the model has an embedding for."""
        return self.anatomy.vocab_size

    def part_bytes(self, part: Part) -> int:
        """Bytes that a part takes in memory once loaded."""
        return sum(stored.size_bytes for stored in self._stored[part])

    @property
    def head_bytes(self) -> int:
        """Bytes that the head takes in memory once loaded, whether its weight is separate or the embedding's."""
        return self.part_bytes("head") or self.part_bytes("embedding")

    def stored_bytes(self, part: Part) -> int:
        """Bytes of a part on disk, which are mapped into memory during reading."""
        return sum(stored.stored_bytes for stored in self._stored[part])

    @property
    def state(self) -> str:
        """Everything besides the tokens that hidden states depend on, as JSON: shards, settings, versions."""
        paths = sorted({stored.path for part in self._stored.values() for stored in part})
        about = configuration(self.model) | {
            "shards": [shard_state(path) for path in paths],
            "dtype": str(self.dtype),
            "device": processor(self.device),
            "float32_products": torch.get_float32_matmul_precision(),
            "versions": computing_versions(),
        }
        return json.dumps(about, sort_keys=True, default=str)

    def _empty(self, config: Any, trust_remote_code: bool) -> tuple[PreTrainedModel, Any]:
        """The model on the meta device, with buffers computed that no checkpoint stores, and its quantizer."""
        with explained(self.name):
            quantizer, config, _ = get_hf_quantizer(config, None, {"": self.device}, True, {})
            if quantizer is not None:
                method = str(getattr(quantizer.quantization_config.quant_method, "value", "unknown"))
                if method not in STREAMED_QUANTIZERS:
                    raise ModelError(
                        f"{self.name} is quantized with {method}; expected plain or bitsandbytes weights to stream "
                        "from; `stream=False` loads it as a whole"
                    )
            with init_empty_weights(include_buffers=False):
                family = model_class(self.name, config)
                model = family.from_config(config, dtype=self.dtype, trust_remote_code=trust_remote_code)
                if quantizer is not None:
                    quantizer.preprocess_model(model=model, dtype=self.dtype, device_map={"": self.device})
                    keep_gradients(model)
            model.tie_weights()
        model.config._name_or_path = model.name_or_path = whole_path(self.name)
        for owner in model.modules():
            owner._buffers.update({name: buffer.to(self.device) for name, buffer in owner.named_buffers(recurse=False)})
        return model.eval().requires_grad_(False), quantizer

    def layer(self, index: int, buffers: Buffers | None = None) -> nn.Module:
        """Layer ``index`` with its weights, frozen and in eval mode; drop it after use.

        Raises:
            ModelError: its weights cannot be read, do not fit the config, or are not finite.
        """
        _, layers = find_layers(self._whole)
        fresh = _copied(self._pristine[index])
        layers[index] = fresh
        try:
            self._fill(self._whole, index, buffers)
        finally:
            layers[index] = self._pristine[index]
        return fresh

    def read_layers(self, order: Sequence[int], ahead: bool = True) -> Iterator[tuple[int, nn.Module]]:
        """Index and layer, one after another; with ``ahead`` the next is read while this one is in use.

        The memory of a layer is reused for a later one, so keep no reference to its weights.

        Raises:
            ModelError: as :meth:`layer`.
        """
        buffers = Buffers()
        with ThreadPoolExecutor(1) as reader:
            pending = None
            for index, following in zip(order, [*order[1:], None], strict=False):
                layer = pending.result() if pending else self.layer(index, buffers)
                pending = reader.submit(self.layer, following, buffers) if ahead and following is not None else None
                yield index, layer
                buffers.give_back(layer)
                del layer

    def call(self, index: int, batch: dict[str, torch.Tensor]) -> Call:
        """The arguments with which the model calls layer ``index``; the hidden states among them are placeholders.

        Raises:
            ModelError: the layer is never called, or reads more of the embedding or of other layers than hidden states.
        """
        inputs = inputs_of(batch)
        with self._run_alone():
            found = layer_call(self.model, self.layers[index], inputs)
        if found is None:
            raise ModelError(f"{type(self.model).__name__} does not call layer {index}; it cannot be streamed")
        self._check_alone(index, *found)
        return found

    def check_layers(self, batch: dict[str, torch.Tensor]) -> None:
        """Refuse a model whose layers read more of earlier results than the hidden states.

        The embedding returns NaNs for the check; only hidden states may carry them. Call it after a layer has run:
        only then is the form of its output known.

        Raises:
            ModelError: names the layer.
        """
        self._blank.value = math.nan
        try:
            for index in range(self.layer_count):
                self.call(index, batch)
            with self._run_alone():
                order = called_layers(
                    self.model.base_model, self.layers, inputs_of(batch)
                )  # without the head, which is not loaded
            check_order(self.name, self.layer_path, order)
        finally:
            self._blank.value = 0.0

    def _run_alone(self) -> AbstractContextManager[None]:
        return explained_pass(f"{self.name} does not run layer by layer", "load it as a whole with `stream=False`")

    def _check_alone(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        others = [*args[1:], *(value for name, value in kwargs.items() if args or name != "hidden_states")]
        flat = [item for value in others for item in (value if isinstance(value, tuple | list) else (value,))]
        for value in flat:
            if isinstance(value, torch.Tensor) and value.is_floating_point() and torch.isnan(value).any():
                raise ModelError(
                    f"layer {index} of {type(self.model).__name__} reads more than the hidden states before it; such a "
                    "model cannot be streamed; load it as a whole with `stream=False`"
                )

    def run(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """The hidden states [B, T, D] that a layer returns; placeholders take over the form of its output."""
        output: torch.Tensor | tuple[Any, ...] | list[Any] = layer(*args, **kwargs)
        if not isinstance(output, tuple | list):
            self.set_outputs(None)
            return output
        self.set_outputs([isinstance(item, torch.Tensor) and item.is_floating_point() for item in output[1:]])
        hidden_BTD: torch.Tensor = output[0]
        return hidden_BTD

    @property
    def outputs(self) -> list[bool] | None:
        """For each item a layer returns after the hidden states, whether it is a float tensor; None if no tuple."""
        extras = self.layers[0].extras
        return None if extras is None else [extra is not None for extra in extras]

    def set_outputs(self, outputs: list[bool] | None) -> None:
        """Let the placeholders return that form, with NaN for tensors, so that a layer that reads them is noticed."""
        for stand_in in self.layers:
            if isinstance(stand_in, PassThrough):
                nan = torch.tensor(math.nan, device=self.device)
                stand_in.extras = None if outputs is None else [nan if given else None for given in outputs]

    @contextmanager
    def embedding(self) -> Iterator[PreTrainedModel]:
        """The skeleton with the embedding's weights, which are dropped on exit.

        Raises:
            ModelError: as :meth:`layer`.
        """
        replace_module(self.model, self._blank, self._embedding)
        try:
            with _restored(self.model):
                self._fill(self.model, "embedding")
                self.model.tie_weights()
                yield self.model
        finally:
            replace_module(self.model, self._embedding, self._blank)

    @contextmanager
    def head(self) -> Iterator[PreTrainedModel]:
        """The skeleton with the head's weights, which are dropped on exit.

        Raises:
            ModelError: as :meth:`layer`.
        """
        if not self._names["head"]:  # tied
            with self.embedding() as model:
                yield model
            return
        with _restored(self.model):
            self._fill(self.model, "head")
            yield self.model

    def suffix(self, boundary: int) -> PreTrainedModel:
        """The model with its head and the layers from ``boundary`` up in memory, for training on stored states.

        Layers below pass hidden states through, and the embedding returns zeros unless it is the head's weight. The
        skeleton itself becomes that model: do not use the checkpoint afterwards.

        Raises:
            ModelError: as :meth:`layer`.
        """
        for index in range(boundary, self.layer_count):
            self.layers[index] = self.layer(index)
        if not self._names["head"]:
            replace_module(self.model, self._blank, self._embedding)
        self._fill(self.model, "head" if self._names["head"] else "embedding")
        self.model.tie_weights()
        if self._quantizer is not None:  # as from_pretrained does; else Trainer and PEFT take it for a plain model
            self.model.hf_quantizer = self._quantizer
            self._quantizer.postprocess_model(self.model)
        return self.model.requires_grad_(False)

    def identity(self, ahead: bool = True) -> ModelIdentity:
        """Name and fingerprints, as :func:`aletheia.anatomy.fingerprint.identify` returns; reads every layer once.

        Raises:
            ModelError: as :meth:`layer`.
        """
        with self.embedding() as model:
            sample = sample_embedding(model.get_input_embeddings().weight)
        samples = [sample_layer(layer) for _, layer in self.read_layers(range(self.layer_count), ahead)]
        return identity(whole_path(self.name), self.anatomy, sample, samples)

    def _fill(self, model: PreTrainedModel, part: Part, buffers: Buffers | None = None) -> None:
        """Load a part's tensors into ``model``, converted, quantized and cast as transformers does it.

        Tensors that are only cast go into ``buffers``.
        """
        with explained(self.name), ExitStack() as stack:
            if logging.is_progress_bar_enabled():  # transformers draws one per layer
                logging.disable_progress_bar()
                stack.callback(logging.enable_progress_bar)
            stored = self._stored[part]
            files = {path: stack.enter_context(opened(path)) for path in {tensor.path for tensor in stored}}
            slices: dict[str, Any] = {tensor.key: files[tensor.path].get_slice(tensor.key) for tensor in stored}
            if buffers is not None and self.device.type == "cpu":
                buffers.keep(
                    {(torch.Size(slices[tensor.key].get_shape()), tensor.dtype) for tensor in stored if tensor.dtype}
                )
                plain = {tensor.key: tensor.dtype for tensor in stored if tensor.dtype is not None}
                slices |= {key: Cast(slices[key], dtype, buffers) for key, dtype in plain.items()}
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
                f"{key} in {self.name} is {by(shape)}; expected {by(wanted)} by the config; "
                "fetch or convert the checkpoint again"
            )
        check_packed(self.name, model)
        for name in sorted(self._names[part]):
            owner, _, own_name = name.rpartition(".")
            value = getattr(model.get_submodule(owner), own_name).requires_grad_(False)
            if value.is_meta:
                reason = found.conversion_errors or "no reason given"
                raise ModelError(f"{name} in {self.name} was not loaded ({reason}); convert the checkpoint again")
            if value.is_floating_point() and value.numel() and not all(map(torch.isfinite, torch.aminmax(value))):
                raise ModelError(f"{name} in {self.name} holds values that are not finite; fetch the checkpoint again")


def inputs_of(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs of a forward pass without a loss, each [B, T]."""
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _copied(module: _Module) -> _Module:
    """A deep copy that shares the parameters; on the meta device they are empty anyway."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """On exit put the earlier parameters and buffers back, which drops what was loaded since."""
    before = [(values, dict(values)) for module in model.modules() for values in (module._parameters, module._buffers)]
    try:
        yield
    finally:
        for values, saved in before:
            values.clear()
            values.update(saved)
