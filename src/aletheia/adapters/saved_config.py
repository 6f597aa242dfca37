"""An ``adapter_config.json`` from an unknown source, checked before PEFT sees it.

PEFT treats its patterns as regular expressions, some of its settings import modules or decompose every weight, and PEFT
allocates whatever sizes it states. So only plain LoRA passes, with literal names, and no larger than the weights stored
next to it. The weights say which modules are adapted, and at which rank.
"""

import json
import math
import re
import struct
from collections.abc import Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import nn

from aletheia.anatomy import foreign
from aletheia.anatomy.read import is_matrix
from aletheia.errors import AdapterError, ModelError
from aletheia.settings import LARGEST_RANK

SAFETENSORS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
HEADER_BYTES = 100_000_000  # the limit of safetensors itself
MOST_NAMES = 20_000
MOST_MATCHED = 1_000  # patterns that PEFT matches against every module
LONGEST = 300  # characters of a name or pattern

_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")
# what PEFT and Aletheia write: a name with its dots escaped or not, whole or as an ending; it matches in linear time
_PATTERN = re.compile(r"\^?(\.\*\\?\.)?(?:[\w-]|\\?\.|\\-)+\$?")
_HARMLESS = (True, False, None, "gaussian", "orthogonal", "eva")  # initializations that leave the base as it is
_IGNORED = ("peft_version", "auto_mapping", "inference_mode", "runtime_config", "megatron_core", "eva_config")
_READ = (  # checked here, or used only by settings that are refused here
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "init_lora_weights", "fan_in_fan_out", "use_rslora", "ensure_weight_tying"),
    *("qalora_group_size", "loftq_config"),
)
_LOADED_ONLY = ("bias", "modules_to_save", "trainable_token_indices", "use_dora", "lora_bias")


def read_lora_config(folder: Path, allow_pickle: bool = False) -> LoraConfig:
    """The configuration of an adapter folder, if it is plain LoRA that is safe to load.

    Args:
        folder: the adapter folder.
        allow_pickle: accept weights in a pickle, which can run code when it is loaded.

    Raises:
        AdapterError: the configuration or the weights are refused. Until then no code has run, and no pattern has been
            matched.
    """
    try:
        foreign.check_files(folder)
        found = foreign.read_settings(folder / foreign.ADAPTER_CONFIG)
    except ModelError as error:
        raise AdapterError(str(error)) from error
    try:
        _check_kind(found)
        _check_numbers(found)
        _check_names(found)
    except ValueError as error:
        raise AdapterError(f"{folder / foreign.ADAPTER_CONFIG}: {error}") from None
    _check_weights(folder, allow_pickle)
    known = {one.name for one in fields(LoraConfig)} - {"peft_type", *_IGNORED}
    kept = {name: value for name, value in found.items() if name in known and value is not None}
    kept["init_lora_weights"] = True  # the stored weights overwrite the initial ones
    if kept.get("fan_in_fan_out"):
        kept["fan_in_fan_out"] = bool(kept["fan_in_fan_out"])
    try:
        return LoraConfig(**kept)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{folder / foreign.ADAPTER_CONFIG}: PEFT refuses it ({str(error)[:200]})") from error


def as_stored(config: LoraConfig, folder: Path, model: nn.Module) -> LoraConfig:
    """Rewrite ``config`` in place: every adapted module with its full name, and the rank that its weights have.

    So PEFT matches no pattern, and allocates nothing that is not stored. The config stays as it is where the model has
    no modules of the stored names, as with older releases of its family, or where parameters are adapted.

    Args:
        config: the configuration, from :func:`read_lora_config`.
        folder: the adapter folder.
        model: the base model.

    Returns:
        ``config``.

    Raises:
        AdapterError: ranks of config and weights differ, a module is no matrix, or an adapter that cannot be rewritten
            names its modules by a pattern, or has a rank that none of its weights has.
    """
    ranks = stored_ranks(folder)
    modules = dict(model.named_modules())
    own_ranks, own_alphas = resolved(config.rank_pattern, ranks), resolved(config.alpha_pattern, ranks)
    if not config.target_parameters and ranks and ranks.keys() <= modules.keys() & _meant(config, modules, ranks):
        for name, rank in ranks.items():
            if own_ranks.get(name, config.r) != rank:
                raise AdapterError(
                    f"{folder} contradicts itself: {name} has weights of rank {rank:,}, but its config says "
                    f"{own_ranks.get(name, config.r):,}; download it again"
                )
            if not is_matrix(modules[name]) and not isinstance(modules[name], nn.Embedding):
                raise AdapterError(f"{folder} adapts {name}, which is not a matrix; expected LoRA on Linear layers")
        config.target_modules = sorted(ranks)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        config.rank_pattern = {re.escape(name): rank for name, rank in own_ranks.items()}
        config.alpha_pattern = {re.escape(name): alpha for name, alpha in own_alphas.items()}
        return config
    is_pattern = isinstance(config.target_modules, str) and config.target_modules != "all-linear"
    if is_pattern or config.exclude_modules or config.layers_pattern:
        raise AdapterError(
            f"{folder} names its modules by a pattern, and this model has no modules of the names in its weights; "
            "expected an adapter trained on this base model"
        )
    patterns = len(config.rank_pattern or ()) + len(config.alpha_pattern or ())
    if patterns > MOST_MATCHED:
        raise AdapterError(f"{folder} has {patterns:,} patterns of ranks and alphas; expected at most {MOST_MATCHED:,}")
    most = max(ranks.values(), default=1)
    if ranks and max((config.r, *(config.rank_pattern or {}).values())) > most:
        raise AdapterError(f"{folder} says rank {config.r:,}, but its weights have at most {most:,}; download it again")
    return config


