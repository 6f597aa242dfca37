"""From MODEL (hub id, local folder or .gguf file) to a config, or to a model with its tokenizer."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from aletheia.anatomy import foreign
from aletheia.anatomy.families import EXPECTED, model_class
from aletheia.anatomy.faults import NEEDS_CODE, explained, first_sentence
from aletheia.anatomy.foreign_tokenizer import check_tokenizer
from aletheia.anatomy.quantized import check_quantized, names_to_skip
from aletheia.anatomy.read import read_anatomy
from aletheia.anatomy.schema import Anatomy
from aletheia.anatomy.settings import Attention
from aletheia.errors import ModelError
from aletheia.files import whole_path
from aletheia.kinds import mistaken, near
from aletheia.libraries import quiet_stderr

Quantize = Literal["nf4", "int8"]
MOST_PER_BYTE = 16  # numbers that a stored byte may encode: GGUF packs up to 8
SPARE_BYTES = 2**20  # allowed on top, for buffers that are computed (positions, masks)
EXPECTED_MODEL = "a hub id, a model folder or a .gguf file"
PACKING = ("Linear4bit", "Linear8bitLt")  # of bitsandbytes
TRIAL_TEXT = "Hello, world! 123\n" + 30 * "a" + "\u00e9"
_ADAPTER = (
    "{name} is an adapter of the base model {base}; expected a base model here; 'aletheia train {name} ...' trains "
    "the adapter further, and with `fresh` merges it into its base first"
)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Loaded:
    """A base model ready to be probed, with its tokenizer, and how it was loaded."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    quantize: Quantize | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the model has an embedding for."""
        return int(self.model.get_input_embeddings().weight.shape[0])


def pick_device() -> torch.device:
    """CUDA, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def pick_dtype(device: torch.device) -> torch.dtype:
    """The fastest dtype that is safe to train in: bfloat16 where the hardware computes in it, else float32.

    A GPU without bfloat16 gets float16, which the trainer runs under autocast with loss scaling. A CPU without
    bfloat16 instructions emulates them, three times slower than float32.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and cpu_has_bfloat16():
        return torch.bfloat16
    return torch.float32


def pick(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; for ``auto`` that of :func:`pick_dtype`.

    Raises:
        ModelError: the name is unknown.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}; expected auto, {', '.join(DTYPES)}")
    return DTYPES.get(dtype) or pick_dtype(device)


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX-512 BF16, AMX, or Arm's bf16)."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch cannot tell
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "amx_tile", "bf16"))


def load_config(name: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of MODEL, without weights; :mod:`aletheia.anatomy.foreign` checks it before transformers reads it.

    Raises:
        ModelError: MODEL cannot be found, is an adapter, or needs its own code while ``trust_remote_code`` is off; or
            its config cannot be read or describes a model that is too large to build.
    """
    place = _place(name)
    with explained(name):
        if "gguf_file" in place:
            foreign.check_gguf(Path(name))
        else:
            _check_settings(name, trust_remote_code)
        config: PretrainedConfig = AutoConfig.from_pretrained(**place, trust_remote_code=trust_remote_code)
        foreign.check_config(config.to_dict(), name)  # again, under the key names of transformers
        return config


def _check_settings(name: str, trust_remote_code: bool) -> None:
    """Check the settings files of a folder or hub id before transformers reads them."""
    if (adapter := foreign.found_file(name, foreign.ADAPTER_CONFIG)) is not None:
        raise ModelError(_ADAPTER.format(name=name, base=foreign.base_of_adapter(adapter.parent)))
    if (file := foreign.found_file(name, foreign.CONFIG)) is None:
        return
    found = foreign.read_settings(file)
    foreign.check_config(found, name)
    if foreign.needs_code(found) and not trust_remote_code:
        raise ModelError(NEEDS_CODE.format(name=name))
    if (generation := foreign.found_file(name, foreign.GENERATION_CONFIG)) is not None:
        foreign.check_values(foreign.read_settings(generation), f"{foreign.GENERATION_CONFIG} of {name}")


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of MODEL.

    Raises:
        ModelError: it cannot be found or read, or needs its own code while ``trust_remote_code`` is off.
    """
    place = _place(name)
    with explained(name, "its tokenizer cannot be read"):
        for file in foreign.tokenizer_files(name):
            check_tokenizer(file)
        with quiet_stderr(), _no_panic(name):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                **place, trust_remote_code=trust_remote_code
            )
            with suppress(Exception):  # a trial; encoding the rows checks what they need
                tokenizer.decode(tokenizer(TRIAL_TEXT)["input_ids"])
        return tokenizer


