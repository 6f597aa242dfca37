"""Bring conversations as people store them to one form: messages with role and content. No torch.

ShareGPT roles and keys (``from``, ``value``, human, gpt), content as a list of text parts, and tool calls with JSON
text as arguments become what chat templates expect.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from aletheia.data.notes import Notes
from aletheia.data.sources import kind, shown, shown_columns
from aletheia.errors import DataError

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool", "developer")
_ROLE_OF = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ipython": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "observation": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
_CALLS = ("function_call", "tool_call")  # roles whose text is one call or a list of calls
_ROLE_KEYS, _TEXT_KEYS = ("role", "from"), ("content", "value")
_LOSS_KEYS = ("weight", "train", "loss")  # keys that say whether an answer is learned
_TRUTH = {"true": True, "false": False}  # as a .csv writes them
_MOST_NAMED = 12  # keys named per message
MEDIA = ("image", "images", "image_url", "audio", "audios", "input_audio", "video", "videos")


class UnusableRowError(DataError):
    """A row that cannot be learned from; left-out rows are counted by ``reason``."""

    def __init__(self, reason: str, message: str) -> None:
        """``message`` is one line for the user, ``reason`` a few words."""
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle both parts."""
        return UnusableRowError, (self.reason, str(self))


def text_of(value: object, name: str, where: str, may_be_empty: bool = False) -> str:
    """The text of a value; numbers, true and false are written as text.

    Raises:
        UnusableRowError: the value is null, another kind, only white space, or contains half of a surrogate pair.
    """
    if isinstance(value, bool | int) or (isinstance(value, float) and value == value):
        return json.dumps(value)
    if not isinstance(value, str):
        reason = "no text" if value is None or isinstance(value, float) else "a value that is not text"
        raise UnusableRowError(
            reason, f"{where}: found {kind(value)} in {name!r}, expected text; correct or remove the row"
        )
    if not may_be_empty and not value.strip():
        found = "only white space" if value else "empty text"
        raise UnusableRowError(
            "no text", f"{where}: found {found} in {name!r}, expected text; fill in or remove the row"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:  # json.loads accepts a lone "\ud800", tokenizers do not
        raise UnusableRowError(
            "half of a surrogate pair",
            f"{where}: found half of a surrogate pair in {name!r} (character {error.start + 1}), "
            "expected valid Unicode; correct or remove the row",
        ) from error
    return value


def from_json(value: object) -> object:
    """The value of JSON text; other values and other text unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def check_text_alone(held: Mapping[str, Any], place: str, where: str) -> None:
    """Refuse a row or message that holds an image, a sound or a video.

    Raises:
        UnusableRowError: names the column or key.
    """
    for name in MEDIA:
        if held.get(name) not in (None, "", [], {}):
            raise UnusableRowError(
                f"{name!r} next to the text",
                f"{where}: found {name!r} in {place}, expected only text; Aletheia trains on text; remove the row",
            )


def message_list(value: object, name: str, where: str, notes: Notes) -> tuple[Message, ...]:
    """The messages of a column that holds a list, or JSON text of one; unused keys are noted.

    Raises:
        UnusableRowError: the value is not a list, is empty, or holds something that is not a message.
    """
    held = from_json(value)
    value = held if isinstance(held, list) else value
    if not isinstance(value, list):
        reason = "no messages" if value is None else "a value that is not a list of messages"
        raise UnusableRowError(
            reason,
            f"{where}: found {kind(value)} in {name!r}, expected a list of messages with role and content; "
            "correct the row (in a .csv write them as JSON, or use another form)",
        )
    if not value:
        raise UnusableRowError(
            "no messages", f"{where}: found an empty list in {name!r}, expected messages; remove the row"
        )
    if all(isinstance(item, str) for item in value):
        raise UnusableRowError(
            "a list of texts",
            f"{where}: found a list of texts in {name!r}, expected text, or a list of messages with role and content; "
            "write one question and one answer per row",
        )
    return tuple(_message(item, f"{name}[{index}]", where, notes) for index, item in enumerate(value))


def tool_list(value: object, name: str, where: str) -> tuple[dict[str, Any], ...]:
    """Tools as chat templates take them, from a list of objects or JSON text; null and empty text mean no tools.

    Raises:
        UnusableRowError: the value is anything else.
    """
    value = from_json(_plain(value))
    if value is None or value == "" or value == []:
        return ()
    tools = [_object(tool) for tool in (value if isinstance(value, list) else [value])]
    if not all(tools):
        raise UnusableRowError(
            "tools that are not objects",
            f"{where}: found {kind(value)} in {name!r}, expected a list of tools, each an object; correct the row",
        )
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def checked(messages: Sequence[Message], where: str, loss_from: int = 0) -> None:
    """Check that there is an answer to learn, and that no answer directly follows another.

    Raises:
        UnusableRowError: one of these is not so.
    """
    roles = [message["role"] for message in messages]
    for index, (role, following) in enumerate(pairwise(roles), start=2):
        if role == following == "assistant":
            raise UnusableRowError(
                "two assistant turns in a row",
                f"{where}: found two assistant turns in a row (messages {index - 1} and {index}), expected "
                "another role between them; join them into one",
            )
    if "assistant" not in roles[max(loss_from, 1) :]:
        found = "only a leading assistant message" if "assistant" in roles[loss_from:] else "no assistant message"
        raise UnusableRowError(
            "no answer",
            f"{where}: found {found} to learn from, expected one after the prompt; add it or remove the row",
        )


def loss_share(message: Message) -> float:
    """The weight of a message's loss by its own keys; 1 without them."""
    for key in _LOSS_KEYS:
        value = from_json(message.get(key))
        value = _TRUTH.get(value.strip().lower(), value) if isinstance(value, str) else value
        if isinstance(value, bool | int | float):
            return float(value)
    return 1.0


def _message(item: object, name: str, where: str, notes: Notes) -> Message:
    if not isinstance(item, dict):
        raise UnusableRowError(
            "a message that is not an object",
            f"{where}: found {kind(item)} in {name}, expected an object with role and content; correct the row",
        )
    role_key = next((key for key in _ROLE_KEYS if item.get(key) is not None), "")
    text_key = next((key for key in _TEXT_KEYS if item.get(key) is not None), "")
    text_key = text_key or next((key for key in _TEXT_KEYS if key in item), "")
    calls = _tool_calls(item.get("tool_calls"), name, where) or _function_call(item.get("function_call"))
    missing = "role" if not role_key else "content" if not text_key and not calls else ""
    if missing:
        raise UnusableRowError(
            f"a message without {missing}",
            f"{where}: found the keys {shown_columns(tuple(item))} in {name}, expected {missing!r} too; "
            "write each message as role and content",
        )
    said = item[role_key]
    said = said.strip().lower() if isinstance(said, str) else said
    role = _ROLE_OF.get(said, said) if isinstance(said, str) else said
    check_text_alone(item, name, where)
    if role not in ROLES:
        raise UnusableRowError(
            "an unknown role",
            f"{where}: found the role {shown(item[role_key])} in {name}, expected one of {', '.join(ROLES)}; "
            "rename the role",
        )
    content = item.get(text_key)
    if said in _CALLS and not calls:
        calls = _tool_calls(content, name, where)
        content = None if calls else content
    text = _content(content, role, f"{name}.{text_key or 'content'}", where, may_be_empty=bool(calls))
    # the chat template may use other fields, such as a tool's name or reasoning_content
    own = (role_key, text_key, "role", "content", "tool_calls", "function_call")
    others = {key: value for key, value in item.items() if key not in own}
    left = {key: value for key, value in others.items() if _is_kept(key, value)}
    unused = [key for key, value in others.items() if key not in left and value not in (None, [], {})]
    for key in unused[:_MOST_NAMED]:
        notes.add(f"the key {shown(key)} of messages holds no text and is not used", where)
    return {"role": role, "content": text} | left | ({"tool_calls": calls} if calls else {})


def _is_kept(key: str, value: object) -> bool:
    return isinstance(value, str) or (key in _LOSS_KEYS and value is not None)


def _content(value: object, role: str, name: str, where: str, may_be_empty: bool) -> str:
    if value is None and may_be_empty:
        return ""
    if isinstance(value, list):
        value = "".join(_part(part, f"{name}[{at}]", where) for at, part in enumerate(value))
    elif isinstance(value, dict) and role == "tool":  # a tool's result as an object
        value = json.dumps(_plain(value), ensure_ascii=False)
    return text_of(value, name, where, may_be_empty or role not in ("user", "assistant"))


def _part(part: object, name: str, where: str) -> str:
    """The text of a part of a message; parts of other types are refused by name."""
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and (part.get("type") in ("text", None)) and isinstance(part.get("text"), str):
        check_text_alone(part, name, where)
        return str(part["text"])
    what = part.get("type") if isinstance(part, dict) else None
    found = f"a part of type {shown(what)}" if isinstance(what, str) else f"{kind(part)} as a part"
    raise UnusableRowError(
        f"{found} in a message", f"{where}: found {found} in {name}, expected text parts only; remove the row"
    )


def _tool_calls(value: object, name: str, where: str) -> list[dict[str, Any]]:
    """Tool calls as templates expect them: each has a function with a name and an object of arguments."""
    value = from_json(_plain(value))
    if value is None or value == [] or value == "":
        return []
    calls = []
    for call in map(_object, value if isinstance(value, list) else [value]):
        inner = _object(call.get("function")) or call
        if not isinstance(inner.get("name"), str):
            raise UnusableRowError(
                "a tool call without a name",
                f"{where}: found {kind(call)} as a tool call of {name}, expected an object with the name and the "
                "arguments of a function; correct the row",
            )
        arguments = from_json(inner.get("arguments", inner.get("parameters")))
        own = {key: value for key, value in call.items() if key in ("id", "type") and isinstance(value, str)}
        arguments = {} if arguments is None or arguments == "" else arguments
        calls.append({"type": "function"} | own | {"function": {"name": inner["name"], "arguments": arguments}})
    return calls


def _function_call(value: object) -> list[dict[str, Any]]:
    """The call of OpenAI's older form, one per message."""
    value = from_json(_plain(value))
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return []
    return _tool_calls(json.dumps([value]), "function_call", "")


def _object(value: object) -> dict[str, Any]:
    """An object, also from JSON text; anything else gives an empty one."""
    held = from_json(value)
    return held if isinstance(held, dict) else {}


def _plain(value: Any) -> Any:
    """The value without nulls, which columnar files put where a row lacks a key; "null" as text stays."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items() if one is not None}
    return [_plain(one) for one in value] if isinstance(value, list) else value