def stored_scales(config: LoraConfig, ranks: dict[str, int]) -> dict[str, float]:
    """The scale of each module's low-rank product in PEFT: alpha / rank, or rsLoRA's alpha / sqrt(rank).

    Args:
        config: the adapter's configuration, from :func:`read_lora_config`.
        ranks: rank of every adapted module by full name, from its weights.
    """
    own = resolved(config.alpha_pattern, ranks)
    power = 0.5 if config.use_rslora else 1.0
    return {name: own.get(name, config.lora_alpha) / rank**power for name, rank in ranks.items()}


def resolved(patterns: dict[str, Any] | None, names: Iterable[str]) -> dict[str, Any]:
    """The number that PEFT would find for each name, without regular expressions: the first match wins."""
    by_end: dict[str, tuple[int, Any]] = {}
    for at, (pattern, value) in enumerate((patterns or {}).items()):
        by_end.setdefault(re.sub(r"^\^?(\.\*\\?\.)?|\\|\$$", "", pattern), (at, value))
    found = {}
    for name in names:
        fitting = [by_end[end] for end in _ends(name) if end in by_end]
        if fitting:
            found[name] = min(fitting, key=lambda one: one[0])[1]
    return found


def _ends(name: str) -> list[str]:
    """The endings of a dotted name, for example ``a.b.c``, ``b.c`` and ``c``."""
    parts = name.split(".")
    return [".".join(parts[at:]) for at in range(len(parts))]


def _meant(config: LoraConfig, modules: dict[str, nn.Module], ranks: dict[str, int]) -> set[str]:
    """The modules that the config selects: the stored ones if it uses patterns; none if names and weights differ."""
    targets = config.target_modules
    if not isinstance(targets, list | set) or config.exclude_modules or config.layers_to_transform is not None:
        return set(ranks)
    ends = set(targets)
    found = {name for name in modules if not ends.isdisjoint(_ends(name))}
    return found if found == ranks.keys() else set()


def stored_ranks(folder: Path) -> dict[str, int]:
    """Rank of every adapted module by full name, from the header of the weights; empty for a pickle.

    Raises:
        AdapterError: the weights are not a readable safetensors file.
    """
    path = folder / SAFETENSORS
    if not path.is_file():
        return {}
    found = {}
    for key, entry in header(path).items():
        name, _, factor = key.removeprefix("base_model.model.").rpartition(".lora_")
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if name and isinstance(shape, list) and shape and factor in ("A.weight", "embedding_A"):
            found[name] = int(shape[0])
    return found


def not_trained_here(config: LoraConfig) -> str | None:
    """The first setting of an adapter beyond plain LoRA that can be loaded but not trained here; None without one."""
    plain = {one.name: one.default for one in fields(LoraConfig) if one.default is not MISSING}
    return next((name for name in _LOADED_ONLY if getattr(config, name) and getattr(config, name) != plain[name]), None)


