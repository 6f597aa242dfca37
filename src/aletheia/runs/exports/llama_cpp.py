"""A LoRA in GGUF for llama.cpp, and the same with a Modelfile for Ollama.

llama.cpp's converters store some rows in another order than transformers: those of q and k where it rotates neighbours,
and those of fused q, k and v that transformers keeps head by head (``permute`` and ``modify_tensors`` in llama.cpp's
conversion/, as in llama-cpp-python 0.3.36). B has the rows of its matrix, so it is reordered in the same way. A is not.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from aletheia.anatomy.foreign import CONFIG, found_file
from aletheia.anatomy.load import load_config
from aletheia.errors import AdapterError, ModelError
from aletheia.files import write_text
from aletheia.runs.exports.factors import Factors, read_factors
from aletheia.runs.exports.written import Task, Written, copy_template, other_weights, shell

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ADAPTER_FILE, MODELFILE = "adapter.gguf", "Modelfile"
Order = Literal["as here", "rotary", "by head"]
FAMILIES: dict[str, tuple[str, Order]] = {  # transformers' model_type: gguf's architecture, and the order of rows
    "llama": ("LLAMA", "rotary"),
    "mistral": ("LLAMA", "rotary"),
    "mixtral": ("LLAMA", "rotary"),
    "granite": ("GRANITE", "rotary"),
    "smollm3": ("SMOLLM3", "rotary"),
    "gpt_neox": ("GPTNEOX", "by head"),
    "bloom": ("BLOOM", "by head"),
    "qwen2": ("QWEN2", "as here"),
    "qwen3": ("QWEN3", "as here"),
    "qwen3_moe": ("QWEN3MOE", "as here"),
    "gemma": ("GEMMA", "as here"),
    "gemma2": ("GEMMA2", "as here"),
    "gemma3_text": ("GEMMA3", "as here"),
    "phi": ("PHI2", "as here"),
    "phi3": ("PHI3", "as here"),
    "olmo2": ("OLMO2", "as here"),
    "olmo3": ("OLMO2", "as here"),
    "cohere": ("COMMAND_R", "as here"),
    "cohere2": ("COHERE2", "as here"),
    "stablelm": ("STABLELM", "as here"),
    "starcoder2": ("STARCODER2", "as here"),
    "gpt2": ("GPT2", "as here"),
}


def write_gguf(task: Task) -> Written:
    """Write ``adapter.gguf`` at one rank with an alpha that makes every scale 1.

    Raises:
        AdapterError: it is not plain LoRA, fits only its quantized base, or its family is not supported.
        ModelError: the base's configuration cannot be read, or the package gguf is missing.
    """
    _write_adapter(task)
    base = task.origin.base if task.origin.base.endswith(".gguf") else "BASE.gguf"
    notes = other_weights(task.origin)
    if base == "BASE.gguf":
        notes = (f"make BASE.gguf from {task.origin.base} with llama.cpp's convert_hf_to_gguf.py", *notes)
    options = ["-m", base, "--lora", task.out / ADAPTER_FILE]
    if template := copy_template(task):
        options += ["--jinja", "--chat-template-file", template]
    return Written(shell("llama-cli", *options, "-p", "..."), notes)


def write_ollama(task: Task) -> Written:
    """Write ``adapter.gguf``, and a ``Modelfile`` that applies it to its base.

    Raises:
        AdapterError: as in :func:`write_gguf`.
        ModelError: as in :func:`write_gguf`, or the base's weights are not on this machine.
    """
    _write_adapter(task)
    template = (
        "# Ollama takes the chat template from the base. If answers look wrong, write a TEMPLATE in Ollama's own\n"
        f"# syntax: it cannot read the transformers template that {task.source.name} was trained with.\n"
    )
    text = f"FROM {_weights_of(task.origin.base)}\nADAPTER ./{ADAPTER_FILE}\n{template}"
    write_text(task.folder / MODELFILE, text)
    return Written(
        shell("ollama", "create", "tuned", "-f", task.out / MODELFILE) + " && ollama run tuned",
        ("check the chat template with: ollama show tuned --template", *other_weights(task.origin)),
    )


def _weights_of(base: str) -> str:
    """The value of ``FROM``: a ``.gguf`` file or a folder; for a hub id, its folder in the download cache."""
    if Path(base).exists():
        return base
    config = found_file(base, CONFIG)
    if config is None or not any(config.parent.glob("*.safetensors")):
        raise ModelError(
            f"the weights of {base} are not on this machine; expected a local model; set `base` to a .gguf file or a "
            "folder"
        )
    return str(config.parent)


def _write_adapter(task: Task) -> None:
    if find_spec("gguf") is None:
        raise ModelError("this export needs the package gguf; install it with: pip install 'aletheia-tune[gguf]'")
    import gguf

    task.origin.check_fits_any_base()
    factors = read_factors(task.source, "llama.cpp", task.allow_pickle)
    config = load_config(task.origin.base, task.trust_remote_code)
    if config.model_type not in FAMILIES:
        raise AdapterError(
            f"exporting the family {config.model_type} to llama.cpp is not supported; expected one of "
            f"{', '.join(FAMILIES)}; set `to` merged and convert that with llama.cpp's convert_hf_to_gguf.py"
        )
    name, order = FAMILIES[config.model_type]
    architecture = gguf.MODEL_ARCH[name]
    rank = factors.largest_rank
    writer = gguf.GGUFWriter(task.folder / ADAPTER_FILE, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))  # llama.cpp divides it by each tensor's rank
    for place, A_RI, B_OR in _tensors(factors, rank, config, gguf.get_tensor_name_map(architecture, _layers(config))):
        for ending, factor in (("lora_a", A_RI), ("lora_b", _as_stored(B_OR, place, order, config))):
            writer.add_tensor(f"{place}.{ending}", factor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(factors: Factors, rank: int, config: "PretrainedConfig", names: Any) -> list[tuple[str, Tensor, Tensor]]:
    """Each matrix's name in llama.cpp and its factors A and B."""
    found = []
    for name, pair in factors.at(rank).items():
        place = names.get_name(f"{name}.weight", try_suffixes=(".weight",))
        if place is None:
            raise AdapterError(
                f"llama.cpp has no name for {name} of {config.model_type}; expected matrices of its layers; "
                "set `to` merged instead"
            )
        found.append((place, pair.A_RI, pair.B_OR))
    return found


def _as_stored(B_OR: Tensor, place: str, order: Order, config: "PretrainedConfig") -> Tensor:
    """B with its rows in the order in which llama.cpp stores those of the matrix."""
    heads = config.num_attention_heads
    kind = place.split(".")[-2]
    if order == "rotary" and kind in ("attn_q", "attn_k"):
        if kind == "attn_k":
            heads = getattr(config, "num_key_value_heads", None) or heads
        return _regrouped(B_OR, (heads, 2))  # halves of a head -> neighbours
    if order == "by head" and kind == "attn_qkv":
        return _regrouped(B_OR, (heads, 3), swap=(0, 1))  # q, k, v of each head -> all q, all k, all v
    return B_OR


def _regrouped(B_OR: Tensor, groups: tuple[int, int], swap: tuple[int, int] = (1, 2)) -> Tensor:
    rows, rank = B_OR.shape
    return B_OR.reshape(*groups, rows // (groups[0] * groups[1]), rank).transpose(*swap).reshape(rows, rank)


def _layers(config: "PretrainedConfig") -> int:
    return int(config.num_hidden_layers)
