"""Interleaved training steps of several kinds in one process: each round, every kind takes one step."""

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import psutil
import torch
from peft import PeftModel
from torch import nn

from aletheia.adapters.adapt import adapt
from aletheia.anatomy.read import find_layers
from aletheia.data.batches import collate, on_device_of
from aletheia.data.examples import Example, Examples
from aletheia.data.order import Order, training_batches
from aletheia.execution.cpu.attention import fast_attention
from aletheia.execution.cpu.norms import fast_norms
from aletheia.execution.fast import adapters_in_bfloat16, bfloat16_autocast, fast_adapters
from aletheia.execution.loss import fast_loss
from aletheia.execution.recompute import Recompute, recomputation
from aletheia.planning.plan import Plan
from aletheia.prefix.boundary import frozen_prefix
from aletheia.prefix.cache import MemoryCache, collate_with_prefix
from aletheia.prefix.fill import fill
from aletheia.prefix.stored import prefix_output, stored_prefix
from aletheia.probing.logits import labelled_logits

ATTEMPTS = 4
OTHERS = 0.1  # share of the CPUs that other work may use during a step that counts


@dataclass(frozen=True)
class StepKind:
    """One way to take a step. With every switch off, it is the plain step of PEFT and transformers' Trainer.

    For a bfloat16 base, that is Trainer with ``bf16=True``, see :func:`aletheia.execution.fast.bfloat16_autocast`.
    """

    name: str
    plan: Plan
    truncated: bool = False  # stop at the boundary; without checkpointing, plain autograd does so by itself
    labelled: bool = False  # logits at labelled positions only
    grouped: bool = False  # batches of rows of similar length
    in_place: bool = False  # adapters, norms and loss in place
    attention: bool = False  # attention by matrix products
    cached: bool = False
    recompute: Recompute = "off"
    early_frozen: bool = False  # the plan's early layers are frozen, with their adapters
    only_prefix: bool = False  # run only the layers below the boundary

    @classmethod
    def fast(cls, name: str, plan: Plan, cached: bool = False, recompute: Recompute = "off") -> "StepKind":
        """Everything that ``aletheia train`` does."""
        every = dict.fromkeys(("truncated", "labelled", "grouped", "in_place", "attention"), True)
        return cls(name, plan, **every, cached=cached, recompute=recompute)

    @classmethod
    def prefix(cls, name: str, plan: Plan, early_frozen: bool) -> "StepKind":
        """The step that fills the cache: the layers below the boundary, computed as in fast steps."""
        return cls(name, plan, grouped=True, in_place=True, attention=True, early_frozen=early_frozen, only_prefix=True)


@contextmanager
def prepared(model: nn.Module, kind: StepKind) -> Iterator[PeftModel]:
    """The base model, adapted and set up for a kind of step; on leaving, the adapters are removed."""
    with ExitStack() as stack:
        adapted = adapt(model, kind.plan)
        stack.callback(adapted.unload)  # after an error, too, or the next kind would start with these adapters
        adapted.train()
        if kind.early_frozen:
            _, layers = find_layers(adapted)
            for index in kind.plan.early_layers:
                layers[index].requires_grad_(False)
        contexts: list[tuple[bool, Callable[[PeftModel], AbstractContextManager[object]]]] = [
            (kind.truncated, frozen_prefix),
            (kind.labelled, labelled_logits),
            (kind.in_place, adapters_in_bfloat16),
            (kind.in_place, fast_adapters),
            (kind.in_place, fast_norms),
            (kind.in_place, fast_loss),
            (kind.attention, fast_attention),
            (kind.cached, partial(stored_prefix, boundary=kind.plan.boundary)),
            (True, partial(recomputation, kind=kind.recompute)),
        ]
        for wanted, context in contexts:
            if wanted:
                stack.enter_context(context(adapted))
        yield adapted


def building_seconds(model: nn.Module, plan: Plan, data: Examples, batch_size: int) -> float:
    """Seconds that it takes to fill a cache in memory with every row, with early layers and their adapters frozen."""
    with prepared(model, StepKind.prefix("fill", plan, bool(plan.early_layers))) as adapted:
        started = time.perf_counter()
        fill(adapted, plan.boundary, data.examples, MemoryCache(), batch_size, show_progress=False)
        return time.perf_counter() - started


