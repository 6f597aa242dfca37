"""``aletheia report``: one page for one or several runs."""

from pathlib import Path
from typing import Annotated

import typer

from aletheia.cli.options import JsonOption, print_json, say

EXAMPLE = "aletheia report runs/uniform runs/plan --out report.html"


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Run folders, or adapter folders of other programs; the first is the reference.", metavar="RUN..."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Page to write.")],
    as_json: JsonOption = False,
) -> None:
    """Write one self-contained page: scores, ranks, losses and times, several runs side by side."""
    from aletheia.reporting.page import report as write_report
    from aletheia.runs.read_adapter import read_run

    written = write_report([read_run(path) for path in runs], out)
    if as_json:
        print_json({"report": str(written), "runs": [str(path) for path in runs]})
    else:
        say(f"wrote {written}")
