"""Interleaved steps, the gain by parts, predictions, memory and growth; written to docs/results/benchmarks/README.md.

    make bench
    .venv/bin/python benchmarks/bench.py steps predictions   # only these sections

Reads GSM8K from ../shared/data or the folder in ALETHEIA_DATA. Every speed is a ratio within one process, steps of all
arms interleaved, with a 95 % interval over rounds; nothing is asserted.
"""

import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
from aletheia_lora.probe import gradient_probe
from attached import attached_steps
from growth import growth
from memory import peaks
from ratios import speedup, table

import aletheia
from aletheia.anatomy.demo import demo_checkpoint
from aletheia.data.examples import Examples
from aletheia.files import package_versions
from aletheia.lab.campaign.steps import StepKind, building_seconds, interleaved_steps
from aletheia.libraries import quiet_libraries
from aletheia.planning.plan import Plan, layer_ranges
from aletheia.planning.targets import BALANCED_SHARE, SPEED_SHARE
from aletheia.probing.scores import Scores

DATA = Path(os.environ.get("ALETHEIA_DATA", "../shared/data")) / "gsm8k" / "train.jsonl"
PAGE = Path(__file__).parents[1] / "docs" / "results" / "benchmarks" / "README.md"
ROWS, MAX_TOKENS, BATCH_SIZE, EPOCHS = 640, 256, 8, 3
ROUNDS, PLAN_ROUNDS, PROBE_REPEATS = 8, 8, 5
SECTIONS = {
    "probe": "Probe",
    "steps": "Steps",
    "attached": "Attached to SFTTrainer",
    "predictions": "Predicted against measured",
    "memory": "Peak memory of the training phase",
    "growth": "Growth of the cached step",
}


def main() -> None:
    wanted = sys.argv[1:] or list(SECTIONS)
    if unknown := [name for name in wanted if name not in SECTIONS]:
        raise SystemExit(f"{unknown[0]} is not a section; expected one of {', '.join(SECTIONS)}")
    quiet_libraries()
    base = aletheia.load(str(demo_checkpoint()), "auto")
    every = aletheia.load_data(str(DATA), base.tokenizer)
    fitting = [index for index, example in enumerate(every.examples) if len(example) <= MAX_TOKENS]
    data = every.subset(fitting[:ROWS])
    scores = aletheia.probe(base.model, data)
    default = aletheia.plan(scores, epochs=EPOCHS, freeze_after=0)
    makers = {
        "probe": lambda: bench_probe(aletheia.load(str(demo_checkpoint()), "float32").model, every),
        "steps": lambda: bench_arms(base.model, data, scores, default),
        "attached": lambda: attached_steps(base, data, scores),
        "predictions": lambda: bench_predictions(base.model, data, scores),
        "memory": lambda: peaks(default, BATCH_SIZE),
        "growth": lambda: growth(base.model.dtype),
    }
    for name in SECTIONS:
        if name in wanted:
            section(SECTIONS[name], makers[name](), data, base.model.dtype)
    print(f"\nwrote {PAGE}")


def head(data: Examples) -> str:
    """How everything was measured."""
    packages = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    return (
        "# Benchmarks\n\n"
        "Written by `make bench` on a machine without a GPU.\n\n"
        f"- **Model and data**: SmolLM2-135M-Instruct, {ROWS} GSM8K rows of up to {MAX_TOKENS} tokens, batches of {BATCH_SIZE}. A row has "
        f"{data.tokens / ROWS:.0f} tokens on average, {data.labelled_tokens / ROWS:.0f} of them with a label.\n"
        "- **Baseline**: plain PEFT as transformers' Trainer steps it (forward, backward, clipping, fused AdamW), with random "
        "batches. Rank 16, alpha 32, seven modules of every layer. In bfloat16 it has `bf16=True`, which is quicker than going without.\n"
        "- **Ratios** are sums over rounds; all arms are interleaved in one process. Intervals are of 95 % "
        "([how](../../explanation/statistics.md)): BCa with expanded levels over paired rounds.\n"
        f"- **Made with** {platform.machine()}, {torch.get_num_threads()} threads, {packages}."
    )


