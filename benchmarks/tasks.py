"""Three tasks of public data, as the benchmarks of defaults and scores train on them: rows of up to 256 tokens."""

import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import aletheia
from aletheia.data.examples import NO_LOSS, Example, Examples

DATA = Path("../shared/data")
LONGEST = 256  # tokens of a row
Batcher = Callable[[list[Example]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Task:
    """Rows to learn from and held-out rows, the same in every run."""

    name: str
    train: Examples
    held_out: Examples


def rows_of(name: str, data: Path) -> tuple[list[dict], list[dict], int]:
    """Rows to learn from, held-out rows, and how many of the first are taken."""

    def read(*files: str) -> list[dict]:
        return [json.loads(line) for file in files for line in (data / file).read_text().splitlines()]

    if name == "gsm8k":
        return read("gsm8k/train.jsonl")[:1200], read("gsm8k/test.jsonl")[:260], 640
    if name == "strategyqa":
        rows, cut, count = read("instruct/cot_strategyqa.jsonl"), 800, 640
    else:
        files = ("instruct/oasst.jsonl", "instruct/self_instruct_seed.jsonl", "instruct/mbpp_train.jsonl")
        rows, cut, count = read(*files), 900, 640
    random.Random(0).shuffle(rows)
    return rows[:cut], rows[cut:], count


def task(name: str, tokenizer: Any, held_out_rows: int = 192, data: Path = DATA) -> Task:
    """``gsm8k``, ``strategyqa`` (a rationale, then yes or no) or ``mix`` (dialogue, instructions, programs)."""
    train, held_out, count = rows_of(name, data)
    with tempfile.TemporaryDirectory() as folder:

        def short(rows: list[dict]) -> Examples:
            path = Path(folder) / "rows.jsonl"
            path.write_text("\n".join(map(json.dumps, rows)))
            every = aletheia.load_data(str(path), tokenizer, skip_unusable=True)
            return every.subset([at for at, row in enumerate(every.examples) if len(row) <= LONGEST])

        learned, held = short(train), short(held_out)
    return Task(
        name, learned.subset(range(min(count, len(learned)))), held.subset(range(min(held_out_rows, len(held))))
    )


@torch.no_grad()
def nats_per_row(model: torch.nn.Module, rows: Examples, batch: Batcher) -> list[float]:
    """Summed loss of each row; ``model`` is inside ``fast_steps``, ``batch`` makes its inputs."""
    model.eval()
    found: dict[int, float] = {}
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    for start in range(0, len(order), 8):
        chosen = order[start : start + 8]
        inputs = batch([rows[row] for row in chosen])
        logits = model(**inputs, use_cache=False).logits[0, :-1].float()  # labelled positions alone, row after row
        targets = inputs["labels"][:, 1:]
        losses = torch.nn.functional.cross_entropy(logits, targets[targets != NO_LOSS], reduction="none")
        parts = losses.split((targets != NO_LOSS).sum(dim=1).tolist())
        found |= {row: round(part.double().sum().item(), 2) for row, part in zip(chosen, parts, strict=True)}
    model.train()
    return [found[row] for row in range(len(rows))]
