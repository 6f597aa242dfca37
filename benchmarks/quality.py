"""Loss against time: arms of the evidence on GSM8K or another set, at equal steps and against the wall clock.

    .venv/bin/python benchmarks/quality.py OUT                  # every arm below, hours; finished arms are kept
    .venv/bin/python benchmarks/quality.py OUT --arms depth-aware   # those whose name begins so
    .venv/bin/python benchmarks/quality.py OUT --time           # interleaved steps of the arms that are there
    .venv/bin/python benchmarks/quality.py OUT --report         # the table from what is there

All arms share rows, order, batches (of like length), optimizer and schedule; held-out losses are kept per row, so that
differences are paired. Wall-clock comes from interleaved steps of all arms and of the baseline, plain PEFT with random
batches, since arms of hours cannot be interleaved themselves. Losses of the uniform arms are computed with the fast
step, which is what the plain one computes. Arms that begin alike share their first steps.
"""

import argparse
import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from scipy.stats import bootstrap

import aletheia
from aletheia.adapters.initial import ROWS, Init, align_with_gradient
from aletheia.anatomy.demo import demo_checkpoint
from aletheia.anatomy.read import find_layers
from aletheia.cli.options import quiet_libraries
from aletheia.data.batches import collate, on_device_of
from aletheia.data.examples import NO_LOSS, Example, Examples
from aletheia.data.order import training_batches
from aletheia.execution.backend import lean_layers
from aletheia.lab.campaign.steps import StepKind, building_seconds, gradient_start_seconds, interleaved_steps
from aletheia.planning.plan import Plan, layer_ranges
from aletheia.prefix.cache import MemoryCache, collate_with_prefix
from aletheia.prefix.fill import fill
from aletheia.probing.scores import Scores

BATCH_SIZE, WARMUP, TIMED_ROUNDS = 8, 0.05, 5


@dataclass(frozen=True)
class Spec:
    """An arm: how layers are chosen, the rank, the peak learning rate, where A starts, and when lower layers freeze."""

    policy: str
    percent: float
    rank: int
    learning_rate: float
    init: Init = "random"
    freeze_after: float = 0.0


