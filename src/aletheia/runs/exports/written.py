"""What an export is made of: what goes in, and what the person is told."""

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from aletheia.runs.exports.origin import Origin

TEMPLATE_FILE = "chat_template.jinja"  # as tokenizers of transformers save it
_TOKENIZER = (TEMPLATE_FILE, "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")


@dataclass(frozen=True)
class Task:
    """One export. Files are written to ``folder``, which is moved to ``out`` when all are there."""

    origin: Origin
    folder: Path
    out: Path
    dtype: str = "auto"
    trust_remote_code: bool = False
    allow_pickle: bool = False

    @property
    def source(self) -> Path:
        """The folder of the adapter."""
        return self.origin.path


@dataclass(frozen=True)
class Written:
    """What was written: the ``command`` that uses it, and a line for each thing to know."""

    command: str
    notes: tuple[str, ...] = ()


def copy_tokenizer(task: Task, folder: Path) -> None:
    """Put what the adapter's folder holds of its tokenizer, chat template included, into a folder."""
    for pattern in _TOKENIZER:
        for file in task.source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def copy_template(task: Task) -> Path | None:
    """Put the adapter's chat template into the export, where there is one; its place when the export is finished."""
    if not (task.source / TEMPLATE_FILE).is_file():
        return None
    shutil.copyfile(task.source / TEMPLATE_FILE, task.folder / TEMPLATE_FILE)
    return task.out / TEMPLATE_FILE


def shell(*words: object) -> str:
    """A command line of these words; ``...`` stands for what the person fills in."""
    return " ".join('"..."' if word == "..." else shlex.quote(str(word)) for word in words)


def other_weights(origin: Origin) -> tuple[str, ...]:
    """A note where the adapter learned on quantized weights, and may be put on others."""
    if origin.quantization is None:
        return ()
    return (
        f"the adapter was trained on {origin.quantization} weights; on others its answers differ slightly; `to` merged "
        "keeps the quantized values",
    )
