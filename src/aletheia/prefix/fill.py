"""Filling the prefix cache before training, for a model whose lower layers leave memory."""

from collections.abc import Sequence

import torch
from torch import nn

from aletheia.anatomy.modes import in_mode
from aletheia.data.examples import Example
from aletheia.errors import CacheError
from aletheia.prefix.cache import PrefixCache
from aletheia.prefix.source import row_states
from aletheia.progress import Progress, Say


def fill(
    model: nn.Module,
    boundary: int,
    rows: Sequence[Example],
    cache: PrefixCache,
    batch_size: int,
    show_progress: bool | Say = True,
) -> int:
    """Compute and store what ``cache`` lacks, longest rows first, in eval mode; returns how many rows that were.

    A build that is killed goes on where it stopped, where the cache is on disk.

    Raises:
        CacheError: a stored value would not be finite, or the disk fails.
    """
    missing = sorted(cache.missing(rows), key=len, reverse=True)
    with in_mode(model, training=False), Progress("cache", len(missing), "rows", show_progress) as progress:
        for start in range(0, len(missing), batch_size):
            group = missing[start : start + batch_size]
            for row, hidden_TD in zip(group, row_states(model, boundary, group), strict=True):
                if not torch.isfinite(hidden_TD).all():
                    raise CacheError(f"{row.where}: the prefix gives a value that is not finite; set `dtype` float32")
                cache.put(row, hidden_TD)
            progress.advance(len(group))
    return len(missing)
