"""The held-out loss: mean over completion tokens, not over batches."""

import torch
from torch import nn

from aletheia.anatomy.modes import in_mode
from aletheia.data.batches import Collator, labelled_tokens, length_sorted_batches, on_device_of
from aletheia.data.examples import Examples
from aletheia.errors import DataError


@torch.no_grad()
def held_out_loss(model: nn.Module, examples: Examples, batch_size: int = 8, collator: Collator | None = None) -> float:
    """Mean cross-entropy over the labelled tokens of ``examples``, in nats per token.

    The model is evaluated in eval mode; its modules are put back into the modes they were in. ``collator`` makes a
    batch of rows, by default :func:`aletheia.data.batches.collate`.

    Raises:
        DataError: the examples hold no labelled token.
    """
    summed = torch.zeros((), dtype=torch.float64)
    tokens = 0
    with in_mode(model, training=False):
        for batch in length_sorted_batches(examples, batch_size, collator):
            labelled = int(labelled_tokens(batch["labels"]))
            loss = model(**on_device_of(model, batch), use_cache=False).loss
            summed += loss.cpu().double() * labelled
            tokens += labelled
    if tokens == 0:
        raise DataError("the held-out rows hold no labelled token; expected at least one completion")
    return summed.item() / tokens
