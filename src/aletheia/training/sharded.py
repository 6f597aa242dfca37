"""Trainers whose layers are sharded over processes (FSDP2)."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from peft import set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from aletheia.prefix.source import Group


def is_sharded(trainer: Trainer) -> bool:
    """Whether each process holds a part of every layer."""
    return bool(getattr(trainer, "is_fsdp_enabled", False))


def group_of(trainer: Trainer) -> Group | None:
    """The processes that train, where there are several."""
    if trainer.args.world_size == 1:
        return None
    device = trainer.args.device if dist.get_backend() == "nccl" else torch.device("cpu")

    def largest(numbers: Sequence[int]) -> list[int]:
        found = torch.tensor(list(numbers), device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return [int(number) for number in found]

    return Group(largest, is_sharded(trainer))


def load_frozen(trainer: Trainer, resume: str | bool | None) -> None:
    """Load all adapters of a checkpoint: FSDP's own files leave out frozen parameters."""
    folder = get_last_checkpoint(str(trainer.args.output_dir)) if resume is True else resume
    file = Path(str(folder)) / SAFETENSORS_WEIGHTS_NAME
    if folder and file.is_file():
        set_peft_model_state_dict(trainer.model, load_file(file))
