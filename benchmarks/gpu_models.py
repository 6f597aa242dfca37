"""Random models and rows that the benchmark of a GPU steps over: only their shapes matter."""

import copy
import gc
import json
import math
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3MoeConfig,
)

import aletheia
from aletheia.anatomy.read import find_layers
from aletheia.anatomy.schema import DataIdentity
from aletheia.data.examples import NO_LOSS, Example, Examples
from aletheia.planning.plan import Plan

PROMPT_SHARE = 0.45  # of a row's tokens, which carry no loss: about GSM8K's


@dataclass(frozen=True)
class Shape:
    """A model's config, and the rows that it steps over.

    Attributes:
        name: of the model whose shape it is.
        config: of the random model.
        batch_size: rows of a padded batch.
        mean_tokens: of a row; lengths are log-normal.
        spread: standard deviation of the logarithm of a length.
        longest: tokens of the longest row.
        packed: blocks of a packed batch and tokens of a block: about as many tokens as a padded batch holds.
    """

    name: str
    config: PreTrainedConfig
    batch_size: int
    mean_tokens: int
    spread: float
    longest: int
    packed: tuple[int, int]


def shapes(tiny: bool) -> dict[str, Shape]:
    """By the names of ``--models``; ``tiny`` ones are of the same families, for a processor."""
    if tiny:
        small = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
        small |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
        rows = (2, 24, 0.4, 64, (1, 64))
        return {
            "8b": Shape("tiny Llama", LlamaConfig(**small), *rows),
            "1.5b": Shape("tiny Qwen2", Qwen2Config(**small, tie_word_embeddings=True), *rows),
            "mixture": Shape("tiny Qwen3-MoE", Qwen3MoeConfig(**small, **experts), *rows),
        }
    llama = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5,
    )  # fmt: skip
    qwen = Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True,
    )  # fmt: skip
    mixture = Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=12, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
        max_position_embeddings=40960,
    )  # fmt: skip
    return {
        "8b": Shape("Llama-3.1-8B", llama, 4, 833, 0.5, 2048, (2, 2048)),
        "1.5b": Shape("Qwen2.5-1.5B", qwen, 16, 223, 0.4, 1024, (4, 1024)),
        "mixture": Shape("Qwen3-30B-A3B, 12 of its 48 layers", mixture, 8, 416, 0.5, 2048, (2, 2048)),
    }


def build(shape: Shape, device: str) -> PreTrainedModel:
    """The random model in bfloat16, made where it will run; the same weights each time."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(shape.config), dtype=torch.bfloat16)
    model.config._name_or_path = model.name_or_path = shape.name
    return model.eval()


def to_nf4(model: PreTrainedModel) -> None:
    """Quantize the matrices of the layers in place, as ``aletheia train --quantize nf4`` loads them."""
    import bitsandbytes as bnb

    _, layers = find_layers(model)
    for layer in layers:
        for path, linear in [pair for pair in layer.named_modules() if type(pair[1]) is torch.nn.Linear]:
            made = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, linear.bias is not None, torch.bfloat16, quant_type="nf4"
            )
            made.weight = bnb.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4")
            made.bias = linear.bias
            parent, _, name = path.rpartition(".")
            setattr(layer.get_submodule(parent), name, made.to(linear.weight.device))
    model.is_loaded_in_4bit = True


def rows_of(shape: Shape, count: int) -> Examples:
    """``count`` rows of random tokens; token 0 is left for padding."""
    draw = random.Random(0)
    centre = math.log(shape.mean_tokens) - shape.spread**2 / 2
    made = []
    for number in range(count):
        length = min(max(8, round(draw.lognormvariate(centre, shape.spread))), shape.longest)
        tokens = [draw.randrange(3, shape.config.vocab_size) for _ in range(length)]
        prompt = round(PROMPT_SHARE * length)
        made.append(Example(tokens, [NO_LOSS] * prompt + tokens[prompt:], f"row {number}"))
    identity = DataIdentity(name="random rows", fingerprint="0" * 64, form="text", rows=count)
    return Examples(identity, tuple(made), shape.longest, 0, 0, 0)


def some_tokenizer() -> PreTrainedTokenizerFast:
    """SFTTrainer wants one for its padding token; the rows are tokens already."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@dataclass(frozen=True)
class Operations:
    """What a step has to compute at least: products with weights, 2 operations a weight and token and direction.

    Weights are frozen, so a layer that learns takes 4 and one below the boundary 2, or none from a cache. Nothing is
    recomputed and the head works at labelled positions alone. Adapters and attention's scores are left out; of
    experts, those count that a token goes through.
    """

    layer_weights: tuple[int, ...]
    head_weights: int

    def of(self, tokens: int, labelled: int, boundary: int, cached: bool) -> float:
        """Operations of a batch."""
        below = 0 if cached else 2 * sum(self.layer_weights[:boundary])
        return tokens * (below + 4 * sum(self.layer_weights[boundary:])) + 4.0 * labelled * self.head_weights


def operations_of(model: PreTrainedModel) -> Operations:
    """Counted on the base model."""
    config = model.config
    per_token = {1: 0.0, 2: 1.0, 3: getattr(config, "num_experts_per_tok", 1) / getattr(config, "num_experts", 1)}
    _, layers = find_layers(model)
    weights = tuple(
        round(sum(per_token[parameter.dim()] * parameter.numel() for parameter in layer.parameters()))
        for layer in layers
    )
    return Operations(weights, model.get_output_embeddings().weight.numel())


def release() -> None:
    """Free the memory of the last arm."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Work:
    """What all arms of one model share: rows, plans, and how many steps are taken."""

    def __init__(self, shape: Shape, device: str, steps: int, warm_up: int) -> None:
        """Probes a random model once, for plans: ``uniform`` adapts every layer, ``half`` the upper half."""
        self.shape, self.device, self.steps, self.warm_up = shape, device, steps, warm_up
        self._in_nf4 = False
        self.data = rows_of(shape, shape.batch_size * steps)
        model = build(shape, device)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.operations = operations_of(model)
        self.computed_by = {
            kind: getattr(model.config, f"_{kind}_implementation", None) for kind in ("attn", "experts")
        }
        self.scores = aletheia.probe(model, self.data, batches=1)

    @property
    def last_steps(self) -> slice:
        """Those that are timed."""
        return slice(-self.steps, None)

    @cached_property
    def uniform(self) -> Plan:
        """Rank 16 on every module of every layer."""
        return aletheia.plan(self.scores, policy="uniform")

    @cached_property
    def half(self) -> Plan:
        """The same in the upper half of the layers, from the first step on."""
        return aletheia.plan(self.scores, policy="last", percent=50, freeze_after=0)

    def model(self) -> PreTrainedModel:
        """A new model for one arm."""
        model = build(self.shape, self.device)
        if self._in_nf4:
            to_nf4(model)
        return model

    @cached_property
    def saved(self) -> Path:
        """A folder with the model, in bfloat16, and the rows, for another process. It is gone when this object is."""
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        build(self.shape, self.device).save_pretrained(folder / "model")
        some_tokenizer().save_pretrained(folder / "model")
        rows = [{"input_ids": row.input_ids, "labels": row.labels} for row in self.data.examples]
        (folder / "rows.json").write_text(json.dumps(rows))
        release()
        return folder

    @contextmanager
    def quantized(self) -> Iterator[None]:
        """A context in which models are in NF4."""
        self._in_nf4 = True
        try:
            yield
        finally:
            self._in_nf4 = False
