"""Read an adapter folder: a finished run, or one that another program wrote."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import LoraConfig

from aletheia.adapters.saved_config import PICKLE, SAFETENSORS, header, not_trained_here, read_lora_config, resolved
from aletheia.anatomy import foreign
from aletheia.anatomy.schema import role_of
from aletheia.errors import AdapterError, ModelError
from aletheia.planning.plan import Adapter
from aletheia.runs.adapter_folder import AdapterFolder, Curve
from aletheia.runs.schema import METRICS_FILE, Run
from aletheia.settings import LARGEST_RANK, MOST_LAYERS

STATE = "trainer_state.json"
STATE_BYTES = 100_000_000  # enough for a million logged steps
_CHECKPOINTS = ("checkpoint-*", "checkpoints/checkpoint-*")  # of Trainer; of aletheia
_FACTOR = re.compile(r"^(?P<name>.+?)\.lora_(embedding_)?[ABab]\b|^(?P<other>.+)\.lora_magnitude_vector")


def read_run(path: str | Path) -> Run | AdapterFolder:
    """A run folder, or any PEFT adapter folder.

    Raises:
        ArtifactError: the folder holds neither, or a file of the run was changed since it was written.
        AdapterError: as in :func:`read_adapter`.
    """
    folder = Path(path)
    is_other = (folder / foreign.ADAPTER_CONFIG).is_file() and not (folder / METRICS_FILE).exists()
    return read_adapter(folder) if is_other else Run.read(folder)


def read_adapter(folder: str | Path) -> AdapterFolder:
    """Describe an adapter folder from its config, the header of its weights, and the Trainer state in it.

    It reads no weights and needs no model.

    Raises:
        AdapterError: the folder holds no LoRA adapter in safetensors, or its files cannot be read.
    """
    folder = Path(folder)
    if (folder / PICKLE).is_file() and not (folder / SAFETENSORS).is_file():
        raise AdapterError(
            f"{folder} holds its weights in {PICKLE}, a pickle, which can run code when it is loaded; expected "
            f"{SAFETENSORS}; save the adapter again with PEFT"
        )
    config = read_lora_config(folder)
    sizes = _sizes(folder)
    stacks = {name: target for target in config.target_parameters or () if (name := target.rpartition(".")[0])}
    ranks = _numbers(config.rank_pattern, sizes, stacks, config.r)
    alphas = _numbers(config.alpha_pattern, sizes, stacks, config.lora_alpha)
    adapters, outside = [], []
    for name, (stored_rank, parameters) in sizes.items():
        plain = name.replace(".base_layer", "")
        layer, inside = _place(plain)
        if layer is None:
            outside.append(plain)
            continue
        fused = any(_ends_with(plain, stack) for stack in stacks)
        rank = ranks[name] if fused or stored_rank is None else stored_rank
        if rank > LARGEST_RANK:
            raise AdapterError(
                f"{folder}: {plain} has rank {rank:,}; expected at most {LARGEST_RANK:,}; download it again"
            )
        adapters.append(
            Adapter(
                name=plain,
                layer=layer,
                role=role_of(inside),
                rank=rank,
                alpha=alphas[name],
                fused=fused,
                parameters=parameters,
            )
        )
    train, held_out = _curves(folder)
    return AdapterFolder(
        path=folder,
        base=config.base_model_name_or_path,
        rank=config.r,
        alpha=config.lora_alpha,
        rslora=config.use_rslora,
        dropout=config.lora_dropout,
        adapters=tuple(sorted(adapters, key=lambda adapter: (adapter.layer, adapter.role != "attention"))),
        outside=tuple(sorted(outside)),
        beside=_beside(config),
        parameters=_stored_parameters(folder),
        made_with=_version(folder),
        train_curve=train,
        held_out_curve=held_out,
    )


def _sizes(folder: Path) -> dict[str, tuple[int | None, int]]:
    """Stored rank and parameters of every adapted module, by its name in the base model."""
    found: dict[str, tuple[int | None, int]] = {}
    for key, entry in header(folder / SAFETENSORS).items():
        if (match := _FACTOR.match(key)) is None:
            continue
        name = (match["name"] or match["other"]).removeprefix("base_model.model.")
        shape = _shape(entry, folder)
        rank, parameters = found.get(name, (None, 0))
        if ".lora_A" in key or ".lora_embedding_A" in key:
            rank = shape[0] if shape else None
        found[name] = rank, parameters + math.prod(shape)
    if not found:
        raise AdapterError(
            f"{folder / SAFETENSORS} holds no LoRA weights; expected lora_A and lora_B; download it again"
        )
    return found


def _shape(entry: Any, folder: Path) -> list[int]:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
        raise AdapterError(
            f"{folder / SAFETENSORS} lists a weight without a valid shape; expected one; download it again"
        )
    return shape


def _stored_parameters(folder: Path) -> int:
    return sum(math.prod(_shape(entry, folder)) for entry in header(folder / SAFETENSORS).values())


def _numbers(patterns: Any, names: Iterable[str], stacks: dict[str, str], common: Any) -> dict[str, Any]:
    """Rank or alpha of each module: from its own pattern, else from its stack of experts, else the common one."""
    plain = {name: name.replace(".base_layer", "") for name in names}
    meant = {
        name: [one, *(target for stack, target in stacks.items() if _ends_with(one, stack))]
        for name, one in plain.items()
    }
    found = resolved(patterns, {one for some in meant.values() for one in some})
    return {name: next((found[one] for one in some if one in found), common) for name, some in meant.items()}


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _place(name: str) -> tuple[int | None, str]:
    """The layer of a module, which is the first number in its path, and the path from there."""
    parts = name.split(".")
    at = next((at for at, part in enumerate(parts) if part.isascii() and part.isdigit()), None)
    if at is None or len(parts[at]) > 6 or int(parts[at]) >= MOST_LAYERS:
        return None, name
    return int(parts[at]), ".".join(parts[at:])


def _beside(config: LoraConfig) -> tuple[str, ...]:
    found = not_trained_here(config)
    return (found,) if found else ()


def _version(folder: Path) -> str | None:
    found = foreign.read_settings(folder / foreign.ADAPTER_CONFIG).get("peft_version")
    return found[:40] if isinstance(found, str) else None


def _curves(folder: Path) -> tuple[Curve, Curve]:
    """Training and held-out losses, from the Trainer state with the most steps; empty if there is none."""
    places = [folder / STATE, *(one / STATE for pattern in _CHECKPOINTS for one in folder.glob(pattern))]
    best: tuple[Curve, Curve] = (), ()
    for place in places:
        if not place.is_file():
            continue
        try:
            state = foreign.read_json(place, "a Trainer's state", STATE_BYTES, "remove it or download it again")
        except ModelError as error:
            raise AdapterError(str(error)) from error
        history = state.get("log_history") if isinstance(state, dict) else None
        lines = [line for line in history if isinstance(line, dict)] if isinstance(history, list) else []
        curves = _curve(lines, "loss"), _curve(lines, "eval_loss")
        best = max(best, curves, key=lambda one: max((step for curve in one for step, _ in curve), default=-1))
    return best


def _curve(history: list[dict[str, Any]], name: str) -> Curve:
    found = {}
    for line in history:
        step, loss = line.get("step"), line.get(name)
        if type(step) is int and step >= 0 and isinstance(loss, int | float) and math.isfinite(loss):
            found[step] = float(loss)
    return tuple(sorted(found.items()))
