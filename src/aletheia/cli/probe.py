"""``aletheia probe``: which layers the task pulls on."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aletheia.cli.options import (
    AttentionOption,
    DataOption,
    DtypeOption,
    JsonOption,
    MaxLengthOption,
    MaxMemoryOption,
    ModelArgument,
    QuantizeOption,
    SeedOption,
    SkipEmptiedOption,
    StreamOption,
    encode_for,
    is_streamed,
    load_for,
    parse_memory,
    print_json,
    print_rich,
    quiet_libraries,
    say,
)

if TYPE_CHECKING:
    from aletheia.anatomy.load import Loaded
    from aletheia.data.examples import Examples
    from aletheia.probing.scores import Scores

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
    quantize: QuantizeOption = None,
    attention: AttentionOption = None,
    stream: StreamOption = None,
    max_memory: MaxMemoryOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Score layers and modules by the gradient norm they receive on a few batches; nothing is trained."""
    quiet_libraries()
    from aletheia.anatomy.checkpoint import Checkpoint
    from aletheia.data.rows import load_rows
    from aletheia.errors import ProbeError
    from aletheia.files import check_writable
    from aletheia.probing.resident import probe as run_probe
    from aletheia.probing.streamed import probe_streamed
    from aletheia.probing.tally import SCORE
    from aletheia.reporting.terminal import render

    if score != SCORE:
        raise ProbeError(f"unknown --score {score!r}; expected {SCORE}")
    cap = parse_memory(max_memory)
    check_writable(out.parent)
    rows = load_rows(data)
    if is_streamed(model, dtype, stream, cap, quantize):
        checkpoint = Checkpoint(model, dtype, attention=attention)  # type: ignore[arg-type]
        examples = encode_for(checkpoint, rows, max_length, skip_emptied)
        say(f"probe  {batches} batches of {batch_size}, layer by layer; plans will count operations, not seconds")
        work = out.with_name(f"{out.name}.partial")
        scores = probe_streamed(checkpoint, examples, batches, batch_size, seed, work, cap)
    else:
        say(f"load   {model}")
        base, examples = load_for(model, dtype, quantize, attention, rows, max_length, skip_emptied)
        say(f"probe  {batches} batches of {batch_size}")
        scores = run_probe(base.model, examples, batches, batch_size, seed)
        if calibrated:
            scores = _timed(scores, base, examples, train_batch_size, seed)
    scores.write(out)
    if as_json:
        print_json(scores.model_dump(mode="json"))
    else:
        print_rich(render(scores))
        say(f"wrote {out}")


def _timed(scores: "Scores", base: "Loaded", examples: "Examples", batch_size: int, seed: int) -> "Scores":
    """With measured step times, where a step of plain uniform LoRA, the yardstick, fits in memory."""
    import torch

    from aletheia.training.calibrate import calibrate

    say(f"time   the parts of a training step of {batch_size} rows")
    try:
        return scores.model_copy(update={"timings": calibrate(base.model, examples, batch_size, seed)})
    except torch.OutOfMemoryError:
        say("note: a step of plain uniform LoRA does not fit in memory; plans count operations instead")
        return scores
