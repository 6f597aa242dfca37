"""Chat templates: read from a file, and run on messages. A template is a program by the model's author."""

import json
import re
from collections.abc import Callable, Sequence
from datetime import date
from functools import cached_property
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

from aletheia.data.contained import contained
from aletheia.data.messages import Message, UnusableRowError
from aletheia.data.sources import one_line
from aletheia.errors import DataError

LARGEST = 1_000_000  # characters of a template; the longest of known models have 30,000
_DATE = re.compile(r"""strftime_now\(\s*(?:"([^"\\]*)"|'([^'\\]*)')\s*\)""")
_MARK = re.compile(r"<[^<>\n]{1,60}>|\[/?[A-Za-z_]+\]")  # what looks like a special token
_WHOLE = re.compile(rf"{_MARK.pattern}|.", re.DOTALL)
_ROLE = re.compile(r"(?im)^\s*(system|developer|user|human|assistant)\b:?")
_WORD = re.compile(r"[^\W\d_]{2,}")
_ADDED, _GROWTH = 50_000, 10  # characters that a template may add to a row, and factor by which it may lengthen one


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
        text = file.read_bytes().decode("utf-8-sig")  # keeps the line ends
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: found bytes that are not UTF-8; {expected}") from error
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


def use_template(tokenizer: Any, template: str) -> None:
    """Make ``template`` the chat template of a tokenizer; if it already is the default of several, they all stay."""
    own = getattr(tokenizer, "chat_template", None)
    if template != (own.get("default") if isinstance(own, dict) else own):
        tokenizer.chat_template = template


def check_size(template: object, name: str) -> None:
    """Refuse a template that is too long.

    Raises:
        DataError: it has more than ``LARGEST`` characters.
    """
    texts = template.values() if isinstance(template, dict) else (template,)
    size = sum(len(text) for text in texts if isinstance(text, str))
    if size > LARGEST:
        raise DataError(
            f"{name}: found a template of {size / 1e6:.1f} million characters, expected at most "
            f"{LARGEST / 1e6:g} million; give another as `chat_template`"
        )