BASELINES = {f"uniform-{rate:g}": Spec("uniform", 100, 16, rate) for rate in (0.001, 0.002, 0.0005)}
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
ARMS |= {
    f"freeze-{share:.3g}-last-{percent}-{rate:g}": Spec("last", percent, 16, rate, "gradient", share)
    for rate in (0.001, 0.002, 0.0005)
    for share in (0.2, 0.25, 1 / 3, 0.125)
    for percent in (50, 33, 40, 20)
}
TIMES = "times.json"
Batcher = Callable[[list[Example]], dict[str, torch.Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--arms", default="", help="names, or how they begin, with commas")
    parser.add_argument("--data", default="../shared/data/gsm8k/train.jsonl")
    parser.add_argument("--held-out", default="", help="a file; by default test.jsonl beside --data, else rows of it")
    parser.add_argument("--rows", type=int, default=640)
    parser.add_argument("--held-out-rows", type=int, default=192)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--points", type=int, default=8, help="held-out losses during the run")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.report:
        quiet_libraries()
        base = aletheia.load(str(demo_checkpoint()), args.dtype)
        data, held_out = rows(args, base.tokenizer)
        scores = aletheia.probe(base.model, data)
        if args.time:
            time_arms(base.model, data, scores, args.out)
        else:
            run_arms(base.model, data, held_out, scores, args)
    print("\n".join(report(args.out)))


def run_arms(
    model: torch.nn.Module, data: Examples, held_out: Examples, scores: Scores, args: argparse.Namespace
) -> None:
    """Every arm that was asked for and is not there yet."""
    settings = settings_of(args)
    for name, spec in ARMS.items():
        path = args.out / f"{name}.json"
        if path.exists() and json.loads(path.read_text())["settings"] != settings:
            raise SystemExit(f"{path} was made with other settings; choose another OUT")
        if path.exists() or not name.startswith(tuple(args.arms.split(","))):
            continue
        plan = planned(scores, spec)
        print(f"{name}: layers {layer_ranges(plan.layers)}, {plan.trainable_parameters:,} parameters", flush=True)
        points = train(model, plan, data, held_out, spec, args)
        found = {"settings": settings, "layers": plan.layers, "arm": asdict(spec), "points": points}
        path.write_text(json.dumps(found))


def settings_of(args: argparse.Namespace) -> dict:
    """What all arms of a folder share."""
    return {name: value for name, value in vars(args).items() if name not in ("out", "arms", "report", "time")}


def planned(scores: Scores, spec: Spec) -> Plan:
    """The plan of an arm."""
    return aletheia.plan(
        scores, policy=spec.policy, percent=spec.percent, rank=spec.rank, freeze_after=spec.freeze_after
    )


def time_arms(model: torch.nn.Module, data: Examples, scores: Scores, out: Path) -> None:
    """Seconds of all that the finished arms consist of, steps interleaved."""
    specs = [Spec(**arm["arm"]) for name, arm in finished(out).items() if name not in BASELINES]
    uniform = aletheia.plan(scores, policy="uniform")
    kinds = {
        "baseline": StepKind("baseline", uniform),
        "baseline, grouped": StepKind("baseline, grouped", uniform, grouped=True),
        "every": StepKind.fast("every", uniform),
    }
    for spec in specs:
        plan, name = planned(scores, spec), timed_as(spec)
        own = StepKind.fast(name, plan, cached=plan.boundary > 0)
        kinds[name] = replace(own, risen=bool(plan.early_layers))
    seconds = interleaved_steps(model, list(kinds.values()), data, BATCH_SIZE, TIMED_ROUNDS)
    building = {
        name: building_seconds(model, kind.plan, data, BATCH_SIZE) for name, kind in kinds.items() if kind.cached
    }
    start = gradient_start_seconds(model, uniform, data, BATCH_SIZE)
    found = {"seconds": seconds, "building": building, "start": start, "probe": scores.probe.seconds}
    (out / TIMES).write_text(json.dumps(found))


def timed_as(spec: Spec) -> str:
    """What the later steps of an arm depend on."""
    return f"{spec.policy} {spec.percent} r{spec.rank}{' after all layers' if spec.freeze_after else ''}"


def finished(out: Path) -> dict[str, dict]:
    """The arms that are there."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json")) if path.name != TIMES}


def rows(args: argparse.Namespace, tokenizer: object) -> tuple[Examples, Examples]:
    """Rows of up to 256 tokens to train on and to hold out."""

    def short(path: str) -> Examples:
        every = aletheia.load_data(path, tokenizer, skip_unusable=True)
        return every.subset([index for index, row in enumerate(every.examples) if len(row) <= 256])

    data, beside = short(args.data), Path(args.data).with_name("test.jsonl")
    other = args.held_out or (str(beside) if beside.exists() else "")
    if other:
        held_out = short(other).subset(range(args.held_out_rows))
        return data.subset(range(args.rows)), held_out
    chosen = np.random.default_rng(0).permutation(len(data))[: args.rows + args.held_out_rows]
    return data.subset(chosen[: args.rows]), data.subset(chosen[args.rows :])


def train(
    model: torch.nn.Module, plan: Plan, data: Examples, held_out: Examples, spec: Spec, args: argparse.Namespace
) -> list[dict]:
    """Held-out losses per row at even steps of one run; its early steps are kept for arms that begin alike."""
    steps, settings = args.epochs * math.ceil(len(data) / BATCH_SIZE), settings_of(args)
    order = training_batches([len(row) for row in data.examples], BATCH_SIZE, steps, 0)
    schedule = [[data[row] for row in chosen] for chosen in order]
    due = {round(steps * number / args.points) for number in range(1, args.points + 1)}
    early, points, begun = plan.early_steps(steps), [], 0
    kept = args.out / f"early-{early}-{spec.learning_rate:g}.pt"
    adapted = aletheia.adapt(model, plan).train()
    used = [*(row for chosen in schedule[early:] for row in chosen), *held_out.examples]
    with ExitStack() as stack:
        parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        batch = fast_batches(stack, adapted, 0 if early else plan.boundary, used, data.pad_token_id)
        optimizer = torch.optim.AdamW(parameters, lr=spec.learning_rate, weight_decay=0.0, fused=True)
        warmup = math.ceil(WARMUP * steps)
        decay = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(step / warmup, max(0.0, (steps - step) / (steps - warmup)))
        )
        if early and kept.exists():
            values, states, points, made_with = torch.load(kept, weights_only=True).values()
            if made_with != settings:
                raise SystemExit(f"{kept} was made with other settings; choose another OUT")
            begun = early
            with torch.no_grad():
                for parameter, value in zip(parameters, values, strict=True):
                    parameter.copy_(value)
            optimizer.load_state_dict(states["optimizer"])
            decay.load_state_dict(states["decay"])
            batch = fast_batches(stack, adapted, plan.boundary, used, data.pad_token_id)
        elif spec.init == "gradient":
            align_with_gradient(adapted, (batch(chosen) for chosen in schedule[: ROWS // BATCH_SIZE]))
        for number, chosen in enumerate(schedule[begun:], start=begun + 1):
            adapted(**batch(chosen), use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            decay.step()
            optimizer.zero_grad()
            if number in due:
                points.append({"step": number, "rows": per_row(adapted, held_out, batch)})
                total = np.sum(points[-1]["rows"], axis=0)
                print(f"step {number}: {total[0] / total[1]:.4f}", flush=True)
            if number == early:
                states = {"optimizer": optimizer.state_dict(), "decay": decay.state_dict()}
                values = [parameter.detach() for parameter in parameters]
                whole = {"values": values, "states": states, "points": points, "settings": settings}
                torch.save(whole, kept.with_suffix(".partial"))
                kept.with_suffix(".partial").rename(kept)
                batch = fast_batches(stack, adapted, plan.boundary, used, data.pad_token_id)
    adapted.unload()
    return points


def fast_batches(stack: ExitStack, model: PeftModel, boundary: int, used: list[Example], pad_token_id: int) -> Batcher:
    """Begin fast steps from ``boundary`` up, out of a cache filled now; the layers below stay as they are."""
    stack.close()
    make: Batcher = partial(collate, pad_token_id=pad_token_id)
    if boundary:
        for layer in find_layers(model)[1][:boundary]:
            layer.requires_grad_(False)
        cache = MemoryCache()
        with lean_layers(model):
            fill(model, boundary, used, cache, BATCH_SIZE, show_progress=False)
        make = partial(collate_with_prefix, pad_token_id=pad_token_id, cache=cache)
    stack.enter_context(aletheia.fast_steps(model, boundary or None))
    return lambda rows: on_device_of(model, make(rows))


@torch.no_grad()
def per_row(model: torch.nn.Module, held_out: Examples, batch: Batcher) -> list[tuple[float, int]]:
    """Summed loss and labelled tokens of each held-out row."""
    model.eval()
    found: dict[int, tuple[float, int]] = {}
    order = sorted(range(len(held_out)), key=lambda row: -len(held_out[row]))
    for start in range(0, len(order), BATCH_SIZE):
        chosen = order[start : start + BATCH_SIZE]
        inputs = batch([held_out[row] for row in chosen])
        logits = model(**inputs, use_cache=False).logits[0, :-1].float()  # labelled positions alone, row after row
        targets = inputs["labels"][:, 1:]
        losses = torch.nn.functional.cross_entropy(logits, targets[targets != NO_LOSS], reduction="none")
        counts = (targets != NO_LOSS).sum(dim=1).tolist()
        for row, part in zip(chosen, losses.split(counts), strict=True):
            found[row] = (part.double().sum().item(), len(part))
    model.train()
    return [found[row] for row in range(len(held_out))]


def report(out: Path) -> list[str]:
    """A table over arms: each against the best point of the best uniform arm, paired by row."""
    arms = finished(out)
    times = json.loads((out / TIMES).read_text()) if (out / TIMES).exists() else None
    best_name, best_point = min(
        ((name, point) for name, arm in arms.items() if name in BASELINES for point in arm["points"]),
        key=lambda pair: mean(pair[1]["rows"]),
    )
    target, last = mean(best_point["rows"]), arms[best_name]["points"][-1]
    lines = [
        f"Best baseline: {best_name}, {target:.4f} after {best_point['step']} steps, {mean(last['rows']):.4f} at end.",
        "",
        "Times as shares of the baseline's, with random batches and with batches of like length.",
        "",
        "| arm | layers | held-out loss | best against its best | at the end against its end | time to its best | whole run |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for name, arm in arms.items():
        curve = " / ".join(f"{mean(point['rows']):.4f}" for point in arm["points"])
        best = difference(min((point["rows"] for point in arm["points"]), key=mean), best_point["rows"])
        end = difference(arm["points"][-1]["rows"], last["rows"])
        reached = next((point["step"] for point in arm["points"] if mean(point["rows"]) <= target), None)
        share = whole = "not timed"
        if times:
            share, whole = (
                told_shares(step, until, name, arm, times) if step else "never"
                for step, until in ((reached, best_point["step"]), (last["step"], last["step"]))
            )
        lines.append(f"| {name} | {layer_ranges(arm['layers'])} | {curve} | {best} | {end} | {share} | {whole} |")
    return lines


def told_shares(step: int, until: int, name: str, arm: dict, times: dict) -> str:
    """Time of an arm up to ``step`` as a share of each baseline's up to ``until``."""
    told = []
    for baseline in ("baseline", "baseline, grouped"):
        whole = until * float(np.mean(times["seconds"][baseline]))
        told.append(f"{seconds_to(step, name, arm, times, baseline) / whole:.2f}")
    return ", ".join(told)


def seconds_to(step: int, name: str, arm: dict, times: dict, baseline: str = "baseline") -> float:
    """Of an arm up to a step; its probe, gradient start and cache included."""
    mean_seconds = {kind: float(np.mean(spent)) for kind, spent in times["seconds"].items()}
    if name in BASELINES:
        return step * mean_seconds[baseline]
    spec = Spec(**arm["arm"])
    own = timed_as(spec)
    early = min(step, round(spec.freeze_after * arm["points"][-1]["step"]))
    once = times["building"].get(own, 0.0) if step > early else 0.0
    once += times["start"] if spec.init == "gradient" else 0.0
    once += times["probe"] if spec.policy in ("depth-aware", "top-percent") else 0.0
    return once + early * mean_seconds["every"] + (step - early) * mean_seconds[own]


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
