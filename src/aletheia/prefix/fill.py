"""Filling the prefix cache: whether it pays, where it goes, and the one pass that computes it."""

import functools
import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from aletheia.anatomy.fingerprint import configuration
from aletheia.anatomy.load import free_memory_bytes
from aletheia.anatomy.modes import in_mode
from aletheia.anatomy.read import adds_router_loss, find_layers
from aletheia.data.batches import collate, on_device_of
from aletheia.data.examples import Example
from aletheia.errors import CacheError
from aletheia.files import package_versions
from aletheia.prefix.cache import (
    CacheInfo,
    DiskCache,
    MemoryCache,
    PrefixCache,
    check_space,
    default_cache_dir,
    distinct_tokens,
    stored_caches,
)
from aletheia.prefix.stored import PREFIX, prefix_output, stored_prefix

CacheKind = Literal["auto", "memory", "disk", "off"]
MEMORY_SHARE = 0.5  # of the memory that is free now: what auto may fill
TRIAL_BYTES = 1 << 24  # written and read once to measure the disk
SAME = 1e-3  # relative; two runs of one shape are equal to the last digits


@dataclass(frozen=True)
class CacheDecision:
    """Where the cache goes and why, in a line for people. ``size_bytes`` is that of all its entries."""

    kind: Literal["memory", "disk", "off"]
    reason: str
    size_bytes: int = 0


