"""The prefix activation cache: the hidden states that enter the boundary layer, one entry per distinct row of tokens.

An entry is [T, D] in the model's dtype, without padding. A cache in memory is a dictionary of tensors. On disk, a
folder per key holds shards, each written by one process: ``NAME.bin`` with the raw entries one after another, and
``NAME.idx`` with one line per complete entry. A line is written after its bytes. So a killed build leaves whole
entries, and the next build continues from them. A checksum detects entries that were damaged later. Other files in the
folder are ignored.
"""

import hashlib
import os
import re
import shutil
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from aletheia.data.batches import collate
from aletheia.data.examples import Example
from aletheia.errors import ArtifactError, CacheError
from aletheia.files import free_bytes
from aletheia.prefix.cache_folders import MARKER, CacheInfo, hold, take_folder
from aletheia.prefix.stored import PREFIX

KEPT_FREE_BYTES = 1 << 30  # disk space that a cache leaves free
CHECKED_EVERY_BYTES = 1 << 26  # bytes stored between two checks of the free space
UNREADABLE = -1  # stands for the size of an index that cannot be read
_INDEX_LINE = re.compile(rb"([0-9a-f]{32}) (\d{1,18}) ([1-9]\d{0,9}) (\d{1,10})")


def row_key(tokens: Sequence[int]) -> str:
    """Digest of a row's tokens, 32 hexadecimal digits."""
    return hashlib.blake2b(np.asarray(tokens, dtype="<i4").tobytes(), digest_size=16).hexdigest()


class PrefixCache(Protocol):
    """Stored hidden states by row."""

    @property
    def size_bytes(self) -> int:
        """Size of the entries."""

    def missing(self, rows: Sequence[Example]) -> list[Example]:
        """The rows without a good entry, each distinct row once."""

    def put(self, row: Example, hidden_TD: torch.Tensor) -> None:
        """Store the hidden states of a row."""

    def get(self, row: Example) -> torch.Tensor:
        """The hidden states [T, D] of a row.

        Raises:
            CacheError: the row has no entry, or a damaged one.
        """


class MemoryCache:
    """Entries in main memory; ``size_bytes`` is their size."""

    def __init__(self) -> None:
        """Start empty."""
        self.size_bytes = 0
        self._entries: dict[str, torch.Tensor] = {}

    def missing(self, rows: Sequence[Example]) -> list[Example]:
        """The rows without an entry, each distinct row once."""
        return [row for key, row in _distinct(rows).items() if key not in self._entries]

    def put(self, row: Example, hidden_TD: torch.Tensor) -> None:
        """Store a copy of the hidden states [T, D] of a row."""
        entry = hidden_TD.detach().to("cpu", copy=True)
        self.size_bytes += entry.nbytes
        self._entries[row_key(row.input_ids)] = entry

    def get(self, row: Example) -> torch.Tensor:
        """The hidden states [T, D] of a row.

        Raises:
            CacheError: the row has no entry.
        """
        try:
            return self._entries[row_key(row.input_ids)]
        except KeyError:
            raise _no_entry(row) from None


class SpillingCache:
    """Entries in memory up to ``limit_bytes``, and further ones in the cache that ``overflow`` opens, if any."""

    def __init__(self, limit_bytes: int, overflow: Callable[[], PrefixCache | None]) -> None:
        """Start empty; ``overflow`` is called only once memory is full."""
        self._memory = MemoryCache()
        self._limit_bytes, self._open = limit_bytes, overflow
        self._overflow: PrefixCache | None = None
        self._opened = False

    @property
    def size_bytes(self) -> int:
        """Size of the entries, in memory and beyond."""
        return self._memory.size_bytes + (self._overflow.size_bytes if self._overflow else 0)

    @property
    def is_spilled(self) -> bool:
        """Whether there are entries outside memory."""
        return self._overflow is not None

    def missing(self, rows: Sequence[Example]) -> list[Example]:
        """The rows without a good entry, each distinct row once."""
        left = self._memory.missing(rows)
        return self._overflow.missing(left) if self._overflow and left else left

    def put(self, row: Example, hidden_TD: torch.Tensor) -> None:
        """Store a copy of the hidden states [T, D] of a row, if there is room.

        Raises:
            CacheError: the overflow cannot be written.
        """
        if self._memory.size_bytes + hidden_TD.nbytes <= self._limit_bytes:
            self._memory.put(row, hidden_TD)
            return
        if not self._opened:
            self._opened = True
            self._overflow = self._open()
        if self._overflow is not None:
            self._overflow.put(row, hidden_TD)

    def get(self, row: Example) -> torch.Tensor:
        """The hidden states [T, D] of a row.

        Raises:
            CacheError: the row has no entry, or a damaged one.
        """
        if self._overflow is not None and self._memory.missing([row]):
            return self._overflow.get(row)
        return self._memory.get(row)


