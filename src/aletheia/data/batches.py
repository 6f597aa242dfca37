"""Padded batches of examples. Shapes: B rows of the batch, T tokens of its longest row."""

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from aletheia.data.examples import NO_LOSS, Example, Examples
from aletheia.errors import DataError

Collator = Callable[[Sequence[Example]], dict[str, torch.Tensor]]


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


def on_device_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch where the model's parameters are."""
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


def labelled_tokens(labels_BT: torch.Tensor) -> torch.Tensor:
    """How many tokens carry a loss, a 0-d tensor; position 0 is never predicted and never counts."""
    return (labels_BT[:, 1:] != NO_LOSS).sum()


def sample_batches(examples: Examples, batches: int, batch_size: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Draw ``batches`` batches of distinct rows, the same for a seed under every torch version.

    With fewer rows than asked for there are fewer batches, the last one possibly smaller, but at least one.

    Raises:
        DataError: no examples, or batches or batch_size below 1.
    """
    _check(examples, batch_size)
    if batches < 1:
        raise DataError(f"found {batches} batches asked for, expected at least 1; raise `batches`")
    count = min(len(examples), batches * batch_size)
    drawn = random.Random(seed).sample(range(len(examples)), count)
    return [_batch(examples, drawn[start : start + batch_size]) for start in range(0, count, batch_size)]


def length_sorted_batches(
    examples: Examples, batch_size: int, collator: Collator | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """Every row once, longest first: little padding, and a lack of memory shows at once.

    ``collator`` makes a batch of rows, by default :func:`collate`.

    Raises:
        DataError: no examples, or batch_size below 1.
    """
    _check(examples, batch_size)
    order = sorted(range(len(examples)), key=lambda index: (-len(examples[index]), index))
    make = collator or partial(collate, pad_token_id=examples.pad_token_id)
    starts = range(0, len(order), batch_size)
    return (make([examples[index] for index in order[start : start + batch_size]]) for start in starts)


def _batch(examples: Examples, indices: Sequence[int]) -> dict[str, torch.Tensor]:
    return collate([examples[index] for index in indices], examples.pad_token_id)


def _check(examples: Examples, batch_size: int) -> None:
    if batch_size < 1:
        raise DataError(f"found the batch size {batch_size}, expected at least 1; raise `batch_size`")
    if len(examples) == 0:
        raise DataError(f"{examples.identity.name}: found no examples, expected at least one; add rows")
