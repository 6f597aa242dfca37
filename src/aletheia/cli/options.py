"""Arguments and options that several commands share, and what they do with their output."""

import json
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from aletheia.cli.wording import translate
from aletheia.names import printable

ModelArgument = Annotated[str, typer.Argument(help="Hub id, local folder or .gguf file.", metavar="MODEL")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of everything that is drawn.", min=0, max=2**32 - 1)]


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

    console = Console(highlight=False, markup=False, emoji=False)  # names are no markup
    for renderable in renderables:
        console.print(renderable)


def say(message: str) -> None:
    """One line of progress on stderr, its names in backticks as options, so that stdout stays clean for results."""
    typer.echo(printable(translate(message)), err=True)


def quiet_libraries() -> None:
    """Keep the libraries' own bars and warnings off the terminal; errors still raise."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for noisy in ("datasets", "bitsandbytes"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch|transformers|peft|accelerate")