@dataclass(frozen=True, slots=True)
class _Entry:
    shard: str
    offset: int
    tokens: int
    checksum: int


class DiskCache:
    """Entries in a folder, memory-mapped when read; processes and runs can share it, even at the same time.

    While it is open, ``aletheia cache`` does not delete the folder. ``size_bytes`` is the size of what this process
    stored. ``notes`` has a line for each unusable file or folder that was skipped.
    """

    def __init__(self, root: str | Path, info: CacheInfo, name: str | None = None) -> None:
        """Open the folder for ``info.key`` under ``root``, or create it.

        Args:
            root: the folder of all caches.
            info: what the cache holds.
            name: name of its folder; by default the first half of the key, so that runs share it.

        Raises:
            CacheError: the folder cannot be written, or other files have all names for it.
        """
        self._dtype = getattr(torch, info.dtype)
        self._row_bytes = info.width * self._dtype.itemsize
        self._width = info.width
        self.size_bytes = 0
        self._checked_bytes = 0
        self._entries: dict[str, dict[str, _Entry]] = {}  # by shard: several writers may have stored a row
        self._read_bytes: dict[str, int] = {}  # size of each index when it was read
        self._good: dict[str, _Entry] = {}  # entries whose checksum was verified
        self._maps: dict[str, np.memmap] = {}
        self._shard = f"{os.getpid()}-{os.urandom(4).hex()}"
        place = name or info.key[:32]
        try:
            self.folder, self.notes = take_folder(Path(root), info, place)
            self._lock = hold(self.folder / MARKER)
        except (OSError, ArtifactError) as error:
            raise CacheError(
                f"cannot use the cache folder {Path(root) / place}: {error}; choose another `cache_dir` or delete it"
            ) from error
        with suppress(OSError):  # the folder may belong to another user
            os.utime(self.folder / MARKER)  # records when it was last used
        self.refresh()

    def refresh(self) -> None:
        """Read the entries that other processes have written since."""
        for index in sorted(self.folder.glob("*.idx")):
            if index.stem == self._shard or self._read_bytes.get(index.stem) == UNREADABLE:
                continue
            try:
                if not index.is_file():
                    raise OSError(f"{index} is not a file")
                size = index.stat().st_size
                if size != self._read_bytes.get(index.stem):
                    self._read_index(index)
                    self._read_bytes[index.stem] = size
            except OSError as error:
                self._read_bytes[index.stem] = UNREADABLE
                self.notes.append(f"{index} is skipped: {error.strerror or 'it is not a file'}")

    def close(self) -> None:
        """Release the folder, so that it can be deleted."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def delete(self) -> None:
        """Close the cache and remove its folder, which no other process may be using."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read_index(self, index: Path) -> None:
        """Read the complete lines whose entries are complete; a torn last line belongs to an incomplete entry."""
        data = index.with_suffix(".bin")
        size = data.stat().st_size if data.is_file() else 0
        for line in index.read_bytes().split(b"\n")[:-1]:
            fields = _INDEX_LINE.fullmatch(line)
            if fields is None:
                continue
            entry = _Entry(index.stem, *map(int, fields.groups()[1:]))
            if entry.offset + entry.tokens * self._row_bytes <= size:
                self._entries.setdefault(index.stem, {})[fields[1].decode()] = entry

    def missing(self, rows: Sequence[Example]) -> list[Example]:
        """The rows without an entry or with a damaged one, each distinct row once. Verifies the entries it finds."""
        left = {key: row for key, row in _distinct(rows).items() if not self._find(key)}
        if left:
            self.refresh()
        return [row for key, row in left.items() if not self._find(key)]

    def _find(self, key: str) -> bool:
        """Whether a row has an intact entry; each entry is verified once."""
        if key not in self._good:
            for entries in self._entries.values():
                entry = entries.get(key)
                if entry is not None and self._bytes(entry) is not None:
                    self._good[key] = entry
                    break
        return key in self._good

    def put(self, row: Example, hidden_TD: torch.Tensor) -> None:
        """Append the hidden states [T, D] of a row to this process's shard.

        Raises:
            CacheError: the disk is full or fails, or the sizes differ. Earlier entries stay valid.
        """
        raw = hidden_TD.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        if len(raw) != len(row) * self._row_bytes:
            raise CacheError(f"{row.where}: {len(raw)} bytes to store, expected {len(row) * self._row_bytes}")
        key, data = row_key(row.input_ids), self.folder / f"{self._shard}.bin"
        self._keep_room(len(raw))
        try:
            with data.open("ab") as stream:
                offset = stream.tell()
                stream.write(raw)
            entry = _Entry(self._shard, offset, len(row), zlib.crc32(raw))
            with data.with_suffix(".idx").open("a") as stream:
                stream.write(f"{key} {entry.offset} {entry.tokens} {entry.checksum}\n")
        except OSError as error:
            raise CacheError(
                f"cannot write to the cache {self.folder}: {error.strerror or error}; free some space and run again, "
                "which continues from here, or set `cache` off"
            ) from error
        self._good[key] = entry
        self.size_bytes += len(raw)

    def _keep_room(self, size_bytes: int) -> None:
        """Check, every 64 MB, that the disk keeps free space for other files, such as checkpoints."""
        if self.size_bytes + size_bytes > self._checked_bytes:
            self._checked_bytes = self.size_bytes + size_bytes + CHECKED_EVERY_BYTES
            check_space(self.folder, size_bytes)

    def get(self, row: Example) -> torch.Tensor:
        """The hidden states [T, D] of a row, verified by their checksum.

        Raises:
            CacheError: the row has no entry, or a damaged one.
        """
        key = row_key(row.input_ids)
        if not self._find(key):
            raise _no_entry(row)
        raw = self._bytes(self._good[key])
        if raw is None or len(raw) != len(row) * self._row_bytes:
            raise CacheError(f"{row.where}: its entry in {self.folder} is damaged; run again, which recomputes it")
        return torch.frombuffer(bytearray(raw), dtype=self._dtype).view(len(row), self._width)

    def _bytes(self, entry: _Entry) -> memoryview | None:
        """The raw entry, or None if it is missing or fails its checksum."""
        end = entry.offset + entry.tokens * self._row_bytes
        mapped = self._maps.get(entry.shard)
        if mapped is None or len(mapped) < end:
            path = self.folder / f"{entry.shard}.bin"
            try:
                if not path.is_file() or path.stat().st_size < end:
                    return None
                mapped = self._maps[entry.shard] = np.memmap(path, dtype=np.uint8, mode="r")
            except OSError:
                return None
        raw = mapped.data[entry.offset : end]
        return raw if zlib.crc32(raw) == entry.checksum else None


