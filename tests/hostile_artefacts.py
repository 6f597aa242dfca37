"""Files that somebody made to do harm: to run code, to write elsewhere, to take hours or all memory.

``artefacts()`` gives each by name with what makes it in an empty folder and what a user would do with it. Run as a
program it tries them all and prints, for each, the seconds and the answer, and in the end the peak of memory.
"""

import json
import os
import pickle
import resource
import shutil
import struct
import sys
import tempfile
import time
from pathlib import Path

import torch

from aletheia.anatomy.checkpoint import Checkpoint
from aletheia.anatomy.load import inspect, load
from aletheia.anatomy.settings import LoadSettings
from aletheia.cli.config import build, read_config
from aletheia.data.settings import DataSettings
from aletheia.errors import AletheiaError
from aletheia.job.adapter import Start
from aletheia.job.settings import JobSettings
from aletheia.lab.campaign.spec import read_campaign
from aletheia.planning.plan import Plan, PlanSettings
from aletheia.probing.scores import Scores
from aletheia.runs.saved import load_adapter
from aletheia.training.settings import TrainSettings

DEEP = 100_000


class Canary:
    """Unpickled, it leaves a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def changed(base, folder, **values):
    """A copy of a model folder with other settings in its config."""
    shutil.copytree(base, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


def nested(depth, inner="1"):
    return '{"a": ' * depth + inner + "}" * depth


CONFIGS = {
    "1e8 layers": {"num_hidden_layers": 10**8},
    "10,001 layers": {"num_hidden_layers": 10_001},
    "negative layers": {"num_hidden_layers": -4},
    "no layers": {"num_hidden_layers": 0},
    "half a layer": {"num_hidden_layers": 2.5},
    "layers as text": {"num_hidden_layers": "1e9"},
    "layers as a list": {"num_hidden_layers": [4]},
    "layers true": {"num_hidden_layers": True},
    "1e8 layers of another family": {"model_type": "gpt2", "n_layer": 10**8},
    "1e8 layers of a mixture": {"model_type": "mixtral", "num_hidden_layers": 10**8, "num_local_experts": 8},
    "1e8 layers in a text config": {"model_type": "gemma3", "text_config": {"num_hidden_layers": 10**8}},
    "1e8 layers in a vision config": {"model_type": "gemma3", "vision_config": {"num_hidden_layers": 10**8}},
    "1e8 layers with types": {"model_type": "qwen2", "num_hidden_layers": 10**8, "use_sliding_window": True},
    "hidden size 1e9": {"hidden_size": 10**9},
    "hidden size 0": {"hidden_size": 0},
    "hidden size -1": {"hidden_size": -1},
    "hidden size 1e308": {"hidden_size": 1e308},
    "intermediate size 1e12": {"intermediate_size": 10**12},
    "vocabulary 1e12": {"vocab_size": 10**12},
    "vocabulary of nothing": {"vocab_size": {}},
    "1e9 heads": {"num_attention_heads": 10**9},
    "head size 1e15": {"head_dim": 10**15},
    "heads that do not divide": {"num_attention_heads": 7, "num_key_value_heads": 5, "head_dim": None},
    "1e9 experts": {"model_type": "qwen3_moe", "num_experts": 10**9},
    "1e8 labels": {"num_labels": 10**8},
    "1e8 labels in a text config": {"model_type": "gemma3", "text_config": {"num_labels": 10**8}},
    "1e6 labels with names": {"id2label": {str(at): "a" for at in range(10**5 + 1)}},
    "1e6 experts": {"model_type": "qwen3_moe", "num_experts": 10**6},
    "1e5 of what nobody names": {"num_whatever": 10**5},
    "1e12 of what nobody counts": {"whatever": 10**12},
    "1e9 of a list in lists": {"model_type": "gpt_neo", "attention_types": [[["global"], 10**9]]},
    "1e6 tokens that end": {"eos_token_id": list(range(10**6))},
    "101 tokens that end": {"eos_token_id": list(range(101))},
    "1e5 types of layers": {"layer_types": ["full_attention"] * (10**5 + 1)},
    "a long list of nothing": {"whatever": [0] * 10_001},
    "1e12 positions": {"max_position_embeddings": 10**12},
    "1e18 positions of rope": {
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 10**18}
    },
    "1e15 parameters": {"hidden_size": 2**20, "intermediate_size": 2**20, "num_hidden_layers": 1000},
    "rope of no kind": {"rope_parameters": {"rope_type": "../../etc/passwd", "rope_theta": 1e4}},
    "rope that is a list": {"rope_parameters": [[[1]]]},
    "activation that is code": {"hidden_act": "__import__('os').system('touch canary')"},
    "dtype that is a function": {"dtype": "load"},
    "unknown model type": {"model_type": "../../evil"},
    "model type that is a list": {"model_type": ["llama"]},
    "attention from a hub": {"attn_implementation": "evil/kernels"},
    "attention of a part from a hub": {"_attn_implementation": {"text_config": "evil/kernels@main:attn"}},
    "experts from a hub": {"experts_implementation": "evil/kernels"},
    "dtype of 1024 bits": {"dtype": "float1024"},
    "packed by a word": {"quantization_config": "4bit"},
    "packed by nobody": {"quantization_config": {"quant_method": "nosuch"}},
    "packed by nobody named": {"quantization_config": {"bits": 4}},
    "4 bits of plain weights": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "8 bits of plain weights": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    "packed and far too few": {"quantization_config": {"quant_method": "gptq", "bits": 4}, "hidden_size": 2**15},
    "another width": {"hidden_size": 64},
    "weights elsewhere": {"transformers_weights": "../../../etc/passwd"},
    "weights that are a pickle": {"transformers_weights": "adapter_model.bin"},
}
CONFIG_TEXTS = {
    "nested 100,000 deep": nested(DEEP),
    "lists nested 100,000 deep": '{"model_type": "llama", "x": ' + "[" * DEEP + "]" * DEEP + "}",
    "nested 200 deep": '{"model_type": "llama", "x": ' + nested(200) + "}",
    "a number of a million digits": '{"model_type": "llama", "vocab_size": ' + "9" * 10**6 + "}",
    "a list": "[1, 2]",
    "cut off": '{"model_type": "lla',
    "not UTF-8": b"\xff\xfe\x00",
    "100 MB": b'{"model_type": "llama", "x": "' + b"a" * 10**8 + b'"}',
}


def _added(count, text="<|{}|>"):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [{"id": 259 + at, "content": text.format(at), "special": True, **flags} for at in range(count)]


def _replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def _split(regex):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _template(pieces, ids=(258,)):
    text = {"Sequence": {"id": "A", "type_id": 0}}
    begin = {"id": "<s>", "ids": list(ids), "tokens": ["<s>"] * len(ids)}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * pieces + [text]
    return {"type": "TemplateProcessing", "single": single, "pair": [text, text], "special_tokens": {"<s>": begin}}


DOUBLED = [_replace({"String": "x"}, "xx"), {"type": "Prepend", "prepend": "x"}]
TOKENIZERS = {
    "an empty text replaced by a megabyte": {"normalizer": _replace({"String": ""}, "x" * 10**6)},
    "an empty text replaced": {"normalizer": _replace({"String": ""}, "x")},
    "nothing replaced": {"normalizer": _replace({"Regex": "~*"}, "x")},
    "a letter replaced by many": {"normalizer": _replace({"String": "e"}, "x" * 101)},
    "doubled 40 times": {"normalizer": {"type": "Sequence", "normalizers": DOUBLED * 40}},
    "tripled in a chain": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [_replace({"String": a}, b * 9) for a, b in ("ab", "bc", "cd", "de")],
        }
    },
    "a pattern that never ends": {"pre_tokenizer": _split("(a+)+$")},
    "a pattern replaced that never ends": {"normalizer": _replace({"Regex": r"([ab]*)*c"}, "x")},
    "a long pattern": {"pre_tokenizer": _split("|".join(f"a{at}" for at in range(5_000)))},
    "no pattern": {"pre_tokenizer": _split("(")},
    "pieces of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "a megabyte before every text": {"normalizer": {"type": "Prepend", "prepend": "x" * 10**6}},
    "10,000 normalizers": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}] * 10_000}},
    "10,000 decoders": {"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}] * 10_000}},
    "10,000 tokens before every text": {"post_processor": _template(10_000)},
    "10,000 ids for a token": {"post_processor": _template(1, [258] * 10_000)},
    "padding to 1e9 tokens": {"padding": {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_id": 0}},
    "200,000 added tokens": {"added_tokens": _added(200_000)},
    "an added token of a megabyte": {"added_tokens": _added(1, "a" * 10**6)},
    "words of 1e9": {"model": {"type": "WordPiece", "vocab": {"a": 0}, "max_input_chars_per_word": 10**9}},
    "a list": [1],
    "nested deep": {"normalizer": json.loads('{"type": "Sequence", "normalizers": [' * 200 + "]}" * 200)},
}


def _tokenizer(folder, base, values):
    shutil.copytree(base, folder, dirs_exist_ok=True)
    told = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(told | values if isinstance(values, dict) else values))
    return folder


GENERATION = {
    "1e5 tokens that end": {"eos_token_id": list(range(10**5))},
    "a long list": {"suppress_tokens": [1] * 10_001},
    "1e12 beams": {"num_beams": 10**12},
}


def _generation(folder, base, values):
    shutil.copytree(base, folder, dirs_exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


def _code(folder, base, model_type="pearlm", tokenizer=False, **auto):
    auto = auto or {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    changed(base, folder, model_type=model_type, auto_map=auto)
    evil = f"open({str(folder / 'canary')!r}, 'w')\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
    evil += "class Config(LlamaConfig):\n    model_type = 'pearlm'\n"
    evil += "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    (folder / "evil.py").write_text(evil)
    if tokenizer:
        told = json.loads((folder / "tokenizer_config.json").read_text())
        told |= {"auto_map": {"AutoTokenizer": ["evil.Tokens", None]}, "tokenizer_class": "Tokens"}
        (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return folder


def _weights(folder, base, content):
    shutil.copytree(base, folder, dirs_exist_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    return folder


def _safetensors(header, data=b"", length=None):
    told = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(told) if length is None else length) + told + data


def _pickle(folder, base, name, old=False):
    shutil.copytree(base, folder, dirs_exist_ok=True)
    (folder / "model.safetensors").unlink()
    evil = Canary(folder / "canary")
    (folder / name).write_bytes(pickle.dumps({"model.embed_tokens.weight": evil}) if old else b"")
    if not old:
        torch.save({"model.embed_tokens.weight": evil}, folder / name)
    return folder


def _index(folder, base, shard, name="model.safetensors.index.json"):
    shutil.copytree(base, folder, dirs_exist_ok=True)
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": shard}}))
    return folder


TENSOR = {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}
WEIGHTS = {
    "header of 2^63 bytes": _safetensors(b"{}", length=2**63),
    "header of 2^40 bytes": _safetensors(b"{}", length=2**40),
    "header longer than the file": _safetensors(b"{}", length=10**6),
    "overlapping tensors": _safetensors({"a": TENSOR, "b": TENSOR}, bytes(32)),
    "offsets backwards": _safetensors({"a": TENSOR | {"data_offsets": [32, 0]}}, bytes(32)),
    "offsets past the end": _safetensors({"a": TENSOR | {"data_offsets": [0, 2**60]}}, bytes(32)),
    "shape of 2^62": _safetensors({"a": TENSOR | {"shape": [2**31, 2**31]}}, bytes(32)),
    "shape below zero": _safetensors({"a": TENSOR | {"shape": [-8]}}, bytes(32)),
    "dtype of no kind": _safetensors({"a": TENSOR | {"dtype": "PICKLE"}}, bytes(32)),
    "header nested 100,000 deep": _safetensors(nested(DEEP).encode()),
    "empty": b"",
    "seven bytes": b"\x01" * 7,
    "zeros": bytes(4096),
    "text": b"<html>not found</html>",
    "a zip": b"PK\x03\x04" + bytes(100),
}
_ARCH = struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<IQ", 8, 5) + b"llama"


def _gguf(tensors, keys, body=b""):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + body


def _key(name, value):
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<II", 4, value)


GGUF = {
    "2^60 tensors": _gguf(2**60, 1, _ARCH),
    "2^60 keys": _gguf(0, 2**60, _ARCH),
    "text of 2^60": _gguf(0, 1, struct.pack("<Q", 2**60) + b"abc"),
    "array of 2^60": _gguf(0, 1, struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 0, 2**60)),
    "2^31 blocks": _gguf(0, 2, _ARCH + _key("llama.block_count", 2**31)),
    "width of 2^31": _gguf(0, 2, _ARCH + _key("llama.embedding_length", 2**31)),
    "2^31 tokens": _gguf(0, 2, _ARCH + _key("llama.vocab_size", 2**31)),
    "empty": b"",
    "no GGUF": b"MZ" + bytes(100),
    "header alone": _gguf(0, 0),
}
EVIL = "(a+)+$" + "|(" * 50 + ")" * 50
ADAPTERS = {
    "pattern that never ends in rank_pattern": {"rank_pattern": {r"((.*)*)*z": 8}},
    "pattern that never ends in alpha_pattern": {"alpha_pattern": {r"(.+)+\d+y": 8}},
    "alternatives in rank_pattern": {"rank_pattern": {"(q|q|q)*proj": 8}},
    "30,000 patterns": {"rank_pattern": {f"layer_{at}": 8 for at in range(30_000)}},
    "pattern of 10,000 characters": {"alpha_pattern": {"a" * 10_000: 8}},
    "module that is a pattern": {"target_modules": ["(q|k)+_proj"]},
    "module that is a path": {"target_modules": ["../../etc"]},
    "1e6 modules": {"target_modules": [f"m{at}" for at in range(10**6)]},
    "modules that are numbers": {"target_modules": [1, 2]},
    "module to save that is a pattern": {"modules_to_save": ["(.*)*z"]},
    "excluded list of patterns": {"exclude_modules": ["(.*)*z"]},
    "parameters that are a pattern": {"target_parameters": ["(.*)*z"]},
    "layers below zero": {"layers_to_transform": [-1]},
    "layers that are text": {"layers_to_transform": "all"},
    "rank 1e9": {"r": 10**9},
    "rank 65,000": {"r": 65_000},
    "rank 0": {"r": 0},
    "rank that is true": {"r": True},
    "rank of a pattern 1e9": {"rank_pattern": {"q_proj": 10**9}},
    "alpha NaN": {"lora_alpha": float("nan")},
    "alpha of text": {"lora_alpha": "16"},
    "alpha of a pattern infinite": {"alpha_pattern": {"q_proj": float("inf")}},
    "dropout 2": {"lora_dropout": 2.0},
    "another kind": {"peft_type": "ADALORA"},
    "no kind": {"peft_type": None},
    "kind of a list": {"peft_type": ["LORA"]},
    "another task": {"task_type": "FEATURE_EXTRACTION"},
    "module to import": {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
    "layers copied": {"layer_replication": [[0, 10**9]]},
    "start by SVD": {"init_lora_weights": "pissa_niter_1000000"},
    "start by LoftQ": {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 10**9}},
    "start by CorDA": {"init_lora_weights": "corda", "corda_config": {"cache_file": "../../x.pt"}},
    "start of a list": {"init_lora_weights": ["pissa"]},
    "tokens of an invocation": {"alora_invocation_tokens": [1]},
    "unknown setting": {"run_this": "rm -rf /"},
    "token indices of text": {"trainable_token_indices": {"embed_tokens": "all"}},
    "bias of no kind": {"bias": "../../"},
}
BASES = (
    "../..",
    "http://localhost/evil",
    "../base",
    "/nowhere/at/all",
    "a/b/c",
    "~/model",
    "",
    7,
    None,
    "file:///etc/passwd",
)
YAML = {
    "billion laughs": "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nmodel: *c",
    "merge keys": "a: &a {x: 1}\nmodel:\n  <<: *a",
    "merge keys 7,000 times": "model: {" + "<<: {a: 1}, " * 7_000 + "}",
    "python object": "model: !!python/object/apply:os.system ['touch canary']",
    "python name": "data: !!python/name:os.system",
    "python module": "plan: !!python/module:antigravity",
    "own tag": "model: !evil x",
    "binary": "model: !!binary aGk=",
    "nested 40,000 deep": "model: " + "[" * 40_000,
    "mappings nested deep": "{a: " * 40_000,
    "100 MB": "#" * 10**8,
    "double key": "model: a\nmodel: b",
    "double setting": "training: {steps: 1, steps: 2}",
    "NaN": "training: {learning_rate: .nan}",
    "tagged NaN": "training: {learning_rate: !!float .nan}",
    "a million digits": "training: {steps: " + "9" * 90_000 + "}",
    "a time": "training: {steps: 2001-12-14t21:59:43.10-05:00}",
    "a key that is a list": "? [a, b]\n: c",
    "two documents": "model: a\n---\nmodel: b",
    "NUL": "model: a\x00b",
    "not UTF-8": b"model: \xff",
    "a list": "- a",
    "recursion": "&a [*a]",
    "no that is a number": "training: {steps: no}",
    "octal that is none": "training: {steps: 0o17}",
}
SETTINGS = {
    "rank 1e9": lambda: PlanSettings(rank=10**9),
    "rank of attention 1e9": lambda: PlanSettings(attention_rank=10**9),
    "rank of a thousand digits": lambda: PlanSettings(mlp_rank=10**1000),
    "rows 1e12 tokens long": lambda: DataSettings(data=("a",), max_length=10**12),
    "1e12 held-out rows": lambda: DataSettings(data=("a",), eval_rows=10**12),
    "batch of 1e9": lambda: TrainSettings(batch_size=10**9),
    "1e18 steps": lambda: TrainSettings(steps=10**18),
    "1e300 epochs": lambda: TrainSettings(epochs=1e300),
    "1e9 batches a step": lambda: TrainSettings(gradient_accumulation_steps=10**9),
    "1e9 evaluations": lambda: TrainSettings(evaluations=10**9),
    "1e6 workers": lambda: TrainSettings(dataloader_num_workers=10**6),
    "seed of 2^40": lambda: TrainSettings(seed=2**40),
}


def artefacts(base, adapter, model, folder):
    """Name, and what tries it, of every artefact; each has a folder of its own below ``folder``.

    ``base`` and ``adapter`` are a good model folder and an adapter folder of it; ``model()`` makes the model.
    """
    cases = []

    def add(kind, name, attempt):
        place = folder / f"{len(cases):03d}"
        cases.append((f"{kind}: {name}", place, attempt))

    for name, values in CONFIGS.items():
        add("config", name, lambda at, v=values: load(str(changed(base, at / "m", **v))))
    for name, text in CONFIG_TEXTS.items():
        add("config", name, lambda at, t=text: inspect(str(_config_text(base, at / "m", t))))
    for name, values in TOKENIZERS.items():
        add("tokenizer", name, lambda at, v=values: load(str(_tokenizer(at / "m", base, v))))
    for name, values in GENERATION.items():
        add("generation", name, lambda at, v=values: load(str(_generation(at / "m", base, v))))
        add("generation streamed", name, lambda at, v=values: Checkpoint(str(_generation(at / "m", base, v))))
    for name, content in WEIGHTS.items():
        add("weights", name, lambda at, c=content: load(str(_weights(at / "m", base, c)), "float32"))
    for name, content in GGUF.items():
        add("gguf", name, lambda at, c=content: load(str(_file(at / "m.gguf", c))))
    for name, kwargs in {
        "config and model": {},
        "tokenizer": {"model_type": "llama", "tokenizer": True},
        "code elsewhere": {"AutoConfig": "evil/repo--evil.Config"},
        "code above": {"AutoConfig": "../../evil.Config"},
    }.items():
        add("code", name, lambda at, k=kwargs: load(str(_code(at / "m", base, **k))))
    add("code", "streamed", lambda at: Checkpoint(str(_code(at / "m", base))))
    add("code", "told by a file", lambda at: _allowed_by_file(at, "trust_remote_code"))
    add("pickle", "told by a file", lambda at: _allowed_by_file(at, "allow_pickle"))
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt"):
        add("pickle", name, lambda at, n=name: load(str(_pickle(at / "m", base, n))))
    add("pickle", "allowed", lambda at: load(str(_pickle(at / "m", base, "pytorch_model.bin")), allow_pickle=True))
    add(
        "pickle", "old", lambda at: load(str(_pickle(at / "m", base, "pytorch_model.bin", old=True)), allow_pickle=True)
    )
    add("pickle", "shard", lambda at: load(str(_index(at / "m", base, "evil.bin"))))
    for name, shard in {
        "above": "../outside.safetensors", "absolute": "/etc/passwd.safetensors", "far": "../../../etc/passwd",
        "number": 3, "backslashes": "..\\outside.safetensors", "nothing": "",
    }.items():  # fmt: skip
        add("index", name, lambda at, s=shard: load(str(_index(at / "m", base, s))))
        add("index streamed", name, lambda at, s=shard: Checkpoint(str(_index(at / "m", base, s))))
    add("folder", "pipe", lambda at: load(str(_pipe(at / "m", base, "tokenizer.json"))))
    add("folder", "pipe of settings", lambda at: load(str(_pipe(at / "m", base, "config.json"))))
    add("folder", "endless settings", lambda at: load(str(_linked(at / "m", base, "config.json", "/dev/zero"))))
    add("folder", "endless weights", lambda at: load(str(_linked(at / "m", base, "model.safetensors", "/dev/zero"))))
    for name, values in ADAPTERS.items():
        add("adapter", name, lambda at, v=values: load_adapter(model(), _adapter(at / "a", adapter, v)))
    for name, content in {"empty": b"", "header of 2^60": _safetensors(b"{}", length=2**60), "text": b"no"}.items():
        add("adapter weights", name, lambda at, c=content: load_adapter(model(), _adapter(at / "a", adapter, {}, c)))
    add("adapter", "pickle", lambda at: load_adapter(model(), _adapter_pickle(at / "a", adapter)))
    add("adapter", "pickle allowed", lambda at: load_adapter(model(), _adapter_pickle(at / "a", adapter), True))
    for name in BASES:
        add("base", str(name), lambda at, n=name: _start(_adapter(at / "a", adapter, {"base_model_name_or_path": n})))
    for name, text in YAML.items():
        add("yaml", name, lambda at, t=text: _run_file(_file(at / "f.yaml", t)))
        add("campaign", name, lambda at, t=text: read_campaign(_file(at / "f.yaml", t)))
    for name, make in SETTINGS.items():
        add("setting", name, lambda at, m=make: m())
    digits = '{"format": "aletheia-plan", "version": ' + "1" * 10**6 + "}"
    for name, text in {"nested": nested(DEEP), "digits": digits, "foreign": "{}"}.items():
        add("plan", name, lambda at, t=text: Plan.read(_file(at / "p.json", t)))
        add("scores", name, lambda at, t=text: Scores.read(_file(at / "s.json", t)))
    return cases


def _config_text(base, folder, text):
    shutil.copytree(base, folder, dirs_exist_ok=True)
    return _file(folder / "config.json", text).parent


def _file(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def _pipe(folder, base, name):
    shutil.copytree(base, folder, dirs_exist_ok=True)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    return folder


def _linked(folder, base, name, target):
    shutil.copytree(base, folder, dirs_exist_ok=True)
    (folder / name).unlink()
    (folder / name).symlink_to(target)
    return folder


def _adapter(folder, adapter, values, weights=None):
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | values))
    if weights is not None:
        (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


def _adapter_pickle(folder, adapter):
    _adapter(folder, adapter, {})
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.x.lora_A.weight": Canary(folder / "canary")}, folder / "adapter_model.bin")
    return folder


def _start(folder):
    return Start.of(JobSettings.of(str(folder), "rows.jsonl"))


def _allowed_by_file(folder, name):
    sections = read_config(_file(folder / "f.yaml", f"model: {{name: m, {name}: true}}"))
    return build(LoadSettings, sections, {"model": {}})


def _run_file(path):
    sections = read_config(path)
    for settings in (LoadSettings, DataSettings, PlanSettings, TrainSettings):
        build(settings, sections, {"model": {"model": "m"}, "data": {"data": ("d",)}})


def tried(attempt, place):
    """Seconds, and the answer: the message of an error of ours, ``accepted``, or what else was raised."""
    place.mkdir(parents=True)
    started = time.perf_counter()
    try:
        attempt(place)
        answer = "accepted"
    except AletheiaError as error:
        answer = f"{type(error).__name__}: {error}"
    except Exception as error:
        answer = f"NOT OURS {type(error).__name__}: {error}"
    return time.perf_counter() - started, answer


def good(folder):
    """A model folder, an adapter folder of it, and what makes the model."""
    from peft import LoraConfig, get_peft_model
    from tiny import make_model, make_tokenizer

    make_model().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    get_peft_model(make_model(), config).save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter", make_model


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        cases = artefacts(*good(Path(made)), Path(made) / "tried")
        for name, place, attempt in cases:
            seconds, answer = tried(attempt, place)
            print(f"{seconds:6.2f} s  {name}: {answer[:200]}", "EXECUTED" if list(place.rglob("canary")) else "")
            shutil.rmtree(place)
    print(json.dumps({"tried": len(cases), "peak_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
    sys.exit()
