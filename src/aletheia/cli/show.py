"""``aletheia show``: scores, a plan, a finished run or an adapter folder in the terminal."""

from pathlib import Path
from typing import Annotated

import typer

from aletheia.cli.options import JsonOption, print_json, print_rich, say

EXAMPLE = "aletheia show plan.json"


def show(
    file: Annotated[
        Path,
        typer.Argument(help="Scores, plan or metrics file, a run folder, or any PEFT adapter folder.", metavar="FILE"),
    ],
    as_json: JsonOption = False,
) -> None:
    """Show scores, a plan, a finished run or an adapter as tables and bars."""
    from aletheia.errors import ArtifactError
    from aletheia.files import artifact_format, is_sealed
    from aletheia.planning.plan import Plan
    from aletheia.probing.scores import Scores
    from aletheia.reporting.terminal import render
    from aletheia.runs.adapter_folder import AdapterFolder
    from aletheia.runs.schema import Metrics, Run

    artifact: Scores | Plan | Run | AdapterFolder
    found = None if file.is_dir() else artifact_format(file)
    if file.is_dir():
        from aletheia.runs.read_adapter import read_run  # loads PEFT

        artifact = read_run(file)
    elif found == Metrics.FORMAT:
        artifact = Run.read(file.parent)
    elif found == Plan.FORMAT:
        artifact = Plan.read(file)
        if not is_sealed(file):
            say(f"note: {file} has no sha256, so it is taken as edited by hand")
    elif found == Scores.FORMAT or not file.exists():
        artifact = Scores.read(file)  # a missing file is reported by the reader
    else:
        raise ArtifactError(
            f"{file} is none of ours; expected scores, a plan, metrics, a run folder or an adapter folder"
        )
    for note in artifact.notes if isinstance(artifact, Run) else ():
        say(f"note: {note}")
    if as_json:
        shown = artifact.metrics if isinstance(artifact, Run) else artifact
        print_json(shown.model_dump(mode="json"))
    else:
        print_rich(render(artifact))