def collate_with_prefix(examples: Sequence[Example], pad_token_id: int, cache: PrefixCache) -> dict[str, torch.Tensor]:
    """The batch of :func:`aletheia.data.batches.collate`, with the stored hidden states [B, T, D], 0 at padding.

    Raises:
        CacheError: a row has no entry, or a damaged one.
    """
    batch = collate(examples, pad_token_id)
    stored = [cache.get(example) for example in examples]
    prefix_BTD = stored[0].new_zeros(*batch["input_ids"].shape, stored[0].shape[1])
    for row, hidden_TD in enumerate(stored):
        prefix_BTD[row, : len(hidden_TD)] = hidden_TD
    return batch | {PREFIX: prefix_BTD}


def check_space(folder: Path, needed_bytes: int) -> None:
    """Check that the disk of ``folder`` can hold ``needed_bytes`` of cache.

    Raises:
        CacheError: it cannot. The message names the bytes needed and the bytes free.
    """
    free = free_bytes(folder)
    if needed_bytes + KEPT_FREE_BYTES > free:
        raise CacheError(
            f"the prefix cache needs {needed_bytes / 1e9:.2f} GB in {folder}, but {free / 1e9:.2f} GB are free and "
            "1 GB must stay free; choose another `cache_dir`, use fewer rows, or set `cache` off"
        )


def _distinct(rows: Sequence[Example]) -> dict[str, Example]:
    return {row_key(row.input_ids): row for row in rows}


def _no_entry(row: Example) -> CacheError:
    return CacheError(
        f"{row.where}: its hidden states are not stored; expected a cache that was filled before training"
    )


def distinct_tokens(rows: Sequence[Example]) -> int:
    """Tokens of the distinct rows, which are the tokens that a cache stores."""
    return sum(len(row) for row in _distinct(rows).values())
