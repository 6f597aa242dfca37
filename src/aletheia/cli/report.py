"""``aletheia report``: write a page about one or several runs."""

from pathlib import Path
from typing import Annotated

import typer

from aletheia.cli.options import JsonOption, print_json, say

EXAMPLE = "aletheia report runs/uniform runs/plan --out report.html"


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Run folders to show, or adapter folders of other programs; the first is what the others are compared "
            "with.",
            metavar="RUN...",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="HTML page to write, such as report.html.", metavar="FILE")],
    as_json: JsonOption = False,
) -> None:
    """Write a web page about one run, or several side by side: losses, layers, ranks and times."""
    from aletheia.reporting.page import report as write_report
    from aletheia.runs.read_adapter import read_run

    written = write_report([read_run(path) for path in runs], out)
    if as_json:
        print_json({"report": str(written), "runs": [str(path) for path in runs]})
    else:
        say(f"wrote {written}")