def section(title: str, lines: list[str], data: Examples, dtype: torch.dtype) -> None:
    """Print a section and put it in its place on the page; the others stay unchanged."""
    dtype_name = "float32" if title == SECTIONS["probe"] else str(dtype).removeprefix("torch.")
    found = "\n".join([f"## {title}", "", f"Measured on {date.today()} in {dtype_name}.", "", *lines]).rstrip() + "\n"
    print(found, flush=True)
    page = PAGE.read_text() if PAGE.exists() else ""
    parts = {part.partition("\n")[0]: f"## {part.rstrip()}\n" for part in page.split("\n## ")[1:]}
    parts[title] = found
    ordered = [parts[name] for name in SECTIONS.values() if name in parts]
    PAGE.write_text("\n".join([head(data) + "\n", *ordered]))


def interleaved(jobs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each job, A B A B, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(repeats + 1):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def bench_probe(model: torch.nn.Module, data: Examples) -> list[str]:
    """The five-sequence probe of the published method: labels are the inputs."""
    rows = [torch.tensor(example.input_ids) for example in data.examples[:5]]
    dataset = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    batches = [
        {"input_ids": row[None], "attention_mask": torch.ones_like(row[None]), "labels": row[None].clone()}
        for row in rows
    ]
    layers = len(aletheia.probe(model, batches[:1]).layers)
    reference = gradient_probe(model, dataset, layers, 5)
    ours = aletheia.probe(model, batches).layers
    worst = max(abs(ours[layer] - reference[layer]) / reference[layer] for layer in range(layers))
    jobs = {
        "aletheia-lora 0.1.2": lambda: gradient_probe(model, dataset, layers, 5),
        "aletheia probe": lambda: aletheia.probe(model, batches),
    }
    lines = [
        f"5 sequences of {sum(map(len, rows))} tokens, {PROBE_REPEATS} repeats; largest relative difference of a layer's "
        f"score {worst:.1e}.",
        "",
        "| probe | median s | against the first |",
        "|---|---:|---:|",
        *table(interleaved(jobs, PROBE_REPEATS)),
    ]
    return lines


def bench_arms(model: torch.nn.Module, data: Examples, scores: Scores, default: Plan) -> list[str]:
    """The gain by parts, then in total; and a whole run computed from its measured parts."""
    uniform = aletheia.plan(scores, policy="uniform")
    plain = StepKind("baseline", uniform)
    every = StepKind.fast("every layer, these four together", uniform)
    cached = StepKind.fast("default plan, everything, from a filled cache", default, cached=True)
    plain_full = replace(plain, name="baseline, full recomputation", recompute="full")
    every_selective = replace(every, name="every layer, fast, selective recomputation", recompute="selective")
    every_full = replace(every, name="every layer, fast, full recomputation", recompute="full")
    cached_selective = replace(cached, name="default plan, cached, selective recomputation", recompute="selective")
    cached_full = replace(cached, name="default plan, cached, full recomputation", recompute="full")
    arms = [
        plain,
        StepKind("baseline + labelled-token logits", uniform, labelled=True),
        StepKind("baseline + length grouping", uniform, grouped=True),
        StepKind("baseline + adapters, norms and loss in place", uniform, in_place=True),
        StepKind("baseline + attention by products", uniform, attention=True),
        every,
        StepKind("default plan alone (truncated backward)", default, truncated=True),
        StepKind("default plan + cache alone", default, truncated=True, cached=True),
        StepKind.fast("default plan, everything, first epoch", default),
        cached,
        plain_full,
        cached_selective,
        cached_full,
        every_selective,
        every_full,
    ]
    seconds = interleaved_steps(model, arms, data, BATCH_SIZE, ROUNDS)
    steps = ROWS // BATCH_SIZE * EPOCHS
    early_plan = aletheia.plan(scores, epochs=EPOCHS, freeze_after=BALANCED_SHARE)
    building = [building_seconds(model, plan, data, BATCH_SIZE) for plan in (default, early_plan)]
    shares = (0.0, SPEED_SHARE, BALANCED_SHARE)
    lines = [
        f"Default plan: {default.settings.policy}, layers {layer_ranges(default.layers)}, rank {default.settings.rank}, "
        f"{default.trainable_parameters:,} parameters (uniform {uniform.trainable_parameters:,}). {ROUNDS} rounds.",
        "",
        "| step | median s | speed-up |",
        "|---|---:|---:|",
        *table(seconds),
        "",
        f"A whole run of {EPOCHS} epochs, {steps} steps, is computed from these parts. The probe takes {scores.probe.seconds:.0f} s. "
        f"The cache takes {building[0]:.0f} s, or {building[1]:.0f} s with adapters in the prefix. Every layer learns for a share of the "
        f"steps; the rest is taken from the cache. {BALANCED_SHARE:.0%} is the default over three passes.",
        "",
        "| run | baseline s | " + " | ".join(f"{share:.1%} first, s | speed-up" for share in shares) + " |",
        "|---|" + "---:|" * (1 + 2 * len(shares)),
    ]
    runs = (
        ("nothing recomputed", plain, every, cached),
        ("gradient checkpointing: full, and ours selective", plain_full, every_selective, cached_selective),
        ("gradient checkpointing: full on both sides", plain_full, every_full, cached_full),
    )
    for label, *kinds in runs:
        baseline_s, every_s, cached_s = (sum(seconds[kind.name]) / ROUNDS for kind in kinds)
        cells = []
        for share in shares:
            early = round(share * steps)
            once = scores.probe.seconds + building[early > 0]
            whole = once + early * every_s + (steps - early) * cached_s
            cells.append(f"{whole:.0f} | {baseline_s * steps / whole:.2f}x")
        lines.append(f"| {label} | {baseline_s * steps:.0f} | {' | '.join(cells)} |")
    ratios = [
        f"{speedup(seconds[plain_full.name], seconds[ours.name])} {ours.recompute}"
        for ours in (cached_selective, cached_full)
    ]
    lines += ["", f"Steps from the cache against the checkpointed baseline's: {', '.join(ratios)}. Memory: below."]
    return lines


def bench_predictions(model: torch.nn.Module, data: Examples, scores: Scores) -> list[str]:
    """Step times that the calibrated cost model predicts, and those measured minutes later."""
    timings = aletheia.calibrate(model, data, batch_size=BATCH_SIZE)
    scores = scores.model_copy(update={"timings": timings})
    plans = {
        "uniform": aletheia.plan(scores, policy="uniform"),
        "top-percent 50 (the paper)": aletheia.plan(scores, policy="top-percent"),
        "by-role 16/64, the paper's layers": aletheia.plan(scores, policy="top-percent", ranks="by-role"),
        "last 67 %": aletheia.plan(scores, policy="last", percent=67),
        "last 50 %, rank 64": aletheia.plan(scores, policy="last", rank=64),
        "last 33 %": aletheia.plan(scores, policy="last", percent=33),
        "last 10 %": aletheia.plan(scores, policy="last", percent=10),
        "random 50 %": aletheia.plan(scores, policy="random", seed=3),
    }
    baseline = StepKind("baseline", plans["uniform"])
    arms = [baseline]
    for name, plan in plans.items():
        arms.append(StepKind.fast(f"{name}, first epoch", plan))
        if plan.boundary:
            arms.append(StepKind.fast(f"{name}, cached", plan, cached=True))
    seconds = interleaved_steps(model, arms, data, BATCH_SIZE, PLAN_ROUNDS)
    lines = [
        f"Calibration took {timings.seconds:.0f} s. {PLAN_ROUNDS} rounds. Predicted and measured speed-ups are against the "
        f"baseline at rank 16, predicted at {timings.baseline:.2f} s a step.",
        "",
        "| plan | predicted | measured | difference |",
        "|---|---:|---:|---:|",
    ]
    for arm in arms[1:]:
        relative = arm.plan.predicted.relative_cached_step_time if arm.cached else arm.plan.predicted.relative_step_time
        assert relative is not None
        own = arm.plan.predicted.baseline_step_seconds
        assert own is not None
        predicted = timings.baseline / (relative * own)
        measured = sum(seconds["baseline"]) / sum(seconds[arm.name])
        lines.append(
            f"| {arm.name} | {predicted:.2f}x | {speedup(seconds['baseline'], seconds[arm.name])} | "
            f"{predicted / measured - 1:+.0%} |"
        )
    return lines


if __name__ == "__main__":
    main()
