"""Records of any source, each with its place for people, and helpers for messages about them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aletheia.errors import DataError

Records = list[tuple[str, dict[str, Any]]]  # (place, record)
_SHOWN_COLUMNS = 12


@dataclass(frozen=True)
class Table:
    """Parsed records, not yet interpreted.

    ``columns`` are those of the first record; ``records`` pairs each record with its place, such as ``file.jsonl:17``.
    ``fingerprint`` depends only on the content.
    """

    columns: tuple[str, ...]
    records: Records
    fingerprint: str = ""

    @classmethod
    def of(cls, records: Records) -> "Table":
        """The table of these records."""
        return cls(tuple(records[0][1]) if records else (), records)


def shown(value: object) -> str:
    """A value from the data for an error message, on one line of at most 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def shown_columns(columns: tuple[str, ...]) -> str:
    """Column names for an error message; a long list is cut."""
    names = ", ".join(shown(name) for name in columns[:_SHOWN_COLUMNS]) or "none"
    more = len(columns) - _SHOWN_COLUMNS
    return f"{names} and {more} more" if more > 0 else names


def kind(value: object) -> str:
    """The kind of a JSON value, in words for an error message."""
    names: dict[type, str] = {str: "text", int: "a number", float: "a number", bool: "true or false"}
    names |= {list: "a list", dict: "an object", type(None): "null", bytes: "bytes"}
    name = names.get(type(value), type(value).__name__)
    return f"{name} ({shown(value)})" if isinstance(value, bool | int | float) else name


def one_line(error: BaseException, limit: int = 200) -> str:
    """The message of a library's error on one line, cut to ``limit`` characters; its type if it is empty."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def decode(path: Path, content: bytes) -> str:
    """UTF-8 text without its byte-order mark.

    Raises:
        DataError: the content is UTF-16, or has a NUL or another byte that is not UTF-8; names the line.
    """
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
