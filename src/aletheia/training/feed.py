"""The batches of any trainer, copied to its device without a wait, and still readable on the host."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Trainer

from aletheia.data.batches import moved
from aletheia.execution.backend import is_behind


@contextmanager
def kept_on_host(trainer: Trainer) -> Iterator[None]:
    """Copy the training batches to a GPU here, and not in the loader of accelerate, within this context.

    A step then finds rows and labels without waiting for the device. The loader's own copy waits, too, unless
    ``accelerator_config`` says otherwise. Batches keep their type and keys, so the loop and the model see what they
    always saw. Where one process loads for all (``dispatch_batches``), nothing changes.
    """
    loader: Any = trainer.callback_handler.train_dataloader
    device = getattr(loader, "device", None)
    if device is None or not is_behind(device):
        yield
        return
    own = trainer.get_batch_samples

    @functools.wraps(own)
    def samples(epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        return own(map(functools.partial(_on, device), epoch_iterator), *args, **kwargs)

    loader.device = None
    trainer.get_batch_samples = samples  # type: ignore[method-assign]
    try:
        yield
    finally:
        loader.device = device
        trainer.get_batch_samples = own  # type: ignore[method-assign]


def _on(device: torch.device, batch: Any) -> Any:
    if not isinstance(batch, Mapping):
        return batch  # Trainer moves it
    return type(batch)({name: moved(value, device) for name, value in batch.items()})  # type: ignore[call-arg]
