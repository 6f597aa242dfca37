"""The outcome of a run: the whole adapter, whether it learned anything, and whether the loss rose."""

import hashlib

import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor

from aletheia.runs.schema import Verdict


def whole_adapter(model: PeftModel) -> dict[str, torch.Tensor] | None:
    """The adapter's weights by name, gathered from all processes; None where they are not sharded.

    All processes must call this function.
    """
    own = {name: value for name, value in model.named_parameters() if "lora_" in name}
    if not any(isinstance(value, DTensor) for value in own.values()):
        return None
    return {name: value.full_tensor().cpu() if isinstance(value, DTensor) else value for name, value in own.items()}


def digest_of_b(model: PeftModel) -> str:
    """A hash of every B: if it is the same as at the start, the run has learned nothing.

    All processes must call this function.
    """
    state = whole_adapter(model) or dict(model.named_parameters())
    digest = hashlib.sha256()
    for value in (value for name, value in state.items() if "lora_B" in name):
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def verdict(learned: bool, before: float, after: float) -> Verdict:
    """The verdict on a run by its held-out losses; with a learning rate near 0, the loss may stay the same."""
    if not learned or after == before:
        return "nothing"
    return "worse" if after > before else "learned"