class ChatTemplate:
    """A tokenizer's chat template as a function from messages to text."""

    def __init__(
        self, tokenizer: Any, pulse: Callable[[], None] = lambda: None, template_date: date | None = None
    ) -> None:
        """``pulse`` is called after each rendering; ``template_date`` replaces today's date in the template."""
        self._tokenizer = tokenizer
        self._pulse = pulse
        self.date = (template_date or date.today()) if writes_date(tokenizer) else None

    def render(
        self, messages: Sequence[Message], generation: bool, where: str, tools: Sequence[dict[str, Any]] = ()
    ) -> str:
        """The text of messages, followed by the opening of an answer if ``generation``; "" for no messages.

        Raises:
            UnusableRowError: the template refuses the messages, or makes far too long a text of them.
        """
        if not messages:
            return ""
        try:
            text = self._apply(messages, generation, tools, self._wants_parts)
        except MemoryError:
            raise
        except Exception as error:  # a template is a program and may raise anything
            raise _refused(messages, error, where) from error
        self._pulse()
        if len(text) > _ADDED and len(text) > _ADDED + _GROWTH * len(repr((messages, tools))):
            raise UnusableRowError(
                "messages that the chat template makes far too long",
                f"{where}: found a chat template that makes {len(text) / 1e6:.1f} million characters of this row, "
                "expected a text of similar length; give another as `chat_template`",
            )
        return text

    def _apply(
        self, messages: Sequence[Message], generation: bool, tools: Sequence[dict[str, Any]], as_parts: bool
    ) -> str:
        if as_parts:
            messages = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]
        given = list(tools) or None
        template = None
        if (today := self.date) is not None:
            template = self._tokenizer.get_chat_template(None, given)
            template = _DATE.sub(lambda found: json.dumps(today.strftime(found[1] or found[2] or "")), template)
        text: str = self._tokenizer.apply_chat_template(
            list(messages), given, chat_template=template, tokenize=False, add_generation_prompt=generation
        )
        return text

    def writes_date_in(self, text: str) -> bool:
        """Whether a text contains the date as the template writes it."""
        if (today := self.date) is None:
            return False
        formats = {one or other for one, other in _DATE.findall(str(self._tokenizer.chat_template))}
        return any(today.strftime(form) in text for form in formats if form)

    def knows(self, token: str) -> bool:
        """Whether a text is one token of the tokenizer."""
        return token in self._vocabulary

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        return dict(self._tokenizer.get_vocab())

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template takes content only as a list of parts, as those of vision models do."""
        question = [{"role": "user", "content": "what the user says"}]
        for as_parts in (False, True):
            try:
                if question[0]["content"] in self._apply(question, True, (), as_parts):
                    return as_parts
            except MemoryError:
                raise
            except Exception:  # rendering the rows reports it
                continue
        return False

    @cached_property
    def user_frame(self) -> tuple[str, str]:
        """What the template puts before and after the text of a user turn, except at the beginning."""
        first, answer, second = "what the user says", "what is answered", "what the user asks then"
        turns = [("user", first), ("assistant", answer), ("user", second)]
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            alone, three = self.render(messages[:1], False, ""), self.render(messages, False, "")
        except UnusableRowError:
            return "", ""
        before, found, behind = alone.partition(first)
        first_end, _, rest = three.partition(first)[2].partition(answer)
        head = _same_end(before, rest.partition(second)[0]) if found else ""
        return head, _same_end(behind, first_end, begin=True)

    def _own_system(self, system: str) -> str:
        said = "what the user says"
        messages = [{"role": "user", "content": said}]
        try:
            text = self.render([{"role": "system", "content": system}, *messages] if system else messages, False, "")
        except UnusableRowError:
            return ""
        before, found, _ = text.partition(said)
        before = before.removesuffix(self.user_frame[0]) if found else ""
        bare = _MARK.sub("\n", before.replace(system, "\n") if system else before)
        words = _ROLE.sub("", bare)
        if len(_WORD.findall(words)) > 1:
            return " ".join(words.split())
        return "" if system or not _WORD.search(bare) else before.removeprefix(self._tokenizer.bos_token or "")

    @cached_property
    def default_system(self) -> str:
        """The system text that the template writes if the data have none; empty if it writes none."""
        return self._own_system("")

    @cached_property
    def system_addition(self) -> str:
        """What the template adds to a system turn of the data; empty if it adds nothing."""
        return self._own_system("what the system turn says")


def _same_end(one: str, other: str, begin: bool = False) -> str:
    """The common end of two texts, or their common beginning; what looks like a special token counts as a whole."""
    sides = [_WHOLE.findall(text)[:: 1 if begin else -1] for text in (one, other)]
    same = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*sides, strict=False))]
    return "".join(same if begin else reversed(same))


def writes_date(tokenizer: Any) -> bool:
    """Whether the chat template of a tokenizer writes today's date."""
    return _DATE.search(str(getattr(tokenizer, "chat_template", None) or "")) is not None


def try_template(tokenizer: Any) -> None:
    """Run a tokenizer's chat template once on a question, in a child process.

    Raises:
        DataError: the template refuses the question, is too long, does not end, or takes too much memory.
    """
    name = template_name(tokenizer)
    check_size(tokenizer.chat_template, name)
    question = [{"role": "user", "content": "What is it?"}]
    list(contained(lambda pulse: [ChatTemplate(tokenizer, pulse).render(question, True, name)], name))


def template_name(tokenizer: Any) -> str:
    """The name of a tokenizer's chat template in messages."""
    place = str(getattr(tokenizer, "name_or_path", ""))
    return f"the chat template of {place}" if place else "the chat template"


def _refused(messages: Sequence[Message], error: Exception, where: str) -> UnusableRowError:
    roles = [message["role"] for message in messages]
    twice = next((role for role, following in pairwise(roles) if role == following), None)
    remedy = f"join the {twice} turns that follow each other into one" if twice else "change the roles"
    return UnusableRowError(
        "messages that the chat template refuses",
        f"{where}: found messages the chat template refuses ({one_line(error)}), expected roles it knows "
        f"(here: {', '.join(roles)}); {remedy}, or give another as `chat_template`",
    )