def _check_kind(found: dict[str, Any]) -> None:
    if found.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {_shown(found.get('peft_type'))}; expected LORA")
    if found.get("task_type") not in ("CAUSAL_LM", None):
        raise ValueError(f"task_type is {_shown(found['task_type'])}; expected CAUSAL_LM")
    start = found.get("init_lora_weights", True)
    if not isinstance(start, bool | str | None) or start not in _HARMLESS:
        raise ValueError(
            f"init_lora_weights is {_shown(start)}, which changes the base model's weights; expected plain LoRA; "
            "convert the adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    plain = {one.name: one.default for one in fields(LoraConfig) if one.default is not MISSING}
    for name, value in found.items():
        if name in (*_READ, *_IGNORED, *_LOADED_ONLY) or value in (None, False, {}, []):
            continue
        if name not in plain or value != plain[name]:
            raise ValueError(f"{_shown(name)} is {_shown(value)}; expected plain LoRA, without it")


def _check_numbers(found: dict[str, Any]) -> None:
    def check(name: str, value: Any, whole: bool, low: float, high: float) -> None:
        kinds = int if whole else int | float
        if (
            isinstance(value, bool)
            or not isinstance(value, kinds)
            or not math.isfinite(value)
            or not low <= value <= high
        ):
            kind = "whole number" if whole else "number"
            raise ValueError(f"{name} is {_shown(value)}; expected a {kind} from {low:g} to {high:,}")

    check("r", found.get("r", 8), True, 1, LARGEST_RANK)
    check("lora_alpha", found.get("lora_alpha", 8), False, 1e-6, 10**9)
    check("lora_dropout", found.get("lora_dropout", 0.0), False, 0, 0.999)
    for name, whole in (("rank_pattern", True), ("alpha_pattern", False)):
        patterns = found.get(name) or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"{name} is {_shown(patterns)}; expected names and numbers")
        _check_count(name, patterns)
        for key, value in patterns.items():
            if len(key) > LONGEST or not _PATTERN.fullmatch(key):
                raise ValueError(f"{name} has the pattern {_shown(key)}; expected names of modules, without operators")
            check(f"{name} of {key}", value, whole, 1 if whole else 1e-6, LARGEST_RANK if whole else 10**9)


def _check_names(found: dict[str, Any]) -> None:
    """Check that lists hold names. A string is a pattern, which is never matched: see :func:`as_stored`."""
    for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save", "target_parameters"):
        value = found.get(name)
        if isinstance(value, str) and name not in ("modules_to_save", "target_parameters"):
            continue
        if value is not None and not isinstance(value, list):
            raise ValueError(f"{name} is {_shown(value)}; expected a list of names")
        _check_count(name, value or [])
        for one in value or []:
            if not isinstance(one, str) or len(one) > LONGEST or not _NAME.fullmatch(one):
                raise ValueError(f"{name} has {_shown(one)}; expected names of modules")
    layers = found.get("layers_to_transform")
    indices = found.get("trainable_token_indices")
    for name, value in (("layers_to_transform", layers), ("trainable_token_indices", indices)):
        lists = (
            list(value.values()) if isinstance(value, dict) else [value if isinstance(value, list) else [value or 0]]
        )
        for one in lists:
            _check_count(name, one if isinstance(one, list) else [])
            if not isinstance(one, list) or not all(type(index) is int and index >= 0 for index in one):
                raise ValueError(f"{name} is {_shown(value)}; expected whole numbers")
    for name in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying"):
        if not isinstance(found.get(name, False), bool | None):
            raise ValueError(f"{name} is {_shown(found[name])}; expected true or false")
    if found.get("bias", "none") not in ("none", "all", "lora_only", None):
        raise ValueError(f"bias is {_shown(found['bias'])}; expected none, all or lora_only")


def _check_count(name: str, values: Any) -> None:
    if len(values) > MOST_NAMES:
        raise ValueError(f"{name} has {len(values):,} entries; expected at most {MOST_NAMES:,}")


def _check_weights(folder: Path, allow_pickle: bool) -> None:
    if (folder / SAFETENSORS).is_file():
        header(folder / SAFETENSORS)
        return
    if not (folder / PICKLE).is_file():
        raise AdapterError(f"{folder} holds no {SAFETENSORS}; expected an adapter's weights next to its config")
    if not allow_pickle:
        raise AdapterError(
            f"{folder / PICKLE} is a pickle, which can run code when it is loaded; expected {SAFETENSORS}; "
            "set `allow_pickle` if you trust its author"
        )


def header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: dtype, shape and offsets by name of a tensor.

    Raises:
        AdapterError: the file is not in the safetensors format, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(HEADER_BYTES, path.stat().st_size - 8):
                raise AdapterError(
                    f"{path} states a header of {length:,} bytes, which is more than it holds; download it again"
                )
            found = json.loads(file.read(length))
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error.strerror}; download it again") from error
    except (ValueError, RecursionError, struct.error) as error:
        raise AdapterError(f"{path} is not a safetensors file ({type(error).__name__}); download it again") from error
    if not isinstance(found, dict):
        raise AdapterError(f"{path} is not a safetensors file; download it again")
    found.pop("__metadata__", None)
    return found


def _shown(value: Any) -> str:
    return repr(value)[:80]
