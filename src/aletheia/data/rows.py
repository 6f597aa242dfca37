"""Rows of every accepted form, as messages or plain text. No torch.

:mod:`aletheia.data.find` decides where the rows are, :mod:`aletheia.data.forms` what their columns mean.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from aletheia.anatomy.schema import BETWEEN_SOURCES, DataIdentity
from aletheia.data.find import find
from aletheia.data.formats import read_table
from aletheia.data.forms import COLUMNS, Row, interpret
from aletheia.data.hub import read_hub, read_saved
from aletheia.data.notes import add_up
from aletheia.data.sources import Table
from aletheia.errors import DataError

__all__ = ["Row", "Rows", "load_rows"]


@dataclass(frozen=True)
class Rows:
    """All rows of a data set, and its identity.

    ``left_out`` counts the unusable rows by reason; ``notes`` are lines that a person should know.
    """

    identity: DataIdentity
    rows: tuple[Row, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def load_rows(data: str | Sequence[str], skip_unusable: bool = False) -> Rows:
    """Read files, folders, patterns, and hub data sets ``name[:config[:split]]``; see :func:`aletheia.data.find.find`.

    Several sources are read one after another as one data set. Each file may have a different form, and is read once.
    A row that cannot be learned from is an error; with ``skip_unusable`` it is left out and counted by reason.

    Raises:
        DataError: there is no source, one cannot be read, its columns fit no form, or a row is unusable; names the row.
    """
    read: set[str] = set()
    parts = [_load_source(source, read, skip_unusable) for source in ([data] if isinstance(data, str) else data)]
    if not parts:
        raise DataError("found no data, expected at least one file or hub data set; give it as `data`")
    return _joined(BETWEEN_SOURCES.join(part.identity.name for part in parts), parts)


def _joined(name: str, parts: Sequence[Rows]) -> Rows:
    """Several parts as one: rows and forms in order, and a fingerprint of all fingerprints."""
    notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
    left_out = add_up([part.left_out for part in parts])
    parts = [part for part in parts if part.rows]
    if len(parts) == 1:
        identity = parts[0].identity.model_copy(update={"name": name})
        return replace(parts[0], identity=identity, left_out=left_out, notes=notes)
    digest = hashlib.sha256("\n".join(part.identity.fingerprint for part in parts).encode()).hexdigest()
    form = " | ".join(dict.fromkeys(form for part in parts for form in part.identity.form.split(" | ") if form))
    rows = tuple(row for part in parts for row in part.rows)
    return Rows(DataIdentity(name=name, fingerprint=digest, form=form, rows=len(rows)), rows, left_out, notes)


def _load_source(source: str, read: set[str], skip_unusable: bool) -> Rows:
    """The rows of one source without the files in ``read``; adds its files to ``read``."""
    found = find(source)
    named = [source] if found is None else [str(path.resolve()) for path in found.paths]
    new = [name for name in dict.fromkeys(named) if name not in read]
    read.update(new)
    if found is None:
        parts = [_interpreted(source, read_hub(source, set(COLUMNS)), skip_unusable) for _ in new]
    else:
        paths = {str(path.resolve()): path for path in reversed(found.paths)}
        parts = [_interpreted(str(paths[name]), _local(paths[name]), skip_unusable) for name in new]
    joined = _joined(source, parts)
    notes = () if found is None else found.notes
    if again := len(named) - len(new):
        some = "" if len(named) == 1 else f"{again} of {len(named)} files are "
        notes += (f"{source}: {some}named more than once, and read once",)
    return replace(joined, notes=(*notes, *joined.notes))


def _local(path: Path) -> Table:
    return read_saved(path, set(COLUMNS)) if path.is_dir() else read_table(path)


def _interpreted(name: str, table: Table, skip_unusable: bool) -> Rows:
    found = interpret(table, skip_unusable)
    identity = DataIdentity(name=name, fingerprint=table.fingerprint, form=found.form, rows=len(found.rows))
    return Rows(identity, found.rows, found.left_out, found.notes)
