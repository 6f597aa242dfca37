"""``aletheia show``: show scores, a plan, a finished run or an adapter folder in the terminal."""

from pathlib import Path
from typing import Annotated

import typer

from aletheia.cli.options import JsonOption, print_json, print_rich, say
from aletheia.kinds import Kind, kind_of, mistaken, near

EXAMPLE = "aletheia show plan.json"
SHOWN: tuple[Kind, ...] = ("run", "scores", "plan", "metrics")
EXPECTED = "a scores file, a plan file, a run folder or an adapter folder"


def show(
    file: Annotated[
        Path,
        typer.Argument(help="Scores file, plan file, run folder, or any PEFT adapter folder.", metavar="FILE"),
    ],
    as_json: JsonOption = False,
) -> None:
    """Show scores, a plan, a finished run or an adapter in the terminal."""
    from aletheia.errors import ArtifactError
    from aletheia.files import is_sealed
    from aletheia.planning.plan import Plan
    from aletheia.probing.scores import Scores
    from aletheia.reporting.terminal import render
    from aletheia.runs.adapter_folder import AdapterFolder
    from aletheia.runs.schema import Run

    artifact: Scores | Plan | Run | AdapterFolder
    kind = kind_of(file)
    if not file.exists():
        raise ArtifactError(f"there is no {file}; expected {EXPECTED}{near(file, *SHOWN)}")
    if kind == "run" or file.is_dir():
        from aletheia.runs.read_adapter import read_run  # loads PEFT

        artifact = read_run(file)
    elif kind == "metrics":
        artifact = Run.read(file.parent)
    elif kind == "plan":
        artifact = Plan.read(file)
        if not is_sealed(file):
            say(f"note: {file} has no sha256 checksum, so it is treated as edited by hand")
    elif kind == "scores":
        artifact = Scores.read(file)
    else:
        raise ArtifactError(
            mistaken(file, EXPECTED, *SHOWN) or f"{file} is not a file of Aletheia; expected {EXPECTED}"
        )
    for note in artifact.notes if isinstance(artifact, Run) else ():
        say(f"note: {note}")
    if as_json:
        shown = artifact.metrics if isinstance(artifact, Run) else artifact
        print_json(shown.model_dump(mode="json"))
    else:
        print_rich(render(artifact))
