"""The safetensors files of a checkpoint, and reusable memory for weights read from them."""

import hashlib
import os
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from aletheia.anatomy.faults import explained
from aletheia.anatomy.foreign import check_index
from aletheia.anatomy.load import load_config
from aletheia.errors import ModelError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PAGE = 4096  # bytes
STREAMED_QUANTIZERS = ("bitsandbytes",)  # their layers can be loaded one by one


class Buffers:
    """Memory lent to layers and taken back: allocating it again takes longer than filling it."""

    def __init__(self) -> None:
        """Start without any memory."""
        self._free: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = {}
        self._lent: dict[int, torch.Tensor] = {}
        self._lock = Lock()  # transformers reads several tensors at a time

    def keep(self, shapes: set[tuple[torch.Size, torch.dtype]]) -> None:
        """Free the buffers of other shapes than ``shapes``."""
        self._free = {key: free for key, free in self._free.items() if key in shapes}

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A CPU tensor that nobody else uses; its values are arbitrary."""
        with self._lock:
            free = self._free.get((torch.Size(shape), dtype))
            buffer = free.pop() if free else torch.empty(*shape, dtype=dtype)
            self._lent[buffer.data_ptr()] = buffer
        return buffer

    def give_back(self, layer: nn.Module) -> None:
        """Take back the memory of a layer that is no longer in use."""
        for value in (*layer.parameters(), *layer.buffers()):
            buffer = self._lent.pop(value.data_ptr(), None)
            if buffer is not None:
                self._free.setdefault((buffer.shape, buffer.dtype), []).append(buffer)


@dataclass(frozen=True)
class Cast:
    """A tensor in a shard that is cast into a buffer when it is read."""

    view: Any
    dtype: torch.dtype
    buffers: Buffers

    def __getitem__(self, everything: Any) -> torch.Tensor:
        """The whole tensor, cast."""
        value = self.view[everything]
        return self.buffers.take(value.shape, self.dtype).copy_(value)


def sampled_sha256(path: str, blocks: int = 256) -> str:
    """The sha256 of ``blocks`` pages spread evenly over a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        last = max(0, os.fstat(file.fileno()).st_size - PAGE)
        for block in range(blocks):
            file.seek(last * block // (blocks - 1))
            digest.update(file.read(PAGE))
    return digest.hexdigest()


def shard_state(path: str) -> tuple[str, int, int, str]:
    """What identifies a shard: name, size in bytes, time of change in ns, and a sample of its bytes.

    The sample is needed because archives and images give all files the same time.
    """
    found = os.stat(path)
    return Path(path).name, found.st_size, found.st_mtime_ns, sampled_sha256(path)


def checksum(tensors: Mapping[str, torch.Tensor], about: Mapping[str, str]) -> str:
    """CRC-32 of CPU tensors and their metadata, for files from which a killed job resumes."""
    value = zlib.crc32(repr(sorted(about.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode(), value)
        value = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data, value)
    return str(value)


def weights_bytes(name: str, dtype: torch.dtype, trust_remote_code: bool = False) -> int | None:
    """Bytes that the weights of MODEL would take in ``dtype``, from the size of its shards.

    None where it has no shards, or is quantized in a way that cannot be streamed.

    Raises:
        ModelError: MODEL cannot be found or its config cannot be read.
    """
    if name.endswith(".gguf"):
        return None
    config = load_config(name, trust_remote_code)
    try:
        stored = sum(os.stat(path).st_size for path in shard_files(name))
    except ModelError:  # another format, which cannot be streamed
        return None
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        return stored if str(getattr(method, "value", method)) in STREAMED_QUANTIZERS else None
    return stored * dtype.itemsize // (config.dtype or torch.bfloat16).itemsize


def shard_files(name: str) -> list[str]:
    """The safetensors files of a folder or hub id, all of them present.

    Raises:
        ModelError: there are none, or some are missing.
    """
    with explained(name):
        quiet = {"_raise_exceptions_for_missing_entries": False}
        index = cached_file(name, INDEX, **quiet)
        if index:
            check_index(Path(index), allow_pickle=False)
        files = get_checkpoint_shard_files(name, index)[0] if index else [cached_file(name, SINGLE, **quiet)]
    if files == [None]:
        raise ModelError(f"{name} has neither {SINGLE} nor {INDEX}; expected safetensors to stream from")
    for path in files:
        if not Path(path).is_file():
            raise ModelError(f"{name} lacks the shard {Path(path).name} that its index names; fetch it again")
    return files


@contextmanager
def opened(path: str) -> Iterator[Any]:
    """An open shard; each tensor is read on demand.

    Raises:
        ModelError: the file cannot be read, or is damaged.
    """
    try:
        # Windows reserves memory for the whole of a mapped file
        with safe_open(path, framework="pt", backend="pread" if sys.platform == "win32" else "mmap") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise ModelError(f"cannot read {path}: {error}; fetch it again") from error


def item_bytes(stored: str, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of an element on disk and in memory: floating-point weights are cast, others stay as they are stored."""
    if stored in ("F64", "F32", "F16", "BF16"):
        return {"F64": 8, "F32": 4}.get(stored, 2), dtype.itemsize
    own = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}.get(stored, 1)
    return own, own
