"""The rows that a batch holds, and their places: padded on the right, or packed into one sequence.

Shapes: B samples of the batch, T tokens of each, S rows of a packed sample.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from aletheia.data.batches import FILLER, LABELLED, on_host
from aletheia.data.examples import NO_LOSS, Example
from aletheia.prefix.stored import INPUTS, OF_PACKS

# arguments of a forward pass that do not change hidden states, or that repeat what positions say
WITHOUT_INFLUENCE = {
    *OF_PACKS,
    LABELLED,
    *("labels", "shift_labels", "num_items_in_batch", "use_cache", "return_dict", "logits_to_keep", "fused_lm_head"),
    "length",
}


@dataclass(frozen=True, slots=True)
class Span:
    """A row of tokens and its place: in ``sample``, from token ``start``."""

    sample: int
    start: int
    row: Example

    @property
    def stop(self) -> int:
        """The token after its last one."""
        return self.start + len(self.row)


def find_spans(batch: Mapping[str, Any]) -> list[Span] | None:
    """The rows of a batch, from the arguments of a forward pass; None if it is not made of rows that start at 0.

    A row is the part of a sample that the attention mask shows. In packed samples, it runs from one position 0 to the
    next, or to the filler of a batch of fixed size. The result is also None with padding on the left, masks of more
    than two dimensions, embeddings instead of tokens, a key-value cache, or unknown arguments: the layers themselves
    must run.
    """
    batch = {name: on_host(value) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    ids_BT = batch.get("input_ids")
    if not isinstance(ids_BT, torch.Tensor) or ids_BT.dim() != 2:
        return None
    given = {name for name, value in batch.items() if value is not None and value is not False}
    if given - WITHOUT_INFLUENCE - set(INPUTS) or (given & set(OF_PACKS) and "position_ids" not in given):
        return None
    mask_BT, positions_BT = batch.get("attention_mask"), batch.get("position_ids")
    if "cu_seq_lens_q" in given and isinstance(mask_BT, torch.Tensor) and mask_BT.numel() == 1:
        mask_BT = None  # it marks packed rows and is not a mask
    for given_BT in (mask_BT, positions_BT):
        if given_BT is not None and not (isinstance(given_BT, torch.Tensor) and given_BT.dim() == 2):
            return None
    tokens = ids_BT.tolist()
    masks = [None] * len(tokens) if mask_BT is None else mask_BT.expand_as(ids_BT).tolist()
    positions = [None] * len(tokens) if positions_BT is None else positions_BT.expand_as(ids_BT).tolist()
    bounds_S1 = batch.get("cu_seq_lens_q")
    bounds = bounds_S1.tolist() if isinstance(bounds_S1, torch.Tensor) and bounds_S1.dim() == len(tokens) == 1 else []
    spans: list[Span] = []
    for sample, (ids_T, mask_T, positions_T) in enumerate(zip(tokens, masks, positions, strict=True)):
        length = len(ids_T) if mask_T is None else sum(map(bool, mask_T))
        if mask_T is not None and not all(mask_T[:length]):
            return None
        if positions_T is not None:
            length = _without_filler(positions_T, bounds, length)
        starts = [0] if positions_T is None else _starts(positions_T[:length])
        if starts is None:
            return None
        for start, stop in zip(starts, [*starts[1:], length], strict=True):
            if stop > start:
                row = Example(ids_T[start:stop], [NO_LOSS] * (stop - start), "a row of the batch")
                spans.append(Span(sample, start, row))
    return spans


def is_packed(spans: list[Span]) -> bool:
    """Whether a sample holds several rows."""
    return len({span.sample for span in spans}) < len(spans)


def _without_filler(positions_T: list[int], bounds: list[int], length: int) -> int:
    """Where the rows of a packed sample end: a segment that begins at ``FILLER`` holds no row."""
    starts = (start for start, stop in pairwise(bounds) if start < stop <= length)
    return next((start for start in starts if positions_T[start] == FILLER), length)


def _starts(positions_T: list[int]) -> list[int] | None:
    """Where positions start at 0 again; None if they do anything but count up from there."""
    starts = [at for at, position in enumerate(positions_T) if position == 0]
    if not starts or starts[0] != 0:
        return None if positions_T else [0]
    expected = [
        at - start
        for start, stop in zip(starts, [*starts[1:], len(positions_T)], strict=True)
        for at in range(start, stop)
    ]
    return starts if positions_T == expected else None
