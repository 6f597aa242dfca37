"""Arguments and options that several commands share, and what they do with their output."""

import json
import logging
import warnings
from typing import Annotated, Any

import typer

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
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of everything that is drawn.")]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="auto, bfloat16, float16 or float32; auto takes what the device is fast in.")
]
MaxLengthOption = Annotated[int, typer.Option("--max-length", help="Tokens per row; longer rows are cut on the right.")]
SkipEmptiedOption = Annotated[
    bool,
    typer.Option("--skip-emptied", help="Skip rows whose completion --max-length cuts off, instead of stopping."),
]


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
    """One line of progress on stderr, so that stdout stays clean for results."""
    typer.echo(message, err=True)


def quiet_libraries() -> None:
    """Keep the libraries' own bars and warnings off the terminal; errors still raise."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch|transformers|peft|accelerate")
