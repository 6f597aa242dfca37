"""From the columns of a record to a row: messages, or plain text. No torch.

The columns of the first record decide the form: the first of ``FORMS`` that fits. Every later record must have it too.
Columns that change the meaning of a row are used; all others are named in one note.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aletheia.data.messages import (
    Message,
    UnusableRowError,
    check_text_alone,
    checked,
    from_json,
    loss_share,
    message_list,
    text_of,
    tool_list,
)
from aletheia.data.notes import Notes
from aletheia.data.sources import Table, shown_columns
from aletheia.errors import DataError

# name of the form -> the columns it needs
FORMS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "conversation": ("conversation",),
    "dialog": ("dialog",),
    "prompt, completion": ("prompt", "completion"),
    "prompt, response": ("prompt", "response"),
    "question, answer": ("question", "answer"),
    "question, response": ("question", "response"),
    "instruction, input, output": ("instruction", "output"),
    "instruction, response": ("instruction", "response"),
    "query, response": ("query", "response"),
    "input, output": ("input", "output"),
    "text": ("text",),
}
_EXTRA = {"instruction": ("input", "context"), "question": ("context",)}  # optional columns that belong to a question
_SYSTEM, _TOOLS = ("system", "system_prompt"), ("tools", "functions")
_RATED = ("label", "kto_tag")  # whether an answer is good: true or false
_ACCEPTED = (
    "messages | conversations | prompt, completion | prompt, response | question, answer | question, response | "
    "instruction, (optional) input, output | query, response | input, output | text"
)
COLUMNS = frozenset(
    {*_SYSTEM, *_TOOLS, *_RATED, "history", "weight", "input", "context"}.union(*FORMS.values())
)  # all columns that a row may use


@dataclass(frozen=True, slots=True)
class Row:
    """One training row: either ``messages`` or ``text``.

    ``where`` is its place in the source, counted from 1: ``file.jsonl:17`` or ``file.json row 17``. Messages before
    ``loss_from`` never carry a loss: they are the prompt of a prompt-completion row. Nor do messages in ``no_loss``,
    which the row itself excludes. ``tools`` are those that the conversation may call.
    """

    messages: tuple[Message, ...] | None
    text: str | None
    where: str
    loss_from: int = 0
    tools: tuple[dict[str, Any], ...] = ()
    no_loss: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Interpreted:
    """The rows of a table, the count of those left out by reason, and notes for people."""

    form: str
    rows: tuple[Row, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def interpret(table: Table, skip_unusable: bool = False) -> Interpreted:
    """The rows of a table. An unusable row is an error; with ``skip_unusable`` it is left out and counted.

    Raises:
        DataError: the columns fit no form, a row is unusable, or with ``skip_unusable`` all are.
    """
    form = _form_of(table)
    notes, rows = Notes(), []
    left_out: dict[str, int] = {}
    first: UnusableRowError | None = None
    for where, record in table.records:
        try:
            rows.append(_row(record, form, where, notes))
        except UnusableRowError as error:
            if not skip_unusable:
                raise _with_remedy(error) from error.__cause__
            first = first or error
            left_out[error.reason] = left_out.get(error.reason, 0) + 1
    if first is not None and not rows:
        raise DataError(f"{first} (the first of {len(table.records)} rows, none of which can be used)")
    _name_unused(table, form, notes)
    return Interpreted(form, tuple(rows), left_out, notes.lines())


def _with_remedy(error: UnusableRowError) -> UnusableRowError:
    return UnusableRowError(error.reason, f"{error}; `skip_unusable=True` leaves such rows out")


def _form_of(table: Table) -> str:
    found = set(table.columns)
    for form, needed in FORMS.items():
        if set(needed) <= found:
            return form
    where = table.records[0][0]
    if {"chosen", "rejected"} <= found:
        raise DataError(
            f"{where}: found a preference data set (columns 'chosen' and 'rejected'), expected one answer per row: "
            "Aletheia trains on answers, not on preferences; rename 'chosen' to 'completion', or to 'messages' if it "
            "holds the whole conversation"
        )
    raise DataError(
        f"{where}: found the columns {shown_columns(table.columns)}; "
        f"expected one of the forms {_ACCEPTED}; rename the columns"
    )


def _used(form: str) -> set[str]:
    """The columns that a form uses, the optional ones included."""
    needed = FORMS[form]
    if form == "text":
        return {"text", "weight"}
    return {*needed, *_EXTRA.get(needed[0], ()), *_SYSTEM, *_TOOLS, "history", "weight"}


def _name_unused(table: Table, form: str, notes: Notes) -> None:
    columns = dict.fromkeys([*table.columns, *(name for _, record in table.records for name in record)])
    used = _used(form)
    for name in _RATED:
        values = [record[name] for _, record in table.records if record.get(name) is not None]
        if values and all(_rating(value) is not None for value in values):
            used.add(name)
    unused = tuple(name for name in columns if name not in used)
    if unused:
        names = f"column{'s' * (len(unused) > 1)} {shown_columns(unused)}"
        verb = "are" if len(unused) > 1 else "is"
        text = f"rows are read as {form}; the {names} {verb} not used"
        having = [where for where, record in table.records if any(name in record for name in unused)]
        notes.add(text, (having or [table.records[0][0]])[0], rows=len(having or table.records))


def _row(record: dict[str, Any], form: str, where: str, notes: Notes) -> Row:
    needed = FORMS[form]
    for name in needed:
        if name not in record:
            raise UnusableRowError(
                f"no column {name!r}",
                f"{where}: found the columns {shown_columns(tuple(record))}, expected {name!r} too; every row "
                f"must have the form of the first ({form})",
            )
    check_text_alone(record, "the columns", where)
    _row_weight(record, where, notes)
    if form == "text":
        return Row(messages=None, text=text_of(record["text"], "text", where), where=where)
    loss_from = 0
    if len(needed) == 1:
        messages = message_list(record[form], form, where, notes)
    else:
        prompt = _prompt(record, needed[0], where, notes)
        loss_from = len(prompt) if isinstance(record[needed[0]], list) else 0
        messages = prompt + _turns(record[needed[1]], needed[1], "assistant", where, notes)
    _check_rating(record, where)
    before = _before(record, messages, where, notes)
    messages, loss_from = before + messages, loss_from + len(before) if loss_from else 0
    checked(messages, where, loss_from)
    no_loss = _no_loss(messages, where, notes)
    tools: tuple[dict[str, Any], ...] = ()
    for name in _TOOLS:
        tools = tools or tool_list(record.get(name), name, where)
    return Row(messages, None, where, loss_from, tools, no_loss)


def _row_weight(record: dict[str, Any], where: str, notes: Notes) -> None:
    share = from_json(record.get("weight"))
    if not isinstance(share, int | float) or share == 1:
        return
    if share == 0:
        raise UnusableRowError(
            "weight 0", f"{where}: found the weight 0, so nothing is learned from it; remove the row"
        )
    notes.add(
        "the column 'weight' counts as 1: weights other than 0 and 1 are not supported, such as {}", where, f"{share}"
    )


def _rating(value: object) -> bool | None:
    """Whether an answer is good; None for a value that is neither true nor false."""
    return {"true": True, "false": False}.get(str(value).strip().lower())


def _check_rating(record: dict[str, Any], where: str) -> None:
    for name in _RATED:
        if _rating(record.get(name)) is False:
            raise UnusableRowError(
                "an answer rated as bad",
                f"{where}: found {name!r} false, an answer rated as bad, expected answers to learn: "
                "Aletheia trains on answers, not on preferences; remove such rows",
            )


def _prompt(record: dict[str, Any], name: str, where: str, notes: Notes) -> tuple[Message, ...]:
    """The question, with the text of the optional columns that belong to it."""
    value = record[name]
    if isinstance(value, list):
        return message_list(value, name, where, notes)
    question = _said(value, name, where, notes)
    for other in _EXTRA.get(name, ()):
        extra = record.get(other)
        if extra is None or not (text := text_of(extra, other, where, may_be_empty=True)).strip():
            continue
        if name == "question":
            notes.add("the column 'context' is put before the question", where)
        question = f"{text}\n\n{question}" if name == "question" else f"{question}\n\n{text}"
    return ({"role": "user", "content": question},)


def _turns(value: object, name: str, role: str, where: str, notes: Notes) -> tuple[Message, ...]:
    """The messages of a column of plain text, or of a list of messages (TRL's conversational form)."""
    if isinstance(value, list):
        return message_list(value, name, where, notes)
    return ({"role": role, "content": _said(value, name, where, notes)},)


def _said(value: object, name: str, where: str, notes: Notes) -> str:
    text = text_of(value, name, where)
    if not isinstance(value, str):
        notes.add(f"numbers in {name!r} are written as text, such as {{}}", where, text)
    return text


def _before(record: dict[str, Any], messages: tuple[Message, ...], where: str, notes: Notes) -> tuple[Message, ...]:
    """The system turn and the earlier turns from separate columns."""
    before: list[Message] = []
    for name in _SYSTEM:
        value = record.get(name)
        if value is None or not (text := text_of(value, name, where, may_be_empty=True)).strip():
            continue
        if before or messages[0]["role"] in ("system", "developer"):
            notes.add(f"the column {name!r} is not used where the messages begin with a system turn", where)
            continue
        before.append({"role": "system", "content": text})
        notes.add(f"the column {name!r} is used as a system turn", where)
    history = from_json(record.get("history"))
    if history:
        before += _history(history, where, notes)
        notes.add("the column 'history' is used as earlier turns", where)
    return tuple(before)


def _history(history: object, where: str, notes: Notes) -> list[Message]:
    if not isinstance(history, list):
        history = [history]
    if all(isinstance(item, dict) for item in history):
        return list(message_list(history, "history", where, notes))
    turns: list[Message] = []
    for at, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise UnusableRowError(
                "a history that is not a list of pairs",
                f"{where}: found no pair in history[{at}], expected [question, answer]; correct the row",
            )
        for role, value in zip(("user", "assistant"), pair, strict=True):
            turns.append({"role": role, "content": text_of(value, f"history[{at}]", where)})
    return turns


def _no_loss(messages: tuple[Message, ...], where: str, notes: Notes) -> frozenset[int]:
    """Indices of messages that carry no loss because the row says so."""
    without = set()
    for at, message in enumerate(messages):
        share = loss_share(message)
        if message["role"] != "assistant" or share == 1:
            continue
        if share == 0:
            without.add(at)
            notes.add("answers of weight 0 are not learned", where)
        else:
            notes.add(
                "the weight of a message counts as 1: weights other than 0 and 1 are not supported, such as {}",
                where,
                f"{share:g}",
            )
    return frozenset(without)
