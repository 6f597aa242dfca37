"""Steps of Unsloth over the model and rows of benchmarks/gpu.py, in a process of its own.

    python benchmarks/gpu_unsloth.py FOLDER

Unsloth changes transformers, PEFT and TRL as it is imported, and asks for other versions of them than other arms need.
``FOLDER`` holds the model, ``request.json`` and ``rows.json``; ``ran.json`` is written there.
"""

import json
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from unsloth import FastLanguageModel  # isort: skip  # it comes before transformers, PEFT and TRL

import torch
import trl
from datasets import Dataset
from gpu_clock import trained

PACKAGES = ("unsloth", "transformers", "trl", "peft", "xformers", "flash-attn")


def main() -> None:
    folder = Path(sys.argv[1])
    request = json.loads((folder / "request.json").read_text())
    recomputed = request["recomputed"]
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder / "model"), max_seq_length=request["trainer"]["max_length"], dtype=torch.bfloat16, load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(
        model, **request["adapters"], lora_dropout=0, bias="none", use_gradient_checkpointing=recomputed
    )
    rows = Dataset.from_list(json.loads((folder / "rows.json").read_text()))
    config = trl.SFTConfig(**request["trainer"], gradient_checkpointing=bool(recomputed))
    trainer = trl.SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    ran = trained(trainer, request["device"])
    notes = [", ".join(map(named, PACKAGES)), f"{learning:,} trainable parameters"]
    if attention := sys.modules.get("unsloth.utils.attention_dispatch"):  # not loaded on a processor
        notes.append(f"attention of packed rows by {attention.select_attention_backend(use_varlen=True)}")
    (folder / "ran.json").write_text(json.dumps({"ran": asdict(ran), "notes": notes}))


def named(package: str) -> str:
    """A package and its version."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


if __name__ == "__main__":
    main()
