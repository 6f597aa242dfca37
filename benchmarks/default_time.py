"""Time of whole default runs against plain PEFT and Trainer, everything counted, put together of interleaved steps.

    .venv/bin/python benchmarks/default_time.py --tasks gsm8k,strategyqa --rounds 4

Counted on our side: probe, every step as the default plan takes it (with every layer, with the lower half frozen, from
the cache), held-out losses. On theirs: plain steps on random batches, and held-out losses as plain PEFT computes them,
as often. Loading is the same on both sides and left out. Prints a table and writes docs/results/defaults/time.json.
"""

import argparse
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tasks import DATA, Task, task

import aletheia
from aletheia.anatomy.demo import demo_checkpoint
from aletheia.data.examples import Examples
from aletheia.execution.lean import bfloat16_autocast
from aletheia.lab.campaign.steps import StepKind, interleaved_steps
from aletheia.training.held_out import held_out_loss

HELD_OUT, PER_PASS = 96, 4
LENGTHS = {"40 x 4": (40, 4, None), "150 x 4": (150, 4, None), "3 passes x 8": (None, 8, 3)}
PLACE = Path("docs/results/defaults/time.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="gsm8k,strategyqa,mix")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--data", type=Path, default=DATA)
    args = parser.parse_args()
    base = aletheia.load(str(demo_checkpoint()))
    found = []
    for name in args.tasks.split(","):
        own = task(name, base.tokenizer, HELD_OUT, args.data)
        for length, about in LENGTHS.items():
            line = {"task": name, "length": length} | measured(base.model, own, *about, args.rounds)
            found.append(line)
            print(f"{name} {length}: {line['share']:.3f} of plain, {line['speedups']}", flush=True)
    PLACE.write_text(
        json.dumps({"threads": torch.get_num_threads(), "rounds": args.rounds, "runs": found}, indent=1) + "\n"
    )


def measured(
    model: torch.nn.Module, own: Task, steps: int | None, batch_size: int, passes: float | None, rounds: int
) -> dict:
    """Seconds of the parts of a run and its share of the plain run's time."""
    scores = aletheia.probe(model, own.train)
    per_pass = len(own.train) / batch_size
    steps = steps or round((passes or 1) * per_pass)
    plan = aletheia.plan(scores, epochs=steps / per_pass)
    uniform = aletheia.plan(scores, policy="uniform")
    kinds = [StepKind("plain", uniform), StepKind.fast("every", uniform)]
    if plan.early_layers:
        kinds.append(replace(StepKind.fast("fresh", plan), risen=True))
        kinds.append(replace(StepKind.fast("cached", plan, cached=True), risen=True))
    seconds = {
        kind: float(np.mean(spent))
        for kind, spent in interleaved_steps(model, kinds, own.train, batch_size, rounds).items()
    }
    every, plain = evaluations(model, uniform, own.held_out, batch_size)
    count = 1 + max(PER_PASS, round(PER_PASS * steps / per_pass))
    early = plan.early_steps(steps) if plan.early_layers else steps
    rest = steps - early
    fresh = min(rest, round(per_pass))  # a row is computed once after the freeze, then read
    ours = scores.probe.seconds + early * seconds["every"] + count * every
    ours += fresh * seconds.get("fresh", 0.0) + (rest - fresh) * seconds.get("cached", 0.0)
    theirs = steps * seconds["plain"] + count * plain
    return {
        **{"steps": steps, "early_steps": early, "evaluations": count, "probe_seconds": scores.probe.seconds},
        **{"step_seconds": seconds, "evaluation_seconds": {"ours": every, "plain": plain}},
        **{"seconds": ours, "plain_seconds": theirs, "share": ours / theirs, "reason": plan.reason},
        "speedups": {kind: round(seconds["plain"] / spent, 2) for kind, spent in seconds.items()},
    }


def evaluations(
    model: torch.nn.Module, uniform: aletheia.Plan, held_out: Examples, batch_size: int
) -> tuple[float, float]:
    """Seconds of a held-out loss, ours and plain; the better of two each."""
    adapted = aletheia.adapt(model, uniform)

    def spent(context: Callable[[], AbstractContextManager[object]]) -> float:
        with context():
            times = []
            for _ in range(2):
                started = time.perf_counter()
                held_out_loss(adapted, held_out, batch_size)
                times.append(time.perf_counter() - started)
        return min(times)

    ours, plain = (
        spent(lambda: aletheia.fast_steps(adapted)),
        spent(lambda: bfloat16_autocast(adapted)),
    )
    adapted.unload()
    return ours, plain


if __name__ == "__main__":
    main()
