"""Loss along a run, for arms that adapt, freeze or thaw layers at different times: what the defaults were chosen from.

    .venv/bin/python benchmarks/frontier.py OUT --cells gsm8k-40,mix-150 --seeds 0,1,2 --rates 1e-3,2e-3 --arms uniform
    .venv/bin/python benchmarks/frontier.py OUT ... --arms uniform,freeze-0.5-15,thaw-0.5-15,spread-2,constant

Every run has LoRA of rank 16 in SmolLM2-135M-Instruct from PEFT's random start, on the same rows, batches and optimizer
as ``aletheia train`` would give it. Runs of a cell, seed and rate that begin alike share their first steps. One line per
run goes to OUT/runs.jsonl: its settings, and the summed loss of each held-out row at every point; existing runs
are not repeated.

Arms: ``uniform``; ``freeze-S-B``: every layer for a share S of the steps, then those from B up; ``thaw-S-B``: those from
B up at first, every layer after a share S; ``last-B``; ``spread-N``: every N-th layer; ``paper``: the half with the
highest probe scores. Each on a linear schedule. With ``~settle`` behind its name, decays to zero are tried from its early
points, over a ninth of the steps before them, and averages of the weights at every point; the run itself is the same.
``~constant`` has a constant rate and the same decays.
"""

import argparse
import json
import math
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tasks import DATA, Batcher, Task, nats_per_row, task

import aletheia
from aletheia.anatomy.demo import demo_checkpoint
from aletheia.anatomy.read import find_layers
from aletheia.data.batches import collate, on_device_of
from aletheia.data.order import training_batches
from aletheia.execution.backend import fast_layers
from aletheia.prefix.cache import MemoryCache, collate_with_prefix
from aletheia.prefix.fill import fill

WARMUP, EPOCHS = 0.05, 3
# batch size, points at which the held-out loss is taken, held-out rows
LENGTHS = {"40": (4, 2, 96), "150": (4, 5, 96), "epochs": (8, 8, 128)}


@dataclass(frozen=True)
class Arm:
    """Layers with adapters, and the boundary from each step on, as shares of the run."""

    name: str
    layers: tuple[int, ...]
    boundaries: tuple[tuple[float, int], ...] = ((0.0, 0),)
    schedule: str = "linear"
    ends: tuple[float, ...] = ()  # decays to zero that are tried from each point, in shares of the steps before it
    averages: tuple[int, ...] = ()  # of the weights: eta, with which the last 1 / (eta + 1) of the steps count most

    @classmethod
    def named(cls, name: str, count: int, paper: tuple[int, ...]) -> "Arm":
        base, _, end = name.partition("~")
        kind, *numbers = base.split("-")
        every, schedule = tuple(range(count)), "constant" if end == "constant" else "linear"
        if end == "settle":
            return replace(cls.named(base, count, paper), name=name, ends=(1 / 9,), averages=(8, 3))
        if end == "constant":
            return replace(cls.named(base, count, paper), name=name, schedule=schedule, ends=(1 / 9,))
        match kind, [float(number) for number in numbers]:
            case "uniform", []:
                return cls(name, every, schedule=schedule)
            case "freeze", [share, boundary]:
                return cls(name, every, ((0.0, 0), (share, int(boundary))), schedule)
            case "thaw", [share, boundary]:
                return cls(name, every, ((0.0, int(boundary)), (share, 0)), schedule)
            case "last", [boundary]:
                return cls(name, every[int(boundary) :], ((0.0, int(boundary)),), schedule)
            case "spread", [stride]:
                return cls(name, every[:: int(stride)], schedule=schedule)
            case "paper", []:
                return cls(name, paper, ((0.0, paper[0]),), schedule)
        raise SystemExit(f"unknown arm {name}")

    def starts(self, steps: int) -> list[tuple[int, int]]:
        """(steps done, boundary) of each phase."""
        return [(min(round(share * steps), steps - 1) if share else 0, boundary) for share, boundary in self.boundaries]


