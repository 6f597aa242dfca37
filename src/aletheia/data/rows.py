"""Rows of every accepted form, as messages or plain text. No torch.

A source is a local file or a hub data set; the columns of its first row decide the form, the first that fits in
the order of ``FORMS``. Every later row must have it too.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from aletheia.anatomy.schema import BETWEEN_SOURCES, DataIdentity
from aletheia.data.find import find
from aletheia.data.formats import read_table
from aletheia.data.hub import read_hub, read_saved
from aletheia.data.sources import Table, kind, shown, shown_columns
from aletheia.errors import DataError

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
    """All rows of a data set, what it is known by, and notes on where the rows were found, one line each."""

    identity: DataIdentity
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


def load_rows(data: str | Sequence[str]) -> Rows:
    """Read files, folders, patterns, and hub sets ``name[:config[:split]]``, see :func:`aletheia.data.find.find`.

    Several are read one after the other as one data set; each file may have a form of its own, and is read once.

    Raises:
        DataError: no source is given, one cannot be read, its columns fit no form, or a row is unusable; names the row.
    """
    read: set[str] = set()
    parts = [_load_source(source, read) for source in ([data] if isinstance(data, str) else data)]
    if not parts:
        raise DataError("found no data, expected at least one file or hub data set; give it as `data`")
    notes = tuple(note for part in parts for note in part.notes)
    parts = [part for part in parts if part.rows]
    return replace(_joined(BETWEEN_SOURCES.join(part.identity.name for part in parts), parts), notes=notes)


def _joined(name: str, parts: Sequence[Rows]) -> Rows:
    """Several as one: rows and forms in order, a fingerprint of all fingerprints."""
    if len(parts) == 1:
        return replace(parts[0], identity=parts[0].identity.model_copy(update={"name": name}))
    digest = hashlib.sha256("\n".join(part.identity.fingerprint for part in parts).encode()).hexdigest()
    form = " | ".join(dict.fromkeys(form for part in parts for form in part.identity.form.split(" | ") if form))
    rows = tuple(row for part in parts for row in part.rows)
    return Rows(DataIdentity(name=name, fingerprint=digest, form=form, rows=len(rows)), rows)


def _load_source(source: str, read: set[str]) -> Rows:
    """The rows of one source, without the files that are in ``read`` already; they are added to it."""
    columns = {"input", *(name for needed in FORMS.values() for name in needed)}
    found = find(source)
    named = [source] if found is None else [str(path.resolve()) for path in found.paths]
    new = [name for name in dict.fromkeys(named) if name not in read]
    read.update(new)
    if found is None:
        parts = [_interpreted(source, read_hub(source, columns)) for _ in new]
    else:
        paths = {str(path.resolve()): path for path in reversed(found.paths)}
        parts = [_interpreted(str(paths[name]), _local(paths[name], columns)) for name in new]
    notes = () if found is None else found.notes
    if again := len(named) - len(new):
        some = "" if len(named) == 1 else f"{again} of {len(named)} files are "
        notes += (f"{source}: {some}named before and read once",)
    return replace(_joined(source, parts), notes=notes)


def _local(path: Path, columns: set[str]) -> Table:
    return read_saved(path, columns) if path.is_dir() else read_table(path)


def _interpreted(name: str, table: Table) -> Rows:
    form = _form_of(table)
    rows = tuple(_row(record, form, where) for where, record in table.records)
    return Rows(DataIdentity(name=name, fingerprint=table.fingerprint, form=form, rows=len(rows)), rows)


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