def interleaved_steps(
    model: nn.Module, kinds: Sequence[StepKind], data: Examples, batch_size: int, rounds: int, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds of ``rounds`` steps of each kind: forward, backward, clipping, AdamW. A first step is not counted.

    Every kind takes batches of one epoch, formed at random or by length, at the same quantiles of size. So the sums
    represent the epoch. Steps that other work disturbed are repeated.
    """
    orders = {grouped: _spread(data, batch_size, rounds, grouped, seed) for grouped in (True, False)}
    caches = _filled(model, kinds, data, orders, batch_size)
    seconds: dict[str, list[float]] = {kind.name: [] for kind in kinds}
    for number in range(rounds + 1):
        first = number % len(kinds)  # each kind goes first in turn, so that none always follows the same one
        for kind in (*kinds[first:], *kinds[:first]):
            rows = [data[row] for row in orders[kind.grouped][number]]
            spent = undisturbed(partial(_seconds, model, kind, rows, data.pad_token_id, caches))
            if number:
                seconds[kind.name].append(spent)
    return seconds


def undisturbed(step: Callable[[], float]) -> float:
    """The seconds that ``step`` returns. On a CPU that other work uses, it takes a few attempts.

    The attempt with the least disturbance counts, not the fastest one.
    """
    if torch.accelerator.is_available():
        return step()
    attempts = []
    for _ in range(ATTEMPTS):
        busy, own, started = _busy_seconds(), time.process_time(), time.perf_counter()
        spent = step()
        used = _busy_seconds() - busy - (time.process_time() - own)
        others = used / ((time.perf_counter() - started) * (os.cpu_count() or 1))
        attempts.append((others, spent))
        if others <= OTHERS:
            break
    return min(attempts)[1]


def _busy_seconds() -> float:
    """Busy seconds of all CPUs since the machine started, including the time that its host took away."""
    times = psutil.cpu_times()
    return sum(getattr(times, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal"))


def _filled(
    model: nn.Module, kinds: Sequence[StepKind], data: Examples, orders: dict[bool, list[list[int]]], batch_size: int
) -> dict[int, MemoryCache]:
    """A filled cache for each boundary that steps start from."""
    caches: dict[int, MemoryCache] = {}
    wanted = [data[row] for grouped in orders.values() for batch in grouped for row in batch]
    for kind in kinds:
        boundary = kind.plan.boundary
        if kind.cached and boundary not in caches:
            with prepared(model, StepKind.prefix("fill", kind.plan, kind.early_frozen)) as adapted:
                caches[boundary] = MemoryCache()
                fill(adapted, boundary, wanted, caches[boundary], batch_size, show_progress=False)
    return caches


def _seconds(
    model: nn.Module, kind: StepKind, rows: list[Example], pad_token_id: int, caches: dict[int, MemoryCache]
) -> float:
    """Seconds of one step, without the time to adapt the model and to restore it."""
    with prepared(model, kind) as adapted:
        parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        _synchronize()
        started = time.perf_counter()
        if kind.cached:
            batch = collate_with_prefix(rows, pad_token_id, caches[kind.plan.boundary])
        else:
            batch = collate(rows, pad_token_id)
        batch = on_device_of(adapted, batch)
        if kind.only_prefix:
            prefix_output(adapted, kind.plan.boundary, batch)
        else:
            with nullcontext() if kind.in_place else bfloat16_autocast(adapted):
                loss = adapted(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        _synchronize()
        return time.perf_counter() - started


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _spread(data: Examples, batch_size: int, rounds: int, grouped: bool, seed: int) -> list[list[int]]:
    """Batches of an epoch at ``rounds`` evenly spaced quantiles of padded size, shuffled, after one for warm-up."""
    lengths = [len(example) for example in data.examples]
    order: Order = "grouped" if grouped else "random"
    epoch = training_batches(lengths, batch_size, len(lengths) // batch_size, seed, order)
    by_size = sorted(epoch, key=lambda batch: max(lengths[row] for row in batch))
    chosen = [by_size[int((number + 0.5) / rounds * len(by_size))] for number in range(rounds)]
    random.Random(seed).shuffle(chosen)
    return [by_size[len(by_size) // 2], *chosen]