@dataclass
class Group:
    """What the runs of a cell, seed and rate share."""

    model: torch.nn.Module
    task: Task
    length: str
    seed: int
    rate: float
    scores: Any
    branches: dict[Any, set[int]]  # steps at which runs of these layers and this schedule part

    def __post_init__(self) -> None:
        self.batch_size, self.points, count = LENGTHS[self.length]
        rows = self.task.train
        self.steps = EPOCHS * math.ceil(len(rows) / self.batch_size) if self.length == "epochs" else int(self.length)
        self.held_out = self.task.held_out.subset(range(min(count, len(self.task.held_out))))
        order = training_batches([len(row) for row in rows.examples], self.batch_size, self.steps, self.seed)
        self.batches = [[rows[row] for row in batch] for batch in order]
        self.due = {round(self.steps * number / self.points) for number in range(1, self.points + 1)}
        self.known: dict[Any, dict] = {}  # states by the phases that led there

    def run(self, arm: Arm) -> dict:
        """Points of one run: steps and summed nats of each held-out row."""
        plan = aletheia.plan(self.scores, policy="uniform")
        adapted = aletheia.adapt(self.model, plan, self.seed).train()
        layers = find_layers(adapted)[1]
        factors = [[p for n, p in layer.named_parameters() if "lora_" in n] for layer in layers]
        parameters = [parameter for own in factors for parameter in own]
        optimizer = torch.optim.AdamW(parameters, lr=self.rate, weight_decay=0.0, fused=True)
        points, begun, spent = [], 0, 0.0
        phases = arm.starts(self.steps)
        for at in range(len(phases), 0, -1):  # the longest beginning that was trained before
            key = (arm.layers, arm.schedule, *phases[:at])
            until = phases[at][0] if at < len(phases) else self.steps
            if (state := self.known.get((key, until))) is not None:
                begun, points, spent = until, list(state["points"]), state["seconds"]
                restore(parameters, optimizer, state)
                break
        wanted = self.branches[arm.layers, arm.schedule]
        decays: list[list] = []
        averages = {eta: [parameter.detach().clone() for parameter in parameters] for eta in arm.averages}
        averaged: list[list] = []
        with ExitStack() as stack:
            boundary, batch = None, None
            for number in range(begun + 1, self.steps + 1):
                now = [boundary for first, boundary in phases if first < number][-1]
                if now != boundary:
                    boundary = now
                    stack.close()
                    batch = self.fast(stack, adapted, factors, arm, boundary, number)
                started = time.perf_counter()
                for group in optimizer.param_groups:
                    group["lr"] = self.rate * factor(number - 1, self.steps, arm.schedule)
                self.step(adapted, optimizer, parameters, batch, number)
                with torch.no_grad():  # polynomial-decay averaging, Shamir and Zhang 2013
                    for eta, means in averages.items():
                        for own, parameter in zip(means, parameters, strict=True):
                            own.lerp_(parameter, min(1.0, (eta + 1) / (number + eta)))
                spent += time.perf_counter() - started
                if number in self.due:
                    points.append([number, nats_per_row(adapted, self.held_out, batch)])
                    print(f"    {number:4d} {mean(points[-1][1], self.counts):.4f} {spent:.0f} s", flush=True)
                    for eta, means in averages.items():
                        own = [parameter.detach().clone() for parameter in parameters]
                        put(parameters, means)
                        averaged.append([number, eta, nats_per_row(adapted, self.held_out, batch)])
                        put(parameters, own)
                        print(f"      mean {eta}: {mean(averaged[-1][2], self.counts):.4f}", flush=True)
                tries = arm.ends if number in self.due and len(self.due) > 2 and number < 0.7 * self.steps else ()
                if number in wanted or tries:
                    state = kept(parameters, optimizer, points, spent)
                    begin = (arm.layers, arm.schedule, *[phase for phase in phases if phase[0] < number])
                    if number in wanted:
                        self.known[begin, number] = state
                    for share in tries:
                        decays.append(self.decayed(adapted, optimizer, parameters, batch, number, share))
                        restore(parameters, optimizer, state)
        adapted.unload()
        return {"points": points, "decays": decays, "averages": averaged, "seconds": round(spent, 1)}

    def step(self, adapted, optimizer, parameters, batch, number) -> None:
        chosen = self.batches[(number - 1) % len(self.batches)]
        adapted(**batch(chosen), use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def decayed(self, adapted, optimizer, parameters, batch, number, share) -> list:
        """The point after a decay to zero that begins here."""
        length, now = max(1, math.ceil(share * number)), optimizer.param_groups[0]["lr"]
        for extra in range(1, length + 1):
            for group in optimizer.param_groups:
                group["lr"] = now * (1 - extra / (length + 1))
            self.step(adapted, optimizer, parameters, batch, number + extra)
        found = [number + length, nats_per_row(adapted, self.held_out, batch)]
        print(f"      decayed to {found[0]}: {mean(found[1], self.counts):.4f}", flush=True)
        return found

    def fast(self, stack: ExitStack, adapted, factors, arm: Arm, boundary: int, number: int) -> Batcher:
        """Start fast steps from ``boundary`` up, with a cache if there are layers below."""
        pad = self.task.train.pad_token_id
        for layer, own in enumerate(factors):
            for parameter in own:
                parameter.requires_grad_(layer >= boundary and layer in arm.layers)
                parameter.grad = None
        make: Batcher = partial(collate, pad_token_id=pad)
        if boundary:
            used = [*(row for chosen in self.batches[number - 1 :] for row in chosen), *self.held_out.examples]
            cache = MemoryCache()
            with fast_layers(adapted):
                fill(adapted, boundary, used, cache, self.batch_size, show_progress=False)
            make = partial(collate_with_prefix, pad_token_id=pad, cache=cache)
        stack.enter_context(aletheia.fast_steps(adapted, boundary or None))
        return lambda rows: on_device_of(adapted, make(rows))

    @property
    def counts(self) -> list[int]:
        """Labelled tokens of each held-out row."""
        return [row.labelled_tokens for row in self.held_out.examples]


def factor(done: int, steps: int, schedule: str) -> float:
    """The rate of the step after ``done``, as a share of the peak."""
    warmup = math.ceil(WARMUP * steps)
    return min(done / warmup, (steps - done) / (steps - warmup) if schedule == "linear" else 1.0)


def kept(parameters, optimizer, points, seconds) -> dict:
    """A copy of everything that changes later."""
    moments = {
        index: {k: v.clone() for k, v in state.items()} for index, state in optimizer.state_dict()["state"].items()
    }
    return {
        "values": [p.detach().clone() for p in parameters],
        "moments": moments,
        "points": list(points),
        "seconds": seconds,
    }


def put(parameters, values) -> None:
    """Give the parameters other values."""
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def restore(parameters, optimizer, state: dict) -> None:
    """Restore a saved state."""
    put(parameters, state["values"])
    whole = optimizer.state_dict()
    whole["state"] = {index: {k: v.clone() for k, v in own.items()} for index, own in state["moments"].items()}
    optimizer.load_state_dict(whole)


def mean(nats: list[float], counts: list[int]) -> float:
    """Nats per labelled token."""
    return sum(nats) / sum(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cells", default="gsm8k-40")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--rates", default="2e-3")
    parser.add_argument("--arms", default="uniform")
    parser.add_argument("--data", type=Path, default=DATA)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    store = args.out / "runs.jsonl"
    base = aletheia.load(str(demo_checkpoint()))
    tasks: dict[str, Task] = {}
    scores: dict[str, Any] = {}
    for seed in map(int, args.seeds.split(",")):
        for cell in args.cells.split(","):
            name, length = cell.rsplit("-", 1)
            if name not in tasks:
                tasks[name] = task(name, base.tokenizer, data=args.data)
                scores[name] = aletheia.probe(base.model, tasks[name].train, seed=0)
            paper = aletheia.plan(scores[name], policy="top-percent").layers
            for rate in map(float, args.rates.split(",")):
                arms = [Arm.named(arm, len(scores[name].layers), paper) for arm in args.arms.split(",")]
                there = done(store)
                arms = [arm for arm in arms if (name, length, seed, rate, arm.name) not in there]
                if not arms:
                    continue
                group = Group(base.model, tasks[name], length, seed, rate, scores[name], defaultdict(set))
                for arm in arms:
                    later = {first for first, _ in arm.starts(group.steps) if first}
                    group.branches[arm.layers, arm.schedule] |= later
                for arm in sorted(arms, key=lambda arm: len(arm.boundaries)):
                    print(f"{cell} seed {seed} rate {rate:g} {arm.name}", flush=True)
                    found = group.run(arm)
                    line = {
                        **{"task": name, "length": length, "steps": group.steps, "batch_size": group.batch_size},
                        **{"seed": seed, "rate": rate, "arm": arm.name, "counts": group.counts},
                    }
                    with store.open("a") as file:
                        file.write(json.dumps(line | found) + "\n")


def done(store: Path) -> set[tuple]:
    """Existing runs."""
    lines = store.read_text().splitlines() if store.exists() else []
    runs = [json.loads(line) for line in lines]
    return {(run["task"], run["length"], run["seed"], run["rate"], run["arm"]) for run in runs}


if __name__ == "__main__":
    main()
