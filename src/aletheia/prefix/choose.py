"""The choice of where a run keeps its prefix cache: in memory, on disk, or nowhere."""

import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from aletheia.anatomy.access import base_of, input_weight, text_config
from aletheia.anatomy.device_memory import free_memory_bytes
from aletheia.anatomy.fingerprint import configuration
from aletheia.anatomy.read import find_layers
from aletheia.anatomy.versions import computing_versions, processor
from aletheia.errors import CacheError
from aletheia.prefix.cache import DiskCache, MemoryCache, PrefixCache, SpillingCache, check_space
from aletheia.prefix.cache_folders import TRIAL, CacheInfo, default_cache_dir, stored_caches

MEMORY_SHARE = 0.5  # share of the free memory that auto may fill
TRIAL_BYTES = 1 << 24  # bytes written and read once to measure the disk


@dataclass(frozen=True)
class CacheDecision:
    """Where stored states go, the reason in words, and their size."""

    kind: Literal["memory", "disk", "off"]
    reason: str
    size_bytes: int = 0


@dataclass(frozen=True)
class CachePlace:
    """Where a run may keep stored states.

    ``private`` names a folder for this run alone, used where its prefix has adapters; None where runs on the same base
    share a folder. ``computed_as`` says how the prefix is computed beyond model and dtype, such as under autocast.
    ``shared_by`` counts the processes that need each other's states. ``key`` is the result of :func:`prefix_key` where
    all processes had to compute it together.
    """

    kind: Literal["auto", "memory", "disk", "off"] = "auto"
    folder: Path | None = None
    private: str | None = None
    computed_as: str = ""
    shared_by: int = 1
    key: str | None = None


def prefix_key(model: nn.Module, boundary: int, computed_as: str = "") -> str:
    """Digest of all that the prefix output depends on besides the tokens: a sha256 of 64 hexadecimal digits.

    It covers the configuration, dtype, boundary, kind of processor, precision of float32 products, the versions of
    :func:`aletheia.anatomy.versions.computing_versions`, and ``computed_as``. It also covers all weights and buffers
    except those of the head and of the layers from ``boundary`` up. Where weights are sharded, all processes must call
    this function.
    """
    base = base_of(model)
    path, layers = find_layers(base)
    above = tuple(f"{path}.{index}." for index in range(boundary, len(layers)))
    head, weight = base.get_output_embeddings(), input_weight(base)
    head_name = next((name for name, module in base.named_modules() if module is head), None)
    digest = hashlib.sha256()
    about = configuration(base) | {
        "boundary": boundary,
        "dtype": str(weight.dtype),
        "device": processor(weight.device),
        "float32_products": _float32_products(),
        "versions": computing_versions(),
        "computed_as": computed_as,
    }
    digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    for name, value in base.state_dict().items():
        if not isinstance(value, torch.Tensor) or name.startswith(above):
            continue
        if head_name and name.startswith(f"{head_name}.") and value.data_ptr() != weight.data_ptr():
            continue
        value = value.full_tensor() if isinstance(value, DTensor) else value
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _float32_products() -> list[str]:
    """The precision of float32 products. torch has an old switch and new ones, and refuses to mix them."""
    backends: Any = torch.backends
    found = [backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision]
    found = [backends.fp32_precision if name == "none" else name for name in found]
    found = ["ieee" if name == "none" else name for name in found]
    with suppress(RuntimeError):
        found.append(torch.get_float32_matmul_precision())
    return found


def open_cache(
    model: nn.Module, boundary: int, dtype: torch.dtype, place: CachePlace, forward_seconds: Callable[[], float]
) -> tuple[PrefixCache | None, CacheDecision]:
    """Open the cache for the inputs of layer ``boundary``; it fills as rows pass.

    Args:
        model: the adapted model.
        boundary: its lowest layer that learns.
        dtype: dtype of the states.
        place: the place that the settings ask for. ``auto`` takes a folder on disk that earlier runs filled. Without
            one, it takes up to half of the free memory, and then the disk if reading is faster than computing. Several
            processes share a folder.
        forward_seconds: measures, when called, the seconds that the prefix takes per token.

    Returns:
        The cache, or None where it is off; and the decision with its reason.

    Raises:
        CacheError: the folder cannot be used.
    """
    if place.kind == "off":
        return None, CacheDecision("off", "as asked")
    if place.kind == "memory":
        return MemoryCache(), CacheDecision("memory", "as asked")
    root = place.folder or default_cache_dir()

    @functools.cache
    def info() -> CacheInfo:
        """Reads every weight below the boundary, so it runs only when needed."""
        return CacheInfo(
            model=str(getattr(model.config, "_name_or_path", "")) or type(model).__name__,
            key=place.key or prefix_key(model, boundary, place.computed_as),
            boundary=boundary,
            dtype=str(dtype).removeprefix("torch."),
            width=text_config(model).hidden_size,
        )

    def on_disk() -> DiskCache:
        return DiskCache(root, info()) if place.private is None else _private(root, info(), place.private)

    if place.kind == "disk":
        disk = on_disk()
        return disk, CacheDecision("disk", f"as asked, in {_where(disk)}")
    if place.private is None:
        candidates = [stored for stored in stored_caches(root) if stored.info.boundary == boundary]
        if candidates and info().key in {stored.info.key for stored in candidates}:
            disk = on_disk()
            return disk, CacheDecision("disk", f"an earlier run stored states in {_where(disk)}")
    if place.shared_by > 1:
        disk = on_disk()
        return disk, CacheDecision("disk", f"shared by {place.shared_by} processes, in {_where(disk)}")
    limit = int(MEMORY_SHARE * free_memory_bytes())

    def overflow() -> PrefixCache | None:
        token_bytes = info().width * dtype.itemsize
        return on_disk() if _disk_pays(root, token_bytes, forward_seconds()) else None

    return SpillingCache(limit, overflow), CacheDecision("memory", f"up to {limit / 1e9:.1f} GB, the rest on disk")


def _where(disk: DiskCache) -> str:
    return "; ".join([str(disk.folder), *disk.notes])


def _private(root: Path, info: CacheInfo, name: str) -> DiskCache:
    """The cache folder of one run; its contents are reused only if they were made with the same weights."""
    found = {stored.folder.name: stored for stored in stored_caches(root)}.get(name)
    if found is not None and found.info != info:
        found.delete()
    elif found is None:
        shutil.rmtree(root / name, ignore_errors=True)  # left by a run that was killed while creating it
    return DiskCache(root, info, name)


def _disk_pays(root: Path, token_bytes: int, forward_seconds: float) -> bool:
    """Whether writing a token to disk and reading it once takes less time than computing it again."""
    try:
        check_space(root, TRIAL_BYTES)
        write, read = disk_bytes_per_second(root)
    except (CacheError, OSError):
        return False
    return token_bytes / write + token_bytes / read < forward_seconds


def disk_bytes_per_second(root: Path) -> tuple[float, float]:
    """Bytes written to the device and bytes read, per second; a read may come from the system's page cache."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"{TRIAL}{os.getpid()}"
    data = os.urandom(TRIAL_BYTES)
    try:
        started = time.perf_counter()
        with path.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
            with suppress(AttributeError):  # not on every system
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        written = time.perf_counter()
        path.read_bytes()
        done = time.perf_counter()
    finally:
        path.unlink(missing_ok=True)
    return TRIAL_BYTES / (written - started), TRIAL_BYTES / (done - written)
