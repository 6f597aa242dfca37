"""Settings files and scripts with which Axolotl, LLaMA-Factory, Unsloth and TRL train an adapter further.

Names are those of axolotl 0.19 (utils/schemas), llamafactory 0.9.5 (hparams), unsloth 2026.10 (models/loader.py) and
TRL 1.16. All four read the folder ``adapter/``, which keeps rank and alpha of every module. Unsloth's
``get_peft_model`` and LLaMA-Factory's settings know only one rank.
"""

import json
from typing import Any

import yaml

from aletheia.files import write_text
from aletheia.runs.exports.bridge import write_bridge
from aletheia.runs.exports.recipe import Recipe, notes_on
from aletheia.runs.exports.written import Task, Written, shell

ROWS = "rows"  # the name of the rows in LLaMA-Factory's list of data sets
_HEAD = "# Rank and alpha of every module come from the folder adapter/, so this file has no settings for them.\n"


def write_axolotl(task: Task) -> Written:
    """Write ``axolotl.yaml`` next to ``adapter/``.

    Raises:
        AletheiaError: as :func:`~aletheia.runs.exports.bridge.write_bridge`.
    """
    write_bridge(task)
    recipe = Recipe.of(task)
    settings: dict[str, Any] = {
        "base_model": recipe.base,
        "adapter": "qlora" if recipe.quantization == "nf4" else "lora",
        "load_in_4bit": recipe.quantization == "nf4",
        "load_in_8bit": recipe.quantization == "int8",
        "lora_model_dir": recipe.adapter,
        "datasets": [_axolotl_rows(file, recipe.columns) for file in recipe.data_files],
        "sequence_len": recipe.max_length,
        "micro_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.accumulation,
        "num_epochs": recipe.epochs,
        "learning_rate": recipe.learning_rate,
        "optimizer": "adamw_torch",
        "lr_scheduler": "cosine",
        "seed": recipe.seed,
        "output_dir": recipe.out,
    }
    _write_yaml(task, "axolotl.yaml", settings)
    return Written(shell("axolotl", "train", task.out / "axolotl.yaml"), notes_on(task))


def _axolotl_rows(file: str, columns: tuple[str, str] | None) -> dict[str, Any]:
    place = {"path": file, "ds_type": "csv" if ".csv" in file else "parquet" if ".parquet" in file else "json"}
    if columns is None:
        return place | {"type": "chat_template", "field_messages": "messages"}
    question, answer = columns
    kind = {"field_instruction": question, "field_output": answer, "format": "{instruction}"}
    return place | {"type": kind | {"no_input_format": "{instruction}"}}


def write_llama_factory(task: Task) -> Written:
    """Write ``llama_factory.yaml`` and ``dataset_info.json`` next to ``adapter/``.

    Raises:
        AletheiaError: as :func:`~aletheia.runs.exports.bridge.write_bridge`.
    """
    write_bridge(task)
    recipe = Recipe.of(task)
    names = [f"{ROWS}{at}" for at in range(1, len(recipe.data_files) + 1)]
    settings: dict[str, Any] = {
        "model_name_or_path": recipe.base,
        "adapter_name_or_path": recipe.adapter,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "dataset_dir": str(task.out),
        "dataset": ",".join(names),
        "cutoff_len": recipe.max_length,
        "per_device_train_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.accumulation,
        "num_train_epochs": recipe.epochs,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": "cosine",
        "seed": recipe.seed,
        "output_dir": recipe.out,
    }
    if recipe.quantization in ("nf4", "int8"):
        settings |= {"quantization_method": "bnb", "quantization_bit": 4 if recipe.quantization == "nf4" else 8}
    _write_yaml(task, "llama_factory.yaml", settings)
    info = {
        name: {"file_name": file} | _llama_factory_rows(recipe.columns)
        for name, file in zip(names, recipe.data_files, strict=True)
    }
    write_text(task.folder / "dataset_info.json", json.dumps(info, indent=2) + "\n")
    return Written(shell("llamafactory-cli", "train", task.out / "llama_factory.yaml"), notes_on(task))


