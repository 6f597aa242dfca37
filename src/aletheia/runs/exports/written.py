"""The input of an export's writer, and its result."""

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from aletheia.runs.exports.origin import Origin

TEMPLATE_FILE = "chat_template.jinja"  # as tokenizers of transformers save it
_TOKENIZER = (TEMPLATE_FILE, "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")


@dataclass(frozen=True)
class Task:
    """One export. Files are written to ``folder``, which is moved to ``out`` when it is complete."""

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
    """The result of an export: the ``command`` that uses it, and notes for the user, one line each."""

    command: str
    notes: tuple[str, ...] = ()


def copy_tokenizer(task: Task, folder: Path) -> None:
    """Copy the tokenizer files in the adapter's folder, chat template included, to ``folder``."""
    for pattern in _TOKENIZER:
        for file in task.source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def copy_template(task: Task) -> Path | None:
    """Copy the adapter's chat template into the export; returns its final path, or None if there is no template."""
    if not (task.source / TEMPLATE_FILE).is_file():
        return None
    shutil.copyfile(task.source / TEMPLATE_FILE, task.folder / TEMPLATE_FILE)
    return task.out / TEMPLATE_FILE


def shell(*words: object) -> str:
    """A command line of these words; ``...`` stands for what the user fills in."""
    return " ".join('"..."' if word == "..." else shlex.quote(str(word)) for word in words)


def other_weights(origin: Origin) -> tuple[str, ...]:
    """A note for an adapter that was trained on quantized weights and may be used with others."""
    if origin.quantization is None:
        return ()
    return (
        f"the adapter was trained on {origin.quantization} weights, and on others its answers differ slightly; `to` "
        "merged keeps the quantized values",
    )
