"""The low-rank factors of an adapter folder, and the same adapter at one rank and one scale.

vLLM and mlx-lm know one rank and one scale; llama.cpp divides one alpha by the rank of each tensor. Padding the factors
with zeros and multiplying the scale into B gives all of them the same product as PEFT.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import load_peft_weights
from torch import Tensor
from torch.nn.functional import pad

from aletheia.adapters.saved_config import not_trained_here, read_lora_config, stored_scales
from aletheia.data.sources import one_line
from aletheia.errors import AdapterError

_PREFIX = "base_model.model."
_PLAIN = "expected plain LoRA on matrices of the layers; set `to` merged instead"


@dataclass(frozen=True)
class Pair:
    """What an adapter adds to ``x W``: ``scale * (x A^T) B^T``. A is rank x in, B is out x rank."""

    A_RI: Tensor
    B_OR: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return int(self.A_RI.shape[0])

    def at(self, rank: int) -> "Pair":
        """The same product in float32 with scale 1, padded to ``rank``, which must not be smaller."""
        more = rank - self.rank
        assert more >= 0, "a rank is only padded"
        A_RI = pad(self.A_RI.float(), (0, 0, 0, more)).contiguous()
        return Pair(A_RI, pad(self.B_OR.float() * self.scale, (0, more)).contiguous(), 1.0)


@dataclass(frozen=True)
class Factors:
    """A plain LoRA adapter: its configuration, and the factors of every adapted matrix by full name."""

    config: LoraConfig
    pairs: Mapping[str, Pair]

    @property
    def largest_rank(self) -> int:
        """The largest rank of any matrix."""
        return max(pair.rank for pair in self.pairs.values())

    def at(self, rank: int) -> dict[str, Pair]:
        """All pairs at one rank, with scale 1."""
        return {name: pair.at(rank) for name, pair in self.pairs.items()}


def read_factors(folder: Path, reader: str, allow_pickle: bool = False) -> Factors:
    """Read an adapter for a program that takes plain LoRA on matrices of the layers.

    Args:
        folder: a run folder or any PEFT adapter folder.
        reader: the program that will load it, for messages.
        allow_pickle: read ``adapter_model.bin``, with torch's ``weights_only``.

    Raises:
        AdapterError: the folder cannot be read, or holds more than such a program can load.
    """
    config = read_lora_config(folder, allow_pickle)
    if beside := not_trained_here(config):
        raise AdapterError(f"{folder} has `{beside}`, which {reader} cannot load; {_PLAIN}")
    if config.target_parameters:
        raise AdapterError(f"{folder} adapts {config.target_parameters[0]}, which {reader} cannot load; {_PLAIN}")
    try:
        stored = load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # a foreign file: PEFT may raise anything
        raise AdapterError(f"{folder}: its weights cannot be read ({one_line(error)}); download it again") from error
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in stored.items():
        name, _, factor = key.removeprefix(_PREFIX).rpartition(".lora_")
        if factor not in ("A.weight", "B.weight") or ".experts." in name or not _in_a_layer(name):
            raise AdapterError(f"{folder} holds {key}, which {reader} cannot load; {_PLAIN}")
        found.setdefault(name, {})[factor[0]] = value
    return Factors(config, _pairs(folder, config, found))


def _pairs(folder: Path, config: LoraConfig, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Pair]:
    for name, both in found.items():
        if both.keys() != {"A", "B"} or both["A"].dim() != 2 or both["A"].shape[0] != both["B"].shape[-1]:
            raise AdapterError(f"{folder}: A and B of {name} do not fit each other; download it again")
        if not all(torch.isfinite(factor).all() for factor in both.values()):
            raise AdapterError(f"{folder}: {name} has weights that are not finite; train it again")
    if not found:
        raise AdapterError(f"{folder} holds no weights; expected those of an adapter")
    scales = stored_scales(config, {name: int(both["A"].shape[0]) for name, both in found.items()})
    return {name: Pair(both["A"], both["B"], scales[name]) for name, both in found.items()}


def _in_a_layer(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))
