"""From a row to pieces of text, each with or without a loss, so that every answer is learned as it was written.

What a chat template drops, doubles or adds is mended where that can be done exactly, and remarked on in any case. No
torch, no tokenising.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from aletheia.data.forms import Row
from aletheia.data.messages import Message, UnusableRowError
from aletheia.data.templates import ChatTemplate

Piece = tuple[str, bool]  # a text, and whether it carries a loss
Remark = tuple[str, str]  # a sentence for Notes, and its example

_STAND_IN = "here stands what the assistant says"
_THINK, _THOUGHT = "<think>", "</think>"
_REASONING = ("reasoning_content", "thinking", "reasoning")

NO_TEMPLATE = "there is no chat template: turns are joined by blank lines; `chat_template` gives one"
ONE_WITHOUT = "only the last assistant turn carries a loss: there is no chat template"
ONE_OF_SEVERAL = "earlier assistant turns carry no loss where the chat template rewrites them"
MARKS_IN_TEXT = "special tokens stand in the text, such as {}, and are read as such"
WHOLE_TEXT = "special tokens stand in the text, such as {}: the whole text is learned, prompts included"
RENDERED = "prompts that end with the opening of an answer, {}, are taken as rendered: no chat template is applied"
LOST = "the chat template drops part of the answers, such as {}; they are learned as they are written"
LOST_FOR_GOOD = "the chat template drops part of the answers, such as {}, which is not learned"
WHITE_SPACE = "the chat template changes white space of the answers, such as {}"
ADDED = "the chat template puts {} in front of answers, which is learned with them"
OPENED = "the generation prompt ends with {}, which the answers lack; they are learned without it"
OPENED_TWICE = "answers begin with {}, which the generation prompt ends with; it is learned once"
REASONING_LOST = "the chat template does not write the field {} of answers, which is not learned"
CALLS_LOST = "the chat template does not write tool calls, such as {}, which are not learned"
TOOLS_LOST = "the chat template does not write the tools, such as {}"
PROMPT_LOST = "the chat template drops or changes the text of {} turns"
SYSTEM_ADDED = "the chat template adds a system turn of its own where there is none: {}"
SYSTEM_MERGED = "system turns are put in front of the first user turn, since the chat template does not take them"


@dataclass(frozen=True)
class Script:
    """A row as pieces.

    ``plain`` rows get the tokenizer's special tokens in front, where they are absent. ``remarks`` are for the notes.
    """

    pieces: tuple[Piece, ...]
    plain: bool
    remarks: tuple[Remark, ...] = ()


@dataclass
class Scripts:
    """Makes scripts of rows. ``marks`` finds special tokens in a text; without a template rows are joined plainly."""

    template: ChatTemplate | None
    marks: re.Pattern[str] | None
    train_on: str = "all"
    _remarks: list[Remark] = field(default_factory=list)

    def of(self, row: Row) -> Script:
        """The pieces of a row.

        Raises:
            UnusableRowError: the chat template refuses it, or there is no telling the answer from the prompt.
        """
        self._remarks = []
        pieces, plain = self._pieces(row)
        return Script(tuple(piece for piece in pieces if piece[0]), plain, tuple(dict.fromkeys(self._remarks)))

    def _remark(self, text: str, example: str = "") -> None:
        self._remarks.append((text, example))

    def _pieces(self, row: Row) -> tuple[list[Piece], bool]:
        if row.text is not None:
            if mark := self._mark(row.text):
                self._remark(WHOLE_TEXT, mark)
            return [(row.text, True)], True
        assert row.messages is not None
        # A leading assistant turn answers nothing: it is context.
        first = max(row.loss_from, 1)
        turns = [at for at in range(first, len(row.messages)) if row.messages[at]["role"] == "assistant"]
        turns = [at for at in (turns[-1:] if self.train_on == "last" else turns) if at not in row.no_loss]
        if not turns:
            raise UnusableRowError(
                "no answer that carries a loss",
                f"{row.where}: found no answer that carries a loss, expected one of weight 1; remove the row",
            )
        mark = next(filter(None, (self._mark(message["content"]) for message in row.messages)), "")
        if mark:
            self._remark(MARKS_IN_TEXT, mark)
        if self.template is None:
            return self._joined(row, turns), True
        chat = _Chat(self.template, row.messages, row.tools, row.where, self._remark)
        if mark and (opening := chat.is_rendered()):
            self._remark(RENDERED, opening)
            return [(row.messages[0]["content"], False), (row.messages[1]["content"], True)], True
        return chat.pieces(turns), False

    def _mark(self, text: str) -> str:
        found = self.marks.search(text) if self.marks else None
        return found[0] if found else ""

    def _joined(self, row: Row, turns: list[int]) -> list[Piece]:
        assert row.messages is not None
        last = turns[-1]
        if any(message.get("tool_calls") for message in row.messages[: last + 1]):
            raise UnusableRowError(
                "tool calls without a chat template",
                f"{row.where}: found tool calls and no chat template to write them with; give one as `chat_template`",
            )
        self._remark(NO_TEMPLATE)
        if len(turns) > 1:
            self._remark(ONE_WITHOUT)
        contents = [message["content"] for message in row.messages]
        prompt = "\n\n".join(contents[:last]) + "\n\n"
        return [(prompt, False), (contents[last], True)]


class _Chat:
    """One conversation under a chat template."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: tuple[Message, ...],
        tools: tuple[dict[str, Any], ...],
        where: str,
        remark: Any,
    ) -> None:
        self._template, self._tools, self._where, self._remark = template, tools, where, remark
        self.messages = messages
        self._rendered: dict[tuple[int, bool], str] = {}

    def _render(self, messages: Sequence[Message], generation: bool) -> str:
        return self._template.render(messages, generation, self._where, self._tools)

    def _until(self, at: int, generation: bool = False) -> str:
        """The first ``at`` messages as text, with the opening of an answer behind them if ``generation``."""
        if (at, generation) not in self._rendered:
            self._rendered[at, generation] = self._render(self.messages[:at], generation)
        return self._rendered[at, generation]

    def is_rendered(self) -> str:
        """The opening of an answer, if a prompt and its answer hold it already; else empty."""
        messages = self.messages
        if [message["role"] for message in messages] != ["user", "assistant"]:
            return ""
        opening = self._until(1, True).removeprefix(self._until(1)).strip()
        return opening if opening and messages[0]["content"].rstrip().endswith(opening) else ""

    def pieces(self, turns: list[int]) -> list[Piece]:
        """Prompt and answer of each of ``turns``; all that the template rewrites later are left without a loss."""
        turns = self._settle_system(turns)
        prompt, answer = self._answer(turns[-1])
        self._check_prompt(prompt, turns[-1])
        pieces: list[Piece] = []
        done = 0
        for at in turns[:-1]:
            region = self._earlier(prompt, at)
            if region is None or region[0] < done:
                self._remark(ONE_OF_SEVERAL)
                continue
            pieces += [(prompt[done : region[0]], False), (prompt[region[0] : region[1]], True)]
            done = region[1]
        return [*pieces, (prompt[done:], False), (answer, True)]

    # --- the prompt

    def _settle_system(self, turns: list[int]) -> list[int]:
        """Put the system turn into the first user turn where the template does not take it."""
        first = self.messages[0]
        if first["role"] not in ("system", "developer"):
            if self._template.system_of_its_own:
                self._remark(SYSTEM_ADDED, self._template.system_of_its_own)
            return turns
        try:
            if _holds(self._until(turns[0], True), first["content"]):
                return turns
            refusal = None
        except UnusableRowError as error:
            refusal = error
        user = next((at for at, message in enumerate(self.messages) if message["role"] == "user"), None)
        if user is not None:
            text = f"{first['content']}\n\n{self.messages[user]['content']}"
            merged = (*self.messages[1:user], self.messages[user] | {"content": text}, *self.messages[user + 1 :])
            try:
                if _holds(
                    self._template.render(merged[: turns[0] - 1], True, self._where, self._tools), first["content"]
                ):
                    self._remark(SYSTEM_MERGED)
                    self.messages, self._rendered = merged, {}
                    return [at - 1 for at in turns]
            except UnusableRowError:
                pass
        if refusal is not None:
            raise refusal
        return turns

    def _check_prompt(self, prompt: str, last: int) -> None:
        """Remark on what the template leaves out of the prompt."""
        for message in self.messages[:last]:
            if message["role"] != "assistant" and not _holds(prompt, message["content"]):
                self._remark(PROMPT_LOST, message["role"])
        if self._tools:
            name = str(self._tools[0].get("function", self._tools[0]).get("name", ""))
            if name not in prompt:
                self._remark(TOOLS_LOST, name)

    # --- the answer

    def _answer(self, at: int) -> tuple[str, str]:
        """The prompt of the answer at ``at`` as generation has it, and the answer with its end of turn."""
        message = self.messages[at]
        content = message["content"]
        prompt, answered = self._until(at, True), self._until(at + 1)
        appends = answered.startswith(prompt) and answered != prompt
        self._check_fields(message, answered[len(prompt) :] if appends else answered)
        opened = _opened_twice(prompt, content)  # the prompt ends with what the answer begins with
        twice = opened and (not appends or _opened_twice(prompt, answered[len(prompt) :]))
        if appends and not twice and answered.startswith(content, len(prompt)):
            return prompt, answered[len(prompt) :]
        bare = self._until(at)
        if not answered.startswith(bare):
            raise self._rewritten()
        header, body = prompt.removeprefix(bare) if prompt.startswith(bare) else "", answered[len(bare) :]
        head, tail = frame = self._frame(at) or ("", "")
        start = len(header) if appends else _common(header, body)
        start = min(start, len(head)) if head and not appends else start
        written = body[start:].removesuffix(tail)
        if twice or not _holds(written, content.lstrip().removeprefix(_THINK) if opened else content):
            if mended := self._mended(prompt, bare, content, frame):
                self._remark(OPENED_TWICE if twice and _holds(written, content) else LOST, content)
                return mended
            if not appends:
                raise self._rewritten()
            self._remark(LOST_FOR_GOOD, content)
        elif not opened and content not in written:
            self._remark(WHITE_SPACE, content)
        lead = head.removeprefix(header).strip() if head.startswith(header) else ""
        if lead and lead in written and not any(message.get(name) for name in _REASONING):
            self._remark(ADDED, lead)
        if not appends and header[start:].strip():
            self._remark(OPENED, header[start:])
        if not body[start:]:
            raise self._rewritten()
        return bare + body[:start], body[start:]

    def _frame(self, at: int) -> tuple[str, str] | None:
        """What the template puts in front of the answer at ``at`` and behind it, found with a text of another kind."""
        bare = self._until(at)
        other = self._render([*self.messages[:at], {"role": "assistant", "content": _STAND_IN}], False)
        if not other.startswith(bare) or other.count(_STAND_IN, len(bare)) != 1:
            return None
        head, _, tail = other[len(bare) :].partition(_STAND_IN)
        return head, tail

    def _check_fields(self, message: Message, answered: str) -> None:
        """Remark on tool calls and reasoning that the template leaves out."""
        calls = message.get("tool_calls") or ()
        for call in calls:
            if call["function"]["name"] not in answered:
                self._remark(CALLS_LOST, call["function"]["name"])
                if not message["content"].strip():
                    raise UnusableRowError(
                        "tool calls that the chat template does not write",
                        f"{self._where}: found an answer of tool calls alone, which the chat template does not write; "
                        "use another with `chat_template`",
                    )
        for name in _REASONING:
            if message.get(name) and not _holds(answered, message[name]):
                self._remark(REASONING_LOST, name)

    def _mended(self, prompt: str, bare: str, content: str, frame: tuple[str, str]) -> tuple[str, str] | None:
        """The answer as it was written, between the opening and the end that the template gives another text."""
        head, tail = frame
        if not head and not tail:
            return None
        header = prompt.removeprefix(bare)
        if _opened_twice(prompt, content):
            space = header[len(header.rstrip()) :]
            content = content.lstrip().removeprefix(_THINK).removeprefix(space)
        elif header.startswith(head):
            opening = header[len(head) :].strip()
            if opening and not (opening == _THINK and _THOUGHT in content):
                self._remark(OPENED, opening)
                header = head
        elif not head.startswith(header):
            return None
        return bare + header, content + tail

    def _earlier(self, prompt: str, at: int) -> tuple[int, int] | None:
        """Where an earlier answer stands in the prompt of the last one, whole and with its end of turn; or None."""
        content = self.messages[at]["content"]
        opened, answered = self._until(at, True), self._until(at + 1)
        self._check_fields(self.messages[at], answered)
        if prompt.startswith(answered) and answered.startswith(opened) and _holds(answered[len(opened) :], content):
            return len(opened), len(answered)
        bare = self._until(at)
        frame = self._frame(at) if content and prompt.startswith(bare) and opened.startswith(bare) else None
        start = prompt.find(content, len(bare)) if frame else -1
        while frame and start >= 0 and opened[len(bare) :].startswith(prompt[len(bare) : start]):
            end = start + len(content)
            if prompt.startswith(frame[1], end):
                return start, end + len(frame[1])
            start = prompt.find(content, start + 1)
        return None

    def _rewritten(self) -> UnusableRowError:
        return UnusableRowError(
            "an answer that cannot be told from its prompt",
            f"{self._where}: found a chat template that rewrites the prompt once it is answered, so its completion "
            "cannot be told apart; expected one that appends; use another with `chat_template`, or the text form",
        )


def _holds(text: str, part: str) -> bool:
    """Whether a text holds another, white space aside."""
    return part in text or "".join(part.split()) in "".join(text.split())


def _opened_twice(prompt: str, content: str) -> bool:
    return prompt.rstrip().endswith(_THINK) and content.lstrip().startswith(_THINK)


def _common(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length
