"""The rows of each batch: in training by the seed, in evaluation by the tokens of a batch. No torch."""

import heapq
import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import Literal

Order = Literal["grouped", "balanced", "random"]  # rows of similar length, batches of nearly equal size, neither
GROUPED_POOL = 20  # batches per sorted pool: enough to save most padding, few enough to stay mixed
BALANCED_POOL = 256  # batches per balanced pool, at least: in smaller ones the largest batch is larger
BLUR = 0.1  # largest part by which a row counts as shorter: without it, most rows meet again in every epoch


def epoch_order(
    lengths: Sequence[int],
    batch_size: int,
    seed: int,
    epoch: int,
    order: Order = "grouped",
    batches_per_step: int = 1,
) -> list[int]:
    """Row indices of one epoch, to be cut into batches: every row once, the rows of an incomplete batch last.

    - ``random``: shuffled rows.
    - ``grouped``: the rows of a step have similar lengths. Shuffled rows are cut into pools of 20 steps. Each pool is
      sorted by length and cut into steps, and all steps are shuffled. So steps of one length are spread over the epoch.
    - ``balanced``: all batches have nearly the same number of tokens. Shuffled rows are cut into pools of at least 256
      batches. The rows of a pool are spread over its batches, and all batches are shuffled.

    Args:
        lengths: tokens of each row.
        batch_size: rows of a batch on one device.
        seed: seed of the run.
        epoch: number of the epoch, from 0.
        order: which of the three orders.
        batches_per_step: batches of an optimizer step, over all devices.
    """
    draw = random.Random(f"{seed}/{epoch}")
    rows = list(range(len(lengths)))
    draw.shuffle(rows)
    if order == "random":
        return rows
    if order == "grouped":
        size = batch_size * batches_per_step
        sorted_pools = (sorted(pool, key=lambda row: -lengths[row]) for pool in _cut(rows, GROUPED_POOL * size))
        batches = [batch for pool in sorted_pools for batch in _cut(pool, size)]
    else:
        size = batch_size
        batches = [batch for pool in _pools(rows, size) for batch in _balanced(pool, lengths, size, draw)]
        for batch in batches:
            draw.shuffle(batch)
    draw.shuffle(batches)
    batches.sort(key=lambda batch: len(batch) < size)
    return [row for batch in batches for row in batch]


def training_batches(
    lengths: Sequence[int],
    batch_size: int,
    steps: int,
    seed: int,
    order: Order = "grouped",
    batches_per_step: int = 1,
) -> list[list[int]]:
    """Row indices of each of ``steps`` steps; each epoch has every row once, and its last step may be smaller.

    The arguments are those of :func:`epoch_order`. By default, a step is a batch.
    """
    batches: list[list[int]] = []
    epoch = 0
    while len(batches) < steps:
        rows = epoch_order(lengths, batch_size, seed, epoch, order, batches_per_step)
        batches += _cut(rows, batch_size * batches_per_step)
        epoch += 1
    return batches[:steps]


def batches_within(lengths: Sequence[int], most_tokens: int, padded_rows: int | None) -> list[list[int]]:
    """Row indices of few batches of at most ``most_tokens``; a longer row is alone. Every row comes once.

    The longest rows come first. A packed row goes where it leaves the least room (best-fit decreasing).

    Args:
        lengths: tokens of each row.
        most_tokens: tokens of a batch, padding included.
        padded_rows: most rows of a batch, each of which takes the length of the longest; None: rows are packed.
    """
    batches: list[list[int]] = []
    room: list[tuple[int, int]] = []  # tokens that still fit into a packed batch, and its number; sorted
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if padded_rows is None:
            at = bisect_left(room, (lengths[row], 0))
            left, number = room.pop(at) if at < len(room) else (most_tokens, len(batches))
            insort(room, (left - lengths[row], number))
        else:
            last = batches[-1] if batches else []
            fits = last and (len(last) + 1) * lengths[last[0]] <= most_tokens and len(last) < padded_rows
            number = len(batches) - bool(fits)
        if number == len(batches):
            batches.append([])
        batches[number].append(row)
    return batches


def _balanced(rows: Sequence[int], lengths: Sequence[int], batch_size: int, draw: random.Random) -> list[list[int]]:
    """Batches of ``batch_size`` rows with nearly the same number of tokens; the last one may be incomplete.

    Long rows come first. Each goes to the batch that needs the longest rows: that lacks most tokens to the mean, for
    each row that it still takes.
    """
    sizes = [len(part) for part in _cut(rows, batch_size)]
    mean = fmean(lengths[row] for row in rows)
    missing = [size * mean for size in sizes]  # tokens
    batches: list[list[int]] = [[] for _ in sizes]
    open_ones = [(-mean, number) for number in range(len(sizes))]  # a heap: all keys are equal
    for row in sorted(rows, key=lambda row: -lengths[row] * draw.uniform(1 - BLUR, 1)):
        _, number = heapq.heappop(open_ones)
        batches[number].append(row)
        missing[number] -= lengths[row]
        if room := sizes[number] - len(batches[number]):
            heapq.heappush(open_ones, (-missing[number] / room, number))
    return batches


def _pools(rows: Sequence[int], batch_size: int) -> list[list[int]]:
    """Rows of at least ``BALANCED_POOL`` batches each, if there are so many; only the last batch may be incomplete."""
    batches = _cut(rows, batch_size)
    count = max(1, len(batches) // BALANCED_POOL)
    starts = [len(batches) * number // count for number in range(count + 1)]
    return [[row for batch in batches[start:stop] for row in batch] for start, stop in pairwise(starts)]


def _cut(rows: Sequence[int], size: int) -> list[list[int]]:
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]
