"""Records of JSON text; the content decides its kind: an object per line, an array, or objects over several lines."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from aletheia.data.sources import Records, Table, decode, kind, shown, shown_columns
from aletheia.errors import DataError

_OF_A_ROW = {"prompt", "completion", "question", "answer", "instruction", "output", "text", "messages", "conversations"}
WRAPPERS = (
    "data",
    "rows",
    "examples",
    "instances",
    "items",
    "records",
    "train",
)  # keys that may hold a file's list of rows
_SPACE = re.compile(r"[ \t\r\n]*")
_OPEN_LINE = re.compile(r"[\[{,]\s*$")  # a line on which a value cannot end


def read_json_rows(path: Path, content: bytes) -> Table:
    """The rows of a JSON or JSON Lines file, whatever its suffix.

    Raises:
        DataError: the file is not UTF-8 or not JSON, or a value is not a row; names the line or the row.
    """
    text = decode(path, content)
    start = _SPACE.match(text).end()  # type: ignore[union-attr]  # it always matches
    line, _, rest = text[start:].partition("\n")
    problem = _parse(line)[2]
    if line.startswith("[") and (problem or not rest.strip()):
        return Table.of(_from_array(path, text))
    is_open = bool(problem) and not problem.startswith("Extra data") and _OPEN_LINE.search(line)
    if line.startswith("{") and is_open:
        return Table.of(_unwrapped(path, _from_objects(path, text, start)))
    return Table.of(_unwrapped(path, _from_lines(path, text)))


def _parse(text: str) -> tuple[Any, int, str]:
    return _tried(lambda: json.loads(text), 1)


def _tried(parse: Callable[[], Any], begin: int) -> tuple[Any, int, str]:
    """(value, line, reason): on failure the line, counted from 1, and the reason; on success the reason is empty.

    ``begin`` is the line to name if the parser names none.
    """
    try:
        return parse(), 0, ""
    except json.JSONDecodeError as error:
        return None, error.lineno, f"{error.msg} at column {error.colno}"
    except RecursionError:
        return None, begin, "nested too deeply"
    except ValueError as error:  # an integer of more than 4,300 digits
        return None, begin, str(error).partition(";")[0]


def _from_lines(path: Path, text: str) -> Records:
    records: Records = []
    # only "\n" ends a line: a JSON string may contain U+2028 and the like, so splitlines() would be wrong
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        record, _, problem = _parse(line)
        if problem:
            raise DataError(
                f"{where}: found invalid JSON ({problem}), expected one complete JSON object per line; "
                "correct or remove the line"
            )
        if not isinstance(record, dict):
            raise DataError(f"{where}: found {kind(record)}, expected a JSON object; write one object per line")
        records.append((where, record))
    return records


def _from_array(path: Path, text: str) -> Records:
    rows, line, problem = _parse(text)
    if problem:
        raise DataError(
            f"{path}:{line}: found invalid JSON ({problem}), expected one array of objects; "
            "correct the file at that line"
        )
    return _numbered(path, rows)


def _numbered(path: Path, rows: list[Any]) -> Records:
    records: Records = []
    for number, row in enumerate(rows, start=1):
        where = f"{path} row {number}"
        if not isinstance(row, dict):
            raise DataError(f"{where}: found {kind(row)}, expected an object; correct or remove the row")
        records.append((where, row))
    return records


def _from_objects(path: Path, text: str, at: int) -> Records:
    """Objects over several lines, one after another; the first begins at character ``at``."""
    records: Records = []
    decoder = json.JSONDecoder()
    line = text.count("\n", 0, at) + 1
    while at < len(text):
        found, line_of_problem, problem = _tried(partial(decoder.raw_decode, text, at), line)
        if problem:
            raise DataError(
                f"{path}:{line_of_problem}: found invalid JSON ({problem}), expected complete JSON objects; "
                "correct the file at that line"
            )
        record, end = found
        if not isinstance(record, dict):
            raise DataError(f"{path}:{line}: found {kind(record)}, expected a JSON object; correct or remove it")
        records.append((f"{path}:{line}", record))
        end = _SPACE.match(text, end).end()  # type: ignore[union-attr]  # it always matches
        line += text.count("\n", at, end)
        at = end
    return records


def _unwrapped(path: Path, records: Records) -> Records:
    """The rows inside the single object of a file such as ``{"data": [...]}``; other records unchanged."""
    if len(records) != 1:
        return records
    [(where, record)] = records
    lists = {key: value for key, value in record.items() if isinstance(value, list)}
    wrapping = [key for key in lists if key.lower() in WRAPPERS]
    if not wrapping or _OF_A_ROW & record.keys():
        return records
    filled = [key for key, value in lists.items() if any(isinstance(item, dict) for item in value)]
    if len(filled) > 1:
        raise DataError(
            f"{where}: found lists of rows under {shown_columns(tuple(filled))}, expected one; "
            "write each into a separate file"
        )
    if not filled:
        raise DataError(f"{where}: found no rows under {shown(wrapping[0])}, expected at least one; check the file")
    return _numbered(path, record[filled[0]]) if filled[0] in wrapping else records
