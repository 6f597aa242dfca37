"""Models of a campaign: existing ones, and random ones of a given shape, which are made once."""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from aletheia.anatomy.demo import demo_checkpoint
from aletheia.anatomy.foreign import check_config
from aletheia.anatomy.load import load
from aletheia.errors import CampaignError, ModelError
from aletheia.lab.campaign.spec import ModelEntry

DEMO = "demo"  # the model of 'aletheia demo', from a Python package
MODELS = "models"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def model_source(entry: ModelEntry, folder: Path) -> str:
    """The model for ``aletheia.load``: the path as it is, or the folder of a random model, made on first use.

    A config always gives the same random model: drawn with seed 0, in float32, with one token per byte. A GGUF file is
    unpacked once, because that can take longer than a row.

    Raises:
        CampaignError: transformers cannot build the config.
    """
    path = str(demo_checkpoint()) if entry.path == DEMO else entry.path
    if path is not None and not path.endswith(".gguf"):
        return path
    digest = hashlib.sha256(json.dumps([path, entry.config], sort_keys=True).encode()).hexdigest()[:8]
    place = folder / MODELS / f"{entry.name}-{digest}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        if not place.exists():
            model, tokenizer = _unpacked(path) if path else _random(entry)
            temporary = place.with_name(f"{place.name}.new")
            shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            temporary.rename(place)
    return str(place)


def _unpacked(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    base = load(path, "float32")
    for name in ("quantization_config", "hf_quantizer"):  # otherwise it would be saved as quantized
        for holder in (base.model, base.model.config):
            if hasattr(holder, name):
                delattr(holder, name)
    return base.model, base.tokenizer


def _random(entry: ModelEntry) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = byte_tokenizer()
    return build(entry, tokenizer), tokenizer


def build(entry: ModelEntry, tokenizer: PreTrainedTokenizerBase, device: str = "cpu") -> PreTrainedModel:
    """A random model of a config, drawn with seed 0 in float32; on the meta device, only its shape.

    Raises:
        CampaignError: transformers cannot build the config.
    """
    try:
        check_config(entry.config or {}, f"model {entry.name}")
    except ModelError as error:
        raise CampaignError(str(error)) from error
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    try:
        config = AutoConfig.for_model(**special | (entry.config or {}))
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            return model
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, RuntimeError) as error:
        raise CampaignError(f"model {entry.name}: transformers cannot build this config ({error})") from error


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast
