"""The cache folders on this machine: where they lie, what they hold, and how they are deleted."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from aletheia.errors import ArtifactError, CacheError
from aletheia.prefix.cache import CacheInfo, hold


def default_cache_dir() -> Path:
    """``ALETHEIA_CACHE``, else ``aletheia/prefix`` in the user's cache folder."""
    if "ALETHEIA_CACHE" in os.environ:
        return Path(os.environ["ALETHEIA_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "aletheia" / "prefix"


@dataclass(frozen=True, slots=True)
class StoredCache:
    """A cache folder as it lies on disk: what it holds, its bytes, and when a run last opened it (seconds, POSIX)."""

    folder: Path
    info: CacheInfo
    size_bytes: int
    used: float

    def delete(self) -> None:
        """Remove the folder.

        Raises:
            CacheError: a run is using it, or the system refuses.
        """
        try:
            held = hold(self.folder / "cache.json", alone=True)
        except OSError:
            raise CacheError(
                f"{self.folder} is in use by a run; expected none, delete it when that has ended"
            ) from None
        try:
            shutil.rmtree(self.folder)
        except OSError as error:
            raise CacheError(f"cannot delete {self.folder}: {error.strerror or error}") from error
        finally:
            if held is not None:
                os.close(held)


def stored_caches(root: str | Path) -> list[StoredCache]:
    """The caches under ``root``, the one used last first; anything else that lies there is left out."""
    found = []
    for marker in Path(root).glob("*/cache.json"):
        try:
            info = CacheInfo.read(marker)
            size = sum(path.stat().st_size for path in marker.parent.rglob("*"))
            found.append(StoredCache(marker.parent, info, size, marker.stat().st_mtime))
        except (ArtifactError, OSError):
            continue
    return sorted(found, key=lambda stored: -stored.used)
