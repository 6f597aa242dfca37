"""Read the records of one local file: unpack, check and parse its bytes."""

import csv
import hashlib
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from aletheia.data.json_rows import read_json_rows
from aletheia.data.sources import Records, Table, decode, one_line, shown
from aletheia.data.unpack import PACKED, unpacked
from aletheia.errors import DataError


def read_table(path: Path) -> Table:
    """Read a ``.jsonl``, ``.ndjson``, ``.json``, ``.csv`` or ``.parquet`` file, also packed as ``.gz`` or ``.zst``.

    The content decides which kind of JSON it is, and whether it is packed. The fingerprint is the sha256 of the
    unpacked content.

    Raises:
        DataError: the file is not regular, unreadable, of another suffix, empty, damaged, too large when unpacked, not
            UTF-8, not parsable, or without rows.
    """
    reader = READERS.get(format_of(path))
    if reader is None:
        raise DataError(
            f"{path}: found the suffix {path.suffix!r}, expected one of {SUFFIXES}, also followed by "
            f"{' or '.join(PACKED)}; convert the file or rename it"
        )
    if not path.is_file():
        raise DataError(f"{path}: found a device or a pipe; expected a regular file on disk")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    content = unpacked(path, content)
    if not content.strip():
        found = "only white space" if content else "an empty file"
        raise DataError(f"{path}: found {found}, expected rows; check how the file was written")
    table = reader(path, content)
    if not table.records:
        raise DataError(f"{path}: found no rows, expected at least one; check how the file was written")
    return replace(table, fingerprint=hashlib.sha256(content).hexdigest())


def _read_csv(path: Path, content: bytes) -> Table:
    text = decode(path, content)
    limit = csv.field_size_limit(len(text) + 1)  # the default refuses fields above 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    records: Records = []
    line = 1
    try:
        for fields in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if not fields:
                continue
            if not header:
                header = [name.strip() for name in fields]
                if twice := sorted({name for name in header if name and header.count(name) > 1}):
                    raise DataError(
                        f"{where}: found the column {shown(twice[0])} twice, expected distinct names; rename one"
                    )
                continue
            if len(fields) != len(header):
                raise DataError(
                    f"{where}: found {len(fields)} fields, expected {len(header)} as in the header; "
                    "put values that hold commas or line breaks in double quotes"
                )
            records.append((where, dict(zip(header, fields, strict=True))))
    except csv.Error as error:
        raise DataError(
            f"{path}:{line}: found invalid CSV ({error}), expected comma-separated values; "
            "close every quote and double the quotes inside a value"
        ) from error
    finally:
        csv.field_size_limit(limit)
    return Table(tuple(header), records)


def _read_parquet(path: Path, content: bytes) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
        rows = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{path}: found no readable Parquet ({one_line(error)}), expected a complete Parquet file; "
            "write or copy it again"
        ) from error
    records = [(f"{path} row {number}", row) for number, row in enumerate(rows, start=1)]
    return Table(tuple(table.column_names), records)


READERS: dict[str, Callable[[Path, bytes], Table]] = {
    ".jsonl": read_json_rows,
    ".ndjson": read_json_rows,
    ".json": read_json_rows,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
SUFFIXES = ", ".join(READERS)


def format_of(path: Path) -> str:
    """The suffix that names the format of a file: ``.jsonl`` of ``rows.jsonl`` and ``rows.jsonl.gz``; empty if none."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""
