"""Time of whole default runs against plain PEFT and Trainer, computed from interleaved steps; everything counts.

    .venv/bin/python benchmarks/default_time.py --tasks gsm8k,strategyqa --rounds 4

On our side, these count: the probe, every step of the default plan (with every layer, with the lower half frozen, from
the cache), the held-out loss before the first step, those during the run (from the cache if possible), and those for
the strength of the adapter. On their side: plain steps on random batches, without held-out losses, which is Trainer's
default; with as many as ours has during the run; and with early stopping on both sides. Steps before a stop and
strengths come from the runs in docs/results/defaults. Loading is the same on both sides and left out. Writes
docs/results/defaults/time.json.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from defaults_page import DEFAULTS, Run, best_uniform, cells, collected, kept, ours
from tasks import DATA, Task, nats_per_row, task

import aletheia
from aletheia.anatomy.demo import demo_checkpoint
from aletheia.data.examples import Examples
from aletheia.execution.backend import fast_layers
from aletheia.execution.fast import bfloat16_autocast
from aletheia.lab.campaign.steps import StepKind, interleaved_steps
from aletheia.prefix.cache import MemoryCache, collate_with_prefix
from aletheia.prefix.fill import fill
from aletheia.training.held_out import held_out_loss
from aletheia.training.loop import evaluations_of
from aletheia.training.recorder import due_steps
from aletheia.training.settings import TrainSettings

LENGTHS = {
    "40": {"steps": 40, "batch_size": 4},
    "150": {"steps": 150, "batch_size": 4},
    "epochs": {"epochs": 3, "batch_size": 8},
}
PLACE = Path("docs/results/defaults/time.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="gsm8k,strategyqa,mix")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--held-out", type=int, default=32, help="rows; 32 are the 5 %% that the command holds out")
    parser.add_argument("--data", type=Path, default=DATA)
    args = parser.parse_args()
    base = aletheia.load(str(demo_checkpoint()))
    runs = cells(collected([]))
    found = []
    for name in args.tasks.split(","):
        own = task(name, base.tokenizer, args.held_out, args.data)
        for length, about in LENGTHS.items():
            parts = measured(base.model, own, TrainSettings(**about), args.rounds)
            whole = shares(parts, known(runs[name, length, "H200"], name, length))
            found.append({"task": name, "length": length, "rounds": args.rounds} | whole | parts)
            print(name, length, {key: round(share, 3) for key, share in whole.items()}, parts["speedups"], flush=True)
    about = {"threads": torch.get_num_threads(), "held_out_rows": args.held_out}
    PLACE.write_text(json.dumps(about | {"runs": found}, indent=1) + "\n")


def known(arms: dict[tuple[str, float], list[Run]], name: str, length: str) -> tuple[float, float, float]:
    """The share of the planned steps that a default run takes, and plain LoRA at its best rate; strengths tried."""
    found = [(run["steps"], *ours(run)[1:]) for run in arms[DEFAULTS[name, length]]]
    defaults = [(stop / steps, max(1, tries)) for steps, stop, tries in found]  # at least one, if none was recorded
    theirs = [kept(run)[2] / run["steps"] for run in best_uniform(arms)[1]]
    stop, tries = np.mean(defaults, axis=0)
    return float(stop), float(np.mean(theirs)), float(tries)


def measured(model: torch.nn.Module, own: Task, settings: TrainSettings, rounds: int) -> dict[str, Any]:
    """Seconds of the parts of a run, ours and plain."""
    scores = aletheia.probe(model, own.train)
    per_pass = len(own.train) / settings.batch_size
    steps = settings.steps or round((settings.epochs or 1) * per_pass)
    plan = aletheia.plan(scores, epochs=steps / per_pass)
    uniform = aletheia.plan(scores, policy="uniform")
    kinds = [StepKind("plain", uniform), StepKind.fast("every", uniform)]
    if plan.early_layers:
        kinds.append(replace(StepKind.fast("fresh", plan), early_frozen=True))
        kinds.append(replace(StepKind.fast("cached", plan, cached=True), early_frozen=True))
    seconds = {
        kind: float(np.mean(spent))
        for kind, spent in interleaved_steps(model, kinds, own.train, settings.batch_size, rounds).items()
    }
    return {
        **{
            "steps": steps,
            "per_pass": per_pass,
            "early_steps": plan.early_steps(steps) if plan.early_layers else steps,
        },
        **{"evaluations": evaluations_of(len(own.train), settings), "probe_seconds": scores.probe.seconds},
        **{"step_seconds": seconds, "reason": plan.reason},
        "evaluation_seconds": evaluations(model, uniform, plan.boundary, own.held_out, settings.batch_size),
        "speedups": {kind: round(seconds["plain"] / spent, 2) for kind, spent in seconds.items()},
    }


def shares(parts: dict[str, Any], ends: tuple[float, float, float]) -> dict[str, float]:
    """Our time as a share of theirs: of plain steps alone, with held-out losses, and both stopped early."""
    our_stop, their_stop, strengths = ends

    def of_ours(done: float) -> float:
        early, seconds = min(done, parts["early_steps"]), parts["step_seconds"]
        fresh = min(done - early, parts["per_pass"])  # a row is computed once after the freeze, then read
        spent = early * seconds["every"] + fresh * seconds.get("fresh", 0.0)
        spent += (done - early - fresh) * seconds.get("cached", 0.0)
        points = [step for step in due_steps(parts["steps"], parts["evaluations"]) if step <= done]
        late = max(0, sum(step > early for step in points) - 1)  # the first one after the freeze fills the cache
        whole, cached = (parts["evaluation_seconds"][kind] for kind in ("ours", "cached"))
        return parts["probe_seconds"] + spent + (1 + len(points) - late + strengths) * whole + late * cached

    def of_theirs(done: float, with_losses: bool) -> float:
        points = sum(step <= done for step in due_steps(parts["steps"], parts["evaluations"]))
        return done * parts["step_seconds"]["plain"] + with_losses * points * parts["evaluation_seconds"]["plain"]

    steps = parts["steps"]
    return {
        "of_steps_alone": of_ours(steps) / of_theirs(steps, False),
        "with_held_out_losses": of_ours(steps) / of_theirs(steps, True),
        "both_stopped_early": of_ours(steps * our_stop) / of_theirs(steps * their_stop, True),
    }


def evaluations(
    model: torch.nn.Module, uniform: aletheia.Plan, boundary: int, held_out: Examples, batch_size: int
) -> dict[str, float]:
    """Seconds of a held-out loss: ours, ours from a filled cache, and plain; the better of two each."""
    adapted = aletheia.adapt(model, uniform)

    def spent(compute: Callable[[], object]) -> float:
        times = []
        for _ in range(2):
            started = time.perf_counter()
            compute()
            times.append(time.perf_counter() - started)
        return min(times)

    found = {}
    with aletheia.fast_steps(adapted):
        found["ours"] = spent(lambda: held_out_loss(adapted, held_out, batch_size))
    found["cached"] = found["ours"]
    if boundary:
        cache = MemoryCache()
        with fast_layers(adapted):
            fill(adapted, boundary, held_out.examples, cache, batch_size, show_progress=False)
        with aletheia.fast_steps(adapted, boundary):
            batch = partial(collate_with_prefix, pad_token_id=held_out.pad_token_id, cache=cache)
            found["cached"] = spent(lambda: nats_per_row(adapted, held_out, batch))
    with bfloat16_autocast(adapted):
        found["plain"] = spent(lambda: held_out_loss(adapted, held_out, batch_size))
    adapted.unload()
    return found


if __name__ == "__main__":
    main()
