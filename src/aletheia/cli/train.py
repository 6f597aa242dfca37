"""``aletheia train``: the whole job. Load, probe, plan, adapt, train, report."""

import time
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
    print_json,
    print_rich,
    quiet_libraries,
    say,
)

EXAMPLE = "aletheia train Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --out run"


def train(
    model: ModelArgument,
    data: DataOption,
    out: Annotated[Path, typer.Option("--out", help="Run folder to write.", metavar="RUN")],
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="Plan to follow; without one, probe and plan first.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimizer steps.")] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", help="Passes over the data (1 by default).")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows per step.")] = 4,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Peak learning rate.")] = 5e-4,
    max_length: MaxLengthOption = 1024,
    eval_data: Annotated[
        str | None, typer.Option("--eval-data", help="Held-out rows, in any form that --data takes.")
    ] = None,
    eval_fraction: Annotated[
        float | None,
        typer.Option("--eval-fraction", help="Share of --data held out instead (0.05 by default)."),
    ] = None,
    eval_rows: Annotated[int, typer.Option("--eval-rows", help="Held-out rows used, at most.")] = 96,
    skip_emptied: SkipEmptiedOption = False,
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another run in --out.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune the layers that matter: probe, plan, adapt and train in one command, or follow a plan."""
    from aletheia.errors import DataError, TrainingError

    if steps is not None and epochs is not None:
        raise TrainingError("--steps and --epochs are both given; expected one of them")
    if eval_data is not None and eval_fraction is not None:
        raise DataError("--eval-data and --eval-fraction are both given; expected one of them")
    quiet_libraries()
    from aletheia.anatomy.fingerprint import identify
    from aletheia.anatomy.load import load
    from aletheia.data.encode import encode
    from aletheia.data.examples import split_held_out
    from aletheia.data.rows import load_rows
    from aletheia.planning.make import plan as make_plan
    from aletheia.planning.plan import Plan
    from aletheia.probing.resident import probe
    from aletheia.reporting.page import report
    from aletheia.reporting.terminal import render
    from aletheia.tuning.adapters import adapt
    from aletheia.tuning.train import check_settings, claim_output
    from aletheia.tuning.train import train as run_training

    # everything that can be refused is refused before the model is loaded
    check_settings(steps, epochs or 1.0, batch_size, learning_rate)
    claim_output(out, overwrite)
    plan = Plan.read(plan_file) if plan_file else None
    rows = load_rows(data)
    eval_source = load_rows(eval_data) if eval_data else None

    seconds: dict[str, float] = {}
    started = time.perf_counter()
    say(f"load   {model}")
    base = load(model, dtype)
    seconds["load"] = time.perf_counter() - started
    if plan:
        plan.check_model(identify(base.model))
    examples = encode(rows, base.tokenizer, max_length, skip_emptied)
    if eval_source:
        held_out = encode(eval_source, base.tokenizer, max_length, skip_emptied)
        held_out = held_out.subset(range(min(eval_rows, len(held_out))))
    else:
        examples, held_out = split_held_out(examples, eval_fraction or 0.05, seed, eval_rows)

    scores = None
    if plan is None:
        started = time.perf_counter()
        say("probe  5 batches of 1")
        scores = probe(base.model, examples, seed=seed)
        seconds["probe"] = time.perf_counter() - started
        started = time.perf_counter()
        plan = make_plan(scores, seed=seed)
        seconds["plan"] = time.perf_counter() - started
    elif plan.data and plan.data.fingerprint != examples.identity.fingerprint:
        say(f"note: the plan was made from {plan.data.name}, this run trains on {examples.identity.name}")
    say(
        f"plan   {plan.settings.policy}: {len(plan.layers)} of {plan.layer_count} layers from {plan.boundary} up, "
        f"{plan.trainable_parameters:,} trainable parameters, predicted step speed-up {plan.predicted.speedup:.2f}x"
    )
    adapted = adapt(base.model, plan, seed)
    run = run_training(
        adapted,
        examples,
        plan,
        out,
        held_out,
        steps=steps,
        epochs=epochs or 1.0,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        overwrite=overwrite,
        earlier_seconds=seconds,
    )
    if scores:
        scores.write(out / "scores.json")
    report([run], out / "report.html")
    if as_json:
        print_json(run.metrics.model_dump(mode="json"))
    else:
        print_rich(render(run))
    say(f"wrote {out} (adapter, plan.json, metrics.json, report.html)")
