"""Rows of every accepted form, as messages or plain text. No torch.

A source is a local file or a hub data set; the columns of its first row decide the form, the first that fits in
the order of ``FORMS``. Every later row must have it too.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from aletheia.anatomy.schema import BETWEEN_SOURCES, DataIdentity
from aletheia.data.hub import read_hub
from aletheia.data.sources import READERS, Table, kind, read_table, shown, shown_columns
from aletheia.errors import DataError
from aletheia.files import file_sha256

ROLES = ("system", "user", "assistant", "tool", "developer")

# Name of the form -> the columns it needs; ``input`` beside ``instruction`` is optional.
FORMS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt, completion": ("prompt", "completion"),
    "question, answer": ("question", "answer"),
    "instruction, input, output": ("instruction", "output"),
    "text": ("text",),
}
_ACCEPTED = "messages | prompt, completion | question, answer | instruction, (optional) input, output | text"


@dataclass(frozen=True, slots=True)
class Row:
    """One training row: either ``messages`` or ``text``.

    ``where`` is its place in the source, 1-based: ``file.jsonl:17`` or ``file.json row 17``. Messages before
    ``loss_from`` never carry a loss: they are the prompt of a prompt-completion row.
    """

    messages: tuple[dict[str, str], ...] | None
    text: str | None
    where: str
    loss_from: int = 0


@dataclass(frozen=True)
class Rows:
    """All rows of a data set and what it is known by."""

    identity: DataIdentity
    rows: tuple[Row, ...]


def load_rows(data: str | Sequence[str]) -> Rows:
    """Read a local ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file, or a hub set ``name[:config[:split]]``.

    Several are read one after the other as one data set; each may have a form of its own.

    Raises:
        DataError: no source is given, one cannot be read, its columns fit no form, or a row is unusable; names the row.
    """
    parts = [_load_one(source) for source in ((data,) if isinstance(data, str) else data)]
    if not parts:
        raise DataError("found no data, expected at least one file or hub data set; give it as `data`")
    if len(parts) == 1:
        return parts[0]
    return Rows(_joined([part.identity for part in parts]), tuple(row for part in parts for row in part.rows))


def _joined(parts: Sequence[DataIdentity]) -> DataIdentity:
    """Several sources as one: names and forms in order, a fingerprint of all fingerprints."""
    digest = hashlib.sha256("\n".join(part.fingerprint for part in parts).encode()).hexdigest()
    return DataIdentity(
        name=BETWEEN_SOURCES.join(part.name for part in parts),
        fingerprint=digest,
        form=" | ".join(dict.fromkeys(part.form for part in parts)),
        rows=sum(part.rows for part in parts),
    )


def _load_one(source: str) -> Rows:
    path = Path(source)
    if _exists(path):
        table, fingerprint = read_table(path), file_sha256(path)
    elif path.suffix.lower() in READERS:
        raise DataError(f"{source}: found no such file; check the path (looked in {Path.cwd()})")
    else:
        table = read_hub(source, columns={"input", *(name for needed in FORMS.values() for name in needed)})
        fingerprint = table.fingerprint
    form = _form_of(table)
    rows = tuple(_row(record, form, where) for where, record in table.records)
    return Rows(DataIdentity(name=source, fingerprint=fingerprint, form=form, rows=len(rows)), rows)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long for the file system, or with a NUL
        return False


def _form_of(table: Table) -> str:
    for form, needed in FORMS.items():
        if set(needed) <= set(table.columns):
            return form
    raise DataError(
        f"{table.records[0][0]}: found the columns {shown_columns(table.columns)}; "
        f"expected one of the forms {_ACCEPTED}; rename the columns"
    )


def _row(record: dict[str, Any], form: str, where: str) -> Row:
    for name in FORMS[form]:
        if name not in record:
            raise DataError(
                f"{where}: found the columns {shown_columns(tuple(record))}, expected {name!r} too; every row "
                f"must have the form of the first ({form})"
            )
    if form == "text":
        return Row(messages=None, text=_text(record["text"], "text", where), where=where)
    if form == "messages":
        return _checked(_message_list(record["messages"], "messages", where), where)
    if form == "prompt, completion":
        prompt = _turns(record["prompt"], "prompt", "user", where)
        completion = _turns(record["completion"], "completion", "assistant", where)
        return _checked(prompt + completion, where, loss_from=len(prompt))
    if form == "question, answer":
        question, answer = (_text(record[name], name, where) for name in ("question", "answer"))
    else:
        question = _text(record["instruction"], "instruction", where)
        answer = _text(record["output"], "output", where)
        extra = record.get("input")
        if extra is not None and _text(extra, "input", where, may_be_empty=True).strip():
            question += f"\n\n{extra}"
    return Row((_message("user", question), _message("assistant", answer)), None, where)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _turns(value: object, name: str, role: str, where: str) -> tuple[dict[str, str], ...]:
    """Prompt or completion: plain text, or a list of messages (TRL's conversational form)."""
    if isinstance(value, list):
        return _message_list(value, name, where)
    return (_message(role, _text(value, name, where)),)


def _text(value: object, name: str, where: str, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: found {kind(value)} in {name!r}, expected text; correct or remove the row")
    if not may_be_empty and not value.strip():
        found = "only white space" if value else "empty text"
        raise DataError(f"{where}: found {found} in {name!r}, expected text; fill in or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # a lone "\ud800" passes json.loads, but no tokenizer
        raise DataError(
            f"{where}: found half of a surrogate pair in {name!r} (character {error.start + 1}), "
            "expected valid Unicode; correct or remove the row"
        ) from error
    return value


def _message_list(value: object, name: str, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list):
        raise DataError(
            f"{where}: found {kind(value)} in {name!r}, expected a list of messages with role and content; "
            "correct the row (in a .csv use another form)"
        )
    if not value:
        raise DataError(f"{where}: found an empty list in {name!r}, expected messages; remove the row")
    return tuple(_one_message(item, f"{name}[{index}]", where) for index, item in enumerate(value))


def _one_message(item: object, name: str, where: str) -> dict[str, str]:
    if not isinstance(item, dict):
        raise DataError(
            f"{where}: found {kind(item)} in {name}, expected an object with role and content; correct the row"
        )
    for key in ("role", "content"):
        if key not in item:
            raise DataError(
                f"{where}: found the keys {shown_columns(tuple(item))} in {name}, expected {key!r} too; "
                "write each message as role and content"
            )
    if item["role"] not in ROLES:
        raise DataError(
            f"{where}: found the role {shown(item['role'])} in {name}, expected one of {', '.join(ROLES)}; "
            "rename the role"
        )
    if item.get("tool_calls"):
        raise DataError(
            f"{where}: found tool_calls in {name}, expected text only; write the call into content as the "
            "model should write it"
        )
    needs_text = item["role"] in ("user", "assistant")
    _text(item["content"], f"{name}.content", where, may_be_empty=not needs_text)
    # Other text, such as a tool's name or a reasoning_content, is for the chat template to use or to ignore.
    return {key: value for key, value in item.items() if isinstance(value, str)}


def _checked(messages: tuple[dict[str, str], ...], where: str, loss_from: int = 0) -> Row:
    roles = [message["role"] for message in messages]
    for index, (role, following) in enumerate(pairwise(roles), start=2):
        if role == following == "assistant":
            raise DataError(
                f"{where}: found two assistant turns in a row (messages {index - 1} and {index}), expected "
                "another role between them; join them into one"
            )
    if "assistant" not in roles[max(loss_from, 1) :]:
        found = "only a leading assistant message" if "assistant" in roles[loss_from:] else "no assistant message"
        raise DataError(
            f"{where}: found {found} to learn from, expected one after the prompt; add it or remove the row"
        )
    return Row(messages, None, where, loss_from)
