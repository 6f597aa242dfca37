"""``aletheia push``: upload a finished run to the hub."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from aletheia.cli.options import JsonOption, print_json, say

EXAMPLE = "aletheia push run me/my-adapter --dry-run"


def push(
    run: Annotated[Path, typer.Argument(help="Run folder written by 'aletheia train'.", metavar="RUN")],
    repo: Annotated[
        str, typer.Argument(help="Repository on the hub: owner/name, or a name for one of yours.", metavar="REPO")
    ],
    private: Annotated[
        bool,
        typer.Option("--private/--public", help="Whether a new repository is private or public. (default: private)"),
    ] = True,
    revision: Annotated[
        str | None,
        typer.Option(
            "--revision", help="Branch to write to, created if it is missing. (default: main)", metavar="BRANCH"
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Hub id of the base model, if the run names a local path.", metavar="HUB_ID"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be uploaded, and upload nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Upload a run to the hub, with a model card. Checkpoints and data stay on this machine."""
    from aletheia.job.push import push as pushed
    from aletheia.reporting.format import human_bytes

    done = pushed(run, repo, private, revision, base, dry_run, say)
    if as_json:
        print_json(asdict(done))
        return
    if dry_run:
        for name, size in sorted(done.files.items()):
            typer.echo(f"{human_bytes(size):>10}  {name}")
        typer.echo("")
        for name, value in done.metadata.items():
            typer.echo(f"{name}: {', '.join(value) if isinstance(value, list) else value}")
    total = human_bytes(sum(done.files.values()))
    where = f"{done.repo} would get" if dry_run else f"{done.address} has"
    say(f"{where} {len(done.files)} files, {total}")
