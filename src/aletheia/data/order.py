"""The order of training: the rows of each batch of a whole run, from the seed alone. No torch."""

import random
from collections.abc import Sequence

POOL_BATCHES = 20  # batches per sorted pool: enough to save most padding, few enough to stay mixed


def epoch_order(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int, group_by_length: bool = True
) -> list[int]:
    """Row indices of one epoch, to be cut into batches: every row once, the rows of an incomplete batch last.

    With ``group_by_length`` the shuffled rows are cut into pools of 20 batches. Each pool is sorted by length and cut
    into batches, and all batches are shuffled. So rows of a batch have similar lengths, and batches of one length are
    spread over the epoch.
    """
    draw = random.Random(f"{seed}/{epoch}")
    rows = list(range(len(lengths)))
    draw.shuffle(rows)
    if not group_by_length:
        return rows
    pools = _cut(rows, POOL_BATCHES * batch_size)
    batches = [batch for pool in pools for batch in _cut(sorted(pool, key=lambda row: -lengths[row]), batch_size)]
    draw.shuffle(batches)
    batches.sort(key=lambda batch: len(batch) < batch_size)
    return [row for batch in batches for row in batch]


def training_batches(
    lengths: Sequence[int], batch_size: int, steps: int, seed: int, group_by_length: bool = True
) -> list[list[int]]:
    """Row indices of each of ``steps`` batches; each epoch has every row once, and its last batch may be smaller."""
    batches: list[list[int]] = []
    epoch = 0
    while len(batches) < steps:
        batches += _cut(epoch_order(lengths, batch_size, seed, epoch, group_by_length), batch_size)
        epoch += 1
    return batches[:steps]


def _cut(rows: Sequence[int], size: int) -> list[list[int]]:
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]