def prefix_key(model: nn.Module, boundary: int) -> str:
    """What the prefix output depends on besides the tokens, as a sha256 of 64 digits.

    All weights and buffers outside the layers from ``boundary`` up and the head, the configuration, dtype, boundary,
    kind of device, precision of float32 products, and the versions of torch and transformers.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    path, layers = find_layers(base)
    above = tuple(f"{path}.{index}." for index in range(boundary, len(layers)))
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    head_name = next((name for name, module in base.named_modules() if module is head), None)
    digest = hashlib.sha256()
    about = configuration(base) | {
        "boundary": boundary,
        "dtype": str(embedding.weight.dtype),
        "device": embedding.weight.device.type,
        "float32_products": torch.get_float32_matmul_precision(),
        "packages": package_versions(("torch", "transformers")),
    }
    digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    for name, value in base.state_dict().items():
        if not isinstance(value, torch.Tensor) or name.startswith(above):
            continue
        if head_name and name.startswith(f"{head_name}.") and value.data_ptr() != embedding.weight.data_ptr():
            continue
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(memoryview(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def open_cache(
    model: nn.Module,
    boundary: int,
    rows: Sequence[Example],
    uses: int,
    batch_size: int,
    pad_token_id: int,
    kind: CacheKind = "auto",
    folder: Path | None = None,
) -> tuple[PrefixCache | None, CacheDecision]:
    """Choose and open a cache for ``rows``; it is not filled yet.

    Args:
        model: the adapted model.
        boundary: its lowest adapted layer.
        rows: every row that the run needs.
        uses: tokens that the run reads in all, each row counted as often as it is used.
        batch_size: rows of a training batch.
        pad_token_id: for the trial batch.
        kind: ``auto`` measures the prefix's forward pass and the disk, and decides.
        folder: for a cache on disk, by default :func:`aletheia.prefix.cache.default_cache_dir`.

    Raises:
        CacheError: an explicit choice that does not fit or cannot be exact.
    """
    if kind == "off":
        return None, CacheDecision("off", "as asked")
    obstacle, dtype = why_not_exact(model, boundary, rows, pad_token_id)
    if obstacle:
        if kind != "auto":
            raise CacheError(f"--cache {kind} is not possible: {obstacle}; pass --cache off")
        return None, CacheDecision("off", obstacle)
    width = model.config.get_text_config().hidden_size
    size = distinct_tokens(rows) * width * dtype.itemsize
    if kind == "memory":
        if size > (free := free_memory_bytes()):
            raise CacheError(
                f"the prefix cache needs {_gb(size)} of memory, {_gb(free)} are free; pass --cache disk or --cache off"
            )
        return MemoryCache(), CacheDecision("memory", "as asked", size)
    root = folder or default_cache_dir()

    @functools.cache
    def info() -> CacheInfo:
        """Reads every weight below the boundary, so not before it is needed."""
        return CacheInfo(
            model=str(getattr(model.config, "_name_or_path", "")) or type(model).__name__,
            key=prefix_key(model, boundary),
            boundary=boundary,
            dtype=str(dtype).removeprefix("torch."),
            width=width,
        )

    if kind == "disk":
        disk = DiskCache(root, info())
        check_space(disk.folder, distinct_tokens(disk.missing(rows)) * width * dtype.itemsize)
        return disk, CacheDecision("disk", f"as asked, in {disk.folder}", size)
    candidates = [stored for stored in stored_caches(root) if stored.info.boundary == boundary]
    if candidates and info().key in {stored.info.key for stored in candidates}:
        disk = DiskCache(root, info())
        tokens, missing = distinct_tokens(rows), distinct_tokens(disk.missing(rows))
        if missing <= tokens / 2:
            found = "all rows are" if missing == 0 else f"{1 - missing / tokens:.0%} of the tokens are"
            return disk, CacheDecision("disk", f"{found} in {disk.folder} from an earlier run", size)
    middle = sorted(rows, key=len)[len(rows) // 2 :][:batch_size]
    decision = _decide(rows, uses, _forward_seconds_per_token(model, boundary, middle, pad_token_id), size, root)
    if decision.kind == "disk":
        return DiskCache(root, info()), decision
    return MemoryCache() if decision.kind == "memory" else None, decision


@torch.no_grad()
def why_not_exact(
    model: nn.Module, boundary: int, rows: Sequence[Example], pad_token_id: int
) -> tuple[str | None, torch.dtype]:
    """Why a cache would not be exact, if so, and the dtype of what it would hold: tried on the two shortest rows.

    Twice in training mode, the prefix must give the same (no dropout, no noise), and the same when evaluating, as it is
    when the cache is filled (8-bit layers compute otherwise then); started from its output, with an embedding of zeros,
    the model must give the logits it gives from the start (nothing above reads anything else).
    """
    dtype = model.get_input_embeddings().weight.dtype
    if boundary == 0:
        return "layer 0 is adapted, so there is no frozen prefix", dtype
    if adds_router_loss(model):
        return "the model adds a router loss, which looks at the layers below the boundary too", dtype
    if _positions_vary(model, max(map(len, rows))):
        return "rotary positions depend on the longest row of a batch (long or dynamic RoPE scaling)", dtype
    batch = on_device_of(model, collate(sorted(rows, key=len)[:2], pad_token_id))
    del batch["labels"]
    try:
        with in_mode(model, training=True), torch.random.fork_rng():
            training = [prefix_output(model, boundary, batch) for _ in range(2)]
        if _differ(*training):
            return "the layers below the boundary draw at random (dropout), so every epoch differs", dtype
        with in_mode(model, training=False), ExitStack() as stack:
            hidden_BTD = prefix_output(model, boundary, batch)
            if _differ(training[0], hidden_BTD, SAME / 10):
                return (
                    "the layers below the boundary compute otherwise in training than in evaluation",
                    dtype,
                )
            plain = model(**batch, use_cache=False).logits
            blank = model.get_input_embeddings().register_forward_hook(lambda *called: torch.zeros_like(called[2]))
            stack.callback(blank.remove)
            stack.enter_context(stored_prefix(model, boundary))
            stored = model(**batch, **{PREFIX: hidden_BTD}, use_cache=False).logits
    except Exception as error:  # whatever a family of tomorrow does with its layers
        told = str(error).splitlines()[0] if str(error) else ""
        return f"{type(model).__name__} does not start at layer {boundary} ({type(error).__name__}: {told})", dtype
    if hidden_BTD.dim() != 3 or _differ(plain, stored):
        return "the layers above the boundary read more than its hidden states", dtype
    return None, hidden_BTD.dtype


def _positions_vary(model: nn.Module, longest: int) -> bool:
    """Whether a row's rotary frequencies are chosen by the rows beside it."""
    config = model.config.get_text_config()
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    original = scaling.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", 0)
    varies = scaling.get("rope_type", scaling.get("type")) in ("dynamic", "longrope")
    return varies and longest > (original or config.max_position_embeddings)