@contextmanager
def _no_panic(name: str) -> Iterator[None]:
    """Turn a panic of a Rust library, which is not an ``Exception``, into a ModelError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        reason = first_sentence(error)
        raise ModelError(f"the tokenizer of {name} fails on a short text: {reason}; fetch it again") from error


def inspect(name: str, trust_remote_code: bool = False) -> Anatomy:
    """Anatomy of MODEL from its config alone: the model is built on the meta device, no weight is read.

    Raises:
        ModelError: MODEL cannot be found or taken apart, or needs its own code while ``trust_remote_code`` is off.
    """
    config = load_config(name, trust_remote_code)
    return read_anatomy(_on_meta(name, config, trust_remote_code))


def load_without_weights(name: str, trust_remote_code: bool = False) -> Loaded:
    """The tokenizer of MODEL and its model on the meta device: enough to show rows as the model sees them.

    Raises:
        ModelError: MODEL cannot be found or read, or needs its own code while ``trust_remote_code`` is off.
    """
    model = _on_meta(name, load_config(name, trust_remote_code), trust_remote_code)
    tokenizer = load_tokenizer(name, trust_remote_code)
    if foreign.found_file(name, foreign.GENERATION_CONFIG) is not None:
        with explained(name):
            model.generation_config = GenerationConfig.from_pretrained(name)
    return Loaded(model, tokenizer)


def load(
    name: str,
    dtype: str = "auto",
    device: str | None = None,
    quantize: Quantize | None = None,
    attention: Attention | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Loaded:
    """Load MODEL and its tokenizer; a quantized checkpoint stays quantized.

    Args:
        name: hub id, local folder or ``.gguf`` file.
        dtype: ``auto`` (see :func:`pick_dtype`), ``bfloat16``, ``float16`` or ``float32``.
        device: a torch device; by default the best available one.
        quantize: quantize the matrices of the layers with bitsandbytes: ``nf4``, double quantization included
            [QLoRA, arXiv:2305.14314], or ``int8``; products are computed in ``dtype``. Experts, and weights that a
            layer may read itself, stay in ``dtype``.
        attention: how attention is computed; by default transformers' choice.
        trust_remote_code: run code that comes with the model, without asking.
        allow_pickle: read weights from ``.bin`` and other pickles, with torch's ``weights_only``.

    Raises:
        ModelError: MODEL cannot be found or read, is an adapter, or needs what is not allowed; or a setting is unknown
            or cannot be met, such as ``quantize`` for a model none of whose layers bitsandbytes can quantize.
    """
    target = torch.device(device) if device else pick_device()
    chosen = pick(dtype, target)
    settings: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    if quantize is not None:
        settings["quantization_config"] = _quantization(name, quantize, chosen)
    config = load_config(name, trust_remote_code)
    family = model_class(name, config)
    _check_weights(name, config, trust_remote_code, allow_pickle)
    if quantize is not None:
        apart = names_to_skip(_on_meta(name, copy.deepcopy(config), trust_remote_code))
        settings["quantization_config"].llm_int8_skip_modules = apart
    if quantize is not None or hasattr(config, "quantization_config"):
        settings["device_map"] = {"": target}  # quantized weights cannot be moved
    place = _place(name)
    tokenizer = load_tokenizer(name, trust_remote_code)
    with explained(name):
        settings |= {"trust_remote_code": trust_remote_code, "use_safetensors": None if allow_pickle else True}
        model, loading = family.from_pretrained(**place, **settings, dtype=chosen, output_loading_info=True)
        if getattr(model, "hf_quantizer", None) is None:
            model = model.to(target)
    _check_complete(name, loading)
    check_packed(name, model)
    if quantize is not None:
        check_quantized(name, model, quantize)
    keep_gradients(model)
    if "gguf_file" in place:
        _forget_gguf(model)
        model = model.to(target)
    # what plans, adapters and model cards call the base model, from any working folder
    model.config._name_or_path = model.name_or_path = whole_path(name)
    return Loaded(model, tokenizer, quantize, trust_remote_code, allow_pickle)


def keep_gradients(model: nn.Module) -> None:
    """Stop 4-bit layers from repacking their weights in their first forward pass in eval mode.

    On CPUs with AVX512-BF16 bitsandbytes does so, for a product without a backward pass. From then on the layers below
    would silently get no gradient.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def quantization_of(model: nn.Module) -> str | None:
    """``nf4``, ``int8`` and the like if the matrices were quantized while loading; the checkpoint's method otherwise.

    A checkpoint that was stored quantized gives ``nf4 checkpoint``; a model that is not quantized gives None.
    """
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    found = config if isinstance(config, dict) else config.to_dict()
    kind = str(found.get("quant_method", "unknown"))
    if found.get("load_in_4bit"):
        kind = str(found.get("bnb_4bit_quant_type", "4-bit"))
    elif found.get("load_in_8bit"):
        kind = "int8"
    is_stored = getattr(getattr(model, "hf_quantizer", None), "pre_quantized", True)
    return f"{kind} checkpoint" if is_stored else kind


