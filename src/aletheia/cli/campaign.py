"""``aletheia campaign``: run, watch and report experiments of models x arms x seeds."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aletheia.cli.help import Command, Group
from aletheia.cli.options import JsonOption, print_json, print_rich, say
from aletheia.cli.settings_options import Given, from_settings
from aletheia.lab.campaign.executors import ExecutorSettings

if TYPE_CHECKING:
    from aletheia.lab.campaign.coordinate import Watcher
    from aletheia.lab.campaign.grid import Job
    from aletheia.lab.campaign.store import Store

app = typer.Typer(
    help="Run and report experiments over models, ways of training and seeds.",
    no_args_is_help=True,
    rich_markup_mode=None,
    cls=Group,
)
EXAMPLES = {
    "run": "aletheia campaign run campaigns/speed.yaml --out speed",
    "status": "aletheia campaign status speed",
    "report": "aletheia campaign report speed",
    "schema": "aletheia campaign schema",
}
OutArgument = Annotated[Path, typer.Argument(help="Folder that 'aletheia campaign run' wrote to.", metavar="OUT")]


@app.command("run", epilog=f"Example:\n\n\b\n{EXAMPLES['run']}", cls=Command)
@from_settings(ExecutorSettings)
def run(
    spec: Annotated[
        Path,
        typer.Argument(help="YAML file that describes the campaign; see 'aletheia campaign schema'.", metavar="SPEC"),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", help="Folder for the results; an interrupted campaign in it resumes.", metavar="OUT"),
    ],
    data_dir: Annotated[
        Path | None,
        typer.Option(
            "--data-dir", help="Folder that data paths are relative to. (default: data_dir of SPEC)", metavar="FOLDER"
        ),
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run the rows that failed again.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the rows with estimated hours and disk space; run nothing.")
    ] = False,
    *,
    given: Given,
) -> None:
    """Run all rows of a campaign that are not done yet; after an interruption, the same command resumes.

    The exit code is 1 if rows failed; the results of the others are kept.
    """
    from aletheia.lab.campaign.checks import check_campaign, check_tools
    from aletheia.lab.campaign.coordinate import run_campaign
    from aletheia.lab.campaign.executors import make_executor
    from aletheia.lab.campaign.spec import read_campaign

    campaign = read_campaign(spec)
    data = data_dir or Path(campaign.data_dir)
    settings = ExecutorSettings(**given["executor"])
    check_campaign(campaign, data, settings)
    if dry_run:
        from aletheia.lab.campaign.forecast import forecast
        from aletheia.lab.reporting.campaign_terminal import forecast_table

        print_rich(*forecast_table(forecast(campaign, out, settings.workers or 1)))
        return
    if settings.executor == "local":  # on Ray, other machines run the benchmarks
        check_tools(campaign)
    chosen = make_executor(settings)
    with _live_table() as show:
        records = run_campaign(campaign, out, chosen, data, retry_failed, show)
    failed = [record for record in records if record.status == "failed"]
    for record in failed:
        say(f"failed {record.row.model} {record.row.arm} {record.row.seed}: {record.reason}")
    say(f"{len(records) - len(failed)} rows done, {len(failed)} failed; next: aletheia campaign report {out}")
    if failed:
        raise typer.Exit(1)


@app.command("status", epilog=f"Example:\n\n\b\n{EXAMPLES['status']}", cls=Command)
def status(out: OutArgument, as_json: JsonOption = False) -> None:
    """Show which rows are done, which failed and why, and which are pending."""
    from aletheia.lab.campaign.store import STORE_FILE, Store
    from aletheia.lab.reporting.campaign_terminal import status_table

    records = Store(out / STORE_FILE).records()
    if as_json:
        print_json(
            [
                {**vars(record.row), "status": record.status, "reason": record.reason, "result": record.result}
                for record in records
            ]
        )
    else:
        print_rich(*status_table(records, []))


@app.command("report", epilog=f"Example:\n\n\b\n{EXAMPLES['report']}", cls=Command)
def report(
    out: OutArgument,
    to: Annotated[
        Path | None,
        typer.Option("--to", help="Folder for report.html, report.md and report.csv. (default: OUT)", metavar="FOLDER"),
    ] = None,
) -> None:
    """Write the report of a campaign: HTML, Markdown and CSV. The same results give the same bytes."""
    from aletheia.lab.campaign.store import STORE_FILE, Store
    from aletheia.lab.reporting.campaign_page import write_report

    for path in write_report(Store(out / STORE_FILE), to or out):
        say(f"wrote {path}")


@app.command("schema", epilog=f"Example:\n\n\b\n{EXAMPLES['schema']}", cls=Command)
def schema() -> None:
    """Print the JSON schema of campaign files."""
    from aletheia.lab.campaign.spec import json_schema

    print_json(json_schema())


@contextmanager
def _live_table() -> "Iterator[Watcher]":
    """Show rows as they finish: a live table, or a line per row if stderr is not a terminal."""
    from rich.console import Console, Group
    from rich.live import Live

    from aletheia.lab.reporting.campaign_terminal import status_table

    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            yield lambda store, running: live.update(Group(*status_table(store.records(), running)), refresh=True)
        return
    seen: set[object] = set()

    def tell(store: "Store", running: "Sequence[Job]") -> None:
        for record in store.records():
            if record.status != "pending" and record.row not in seen:
                seen.add(record.row)
                say(f"{record.status:6} {record.row.model} {record.row.arm} {record.row.seed}")

    yield tell
