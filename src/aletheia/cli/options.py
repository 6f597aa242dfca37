"""Arguments and options that several commands share, and what they do with their output."""

import json
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from aletheia.anatomy.checkpoint import Checkpoint
    from aletheia.anatomy.load import Loaded
    from aletheia.data.examples import Examples
    from aletheia.data.rows import Rows

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


def is_streamed(model: str, dtype: str, stream: bool | None, max_memory: int | None, quantize: str | None) -> bool:
    """Whether to read the weights layer by layer: as asked, or where they would take most of the memory.

    Raises:
        ModelError: ``--stream`` with ``--quantize``, which needs the model as a whole.
    """
    from aletheia.anatomy.load import free_memory_bytes, pick, pick_device
    from aletheia.anatomy.shards import weights_bytes
    from aletheia.errors import ModelError
    from aletheia.planning.estimate import RESIDENT_SHARE

    if stream and quantize:
        raise ModelError(
            "--stream and --quantize are both given; expected a checkpoint that is quantized to stream from"
        )
    if stream is not None or quantize:
        return bool(stream)
    device = pick_device()
    needed = weights_bytes(model, pick(dtype, device))
    limit = free_memory_bytes(device) if max_memory is None else max_memory
    if needed is None or needed <= RESIDENT_SHARE * limit:
        return False
    say(f"stream {needed / 1e9:.1f} GB of weights, {limit / 1e9:.1f} GB of memory: layer by layer")
    return True


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Record the wall-clock seconds of a phase."""
    started = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - started


def encode_for(base: "Loaded | Checkpoint", rows: "Rows", max_length: int, skip_emptied: bool) -> "Examples":
    """Tokenise rows for a model: no longer than its positions, no token it has no embedding for."""
    from aletheia.data.encode import encode

    positions = getattr(base.model.config.get_text_config(), "max_position_embeddings", None) or max_length
    if positions < max_length:
        say(f"note: the model has {positions} positions; --max-length {max_length} is lowered to that")
    examples = encode(rows, base.tokenizer, min(max_length, positions), skip_emptied, base.vocab_size)
    if examples.truncated:
        say(
            f"note: {examples.truncated} of {len(examples)} rows are cut to {examples.max_length} tokens (--max-length)"
        )
    if examples.skipped:
        say(f"note: {examples.skipped} rows are left out, with no token to learn within --max-length")
    return examples


def load_for(
    model: str,
    dtype: str,
    quantize: str | None,
    attention: str | None,
    rows: "Rows",
    max_length: int,
    skip_emptied: bool,
) -> "tuple[Loaded, Examples]":
    """The model and its rows, computed in a way that stays finite where float16 does not."""
    from aletheia.anatomy.load import load
    from aletheia.probing.preflight import preflight

    base = load(model, dtype, None, quantize, attention)  # type: ignore[arg-type]
    examples = encode_for(base, rows, max_length, skip_emptied)
    base, changed = preflight(base, examples)
    if changed:
        say(f"note: {changed}")
    return base, examples


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
