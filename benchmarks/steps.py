"""Interleaved training steps of several arms in one process: each round, every arm takes one step."""

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.stats import t as student

import aletheia
from aletheia.data.batches import collate
from aletheia.data.order import training_batches
from aletheia.planning.plan import Plan
from aletheia.probing.logits import labelled_logits
from aletheia.tuning.cache import MemoryCache, collate_with_prefix
from aletheia.tuning.fill import fill
from aletheia.tuning.lean import lean_adapters, lean_loss
from aletheia.tuning.prefix import frozen_prefix, stored_prefix
from aletheia.tuning.recompute import Recompute, recomputation


@dataclass(frozen=True)
class Arm:
    """One way to take a step; the baseline has every switch off and adapts every layer."""

    name: str
    plan: Plan
    truncated: bool = True  # plain autograd stops at the boundary by itself; matters under checkpointing
    labelled: bool = False
    grouped: bool = False
    lean: bool = False
    cached: bool = False
    recompute: Recompute = "off"

    @classmethod
    def fast(cls, name: str, plan: Plan, cached: bool = False, recompute: Recompute = "off") -> "Arm":
        """Everything that ``aletheia train`` does."""
        return cls(name, plan, True, True, True, True, cached, recompute)


@contextmanager
def prepared(model: torch.nn.Module, arm: Arm) -> Iterator[torch.nn.Module]:
    """The base model adapted and set up for an arm, and given back without adapters."""
    adapted = aletheia.adapt(model, arm.plan)
    adapted.train()
    with ExitStack() as stack:
        contexts = [
            (arm.truncated, frozen_prefix),
            (arm.labelled, labelled_logits),
            (arm.lean, lean_adapters),
            (arm.lean, lean_loss),
            (arm.cached, partial(stored_prefix, boundary=arm.plan.boundary)),
            (True, partial(recomputation, kind=arm.recompute)),
        ]
        for wanted, context in contexts:
            if wanted:
                stack.enter_context(context(adapted))
        yield adapted
    adapted.unload()


def interleaved_steps(
    model: torch.nn.Module, arms: Sequence[Arm], data: aletheia.Examples, batch_size: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of ``rounds`` steps of each arm: forward, backward, clipping, AdamW; after a step that is not counted.

    Every arm goes through batches of one epoch, cut at random or by length as the arm says, at the same quantiles of
    size, so that the sums stand for the epoch.
    """
    orders = {grouped: _spread(data, batch_size, rounds, grouped) for grouped in (True, False)}
    caches: dict[int, MemoryCache] = {}
    for arm in arms:
        if arm.cached and arm.plan.boundary not in caches:
            with prepared(model, Arm("fill", arm.plan)) as adapted:
                cache = caches[arm.plan.boundary] = MemoryCache()
                wanted = [data[row] for grouped in orders.values() for batch in grouped for row in batch]
                fill(adapted, arm.plan.boundary, wanted, cache, batch_size, data.pad_token_id, show_progress=False)
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for number in range(rounds + 1):
        for arm in arms:
            rows = [data[row] for row in orders[arm.grouped][number]]
            with prepared(model, arm) as adapted:
                parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
                optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
                started = time.perf_counter()
                if arm.cached:
                    batch = collate_with_prefix(rows, data.pad_token_id, caches[arm.plan.boundary])
                else:
                    batch = collate(rows, data.pad_token_id)
                adapted(**batch, use_cache=False).loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                if number:
                    seconds[arm.name].append(time.perf_counter() - started)
    return seconds


def _spread(data: aletheia.Examples, batch_size: int, rounds: int, grouped: bool) -> list[list[int]]:
    """Batches of an epoch at ``rounds`` evenly spaced quantiles of padded size, shuffled, after one to warm up."""
    lengths = [len(example) for example in data.examples]
    epoch = training_batches(lengths, batch_size, len(lengths) // batch_size, 0, grouped)
    by_size = sorted(epoch, key=lambda batch: max(lengths[row] for row in batch))
    chosen = [by_size[int((number + 0.5) / rounds * len(by_size))] for number in range(rounds)]
    random.Random(0).shuffle(chosen)
    return [by_size[len(by_size) // 2], *chosen]


def speedup(reference: Sequence[float], seconds: Sequence[float]) -> tuple[float, float, float]:
    """Ratio of the summed times and its 95 % interval: the ratio estimator over paired rounds, Student's t."""
    a, b = np.asarray(reference), np.asarray(seconds)
    ratio = a.sum() / b.sum()
    error = np.sqrt(((a - ratio * b) ** 2).sum() / (len(a) * (len(a) - 1))) / b.mean()
    half = student.ppf(0.975, len(a) - 1) * error
    return float(ratio), float(ratio - half), float(ratio + half)


def table(seconds: dict[str, list[float]], notes: dict[str, str] | None = None) -> list[str]:
    """A Markdown row per arm, ratios against the first."""
    reference = next(iter(seconds.values()))
    lines = []
    for name, values in seconds.items():
        ratio, low, high = speedup(reference, values)
        note = f" {notes.get(name, '')} |" if notes is not None else ""
        lines.append(f"| {name} | {statistics.median(values):.2f} | {ratio:.2f}x ({low:.2f}-{high:.2f}) |{note}")
    return lines
