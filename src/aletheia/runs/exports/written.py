"""What an export is made of: what goes in, and what the person is told."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from aletheia.runs.exports.origin import Origin


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
