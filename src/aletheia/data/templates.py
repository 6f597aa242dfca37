"""Chat templates: read from a file, and run on messages. A template is a program of its model's author."""

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from aletheia.data.messages import Message, UnusableRow
from aletheia.data.sources import one_line
from aletheia.errors import DataError

LARGEST = 1_000_000  # characters of a template; the longest of known models have 30,000
_NAMES = ("chat_template", "default")


def read_template(path: str | Path) -> str:
    """The chat template in a ``.jinja`` file, or in a ``tokenizer_config.json`` or ``chat_template.json``.

    Raises:
        DataError: the file cannot be read or holds no template.
    """
    file = Path(path)
    expected = "expected a .jinja file, or a tokenizer_config.json or chat_template.json"
    try:
        if not file.is_file():
            raise DataError(f"{path}: found no such file for `chat_template`; {expected}")
        if file.stat().st_size > 50 * LARGEST:
            raise DataError(f"{path}: found {file.stat().st_size / 1e6:.0f} MB; {expected}")
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: found bytes that are no UTF-8; {expected}") from error
    if file.suffix == ".json":
        text = _from_json(text, path, expected)
    if not text.strip():
        raise DataError(f"{path}: found no chat template in it; {expected}")
    check_size(text, str(path))
    return text


def _from_json(text: str, path: str | Path, expected: str) -> str:
    try:
        held = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: found invalid JSON ({one_line(error)}); {expected}") from error
    found = held.get("chat_template") if isinstance(held, dict) else None
    if isinstance(found, list):  # several, by name
        found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
    if isinstance(found, dict):
        found = found.get("default")
    return found if isinstance(found, str) else ""


def check_size(template: object, name: str) -> None:
    """Refuse a template that is too long to be one.

    Raises:
        DataError: it has more than ``LARGEST`` characters.
    """
    texts = template.values() if isinstance(template, dict) else (template,)
    size = sum(len(text) for text in texts if isinstance(text, str))
    if size > LARGEST:
        raise DataError(
            f"{name}: found a chat template of {size / 1e6:.1f} million characters, expected at most "
            f"{LARGEST / 1e6:g} million; use another with `chat_template`"
        )


class ChatTemplate:
    """A tokenizer's chat template as a function from messages to text."""

    def __init__(self, tokenizer: Any, pulse: Callable[[], None] = lambda: None) -> None:
        """``pulse`` is called after each rendering."""
        self._tokenizer = tokenizer
        self._pulse = pulse

    def render(
        self, messages: Sequence[Message], generation: bool, where: str, tools: Sequence[dict[str, Any]] = ()
    ) -> str:
        """The text of messages, with the opening of an answer behind it if ``generation``; "" for no messages.

        Raises:
            UnusableRow: the template refuses the messages.
        """
        if not messages:
            return ""
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=generation
            )
        except MemoryError:
            raise
        except Exception as error:  # a template is a program and may raise anything
            raise _refused(messages, error, where) from error
        self._pulse()
        return text

    @cached_property
    def system_of_its_own(self) -> str:
        """The text of the system turn that the template adds where there is none; empty if it adds none."""
        user, system = ({"role": role, "content": f"the {role} says"} for role in ("user", "system"))
        try:
            bare = self.render([user], True, "")
            given = self.render([system, user], True, "")
        except UnusableRow:
            return ""
        before, found, behind = given.partition(system["content"])
        if not found or not before or not bare.startswith(before) or not bare.endswith(behind):
            return ""
        return bare[len(before) : len(bare) - len(behind)].strip() if len(bare) > len(before) + len(behind) else ""


def _refused(messages: Sequence[Message], error: Exception, where: str) -> UnusableRow:
    roles = [message["role"] for message in messages]
    twice = next((role for role, following in zip(roles, roles[1:], strict=False) if role == following), None)
    remedy = f"join the {twice} turns that follow each other into one" if twice else "change the roles"
    return UnusableRow(
        "messages that the chat template refuses",
        f"{where}: found messages the chat template refuses ({one_line(error)}), expected roles it knows "
        f"(here: {', '.join(roles)}); {remedy} or use another with `chat_template`",
    )
