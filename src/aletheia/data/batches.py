"""Batches of examples, padded or packed. Shapes: B rows of the batch, T tokens of its longest row, N tokens of all."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from aletheia.data.examples import NO_LOSS, Example, Examples
from aletheia.data.order import batches_within
from aletheia.errors import DataError

Collator = Callable[[Sequence[Example]], dict[str, Any]]
FILLER = 1  # position of every token of a filler: a row starts at 0, so none can be taken for a row
LABELLED = "labelled_tokens"  # key for their number, for code that cannot read the labels
COPY_OF = "copy_of"  # attribute of a tensor on a device: its original in main memory, and the versions of both then


def collate(examples: Sequence[Example], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad on the right to the longest row; int64 ``input_ids``, ``attention_mask`` and ``labels``, each [B, T].

    With ``functools.partial(collate, pad_token_id=...)`` it is a ``data_collator`` of the transformers Trainer.
    """
    shape_BT = (len(examples), max(len(example) for example in examples))
    input_ids_BT = torch.full(shape_BT, pad_token_id, dtype=torch.int64)
    attention_mask_BT = torch.zeros(shape_BT, dtype=torch.int64)
    labels_BT = torch.full(shape_BT, NO_LOSS, dtype=torch.int64)
    for row, example in enumerate(examples):
        length = len(example)
        input_ids_BT[row, :length] = torch.tensor(example.input_ids, dtype=torch.int64)
        attention_mask_BT[row, :length] = 1
        labels_BT[row, :length] = torch.tensor(example.labels, dtype=torch.int64)
    return {"input_ids": input_ids_BT, "attention_mask": attention_mask_BT, "labels": labels_BT}


@dataclass(frozen=True)
class PackSize:
    """The size that packed batches are filled up to: ``tokens`` tokens in all, in at most ``rows`` rows."""

    tokens: int
    rows: int


def collate_packed(examples: Sequence[Example], size: PackSize | None = None, pad_token_id: int = 0) -> dict[str, Any]:
    """One row after another in one sequence, without padding: ``input_ids``, ``position_ids`` and ``labels`` [1, N].

    ``cu_seq_lens_q`` and ``cu_seq_lens_k`` (int32 [S + 1]) give the starts of the S rows. ``max_length_q`` and
    ``max_length_k`` are the longest length, rounded up to a power of two: few values, so compiled code is reused.
    Attention needs only these; the ``attention_mask`` [1, 1, 1, 1] merely keeps models from making another one. The
    first token of a row has no label, because nothing predicts it.

    With ``size``, every batch has the same shapes. N is ``size.tokens``: one segment of filler follows the rows, all
    ``pad_token_id`` without labels, at position ``FILLER``. The starts are [``size.rows`` + 2]: missing rows are empty
    segments after the filler. The longest length is taken to be ``size.tokens``.

    Raises:
        DataError: the rows do not fit into ``size``.
    """
    lengths = [len(example) for example in examples]
    ids = [token for example in examples for token in example.input_ids]
    labels = [label for example in examples for label in (NO_LOSS, *example.labels[1:])]
    positions = [position for length in lengths for position in range(length)]
    starts = [0, *itertools.accumulate(lengths)]
    longest = 1 << (max(lengths) - 1).bit_length()
    if size is not None:
        missing = size.tokens - len(ids)
        if missing < 0 or len(examples) > size.rows:
            raise DataError(
                f"found a batch of {len(examples)} rows and {len(ids):,} tokens, expected at most {size.rows} rows and "
                f"{size.tokens:,} tokens; raise the size that batches are filled up to"
            )
        ids += [pad_token_id] * missing
        labels += [NO_LOSS] * missing
        positions += [FILLER] * missing
        starts += [size.tokens] * (size.rows + 1 - len(examples))
        longest = size.tokens
    bounds = torch.tensor(starts, dtype=torch.int32)
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
        "labels": torch.tensor([labels]),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def on_device_of(model: torch.nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with its tensors on the device of the model's parameters."""
    device = next(model.parameters()).device
    return {name: moved(value, device) for name, value in batch.items()}


def moved(value: Any, device: torch.device) -> Any:
    """A tensor of main memory on ``device``, without waiting for the copy; :func:`on_host` still reads the original."""
    if not isinstance(value, torch.Tensor):
        return value
    there = value.to(device, non_blocking=True)
    if there is not value and value.device.type == "cpu":
        vars(there)[COPY_OF] = value, (value._version, there._version)
    return there


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor holds, where that can be read without waiting for its device; otherwise the tensor itself.

    That is the original of :func:`moved`, until one of the two changes in place. A slice or another copy has none.
    """
    original, versions = vars(tensor).get(COPY_OF, (tensor, None))
    return original if versions == (original._version, tensor._version) else tensor


def labelled_tokens(labels_BT: torch.Tensor) -> torch.Tensor:
    """How many tokens carry a loss, as a 0-d tensor; position 0 is never predicted and never counts."""
    return (labels_BT[:, 1:] != NO_LOSS).sum()


def sample_batches(examples: Examples, batches: int, batch_size: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Draw ``batches`` batches of distinct rows, the same for a seed under every torch version.

    If there are too few rows, there are fewer batches, at least one, and the last may be smaller.

    Raises:
        DataError: no examples, or batches or batch_size below 1.
    """
    _check(examples, batch_size)
    if batches < 1:
        raise DataError(f"found {batches} as the number of batches, expected at least 1; raise `batches`")
    count = min(len(examples), batches * batch_size)
    drawn = random.Random(seed).sample(range(len(examples)), count)
    return [_batch(examples, drawn[start : start + batch_size]) for start in range(0, count, batch_size)]


def padded_batches(examples: Examples, batch_size: int) -> Iterator[dict[str, Any]]:
    """Every row once, longest first: little padding, and too little memory shows at once.

    Raises:
        DataError: no examples, or batch_size below 1.
    """
    _check(examples, batch_size)
    lengths = [len(row) for row in examples.examples]
    return (_batch(examples, rows) for rows in batches_within(lengths, batch_size * max(lengths), batch_size))


def _batch(examples: Examples, indices: Sequence[int]) -> dict[str, torch.Tensor]:
    return collate([examples[index] for index in indices], examples.pad_token_id)


def _check(examples: Examples, batch_size: int) -> None:
    if batch_size < 1:
        raise DataError(f"found the batch size {batch_size}, expected at least 1; raise `batch_size`")
    if len(examples) == 0:
        raise DataError(f"{examples.identity.name}: found no examples, expected at least one; add rows")
