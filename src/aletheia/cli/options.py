"""Arguments and options that several commands share, and the output of commands."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aletheia.cli.wording import translate
from aletheia.names import printable
from aletheia.progress import Stderr
from aletheia.settings import OUTPUT

if TYPE_CHECKING:
    from aletheia.runs.schema import Run

MODEL = "Hub id such as Qwen/Qwen2.5-0.5B-Instruct, model folder or .gguf file."
MODEL_OR_ADAPTER = (
    "Hub id such as Qwen/Qwen2.5-0.5B-Instruct, model folder or .gguf file; or an adapter folder to train further."
)
ModelArgument = Annotated[str, typer.Argument(help=MODEL, metavar="MODEL")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on stdout, for programs.", rich_help_panel=OUTPUT)
]
SeedOption = Annotated[
    int,
    typer.Option(
        "--seed",
        help="Random seed; the same seed gives the same result.",
        metavar="INT",
        min=0,
        max=2**32 - 1,
    ),
]


def parse_memory(value: str | None) -> int | None:
    """Bytes of a ``--max-memory`` such as 6GB, 500MiB or 3000000000.

    Raises:
        ModelError: ``value`` is not an amount of memory.
    """
    from pydantic import ByteSize, TypeAdapter, ValidationError

    from aletheia.errors import ModelError

    if value is None:
        return None
    try:
        return int(TypeAdapter(ByteSize).validate_python(value))
    except ValidationError as error:
        raise ModelError(f"--max-memory is {value!r}; expected an amount such as 6GB or 500MiB") from error


NO_GAIN = 3  # exit code of a run that learned nothing or made the model worse


def conclude(runs: "Sequence[Run]", allow_worse: bool = False, aloud: bool = True) -> None:
    """Print a last line and set the exit code if a run learned nothing or made the model worse.

    Raises:
        typer.Exit: with code 3: a run learned nothing, or its held-out loss rose and that is not allowed.
    """
    allowed = [run.metrics.verdict == "worse" and allow_worse for run in runs]
    for run, is_allowed in zip(runs, allowed, strict=True):
        if run.warning and aloud:
            say(f"{'note' if is_allowed else 'warning'}: {run.warning}")
    if any(run.warning and not is_allowed for run, is_allowed in zip(runs, allowed, strict=True)):
        raise typer.Exit(NO_GAIN)


def print_json(value: Any) -> None:
    """Print a machine-readable result on stdout."""
    typer.echo(json.dumps(value, indent=1))


def print_rich(*renderables: Any) -> None:
    """Print tables and text for people on stdout."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)  # names are not markup
    for renderable in renderables:
        console.print(renderable)


def _as_options(line: str) -> str:
    """Turn names in backticks into options; an indented line quotes data and stays as it is."""
    return printable(line if line.startswith("    ") else translate(line))


say = Stderr(_as_options)
