"""Fill the prefix cache before training, so that the lower layers can be freed from memory."""

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
    most_tokens: int | None = None,
) -> int:
    """Compute and store the rows that ``cache`` lacks, longest first, in eval mode; returns how many there were.

    ``batch_size`` rows run at once, or fewer where these would be more than ``most_tokens``, padding included. With a
    cache on disk, a build that was killed continues where it stopped.

    Raises:
        CacheError: a value is not finite, or the disk fails.
    """
    missing = sorted(cache.missing(rows), key=len, reverse=True)
    with in_mode(model, training=False), Progress("cache", len(missing), "rows", show_progress) as progress:
        for start in range(0, len(missing), batch_size):
            group = missing[start : start + batch_size]
            for row, hidden_TD in zip(group, row_states(model, boundary, group, most_tokens), strict=True):
                if not torch.isfinite(hidden_TD).all():
                    raise CacheError(
                        f"{row.where}: the layers below the boundary give a value that is not finite; expected finite "
                        "values; set `dtype` float32"
                    )
                cache.put(row, hidden_TD)
            progress.advance(len(group))
    return len(missing)
