"""Read data sets with the ``datasets`` library, from the hub or from disk; the only place that calls it.

Code of a data set is never run: ``datasets`` runs none, and reads Arrow files without unpickling.
"""

import hashlib
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from aletheia.data.find import name_parts
from aletheia.data.sources import Records, Table, one_line
from aletheia.errors import DataError
from aletheia.files import file_sha256
from aletheia.kinds import near

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # "name" or "owner/name"


def read_hub(source: str, columns: set[str]) -> Table:
    """Read ``name[:config[:split]]`` (split: train), only the columns in ``columns`` if it has any of them.

    Without a connection, data sets in the local cache are still found; others are refused at once.

    Raises:
        DataError: no such data set, config or split, no connection, or no rows.
    """
    name, config, split = name_parts(source)
    if not _HUB_NAME.fullmatch(name):
        raise _not_found(source, "that is not the name of a hub data set")
    import datasets

    try:
        with _quick_when_offline(datasets):
            dataset = datasets.load_dataset(name, config or None, split=split or "train")
        records = _records(source, dataset, columns)
    except Exception as error:  # load_dataset raises OSError, ValueError, RuntimeError, pyarrow errors, ...
        raise _not_found(source, one_line(error)) from error
    if not records:
        raise DataError(f"{source}: found no rows, expected at least one; choose another split with name:config:split")
    return Table(tuple(dataset.column_names), records, fingerprint=dataset._fingerprint)


def read_saved(folder: Path, columns: set[str]) -> Table:
    """Read a data set that ``save_to_disk`` wrote, only the columns in ``columns`` if it has any of them.

    Raises:
        DataError: the folder is incomplete or damaged, or holds no rows.
    """
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder)).with_format(None)
        records = _records(str(folder), dataset, columns)
        digests = [file_sha256(path) for path in sorted(folder.glob("*.arrow"))]
    except Exception as error:  # as load_dataset
        raise DataError(
            f"{folder}: found a saved data set that cannot be read ({one_line(error)}), expected what save_to_disk "
            "writes; save or copy it again"
        ) from error
    if not records:
        raise DataError(f"{folder}: found no rows, expected at least one; check how it was written")
    fingerprint = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return Table(tuple(dataset.column_names), records, fingerprint)


def _records(source: str, dataset: Any, columns: set[str]) -> Records:
    wanted = [column for column in dataset.column_names if column in columns]
    rows = dataset.select_columns(wanted) if wanted else dataset.select(range(min(1, len(dataset))))
    return [(f"{source} row {number}", row) for number, row in enumerate(rows, start=1)]


def _not_found(source: str, reason: str) -> DataError:
    hint = near(source, "rows")
    return DataError(
        f"no file {source}, and no data set of that name could be loaded: {reason}{hint}; give a .jsonl, .json, .csv "
        "or .parquet file, a folder of them, a pattern such as data/*.jsonl, or a hub data set as name[:config[:split]]"
    )


@contextmanager
def _quick_when_offline(datasets: Any) -> Iterator[None]:
    """Use the offline mode of ``datasets`` if there is no connection: else it retries for 24 s."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or not _reachable(datasets.config.HF_ENDPOINT)
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _reachable(endpoint: str) -> bool:
    """Whether a connection to the hub opens within 3 s; assumed to if there is a proxy."""
    if getproxies():
        return True
    address = urlsplit(endpoint)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=3).close()
    except OSError:
        return False
    return True
