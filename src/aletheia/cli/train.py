"""``aletheia train``: the whole job. Load, probe, plan, adapt, train, report."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aletheia.anatomy.settings import LoadSettings
from aletheia.cli.config import build, merge, read_config
from aletheia.cli.help import OR_IN_FILE
from aletheia.cli.options import MODEL_OR_ADAPTER, JsonOption, conclude, print_json, print_rich, say
from aletheia.cli.settings_options import Given, from_settings
from aletheia.cli.wording import translate
from aletheia.data.settings import DataSettings
from aletheia.planning.plan import PlanSettings
from aletheia.settings import GIVEN, PLAN, SAVING
from aletheia.training.settings import TrainSettings

if TYPE_CHECKING:
    from aletheia.planning.outlook import DryRun

EXAMPLE = "aletheia train Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --out run"


@from_settings(LoadSettings, DataSettings, PlanSettings, TrainSettings, leave_out={"model"})
def train(
    out: Annotated[
        Path,
        typer.Option("--out", help="Folder to write the run to: adapter, plan, metrics, report.", metavar="RUN"),
    ],
    model: Annotated[
        str | None,
        typer.Argument(help=f"{MODEL_OR_ADAPTER} {OR_IN_FILE}", metavar="MODEL", show_default=False),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="YAML file of settings in the sections model, data, plan and training. Options on the command line "
            "override it. A finished run has such a file, config.yaml. The section training also takes every field of "
            "transformers' TrainingArguments.",
            metavar="FILE",
            rich_help_panel=GIVEN,
        ),
    ] = None,
    plan_file: Annotated[
        Path | None,
        typer.Option(
            "--plan",
            help="Plan file to follow, from 'aletheia plan'. (default: probe the model and make a plan)",
            metavar="FILE",
            rich_help_panel=PLAN,
        ),
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            "--resume",
            help="What to do with an interrupted run in RUN: auto resumes it, never starts from the beginning, and the "
            "folder of a checkpoint resumes from there.",
            metavar="{auto,never}|PATH",
            rich_help_panel=SAVING,
        ),
    ] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a finished run in RUN.", rich_help_panel=SAVING)
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Train and write nothing: load the model, plan, time a few steps, and show the plan, a row, and the "
            "predicted time, memory and disk space.",
            rich_help_panel=GIVEN,
        ),
    ] = False,
    as_json: JsonOption = False,
    *,
    given: Given,
) -> None:
    """Fine-tune a model: find the layers that matter, choose what to adapt, and train it.

    If the run is stopped or killed, the same command resumes it from the last checkpoint. The exit code is 3 if nothing
    was learned or the held-out loss rose; the adapter is kept.
    """
    from aletheia.job.dry_run import dry_run as look_ahead
    from aletheia.job.fine_tune import fine_tune
    from aletheia.reporting.terminal import render
    from aletheia.training.processes import Launch

    if model is not None:
        given["model"]["model"] = model
    if plan_file is not None:
        given["plan"]["file"] = plan_file
    sections = read_config(config) if config is not None else {}
    made = build(PlanSettings, sections, given)
    plan: PlanSettings | dict[str, Any] = made
    if (file := merge(sections, given)["plan"].get("file")) is not None:
        plan = {"file": file} | made.given()
    training = build(TrainSettings, sections, given)
    loading, data = build(LoadSettings, sections, given), build(DataSettings, sections, given)
    if dry_run:
        found = look_ahead(loading, data, out, plan, training, overwrite, resume, say)
        if Launch.here().is_first:
            _show_outlook(found, as_json)
        return
    run = fine_tune(loading, data, out, plan, training, overwrite, resume, say)
    if not Launch.here().is_first:
        conclude([run], training.allow_worse, aloud=False)
        return
    if as_json:
        print_json(run.metrics.model_dump(mode="json"))
    else:
        print_rich(render(run))
    say(f"wrote {out} (adapter, plan.json, metrics.json, config.yaml, report.html)")
    conclude([run], training.allow_worse)


def _show_outlook(found: "DryRun", as_json: bool) -> None:
    """Print what a run would do."""
    from dataclasses import replace

    from aletheia.reporting.outlook import dry_run_view

    found = replace(found, notes=tuple(translate(note) for note in found.notes))
    if as_json:
        print_json(found.to_dict())
    else:
        print_rich(dry_run_view(found))
        say("to train, give the same command without --dry-run")