def _quantization(name: str, kind: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    if kind not in get_args(Quantize):
        raise ModelError(f"unknown quantization {kind!r}; expected one of {', '.join(get_args(Quantize))}")
    if name.endswith(".gguf"):
        raise ModelError(f"{name} is a GGUF file, which transformers cannot quantize again; expected a model folder")
    if find_spec("bitsandbytes") is None:
        raise ModelError("`quantize` needs bitsandbytes; install it with: pip install 'aletheia-tune[quant]'")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _on_meta(name: str, config: PretrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    config.__dict__.pop("quantization_config", None)  # only shapes are needed, not the quantizer's packages
    with explained(name), torch.device("meta"):
        family = model_class(name, config)
        model: PreTrainedModel = family.from_config(config, trust_remote_code=trust_remote_code)
        return model


def _check_weights(name: str, config: PretrainedConfig, trust_remote_code: bool, allow_pickle: bool) -> None:
    """Refuse pickles that are not allowed, and far fewer weights than the config needs: gaps would be filled."""
    stored = foreign.stored_bytes(Path(name), allow_pickle)
    if stored is None:
        return  # a hub id; so far only its config is here
    if trust_remote_code:
        return  # custom code may do anything
    model = _on_meta(name, copy.deepcopy(config), trust_remote_code)
    elements = sum(value.numel() for value in (*model.parameters(), *model.buffers()))
    if elements > MOST_PER_BYTE * (stored + SPARE_BYTES):
        raise ModelError(
            f"{name} has {stored / 1e6:,.1f} MB of weights, but its config describes {elements:,} numbers; expected "
            "about two bytes each; fetch the checkpoint again"
        )


def _check_complete(name: str, loading: dict[str, Any]) -> None:
    """Refuse a checkpoint whose gaps transformers filled with random numbers."""
    for problem in ("missing_keys", "mismatched_keys"):
        if found := sorted(map(str, loading.get(problem) or ())):
            raise ModelError(
                f"{name} has {len(found)} {problem.replace('_', ' ')}, first {found[0]}; expected a weight for every "
                "parameter of its config; fetch or convert the checkpoint again"
            )


def check_packed(name: str, model: nn.Module) -> None:
    """Refuse plain weights where the config says packed: bitsandbytes would fail in the first forward pass.

    Raises:
        ModelError: names the first such weight.
    """
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        is_plain = isinstance(weight, torch.Tensor) and weight.is_floating_point()
        if type(module).__name__ in PACKING and is_plain and getattr(weight, "quant_state", None) is None:
            raise ModelError(
                f"the quantization_config of {name} says packed weights, but {path} is not packed; expected both "
                "alike; remove quantization_config from its config.json, or fetch the checkpoint again"
            )


def _forget_gguf(model: PreTrainedModel) -> None:
    """Remove the marks of quantization: a GGUF checkpoint is dequantized on loading, but Trainer goes by the marks."""
    for owner, mark in ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, mark):
            delattr(owner, mark)
    model.is_quantized = False


def _place(name: str) -> dict[str, Any]:
    """Arguments of ``from_pretrained``: a GGUF file is named by its folder and its file name.

    Raises:
        ModelError: MODEL is a local path without a model.
    """
    try:
        name.encode()
    except UnicodeEncodeError as error:  # the libraries that read models do not take such a name either
        raise ModelError(f"the name {name} is not UTF-8; rename the folder") from error
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {name}; expected a GGUF checkpoint{near(path)}")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_dir():
        foreign.check_files(path)
        if (path / foreign.ADAPTER_CONFIG).exists():
            raise ModelError(_ADAPTER.format(name=name, base=foreign.base_of_adapter(path)))
        if (path / "model_index.json").is_file():
            raise ModelError(f"{name} is a diffusion pipeline, which makes images; {EXPECTED}")
        if not (path / "config.json").is_file():
            if (fault := mistaken(path, EXPECTED_MODEL, "model")) is not None:
                raise ModelError(fault)
            raise ModelError(f"{name} has no config.json; expected a transformers model folder or a .gguf file")
        return {"pretrained_model_name_or_path": name}
    if path.exists():
        raise ModelError(mistaken(path, EXPECTED_MODEL, "model") or f"{name} is a file; expected {EXPECTED_MODEL}")
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ModelError(f"there is no folder {name}; expected {EXPECTED_MODEL}{near(path)}")
    return {"pretrained_model_name_or_path": name}