def _differ(one: torch.Tensor, other: torch.Tensor, tolerance: float = SAME) -> bool:
    return bool((one.float() - other.float()).norm() > tolerance * one.float().norm())


def _decide(rows: Sequence[Example], uses: int, forward: float, size: int, root: Path) -> CacheDecision:
    """``auto``: every forward through the prefix, ``forward`` seconds a token, against building once and reading."""
    tokens = distinct_tokens(rows)
    element_bytes = size / tokens
    without = uses * forward
    copying = element_bytes / _copy_bytes_per_second()
    in_memory = tokens * (forward + copying) + uses * copying
    if size <= MEMORY_SHARE * (free := free_memory_bytes()):
        told = f"the prefix takes {without:.0f} s run each time, {in_memory:.0f} s computed once and read from memory"
        if in_memory < without:
            return CacheDecision("memory", f"{told} ({_gb(size)} of {_gb(free)} free)", size)
        return CacheDecision("off", told)
    try:
        check_space(root, size)
        write, read = _disk_bytes_per_second(root)
    except (CacheError, OSError) as error:
        return CacheDecision("off", f"too large for memory ({_gb(size)}), and the disk: {error}")
    on_disk = tokens * (forward + element_bytes / write) + uses * element_bytes / read
    told = (
        f"{_gb(size)} are too much for memory; the prefix takes {without:.0f} s run each time, {on_disk:.0f} s "
        f"computed once and read from disk ({write / 1e6:.0f} MB/s written, {read / 1e6:.0f} MB/s read)"
    )
    if on_disk < without:
        return CacheDecision("disk", told, size)
    return CacheDecision("off", told)


def _forward_seconds_per_token(model: nn.Module, boundary: int, rows: Sequence[Example], pad_token_id: int) -> float:
    batch = on_device_of(model, collate(rows, pad_token_id))
    seconds = []
    for _ in range(2):  # the first one warms up
        started = time.perf_counter()
        prefix_output(model, boundary, batch).cpu()
        seconds.append(time.perf_counter() - started)
    return min(seconds) / sum(len(row) for row in rows)


def _copy_bytes_per_second() -> float:
    trial = torch.zeros(TRIAL_BYTES, dtype=torch.uint8)
    started = time.perf_counter()
    trial.clone()
    return TRIAL_BYTES / max(time.perf_counter() - started, 1e-9)


def _disk_bytes_per_second(root: Path) -> tuple[float, float]:
    """Written (to the device itself) and read; the read comes from the system's cache where that still holds it."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / f".trial-{os.getpid()}"
    data = os.urandom(TRIAL_BYTES)
    try:
        started = time.perf_counter()
        with path.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        written = time.perf_counter()
        path.read_bytes()
        done = time.perf_counter()
    finally:
        path.unlink(missing_ok=True)
    return TRIAL_BYTES / (written - started), TRIAL_BYTES / (done - written)


def fill(
    model: nn.Module,
    boundary: int,
    rows: Sequence[Example],
    cache: PrefixCache,
    batch_size: int,
    pad_token_id: int,
    show_progress: bool = True,
) -> int:
    """Compute and store what ``cache`` lacks, longest rows first, in eval mode; returns how many rows that were.

    A build that is killed goes on where it stopped, where the cache is on disk.

    Raises:
        CacheError: a stored value would not be finite, or the disk fails.
    """
    missing = sorted(cache.missing(rows), key=len, reverse=True)
    if not missing:
        return 0
    make = functools.partial(collate, pad_token_id=pad_token_id)
    columns = (TextColumn("cache"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), disable=not show_progress)
    with in_mode(model, training=False), bar as progress:
        task = progress.add_task("cache", total=len(missing))
        for start in range(0, len(missing), batch_size):
            group = missing[start : start + batch_size]
            hidden_BTD = prefix_output(model, boundary, on_device_of(model, make(group)))
            for row, hidden_TD in zip(group, hidden_BTD.cpu(), strict=True):
                if not torch.isfinite(hidden_TD[: len(row)]).all():
                    raise CacheError(f"{row.where}: the prefix gives a value that is not finite; try --dtype float32")
                cache.put(row, hidden_TD[: len(row)])
            progress.advance(task, len(group))
    return len(missing)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
