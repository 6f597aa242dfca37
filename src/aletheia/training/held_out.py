"""The held-out loss: mean over completion tokens, not over batches."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from aletheia.anatomy.modes import in_mode
from aletheia.data.batches import labelled_tokens, on_device_of, padded_batches
from aletheia.data.examples import Examples
from aletheia.errors import DataError
from aletheia.training.processes import Launch


def held_out_loss(model: nn.Module, examples: Examples, batch_size: int = 8) -> float:
    """Mean cross-entropy over the labelled tokens of ``examples``, in nats per token.

    The model runs in eval mode; afterwards its modules have their earlier modes again. Where several processes train
    it, all must call this function: they divide the batches among them, and all get the same result.

    Args:
        model: the model, adapted or not.
        examples: the held-out rows.
        batch_size: rows per batch.

    Raises:
        DataError: the examples hold no labelled token.
    """
    return loss_over(model, padded_batches(examples, batch_size))


@torch.no_grad()
def loss_over(
    model: nn.Module,
    held_out: Iterable[dict[str, Any]],
    seen: Callable[[int, int], None] = lambda done, of: None,
) -> float:
    """The loss of :func:`held_out_loss` over batches.

    Args:
        model: the model, adapted or not.
        held_out: the batches.
        seen: called with how many batches are done, and how many there are.

    Raises:
        DataError: the batches hold no labelled token.
    """
    sums = torch.zeros(2, dtype=torch.float64)  # nats, tokens
    launch = Launch.here()
    batches = list(held_out)
    with in_mode(model, training=False):
        for start in range(0, len(batches), launch.processes):  # all processes must run sharded layers equally often
            own = start + launch.rank < len(batches)
            batch = batches[start + launch.rank] if own else batches[0]
            labelled = int(labelled_tokens(batch["labels"]))
            loss = model(**on_device_of(model, batch), use_cache=False).loss
            seen(min(start + launch.processes, len(batches)), len(batches))
            if own:
                sums += torch.tensor([loss.item() * labelled, labelled], dtype=torch.float64)
    if launch.processes > 1:
        sums = sums.to("cpu" if dist.get_backend() == "gloo" else next(model.parameters()).device)
        dist.all_reduce(sums)
    nats, tokens = (float(number) for number in sums)
    if tokens == 0:
        raise DataError("the held-out rows hold no labelled token; expected at least one completion")
    return nats / tokens
