"""Records of a local file: the bytes checked, parsed, and each record given the place a person can look up."""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aletheia.errors import DataError

Records = list[tuple[str, dict[str, Any]]]  # each with the place where it stands
_SHOWN_COLUMNS = 12


@dataclass(frozen=True)
class Table:
    """Parsed records, not yet interpreted.

    ``columns`` are those of the first record; ``records`` pairs each record with where it stands, such as
    ``file.jsonl:17``. ``fingerprint`` is left empty by readers of files, whose bytes are the fingerprint.
    """

    columns: tuple[str, ...]
    records: Records
    fingerprint: str = ""


def read_table(path: Path) -> Table:
    """Read a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file that exists.

    Raises:
        DataError: no regular file, unreadable, another suffix, empty, not UTF-8, not parsable, or without rows.
    """
    if path.is_dir():
        raise DataError(f"{path}: found a folder, expected a data file; name one of the files in it")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: found the suffix {path.suffix!r}, expected one of {', '.join(READERS)}; "
            "convert the file or rename it"
        )
    if not path.is_file():
        raise DataError(f"{path}: found no regular file (a device or a pipe); expected a data file on disk")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if not content.strip():
        found = "only white space" if content else "an empty file"
        raise DataError(f"{path}: found {found}, expected rows; check how the file was written")
    table = reader(path, content)
    if not table.records:
        raise DataError(f"{path}: found no rows, expected at least one; check how the file was written")
    return table


def shown(value: object) -> str:
    """A value from the data for an error message: one line, at most about 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def shown_columns(columns: tuple[str, ...]) -> str:
    """Column names for an error message; a long list is cut."""
    names = ", ".join(shown(name) for name in columns[:_SHOWN_COLUMNS]) or "none"
    more = len(columns) - _SHOWN_COLUMNS
    return f"{names} and {more} more" if more > 0 else names


def kind(value: object) -> str:
    """What a JSON value is, in the words of an error message."""
    names: dict[type, str] = {str: "text", int: "a number", float: "a number", bool: "true or false"}
    names |= {list: "a list", dict: "an object", type(None): "null", bytes: "bytes"}
    name = names.get(type(value), type(value).__name__)
    return f"{name} ({shown(value)})" if isinstance(value, bool | int | float) else name


def _decode(path: Path, content: bytes) -> str:
    """UTF-8 text without its byte-order mark."""
    if content.startswith(b"\x1f\x8b"):
        raise DataError(f"{path}: found gzip data, expected text; unpack it first (gunzip)")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}:1: found UTF-16, expected UTF-8; save the file as UTF-8 (iconv -f UTF-16)")
    if (nul := content.find(b"\0")) >= 0:
        raise DataError(
            f"{path}:{_line_at(content, nul)}: found a NUL byte, expected UTF-8 text; "
            "the file is binary, damaged or UTF-16: save it as UTF-8"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}:{_line_at(content, error.start)}: found the byte 0x{error.object[error.start]:02x}, "
            "expected UTF-8; save the file as UTF-8"
        ) from error


def _line_at(content: bytes, offset: int) -> int:
    return content.count(b"\n", 0, offset) + 1


def _parse_json(text: str) -> tuple[Any, int, str]:
    """The value, or the line (1-based) and the reason why there is none; the reason is empty on success."""
    try:
        return json.loads(text), 0, ""
    except json.JSONDecodeError as error:
        return None, error.lineno, f"{error.msg} at column {error.colno}"
    except RecursionError:
        return None, 1, "nested too deeply"
    except ValueError as error:  # an integer of more than 4,300 digits
        return None, 1, str(error).partition(";")[0]


def _read_jsonl(path: Path, content: bytes) -> Table:
    records: Records = []
    # Only "\n" ends a line: U+2028 and its like may stand inside a JSON string, so splitlines() would be wrong.
    for number, line in enumerate(_decode(path, content).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        record, _, problem = _parse_json(line)
        if not records and line.lstrip().startswith("["):
            raise DataError(f"{where}: found a JSON array, expected one object per line; rename the file to .json")
        if problem:
            raise DataError(
                f"{where}: found invalid JSON ({problem}), expected one complete JSON object per line; "
                "correct or remove the line"
            )
        if not isinstance(record, dict):
            raise DataError(f"{where}: found {kind(record)}, expected a JSON object; write one object per line")
        records.append((where, record))
    return Table(_first_columns(records), records)


def _read_json(path: Path, content: bytes) -> Table:
    rows, line, problem = _parse_json(_decode(path, content))
    if problem.startswith("Extra data"):
        problem += "; a file with one object per line is named .jsonl"
    if problem:
        raise DataError(
            f"{path}:{line}: found invalid JSON ({problem}), expected one array of objects; "
            "correct the file at that line"
        )
    if not isinstance(rows, list):
        raise DataError(
            f"{path}: found {kind(rows)} at the top, expected an array of objects; write the rows as [{{...}}, {{...}}]"
        )
    records: Records = []
    for number, row in enumerate(rows, start=1):
        where = f"{path} row {number}"
        if not isinstance(row, dict):
            raise DataError(f"{where}: found {kind(row)}, expected an object; correct or remove the row")
        records.append((where, row))
    return Table(_first_columns(records), records)


def _read_csv(path: Path, content: bytes) -> Table:
    text = _decode(path, content)
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


def one_line(error: BaseException, limit: int = 200) -> str:
    """The text of a foreign error on one line, cut to ``limit`` characters; its type if it has no text."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _first_columns(records: Records) -> tuple[str, ...]:
    return tuple(records[0][1]) if records else ()


READERS: dict[str, Callable[[Path, bytes], Table]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
