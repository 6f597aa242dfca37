"""Loss against time: arms of the evidence on GSM8K or another set, at equal steps and against the wall clock.

    .venv/bin/python benchmarks/quality.py OUT                  # every arm below, hours; finished arms are kept
    .venv/bin/python benchmarks/quality.py OUT --arms depth-aware   # those whose name begins so
    .venv/bin/python benchmarks/quality.py OUT --report         # the table from what is there

All arms share rows, order, batches (of like length), optimizer and schedule; held-out losses are kept per row, so that
differences are paired. Wall-clock comes from interleaved steps of the arm and of the baseline, plain PEFT with random
batches, since arms of hours cannot be interleaved themselves. Losses of the uniform arms are computed with the exact
fast step, which is what the plain one computes.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import bootstrap
from steps import Arm, interleaved_steps, prepared

import aletheia
from aletheia.cli.demo import demo_checkpoint
from aletheia.cli.options import quiet_libraries
from aletheia.data.batches import collate
from aletheia.data.examples import NO_LOSS, Examples
from aletheia.data.order import training_batches
from aletheia.planning.plan import layer_ranges
from aletheia.tuning.cache import MemoryCache, collate_with_prefix
from aletheia.tuning.fill import fill
from aletheia.tuning.initial import ROWS, Init, align_with_gradient

BATCH_SIZE, WARMUP = 8, 0.05


@dataclass(frozen=True)
class Spec:
    """An arm: how layers are chosen, the rank, the peak learning rate, and where A starts."""

    policy: str
    percent: float
    rank: int
    learning_rate: float
    init: Init = "random"


BASELINES = {f"uniform-{rate:g}": Spec("uniform", 100, 16, rate) for rate in (0.0005, 0.001, 0.00025)}
ARMS = BASELINES | {
    f"{policy}-{percent}-r{rank}-{rate:g}-{init}": Spec(policy, percent, rank, rate, init)
    for policy, percent, rank, rates in (
        ("depth-aware", 50, 16, (0.001, 0.002, 0.0005)),
        ("last", 67, 16, (0.001, 0.002)),
        ("last", 50, 32, (0.001, 0.002)),
        ("uniform", 100, 16, (0.0005, 0.001)),
        ("top-percent", 50, 16, (0.001,)),
        ("random", 50, 16, (0.001,)),
    )
    for rate in rates
    for init in ("gradient", "random")
    if (policy, init) != ("uniform", "random")
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--arms", default="", help="names, or how they begin, with commas")
    parser.add_argument("--data", default="../shared/data/gsm8k/train.jsonl")
    parser.add_argument("--held-out", default="", help="a file; by default test.jsonl beside --data, else rows of it")
    parser.add_argument("--rows", type=int, default=640)
    parser.add_argument("--held-out-rows", type=int, default=192)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--points", type=int, default=6, help="held-out losses during the run")
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.report:
        run_arms(args)
    print("\n".join(report(args.out)))


def run_arms(args: argparse.Namespace) -> None:
    quiet_libraries()
    base = aletheia.load(str(demo_checkpoint()), "float32")
    data, held_out = rows(args, base.tokenizer)
    scores = aletheia.probe(base.model, data)
    uniform = aletheia.plan(scores, "uniform")
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "arms", "report")}
    for name, spec in ARMS.items():
        path = args.out / f"{name}.json"
        if path.exists() and json.loads(path.read_text()).get("settings", settings) != settings:
            raise SystemExit(f"{path} was made with other settings; choose another OUT")
        if path.exists() or not name.startswith(tuple(args.arms.split(","))):
            continue
        plan = aletheia.plan(scores, spec.policy, spec.percent, spec.rank)
        baseline, own = Arm("baseline", uniform, truncated=False), Arm.fast("own", plan, cached=plan.boundary > 0)
        timed = interleaved_steps(base.model, [baseline, own], data, BATCH_SIZE, 3)
        print(f"{name}: layers {layer_ranges(plan.layers)}, {plan.trainable_parameters:,} parameters", flush=True)
        found = train(base.model, own, data, held_out, spec, args)
        found |= {"settings": settings, "layers": plan.layers, "arm": asdict(spec)}
        found |= {
            "step_seconds": float(np.mean(timed["own"])),
            "baseline_step_seconds": float(np.mean(timed["baseline"])),
        }
        path.write_text(json.dumps(found))


def rows(args: argparse.Namespace, tokenizer: object) -> tuple[Examples, Examples]:
    """Rows of up to 256 tokens to train on and to hold out."""

    def short(path: str) -> Examples:
        every = aletheia.load_data(path, tokenizer, skip_emptied=True)
        return every.subset([index for index, row in enumerate(every.examples) if len(row) <= 256])

    data, beside = short(args.data), Path(args.data).with_name("test.jsonl")
    other = args.held_out or (str(beside) if beside.exists() else "")
    if other:
        held_out = short(other).subset(range(args.held_out_rows))
        return data.subset(range(args.rows)), held_out
    chosen = np.random.default_rng(0).permutation(len(data))[: args.rows + args.held_out_rows]
    return data.subset(chosen[: args.rows]), data.subset(chosen[args.rows :])


def train(
    model: torch.nn.Module, arm: Arm, data: Examples, held_out: Examples, spec: Spec, args: argparse.Namespace
) -> dict:
    """Held-out losses per row at even steps of one run."""
    steps = args.epochs * math.ceil(len(data) / BATCH_SIZE)
    order = training_batches([len(row) for row in data.examples], BATCH_SIZE, steps, 0)
    due = {round(steps * number / args.points) for number in range(1, args.points + 1)}
    cache = MemoryCache() if arm.cached else None
    started = time.perf_counter()
    if cache is not None:
        with prepared(model, Arm("fill", arm.plan)) as adapted:
            both = [*data.examples, *held_out.examples]
            fill(adapted, arm.plan.boundary, both, cache, BATCH_SIZE, data.pad_token_id, show_progress=False)
    building = time.perf_counter() - started
    points = []

    def of(chosen: list[int]) -> dict[str, torch.Tensor]:
        return batch([data[row] for row in chosen], data, cache)

    with prepared(model, arm) as adapted:
        parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        started = time.perf_counter()
        if spec.init == "gradient":
            align_with_gradient(adapted, (of(chosen) for chosen in order[: ROWS // BATCH_SIZE]))
        starting = time.perf_counter() - started
        optimizer = torch.optim.AdamW(parameters, lr=spec.learning_rate, weight_decay=0.0, fused=True)
        warmup = math.ceil(WARMUP * steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(step / warmup, max(0.0, (steps - step) / (steps - warmup)))
        )
        for number, chosen in enumerate(order, start=1):
            adapted(**of(chosen), use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if number in due:
                points.append({"step": number, "rows": per_row(adapted, held_out, cache)})
                total = np.sum(points[-1]["rows"], axis=0)
                print(f"step {number}: {total[0] / total[1]:.4f}", flush=True)
    return {"points": points, "building_seconds": building + starting}


def batch(chosen: list, data: Examples, cache: MemoryCache | None) -> dict[str, torch.Tensor]:
    if cache is None:
        return collate(chosen, data.pad_token_id)
    return collate_with_prefix(chosen, data.pad_token_id, cache)


@torch.no_grad()
def per_row(model: torch.nn.Module, held_out: Examples, cache: MemoryCache | None) -> list[tuple[float, int]]:
    """Summed loss and labelled tokens of each held-out row."""
    model.eval()
    found: dict[int, tuple[float, int]] = {}
    order = sorted(range(len(held_out)), key=lambda row: -len(held_out[row]))
    for start in range(0, len(order), BATCH_SIZE):
        chosen = order[start : start + BATCH_SIZE]
        inputs = batch([held_out[row] for row in chosen], held_out, cache)
        logits = model(**inputs, use_cache=False).logits[0, :-1]  # labelled positions alone, row after row
        targets = inputs["labels"][:, 1:]
        losses = torch.nn.functional.cross_entropy(logits, targets[targets != NO_LOSS], reduction="none")
        counts = (targets != NO_LOSS).sum(dim=1).tolist()
        for row, part in zip(chosen, losses.split(counts), strict=True):
            found[row] = (part.sum().item(), len(part))
    model.train()
    return [found[row] for row in range(len(held_out))]


def report(out: Path) -> list[str]:
    """A table over arms: each against the best point of the best uniform arm, paired by row."""
    arms = {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}
    best_name, best_point = min(
        ((name, point) for name, arm in arms.items() if name in BASELINES for point in arm["points"]),
        key=lambda pair: mean(pair[1]["rows"]),
    )
    target, last = mean(best_point["rows"]), arms[best_name]["points"][-1]
    lines = [
        f"Best baseline: {best_name}, {target:.4f} after {best_point['step']} steps, {mean(last['rows']):.4f} at end.",
        "",
        "| arm | layers | held-out loss | at the end against it | cached s/step (baseline) | time to its best |",
        "|---|---|---|---:|---:|---:|",
    ]
    for name, arm in arms.items():
        curve = " / ".join(f"{mean(point['rows']):.4f}" for point in arm["points"])
        end = difference(arm["points"][-1]["rows"], last["rows"])
        reached = next((point["step"] for point in arm["points"] if mean(point["rows"]) <= target), None)
        is_baseline = name in BASELINES
        seconds = arm["baseline_step_seconds"] if is_baseline else arm["step_seconds"]
        share = "never"
        if reached:
            own = reached * seconds + (0 if is_baseline else arm["building_seconds"])
            share = f"{own / (best_point['step'] * arm['baseline_step_seconds']):.2f}"
        lines.append(
            f"| {name} | {arm['layers'][0]}-{arm['layers'][-1]} ({len(arm['layers'])}) | {curve} | {end} | "
            f"{arm['step_seconds']:.2f} ({arm['baseline_step_seconds']:.2f}) | {share} |"
        )
    return lines


def mean(rows: list) -> float:
    summed, tokens = np.sum(rows, axis=0)
    return float(summed / tokens)


def difference(rows: list, others: list) -> str:
    """Relative difference of the mean losses with a 95 % bootstrap interval over rows, paired."""
    ours, theirs = np.array(rows), np.array(others)

    def relative(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return a.sum(axis=axis) / b.sum(axis=axis) - 1

    value = relative(ours[:, 0], theirs[:, 0])
    if np.array_equal(ours, theirs):
        return "0"
    interval = bootstrap((ours[:, 0], theirs[:, 0]), relative, paired=True, vectorized=True, rng=0).confidence_interval
    return f"{value:+.2%} ({interval.low:+.2%} to {interval.high:+.2%})"


if __name__ == "__main__":
    main()
