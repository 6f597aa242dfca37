"""``aletheia train``: the whole job. Load, probe, plan, adapt, train, report."""

from pathlib import Path
from typing import Annotated, Any

import typer

from aletheia.anatomy.settings import LoadSettings
from aletheia.cli.config import build, merge, read_config
from aletheia.cli.options import JsonOption, conclude, print_json, print_rich, say
from aletheia.cli.settings_options import Given, from_settings
from aletheia.data.settings import DataSettings
from aletheia.planning.plan import PlanSettings
from aletheia.training.settings import TrainSettings

EXAMPLE = "aletheia train Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --out run"


@from_settings(LoadSettings, DataSettings, PlanSettings, TrainSettings, leave_out={"model"})
def train(
    out: Annotated[Path, typer.Option("--out", help="Run folder to write.", metavar="RUN")],
    model: Annotated[
        str | None, typer.Argument(help="Hub id, local folder or .gguf file.", metavar="MODEL", show_default=False)
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="YAML file with the sections model, data, plan and training; options go before it. The file of a "
            "finished run is its config.yaml. training takes any field of transformers' TrainingArguments, too.",
            metavar="FILE",
        ),
    ] = None,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="Plan to follow; without one, probe and plan first.", metavar="FILE")
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            "--resume",
            help="auto goes on with an interrupted run in RUN, never begins anew, a folder is the checkpoint to go on "
            "from.",
            metavar="{auto,never}|PATH",
        ),
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished run in RUN.")] = False,
    as_json: JsonOption = False,
    *,
    given: Given,
) -> None:
    """Fine-tune the layers that matter: probe, plan, adapt and train in one command, or follow a plan.

    Stopped by a signal, or killed, the same command goes on from the last checkpoint. Exit code 3 if nothing was
    learned or the held-out loss rose; the adapter is kept.
    """
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
    run = fine_tune(
        build(LoadSettings, sections, given),
        build(DataSettings, sections, given),
        out,
        plan,
        training,
        overwrite,
        resume,
        say,
    )
    if not Launch.here().is_first:
        conclude([run], training.allow_worse, aloud=False)
        return
    if as_json:
        print_json(run.metrics.model_dump(mode="json"))
    else:
        print_rich(render(run))
    say(f"wrote {out} (adapter, plan.json, metrics.json, config.yaml, report.html)")
    conclude([run], training.allow_worse)
