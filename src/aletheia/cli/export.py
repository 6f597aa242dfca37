"""``aletheia export``: convert a run for programs that serve it or train it further."""

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
            help="Program or form to write for. The first five serve the result, the others train it further.",
            metavar="{merged,vllm,gguf,ollama,mlx,axolotl,llama-factory,unsloth,trl}",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder to write. (default: RUN-TARGET, such as run-vllm)", metavar="FOLDER"),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="Base model: hub id, model folder or .gguf file. (default: the one that RUN names)",
            metavar="MODEL",
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            help="Number format of merged weights; auto keeps that of the base.",
            metavar="{auto,bfloat16,float16,float32}",
        ),
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export in --out.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the base model.")
    ] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read weights from pickle files (.bin, .pt), too.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a run for another program, which serves it or trains it further."""
    from aletheia.runs.exports.export import export as write_export

    done = write_export(source, to, out, base, dtype, overwrite, trust_remote_code, allow_pickle)  # type: ignore[arg-type]  # checked there
    for note in done.notes:
        say(f"note: {note}")
    if as_json:
        result = {"export": str(done.path), "to": done.to, "files": done.files, "command": done.command}
        print_json(result | {"notes": done.notes})
        return
    say(f"wrote {done.path}: {', '.join(done.files)}")
    typer.echo(done.command)