def _llama_factory_rows(columns: tuple[str, str] | None) -> dict[str, Any]:
    if columns is not None:
        return {"formatting": "alpaca", "columns": {"prompt": columns[0], "response": columns[1]}}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    return {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags | {"system_tag": "system"}}


def write_trl(task: Task) -> Written:
    """Write ``train_trl.py`` next to ``adapter/``.

    Raises:
        AletheiaError: as :func:`~aletheia.runs.exports.bridge.write_bridge`.
    """
    write_bridge(task)
    recipe = Recipe.of(task)
    packed = {"nf4": 'load_in_4bit=True, bnb_4bit_quant_type="nf4"', "int8": "load_in_8bit=True"}
    quantized = packed.get(recipe.quantization or "")
    how = f", quantization_config=BitsAndBytesConfig({quantized})" if quantized else ""
    names = "AutoModelForCausalLM, AutoTokenizer" + (", BitsAndBytesConfig" if quantized else "")
    head = f'''"""Train the adapter in adapter/ further with TRL; every module keeps its rank and alpha."""

from datasets import load_dataset
from peft import PeftModel
from transformers import {names}
from trl import SFTConfig, SFTTrainer

model = AutoModelForCausalLM.from_pretrained({_text(recipe.base)}, dtype="auto"{how})
model = PeftModel.from_pretrained(model, {_text(recipe.adapter)}, is_trainable=True)
tokenizer = AutoTokenizer.from_pretrained({_text(recipe.tokenizer)})
'''
    write_text(task.folder / "train_trl.py", head + _sft(recipe))
    return Written(shell("python", task.out / "train_trl.py"), notes_on(task))


def write_unsloth(task: Task) -> Written:
    """Write ``train_unsloth.py`` next to ``adapter/``.

    Raises:
        AletheiaError: as :func:`~aletheia.runs.exports.bridge.write_bridge`.
    """
    write_bridge(task)
    recipe = Recipe.of(task)
    head = f'''"""Train the adapter in adapter/ further with Unsloth; every module keeps its rank and alpha.

FastLanguageModel.get_peft_model knows one rank for all modules, so the adapter is loaded instead.
"""

from unsloth import FastLanguageModel  # before transformers and TRL

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

model, tokenizer = FastLanguageModel.from_pretrained(
    {_text(recipe.adapter)},
    max_seq_length={recipe.max_length},
    load_in_4bit={recipe.quantization == "nf4"},
    load_in_8bit={recipe.quantization == "int8"},
)
'''
    write_text(task.folder / "train_unsloth.py", head + _sft(recipe))
    return Written(shell("python", task.out / "train_unsloth.py"), notes_on(task))


def _sft(recipe: Recipe) -> str:
    """The part that both scripts share: rows, settings and the trainer."""
    kind = next((kind for kind in ("csv", "parquet") if f".{kind}" in recipe.data_files[0]), "json")
    mapped = ""
    if recipe.columns is not None:
        question, answer = recipe.columns
        mapped = f"""rows = rows.map(
    lambda row: {{
        "prompt": [{{"role": "user", "content": row[{_text(question)}]}}],
        "completion": [{{"role": "assistant", "content": row[{_text(answer)}]}}],
    }},
    remove_columns=rows.column_names,
)
"""
    return f"""
rows = load_dataset({_text(kind)}, data_files={_text(recipe.data_files)}, split="train")
{mapped}
settings = SFTConfig(
    output_dir={_text(recipe.out)},
    max_length={recipe.max_length},
    per_device_train_batch_size={recipe.batch_size},
    gradient_accumulation_steps={recipe.accumulation},
    num_train_epochs={recipe.epochs},
    learning_rate={recipe.learning_rate},
    seed={recipe.seed},
)
trainer = SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
trainer.train()
trainer.save_model()
"""


def _write_yaml(task: Task, name: str, settings: dict[str, Any]) -> None:
    write_text(task.folder / name, _HEAD + yaml.safe_dump(settings, sort_keys=False, width=10_000))


def _text(value: Any) -> str:
    """A string, or a list of strings, as a Python literal."""
    return json.dumps(value, ensure_ascii=False)
