"""The order of training: which rows make which batch, for a whole run, from the seed alone. No torch."""

import math
import random
from collections.abc import Sequence

POOL_BATCHES = 20  # batches cut from one sorted pool: enough to save most padding, few enough to stay mixed


def training_batches(
    lengths: Sequence[int], batch_size: int, steps: int, seed: int, group_by_length: bool = True
) -> list[list[int]]:
    """Row indices of each of ``steps`` batches; every epoch holds every row once, its last batch may be smaller.

    With ``group_by_length`` an epoch's shuffled rows are cut into pools of 20 batches, each pool is sorted by length
    and cut into batches, and the batches are shuffled: rows of a batch are of like length, batches of one length are
    spread over the epoch.
    """
    batches: list[list[int]] = []
    for epoch in range(math.ceil(steps / math.ceil(len(lengths) / batch_size))):
        draw = random.Random(f"{seed}/{epoch}")
        rows = list(range(len(lengths)))
        draw.shuffle(rows)
        if not group_by_length:
            batches += _cut(rows, batch_size)
            continue
        pools = _cut(rows, POOL_BATCHES * batch_size)
        grouped = [batch for pool in pools for batch in _cut(sorted(pool, key=lambda row: -lengths[row]), batch_size)]
        draw.shuffle(grouped)
        batches += grouped
    return batches[:steps]


def _cut(rows: Sequence[int], size: int) -> list[list[int]]:
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]
