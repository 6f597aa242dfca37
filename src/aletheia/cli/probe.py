"""``aletheia probe``: which layers the task pulls on."""

from pathlib import Path
from typing import Annotated

import typer

from aletheia.cli.options import (
    DataOption,
    DtypeOption,
    JsonOption,
    MaxLengthOption,
    ModelArgument,
    SeedOption,
    SkipEmptiedOption,
    encode_for,
    print_json,
    print_rich,
    quiet_libraries,
    say,
)

EXAMPLE = "aletheia probe Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --out scores.json"


def probe(
    model: ModelArgument,
    data: DataOption,
    out: Annotated[Path, typer.Option("--out", help="Scores file to write.")],
    batches: Annotated[int, typer.Option("--batches", help="Probe batches.", min=1)] = 5,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows per probe batch.", min=1)] = 1,
    score: Annotated[str, typer.Option("--score", help="What is measured: gradient-norm.")] = "gradient-norm",
    train_batch_size: Annotated[
        int,
        typer.Option("--train-batch-size", help="Rows per training step, for which step times are measured.", min=1),
    ] = 4,
    calibrated: Annotated[
        bool, typer.Option("--calibrate/--no-calibrate", help="Measure step times, so that plans predict seconds.")
    ] = True,
    max_length: MaxLengthOption = 1024,
    skip_emptied: SkipEmptiedOption = False,
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Score layers and modules by the gradient norm they receive on a few batches; nothing is trained."""
    quiet_libraries()
    import torch

    from aletheia.anatomy.load import load
    from aletheia.data.rows import load_rows
    from aletheia.errors import ProbeError
    from aletheia.files import check_writable
    from aletheia.probing.resident import SCORE
    from aletheia.probing.resident import probe as run_probe
    from aletheia.reporting.terminal import render
    from aletheia.tuning.calibrate import calibrate

    if score != SCORE:
        raise ProbeError(f"unknown --score {score!r}; expected {SCORE}")
    check_writable(out.parent)
    rows = load_rows(data)
    say(f"load   {model}")
    base = load(model, dtype)
    examples = encode_for(base, rows, max_length, skip_emptied)
    say(f"probe  {batches} batches of {batch_size}")
    scores = run_probe(base.model, examples, batches, batch_size, seed)
    if calibrated:
        say(f"time   the parts of a training step of {train_batch_size} rows")
        try:
            scores = scores.model_copy(update={"timings": calibrate(base.model, examples, train_batch_size, seed)})
        except torch.OutOfMemoryError:  # the yardstick, plain uniform LoRA, may need more than any plan
            say("note: a step of plain uniform LoRA does not fit in memory; plans count operations instead")
    scores.write(out)
    if as_json:
        print_json(scores.model_dump(mode="json"))
    else:
        print_rich(render(scores))
        say(f"wrote {out}")
