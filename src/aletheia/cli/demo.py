"""``aletheia demo``: the whole job on a small real model and a real task, compared with uniform LoRA."""

from pathlib import Path
from textwrap import indent
from typing import Annotated

import typer

from aletheia.cli.options import (
    JsonOption,
    SeedOption,
    conclude,
    print_json,
    print_rich,
    say,
)
from aletheia.settings import MOST_STEPS

EXAMPLE = "aletheia demo --out demo-run"

STEPS = 36  # as in aletheia.job.demo, which needs torch
ABOUT = (
    "Both runs take the same steps on the same rows and compute them in the same way; only the plan differs. 'uniform' "
    "is LoRA on every layer to the end. One short run of each shows that a plan works, not how much it gains. For "
    "results over many runs, see docs/results."
)


def demo(
    out: Annotated[
        Path, typer.Option("--out", help="Folder to write data, runs and report to.", metavar="FOLDER")
    ] = Path("demo-run"),
    steps: Annotated[
        int, typer.Option("--steps", help="Optimizer steps of each run.", metavar="INT", min=1, max=MOST_STEPS)
    ] = STEPS,
    seed: SeedOption = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo in --out.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune a small model twice, with a plan for speed and with uniform LoRA, and compare the two."""
    from aletheia.files import check_writable
    from aletheia.runs.folder import check_out

    check_writable(out)  # before torch is loaded, which takes a while
    for arm in ("uniform", "plan"):
        check_out(out / arm, overwrite)
    say("start  loading torch and transformers takes some seconds")
    from aletheia.job.demo import demo as run_demo
    from aletheia.reporting.terminal import comparison_table

    done = run_demo(out, steps, seed, overwrite, say)
    if as_json:
        metrics = {run.name: run.metrics.model_dump(mode="json") for run in done.runs}
        sample = {"prompt": done.prompt, "before": done.before, "after": done.after}
        print_json({"runs": metrics, "sample": sample, "report": str(done.page)})
    else:
        print_rich(comparison_table(done.runs), "", ABOUT, "")
        answers = (("asked", done.prompt), ("answer before", done.before), ("answer after the plan's run", done.after))
        for label, text in answers:
            typer.echo(f"{label}:\n{indent(text, '    ')}")
    say(f"wrote {done.page}")
    conclude(done.runs)
