"""``aletheia demo``: the main job on a small real model and a real task, against uniform LoRA."""

from contextlib import ExitStack
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Annotated

import typer

from aletheia.cli.options import (
    JsonOption,
    SeedOption,
    conclude,
    print_json,
    print_rich,
    say,
    timed,
)
from aletheia.settings import MOST_STEPS

if TYPE_CHECKING:
    from aletheia.anatomy.load import Loaded

EXAMPLE = "aletheia demo --out demo-run"

STEPS = 25
BATCH_SIZE = 4
HELD_OUT_ROWS = 40


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
    """Compare a plan of ours with plain LoRA: SmolLM2-135M learns to write summary lines of functions."""
    from aletheia.adapters.adapt import adapt
    from aletheia.anatomy.demo import demo_checkpoint
    from aletheia.anatomy.load import load
    from aletheia.data.encode import encode, load_data
    from aletheia.data.rows import load_rows
    from aletheia.data.stdlib_task import write_stdlib_task
    from aletheia.planning.make import plan as make_plan
    from aletheia.probing.resident import probe
    from aletheia.reporting.page import report
    from aletheia.reporting.terminal import comparison_table, render
    from aletheia.runs.folder import RunFolder
    from aletheia.runs.schema import REPORT_FILE, SCORES_FILE
    from aletheia.training.settings import TrainSettings
    from aletheia.training.train import Prepared, train

    with ExitStack() as stack:
        folders = {
            arm: stack.enter_context(RunFolder.claim(out / arm, overwrite, "never")) for arm in ("uniform", "plan")
        }
        train_file, held_out_file = write_stdlib_task(out, steps * BATCH_SIZE, HELD_OUT_ROWS, seed)
        seconds: dict[str, float] = {}
        say("load   SmolLM2-135M-Instruct (GGUF, about half a minute)")
        with timed(seconds, "load"):
            base = load(str(demo_checkpoint()))
        data = load_data(str(train_file), base.tokenizer)
        held_out_rows = load_rows(str(held_out_file))
        held_out = encode(held_out_rows, base.tokenizer)
        first = held_out_rows.rows[0].messages
        assert first is not None  # rows of a prompt and a completion are messages
        prompt = first[0]["content"]
        before = answer(base, prompt)
        say("probe  5 batches of 1")
        scores = probe(base.model, data, seed=seed)
        scores.write(out / SCORES_FILE)
        runs, after = [], ""
        for arm, plan in (("uniform", make_plan(scores, policy="uniform")), ("plan", make_plan(scores))):
            say(f"train  {arm}: {len(plan.layers)} of {plan.layer_count} layers, {steps} steps of {BATCH_SIZE}")
            model = adapt(base.model, plan, seed)
            settings = TrainSettings(steps=steps, batch_size=BATCH_SIZE, seed=seed)
            runs.append(train(model, data, plan, folders[arm], held_out, settings, Prepared(seconds=seconds)))
            after = answer(base, prompt)
            model.unload()
    page = report(runs, out / REPORT_FILE)
    sample = {"prompt": prompt, "before": before, "after": after}
    if as_json:
        metrics = {run.name: run.metrics.model_dump(mode="json") for run in runs}
        print_json({"runs": metrics, "sample": sample, "report": str(page)})
    else:
        print_rich(render(runs[1].plan), "", comparison_table(runs), "")
        for label, text in sample.items():
            typer.echo(f"{label}:\n{indent(text, '    ')}")
    say(f"wrote {page}")
    conclude(runs)


def answer(base: "Loaded", prompt: str, max_new_tokens: int = 40) -> str:
    """What the model says to one prompt, greedily."""
    import torch

    text = base.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    inputs = base.tokenizer(text, return_tensors="pt", add_special_tokens=False).to(base.model.device)
    base.model.eval()
    with torch.no_grad():
        output_BT = base.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)  # type: ignore[operator]
    return str(base.tokenizer.decode(output_BT[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
