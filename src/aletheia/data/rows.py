"""Rows of every accepted form, as messages or plain text. No torch.

A source is a local file or a hub data set; what its columns mean is decided in :mod:`aletheia.data.forms`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aletheia.anatomy.schema import BETWEEN_SOURCES, DataIdentity
from aletheia.data.forms import COLUMNS, Row, interpret
from aletheia.data.hub import read_hub
from aletheia.data.notes import add_up
from aletheia.data.sources import READERS, read_table
from aletheia.errors import DataError
from aletheia.files import file_sha256

__all__ = ["Row", "Rows", "load_rows"]


@dataclass(frozen=True)
class Rows:
    """All rows of a data set and what it is known by.

    ``left_out`` counts rows that are not here, by reason; ``notes`` say what a person should know, one line each.
    """

    identity: DataIdentity
    rows: tuple[Row, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def load_rows(data: str | Sequence[str], skip_unusable: bool = False) -> Rows:
    """Read a local ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file, or a hub set ``name[:config[:split]]``.

    Several are read one after the other as one data set; each may have a form of its own. Rows that cannot be learned
    from are an error, or left out and counted by reason with ``skip_unusable``.

    Raises:
        DataError: no source is given, one cannot be read, its columns fit no form, or a row is unusable; names the row.
    """
    parts = [_load_one(source, skip_unusable) for source in ((data,) if isinstance(data, str) else data)]
    if not parts:
        raise DataError("found no data, expected at least one file or hub data set; give it as `data`")
    if len(parts) == 1:
        return parts[0]
    return Rows(
        _joined([part.identity for part in parts]),
        tuple(row for part in parts for row in part.rows),
        add_up([part.left_out for part in parts]),
        tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )


def _joined(parts: Sequence[DataIdentity]) -> DataIdentity:
    """Several sources as one: names and forms in order, a fingerprint of all fingerprints."""
    digest = hashlib.sha256("\n".join(part.fingerprint for part in parts).encode()).hexdigest()
    return DataIdentity(
        name=BETWEEN_SOURCES.join(part.name for part in parts),
        fingerprint=digest,
        form=" | ".join(dict.fromkeys(part.form for part in parts)),
        rows=sum(part.rows for part in parts),
    )


def _load_one(source: str, skip_unusable: bool) -> Rows:
    path = Path(source)
    if _exists(path):
        table, fingerprint = read_table(path), file_sha256(path)
    elif path.suffix.lower() in READERS:
        raise DataError(f"{source}: found no such file; check the path (looked in {Path.cwd()})")
    else:
        table = read_hub(source, columns=set(COLUMNS))
        fingerprint = table.fingerprint
    found = interpret(table, skip_unusable)
    identity = DataIdentity(name=source, fingerprint=fingerprint, form=found.form, rows=len(found.rows))
    return Rows(identity, found.rows, found.left_out, found.notes)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long for the file system, or with a NUL
        return False
