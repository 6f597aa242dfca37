"""The cache folders on this machine: where they are, what they hold, and how they are opened and deleted."""

import errno
import os
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from aletheia.errors import ArtifactError, CacheError
from aletheia.files import Artifact

MARKER = "cache.json"
NAMES_TRIED = 10  # names to try for a cache whose name is taken by something else
TRIAL = ".trial-"  # prefix of the name of a file that is written once to measure the disk


class CacheInfo(Artifact):
    """What a cache folder holds; ``key`` covers the base weights, the boundary, the dtype and the library."""

    FORMAT: ClassVar[str] = "aletheia-prefix-cache"

    model: str
    key: str
    boundary: int
    dtype: str
    width: int


def default_cache_dir() -> Path:
    """``ALETHEIA_CACHE``, else ``aletheia/prefix`` in the user's cache folder."""
    if "ALETHEIA_CACHE" in os.environ:
        return Path(os.environ["ALETHEIA_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "aletheia" / "prefix"


def take_folder(root: Path, info: CacheInfo, name: str) -> tuple[Path, list[str]]:
    """The folder ``name`` under ``root`` for a cache, created if necessary; another name if something else has it.

    Returns:
        The folder, and a line for each file or folder that was skipped or rewritten.

    Raises:
        OSError: the folder cannot be created.
        ArtifactError: its ``cache.json`` cannot be written.
        CacheError: other files have all the names that were tried.
    """
    notes: list[str] = []
    for number in range(NAMES_TRIED):
        folder = root / (f"{name}-{number}" if number else name)
        if os.path.lexists(folder) and not folder.is_dir():
            notes.append(f"{folder} is not a folder and is skipped")
            continue
        folder.mkdir(parents=True, exist_ok=True)
        marker = folder / MARKER
        if not os.path.lexists(marker):
            info.write(marker)
            return folder, notes
        if not marker.is_file():
            notes.append(f"{marker} is not a file, so {folder} is skipped")
            continue
        try:
            if CacheInfo.read(marker).key == info.key:
                return folder, notes
            notes.append(f"{folder} holds another cache and is skipped")
        except ArtifactError:
            try:
                marker.unlink(missing_ok=True)
                info.write(marker)
            except (OSError, ArtifactError):  # it may belong to another user
                notes.append(f"{marker} cannot be read, so {folder} is skipped")
                continue
            notes.append(f"{marker} was damaged and is rewritten")
            return folder, notes
    raise CacheError(f"other files in {root} have all names for this cache, first {root / name}; move them elsewhere")


def hold(path: Path, alone: bool = False) -> int | None:
    """Lock a file, shared or ``alone``, until the descriptor is closed; None where the system has no such locks.

    Raises:
        OSError: another process holds it.
    """
    if sys.platform == "win32":
        return None
    import fcntl  # absent on Windows

    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        return None  # a file system without locks
    return descriptor


@dataclass(frozen=True, slots=True)
class StoredCache:
    """A cache folder on disk: what it holds, its size, and when a run last opened it (POSIX seconds)."""

    folder: Path
    info: CacheInfo
    size_bytes: int
    used: float

    @property
    def is_used(self) -> bool:
        """Whether a run has it open."""
        try:
            held = hold(self.folder / MARKER, alone=True)
        except OSError:
            return True
        if held is not None:
            os.close(held)
        return False

    def delete(self) -> None:
        """Remove the folder.

        Raises:
            CacheError: a run is using the folder, or the system refuses to remove it.
        """
        try:
            held = hold(self.folder / MARKER, alone=True)
        except OSError:
            raise CacheError(
                f"{self.folder} is in use by a run; expected an unused cache; delete it once the run has ended"
            ) from None
        try:
            shutil.rmtree(self.folder)
        except OSError as error:
            raise CacheError(f"cannot delete {self.folder}: {error.strerror or error}") from error
        finally:
            if held is not None:
                os.close(held)


def stored_caches(root: str | Path, strays: list[Path] | None = None) -> list[StoredCache]:
    """The caches under ``root``, most recently used first.

    Args:
        root: the folder of all caches.
        strays: a list that receives everything else in it, damaged caches included.
    """
    found = []
    try:
        there = sorted(Path(root).iterdir())
    except OSError:
        return []
    for folder in there:
        marker = folder / MARKER
        try:
            if not marker.is_file():
                raise ArtifactError(f"{folder} is not a cache")
            found.append(StoredCache(folder, CacheInfo.read(marker), _size_bytes(folder), marker.stat().st_mtime))
        except (ArtifactError, OSError):
            if strays is not None and not folder.name.startswith(TRIAL):
                strays.append(folder)
    return sorted(found, key=lambda stored: -stored.used)


def _size_bytes(folder: Path) -> int:
    """Size of all files; one that disappears meanwhile, or cannot be read, does not count."""
    size = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            size += path.lstat().st_size
    return size
