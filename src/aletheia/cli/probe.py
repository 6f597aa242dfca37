"""``aletheia probe``: score the layers by the gradients of a task."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aletheia.anatomy.settings import LoadSettings
from aletheia.cli.options import (
    JsonOption,
    ModelArgument,
    SeedOption,
    print_json,
    print_rich,
    say,
)
from aletheia.cli.settings_options import Given, from_settings
from aletheia.data.settings import DataSettings
from aletheia.settings import MOST_ROWS, MOST_STEPS

if TYPE_CHECKING:
    from aletheia.anatomy.load import Loaded
    from aletheia.data.examples import Examples
    from aletheia.probing.scores import Scores

EXAMPLE = "aletheia probe Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --out scores.json"


@from_settings(LoadSettings, DataSettings, leave_out={"model", "eval_data", "eval_fraction", "eval_rows"})
def probe(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", help="Scores file to write, such as scores.json.", metavar="FILE")],
    batches: Annotated[
        int,
        typer.Option(
            "--batches", help="Batches to probe with; more give steadier scores.", metavar="INT", min=1, max=MOST_STEPS
        ),
    ] = 5,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Rows per probe batch.", metavar="INT", min=1, max=MOST_ROWS)
    ] = 1,
    score: Annotated[
        str, typer.Option("--score", help="What to measure.", metavar="{gradient-norm}")
    ] = "gradient-norm",
    train_batch_size: Annotated[
        int,
        typer.Option(
            "--train-batch-size",
            help="Rows per training step, to measure its time.",
            metavar="INT",
            min=1,
            max=MOST_ROWS,
        ),
    ] = 4,
    calibrated: Annotated[
        bool,
        typer.Option(
            "--calibrate/--no-calibrate",
            help="Also time training steps, so that plans predict seconds instead of operations. (default: yes)",
        ),
    ] = True,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    *,
    given: Given,
) -> None:
    """Score each layer by the norm of its gradients on a few batches of the task. Trains nothing."""
    from aletheia.data.rows import load_rows
    from aletheia.errors import ProbeError
    from aletheia.files import sibling
    from aletheia.job.source import is_streamed, load_for, stream_for
    from aletheia.probing.resident import probe as run_probe
    from aletheia.probing.scores import Scores
    from aletheia.probing.streamed import probe_streamed
    from aletheia.probing.tally import SCORE
    from aletheia.progress import Progress
    from aletheia.reporting.terminal import render

    if score != SCORE:
        raise ProbeError(f"unknown --score {score!r}; expected {SCORE}")
    loading = LoadSettings(model=model, **given["model"])
    data = DataSettings(**given["data"])
    Scores.check_out(out)
    rows = load_rows(data.data, data.skip_unusable)
    if is_streamed(loading, say):
        checkpoint, examples = stream_for(loading, rows, data, say)
        say(f"probe  scores the layers by their gradients on {batches * batch_size} rows, layer by layer")
        say("note: step times of a streamed model are not measured; plans count operations instead")
        work = sibling(out, ".partial")
        scores = probe_streamed(checkpoint, examples, batches, batch_size, seed, work, loading.max_memory, say)
    else:
        say(f"load   {model}")
        with Progress("load", 0, "", say):
            base, examples = load_for(loading, rows, data, say)
        say(f"probe  scores the layers by their gradients on {batches * batch_size} rows")
        scores = run_probe(base.model, examples, batches, batch_size, seed, say)
        if calibrated:
            scores = _timed(scores, base, examples, train_batch_size, seed)
    scores.write(out)
    if as_json:
        print_json(scores.model_dump(mode="json"))
    else:
        print_rich(render(scores))
        say(f"wrote {out}")


def _timed(scores: "Scores", base: "Loaded", examples: "Examples", batch_size: int, seed: int) -> "Scores":
    """Scores with measured step times, if a step of plain uniform LoRA, the baseline, fits in memory."""
    import torch

    from aletheia.training.calibrate import calibrate

    say(f"time   measures the parts of a training step of {batch_size} rows")
    try:
        return scores.model_copy(
            update={"timings": calibrate(base.model, examples, batch_size=batch_size, seed=seed, show_progress=say)}
        )
    except torch.OutOfMemoryError:
        say("note: a step of plain uniform LoRA does not fit in memory; plans count operations instead")
        return scores
