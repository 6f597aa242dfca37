"""``aletheia export``: a run for the programs that serve it or train it on."""

from pathlib import Path
from typing import Annotated

import typer

from aletheia.cli.options import JsonOption, print_json, say

EXAMPLE = "aletheia export run --to vllm"


def export(
    source: Annotated[
        Path,
        typer.Argument(help="Run folder or PEFT adapter folder; a plan file for the trainers.", metavar="RUN"),
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="merged, vllm, gguf, ollama or mlx to serve it; axolotl, llama-factory, unsloth or trl to train it "
            "on.",
            metavar="TARGET",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write (RUN-TARGET by default).", show_default=False)
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Base model to use instead of the one that RUN names.", metavar="MODEL"),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option("--dtype", help="Of merged weights: auto (as in the base), bfloat16, float16 or float32."),
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export in --out.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the base model.")
    ] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read weights from .bin and other pickle files.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a run in the form that another program serves or trains on."""
    from aletheia.runs.exports.export import export as write_export

    done = write_export(source, to, out, base, dtype, overwrite, trust_remote_code, allow_pickle)  # type: ignore[arg-type]  # checked there
    for note in done.notes:
        say(f"note: {note}")
    if as_json:
        told = {"export": str(done.path), "to": done.to, "files": done.files, "command": done.command}
        print_json(told | {"notes": done.notes})
        return
    say(f"wrote {done.path}: {', '.join(done.files)}")
    typer.echo(done.command)
