"""``aletheia cache``: list and delete prefix caches on disk."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aletheia.cli.options import JsonOption, print_json, print_rich, say

if TYPE_CHECKING:
    from aletheia.prefix.cache_folders import StoredCache

EXAMPLE = "aletheia cache --delete-unused 30"
DAY_SECONDS = 24 * 3600


def cache(
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            "--cache-dir",
            help="Folder to look in. (default: $ALETHEIA_CACHE, else your cache folder)",
            metavar="FOLDER",
        ),
    ] = None,
    delete: Annotated[
        str | None,
        typer.Option(
            "--delete", help="Delete the cache with this key; its first characters are enough.", metavar="KEY"
        ),
    ] = None,
    delete_unused: Annotated[
        float | None,
        typer.Option(
            "--delete-unused", help="Delete all caches that no run has used for this many days.", metavar="DAYS", min=0
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the prefix caches on disk, or delete those that are no longer used."""
    from aletheia.errors import CacheError
    from aletheia.prefix.cache_folders import default_cache_dir, stored_caches
    from aletheia.reporting.format import human_bytes

    root = cache_dir or default_cache_dir()
    strays: list[Path] = []
    found = stored_caches(root, strays)
    unwanted = []
    if delete is not None:
        unwanted = [one for one in found if delete and one.folder.name.startswith(delete)]
        if len(unwanted) != 1:
            raise CacheError(
                f"{len(unwanted)} caches in {root} begin with {delete!r}; expected exactly one; see 'aletheia cache'"
            )
    if delete_unused is not None:
        before = time.time() - delete_unused * DAY_SECONDS
        old = [one for one in found if one.used < before and one not in unwanted]
        for one in old:
            if one.is_used:
                say(f"note: {one.folder} is in use by a run and is kept")
        unwanted += [one for one in old if not one.is_used]
    for one in unwanted:
        one.delete()
        say(f"deleted {one.folder} ({human_bytes(one.size_bytes)})")
    left = [one for one in found if one not in unwanted]
    if strays:
        names = ", ".join(one.name for one in strays[:3])
        more = f" and {len(strays) - 3} more" if len(strays) > 3 else ""
        say(f"note: skipped in {root}, because they are not prefix caches: {names}{more}")
    if as_json:
        print_json([_described(one) for one in left])
    elif left:
        print_rich(_table(left))
    else:
        say(f"no prefix cache in {root}")


def _described(stored: "StoredCache") -> dict[str, object]:
    return {
        "key": stored.folder.name,
        "folder": str(stored.folder),
        "model": stored.info.model,
        "boundary": stored.info.boundary,
        "dtype": stored.info.dtype,
        "size_bytes": stored.size_bytes,
        "used": stored.used,
    }


def _table(caches: "list[StoredCache]") -> object:
    from rich.table import Table

    from aletheia.reporting.format import human_bytes

    table = Table("key", "model", "boundary", "dtype", "size", "last used", box=None, pad_edge=False)
    for one in caches:
        used = time.strftime("%Y-%m-%d", time.localtime(one.used))
        size = human_bytes(one.size_bytes)
        table.add_row(one.folder.name[:12], one.info.model, str(one.info.boundary), one.info.dtype, size, used)
    return table
