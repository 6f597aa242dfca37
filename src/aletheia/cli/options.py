"""Arguments and options that several commands share, and what they do with their output."""

import json
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aletheia.cli.wording import translate

if TYPE_CHECKING:
    pass

ModelArgument = Annotated[str, typer.Argument(help="Hub id, local folder or .gguf file.", metavar="MODEL")]
DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        help="Rows to learn from: .jsonl, .json, .csv or .parquet, or a hub data set name[:config[:split]].",
        metavar="DATA",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of everything that is drawn.", min=0, max=2**32 - 1)]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="auto, bfloat16, float16 or float32; auto takes what the device is fast in.")
]
QuantizeOption = Annotated[
    str | None, typer.Option("--quantize", help="Quantize the base while loading, for QLoRA: nf4 or int8.")
]
AttentionOption = Annotated[
    str | None,
    typer.Option("--attention", help="eager, sdpa, flash_attention_2 (transformers chooses by default)."),
]
MaxLengthOption = Annotated[
    int, typer.Option("--max-length", help="Tokens per row; longer rows are cut on the right.", min=2)
]
SkipEmptiedOption = Annotated[
    bool,
    typer.Option("--skip-emptied", help="Skip rows whose completion --max-length cuts off, instead of stopping."),
]

StreamOption = Annotated[
    bool | None,
    typer.Option(
        "--stream/--no-stream",
        help="Read the weights layer by layer (by default where they take over half the memory).",
    ),
]
MaxMemoryOption = Annotated[
    str | None, typer.Option("--max-memory", help="Memory that may be used, such as 6GB (by default what is free).")
]


def parse_memory(value: str | None) -> int | None:
    """Bytes of a ``--max-memory`` such as 6GB, 500MiB or 3000000000.

    Raises:
        ModelError: it is no amount of memory.
    """
    from pydantic import ByteSize, TypeAdapter, ValidationError

    from aletheia.errors import ModelError

    if value is None:
        return None
    try:
        return int(TypeAdapter(ByteSize).validate_python(value))
    except ValidationError as error:
        raise ModelError(f"--max-memory is {value!r}; expected an amount such as 6GB or 500MiB") from error


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Record the wall-clock seconds of a phase."""
    started = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - started


def print_json(value: Any) -> None:
    """Machine-readable result on stdout."""
    typer.echo(json.dumps(value, indent=1))


def print_rich(*renderables: Any) -> None:
    """Tables and text for people on stdout."""
    from rich.console import Console

    console = Console(highlight=False)
    for renderable in renderables:
        console.print(renderable)


def say(message: str) -> None:
    """One line of progress on stderr, its names in backticks as options, so that stdout stays clean for results."""
    typer.echo(translate(message), err=True)


def quiet_libraries() -> None:
    """Keep the libraries' own bars and warnings off the terminal; errors still raise."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for noisy in ("datasets", "bitsandbytes"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch|transformers|peft|accelerate")
