"""``aletheia train``: the whole job. Load, probe, plan, adapt, train, report."""

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
    timed,
)
from aletheia.errors import DataError, TrainingError

if TYPE_CHECKING:
    from aletheia.anatomy.checkpoint import Checkpoint
    from aletheia.anatomy.load import Loaded
    from aletheia.data.examples import Example, Examples
    from aletheia.planning.plan import Plan
    from aletheia.probing.scores import Scores

EXAMPLE = "aletheia train Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --out run"


def train(
    model: ModelArgument,
    data: DataOption,
    out: Annotated[Path, typer.Option("--out", help="Run folder to write.", metavar="RUN")],
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="Plan to follow; without one, probe and plan first.")
    ] = None,
    freeze_after: Annotated[
        float | None,
        typer.Option(
            "--freeze-after",
            help="Without a plan: share of the steps in which all layers learn before the lower ones freeze (0.25).",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimizer steps.")] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", help="Passes over the data (1 by default).")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows per step.")] = 4,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", help="Peak learning rate (by default from width, steps and --init)."),
    ] = None,
    init: Annotated[
        str, typer.Option("--init", help="Where A starts: along the gradient of the first rows, or at random.")
    ] = "gradient",
    max_length: MaxLengthOption = 1024,
    eval_data: Annotated[
        str | None, typer.Option("--eval-data", help="Held-out rows, in any form that --data takes.")
    ] = None,
    eval_fraction: Annotated[
        float | None,
        typer.Option("--eval-fraction", help="Share of --data held out instead (0.05 by default)."),
    ] = None,
    eval_rows: Annotated[int, typer.Option("--eval-rows", help="Held-out rows used, at most.", min=1)] = 96,
    evaluations: Annotated[
        int, typer.Option("--evaluations", help="How often the held-out loss is taken during training.")
    ] = 4,
    skip_emptied: SkipEmptiedOption = False,
    cache: Annotated[
        str,
        typer.Option(
            "--cache", help="Keep what enters the lowest adapted layer: auto (measured), memory, disk or off."
        ),
    ] = "auto",
    cache_dir: Annotated[
        Path | None, typer.Option("--cache-dir", help="For a cache on disk ($ALETHEIA_CACHE, or your cache folder).")
    ] = None,
    gradient_checkpointing: Annotated[
        str,
        typer.Option(
            "--gradient-checkpointing",
            help="Less memory, more time: compute again in backward all but matrix products (selective) or all (full).",
        ),
    ] = "off",
    group_by_length: Annotated[
        bool,
        typer.Option("--group-by-length/--no-group-by-length", help="Make batches of rows of like length."),
    ] = True,
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    correct_quantization: Annotated[
        bool,
        typer.Option(
            "--correct-quantization",
            help="With --quantize nf4: a frozen part of each adapter takes back most of what that does. Fits NF4 only.",
        ),
    ] = False,
    attention: AttentionOption = None,
    stream: StreamOption = None,
    max_memory: MaxMemoryOption = None,
    seed: SeedOption = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another run in --out.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune the layers that matter: probe, plan, adapt and train in one command, or follow a plan."""
    # everything that can be refused is refused before the model is loaded
    if plan_file is not None and freeze_after is not None:
        raise TrainingError("--plan and --freeze-after are both given; expected the plan alone, which says so itself")
    if steps is not None and epochs is not None:
        raise TrainingError("--steps and --epochs are both given; expected one of them")
    if eval_data is not None and eval_fraction is not None:
        raise DataError("--eval-data and --eval-fraction are both given; expected one of them")
    quiet_libraries()
    from aletheia.adapters.adapt import adapt
    from aletheia.anatomy.checkpoint import Checkpoint
    from aletheia.data.examples import split_held_out
    from aletheia.data.rows import load_rows
    from aletheia.planning.plan import Plan
    from aletheia.prefix.fill_streamed import fill_streamed, streamed_cache
    from aletheia.reporting.page import report
    from aletheia.reporting.terminal import render
    from aletheia.runs.folder import claim_output
    from aletheia.runs.schema import REPORT_FILE, SCORES_FILE
    from aletheia.training.train import check_settings
    from aletheia.training.train import train as run_training

    if correct_quantization and quantize != "nf4":
        raise TrainingError(
            "--correct-quantization takes back what --quantize nf4 does to weights; "
            f"found {f'--quantize {quantize}' if quantize else 'no --quantize'}, expected nf4"
        )
    check_settings(steps, epochs, batch_size, learning_rate, cache, gradient_checkpointing, init, evaluations)
    claim_output(out, overwrite)
    plan = Plan.read(plan_file) if plan_file else None
    rows = load_rows(data)
    eval_source = load_rows(eval_data) if eval_data else None
    unquantized = Checkpoint(model, dtype) if correct_quantization else None
    seconds: dict[str, float] = {}
    cap = parse_memory(max_memory)
    say(f"load   {model}")
    with timed(seconds, "load"):
        base: Loaded | Checkpoint
        if is_streamed(model, dtype, stream, cap, quantize):
            _check_streamed(plan, freeze_after, cache)
            base = Checkpoint(model, dtype, attention=attention)  # type: ignore[arg-type]
            examples = encode_for(base, rows, max_length, skip_emptied)
        else:
            base, examples = load_for(model, dtype, quantize, attention, rows, max_length, skip_emptied)
    if eval_source:
        held_out = encode_for(base, eval_source, max_length, skip_emptied)
        held_out = held_out.subset(range(min(eval_rows, len(held_out))))
    else:
        fraction = 0.05 if eval_fraction is None else eval_fraction
        examples, held_out = split_held_out(examples, fraction, seed, eval_rows)
    passes = 1.0 if cache == "off" else steps * batch_size / len(examples) if steps else epochs or 1.0
    if plan is not None:
        _check_plan(plan, base, examples, batch_size, cap)
        scores = None
    else:
        work = out.with_name(f"{out.name}.partial")
        scores = _probe(base, examples, seed, cap, work, seconds)
        with timed(seconds, "plan"):
            plan = _plan(scores, base, examples, passes, batch_size, cap, freeze_after, seed)
    say(
        f"plan   {plan.settings.policy}: {len(plan.layers)} of {plan.layer_count} layers from {plan.boundary} up, "
        + (f"the others in the first {plan.settings.freeze_after:.0%} of the steps, " if plan.early_layers else "")
        + f"{plan.trainable_parameters:,} trainable parameters, predicted step speed-up {plan.predicted.speedup:.2f}x"
        + ("" if cache == "off" else f", {plan.predicted.cached_speedup:.2f}x from a filled cache")
    )
    prefix = None
    if isinstance(base, Checkpoint):
        rows_used = [*_used(examples, steps, batch_size, seed, group_by_length), *held_out.examples]
        with timed(seconds, "cache"):
            prefix = streamed_cache(base, plan.boundary, cache_dir)
            fill_streamed(base, plan.boundary, rows_used, prefix, batch_size, examples.pad_token_id, cap)
        adapted = adapt(base.suffix(plan.boundary), plan, seed, plan.model)
    else:
        adapted = adapt(base.model, plan, seed)
    run = run_training(
        adapted,
        examples,
        plan,
        out,
        held_out,
        steps=steps,
        epochs=1.0 if epochs is None else epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        init=init,  # type: ignore[arg-type]
        evaluations=evaluations,
        seed=seed,
        cache=cache,  # type: ignore[arg-type]
        cache_dir=cache_dir,
        free_prefix=True,
        prefix=prefix,
        unquantized=unquantized,
        gradient_checkpointing=gradient_checkpointing,  # type: ignore[arg-type]
        group_by_length=group_by_length,
        overwrite=overwrite,
        earlier_seconds=seconds,
    )
    if scores:
        scores.write(out / SCORES_FILE)
    report([run], out / REPORT_FILE)
    if as_json:
        print_json(run.metrics.model_dump(mode="json"))
    else:
        print_rich(render(run))
    say(f"wrote {out} (adapter, plan.json, metrics.json, report.html)")


def _used(examples: "Examples", steps: int | None, batch_size: int, seed: int, grouped: bool) -> "list[Example]":
    """The rows that a run will see: all, unless it ends before."""
    from aletheia.data.order import training_batches

    if steps is None:
        return list(examples.examples)
    batches = training_batches([len(row) for row in examples.examples], batch_size, steps, seed, grouped)
    return [examples[row] for batch in batches for row in batch]


def _check_streamed(plan: "Plan | None", freeze_after: float | None, cache: str) -> None:
    """Refuse what a streamed model cannot do, before anything is read."""
    from aletheia.planning.plan import layer_ranges

    streamed = "where the model is streamed"
    if freeze_after:
        raise TrainingError(
            f"--freeze-after is {freeze_after:g}; expected 0 {streamed}: lower layers are not in memory"
        )
    if cache not in ("auto", "disk"):
        raise TrainingError(f"--cache is {cache}; expected auto or disk {streamed}: its prefix is computed once")
    if plan is not None and plan.early_layers:
        raise TrainingError(
            f"the plan adapts layers {layer_ranges(plan.early_layers)} at first, which are not in memory {streamed}; "
            "expected one made with --freeze-after 0"
        )
    if plan is not None and plan.boundary == 0:
        raise TrainingError(f"the plan adapts layer 0; expected one that leaves a frozen prefix {streamed}")


def _check_plan(
    plan: "Plan", base: "Loaded | Checkpoint", examples: "Examples", batch_size: int, max_memory: int | None
) -> None:
    """Whether a plan that was given belongs to the model and fits in memory; other data are only noted."""
    from aletheia.anatomy.checkpoint import Checkpoint
    from aletheia.anatomy.fingerprint import identify
    from aletheia.anatomy.read import read_anatomy
    from aletheia.planning.memory import training_bytes
    from aletheia.probing import resident
    from aletheia.probing import streamed as by_layer

    streamed = isinstance(base, Checkpoint)
    plan.check_model(base.identity(ahead=max_memory is None) if streamed else identify(base.model))
    if plan.data and plan.data.fingerprint != examples.identity.fingerprint:
        say(f"note: the plan was made from {plan.data.name}, this run trains on {examples.identity.name}")
    if max_memory is None:
        return
    if streamed:
        anatomy, weights = base.anatomy, by_layer.weight_bytes(base)
    else:
        anatomy, weights = read_anatomy(base.model), resident.weight_bytes(base.model)
    ranks = {adapter.name: adapter.rank for adapter in plan.adapters}
    tokens, share = _largest_batch(examples, batch_size)
    needed = training_bytes(anatomy, weights, (*plan.layers, *plan.early_layers), ranks, tokens, share)
    if needed > max_memory:
        raise TrainingError(
            f"--max-memory is {max_memory / 1e9:.1f} GB; the plan takes up to {needed / 1e9:.1f} GB with batches of "
            f"{tokens:,} tokens; expected a plan made with that --max-memory, smaller batches or shorter rows"
        )


def _largest_batch(examples: "Examples", batch_size: int) -> tuple[int, float]:
    """Tokens of a batch of the longest rows, and the largest share of a row that is labelled."""
    tokens = batch_size * max(map(len, examples.examples))
    return tokens, max(row.labelled_tokens / len(row) for row in examples.examples)


def _probe(
    base: "Loaded | Checkpoint",
    examples: "Examples",
    seed: int,
    max_memory: int | None,
    work: Path,
    seconds: dict[str, float],
) -> "Scores":
    from aletheia.anatomy.checkpoint import Checkpoint
    from aletheia.probing.resident import probe
    from aletheia.probing.streamed import probe_streamed

    say("probe  5 batches of 1")
    with timed(seconds, "probe"):
        if isinstance(base, Checkpoint):
            return probe_streamed(base, examples, seed=seed, work=work, max_memory=max_memory)
        return probe(base.model, examples, seed=seed)


def _plan(
    scores: "Scores",
    base: "Loaded | Checkpoint",
    examples: "Examples",
    epochs: float,
    batch_size: int,
    max_memory: int | None,
    freeze_after: float | None,
    seed: int,
) -> "Plan":
    """The default plan: what fits in memory, and all layers at first where those do."""
    from aletheia.anatomy.checkpoint import Checkpoint
    from aletheia.anatomy.load import free_memory_bytes, own_memory_bytes
    from aletheia.planning.make import plan
    from aletheia.planning.memory import training_bytes
    from aletheia.planning.plan import FREEZE_AFTER

    streamed = isinstance(base, Checkpoint)
    device = base.device if streamed else base.model.device
    room = free_memory_bytes(device) + own_memory_bytes(device) if max_memory is None else max_memory
    tokens, share = _largest_batch(examples, batch_size)
    if freeze_after is None:
        anatomy, ranks = scores.anatomy, {module.name: 16 for module in scores.anatomy.adaptable()}
        weights = scores.weight_bytes
        every = weights and training_bytes(anatomy, weights, range(anatomy.layer_count), ranks, tokens, share)
        fits = not streamed and max_memory is None and every is not None and every <= room
        freeze_after = FREEZE_AFTER if fits else 0.0
        if not fits:
            say("note: lower layers do not learn at first, as they would by default: they may not fit in memory")
    return plan(
        scores,
        seed=seed,
        epochs=epochs,
        max_memory=room if streamed else max_memory,
        batch_tokens=tokens,
        labelled_share=share,
        freeze_after=freeze_after,
    )
