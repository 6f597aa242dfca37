"""One conversation under a chat template: where its answers are, and what the template does to them.

What a chat template drops, doubles or adds is repaired where that can be done exactly, and always noted.
"""

import contextlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from aletheia.data.messages import Message, UnusableRowError
from aletheia.data.remarks import (
    ADDED,
    CALLS_LOST,
    LOST,
    LOST_FOR_GOOD,
    ONE_OF_SEVERAL,
    OPENED,
    OPENED_TWICE,
    PROMPT_LOST,
    PROMPT_REWRITTEN,
    REASONING_LOST,
    SYSTEM_ADDED,
    SYSTEM_EXTENDED,
    SYSTEM_MERGED,
    THOUGHTS_ADDED,
    TOOLS_LOST,
    WHITE_SPACE,
)
from aletheia.data.templates import ChatTemplate

Piece = tuple[str, bool]  # a text, and whether it carries a loss

_STAND_IN = "here is what the assistant says"
_THINK, _THOUGHT = "<think>", "</think>"
_REASONING = ("reasoning_content", "thinking", "reasoning")


class Conversation:
    """One conversation under a chat template."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: tuple[Message, ...],
        tools: tuple[dict[str, Any], ...],
        where: str,
        remark: Callable[..., None],
        marks: re.Pattern[str] | None,
    ) -> None:
        """``remark`` takes a sentence and its example; ``marks`` finds special tokens in a text."""
        self._template, self._tools, self._where, self._remark, self._marks = template, tools, where, remark, marks
        self.messages = messages
        self._rendered: dict[tuple[int, bool], str] = {}

    def _render(self, messages: Sequence[Message], generation: bool) -> str:
        return self._template.render(messages, generation, self._where, self._tools)

    def _until(self, at: int, generation: bool = False) -> str:
        """The first ``at`` messages as text, followed by the opening of an answer if ``generation``."""
        if (at, generation) not in self._rendered:
            self._rendered[at, generation] = self._render(self.messages[:at], generation)
        return self._rendered[at, generation]

    def _before(self, at: int) -> str:
        """The text before the answer at ``at``, without its opening and without an end token that some add."""
        bare, opened = self._until(at), self._until(at, True)
        ends = [found.span() for found in self._marks.finditer(bare)] if self._marks else []
        if not opened.startswith(bare) and ends and ends[-1][1] == len(bare) and opened.startswith(bare[: ends[-1][0]]):
            return bare[: ends[-1][0]]
        return bare

    def as_rendered(self, has_marks: bool) -> tuple[str, str, str] | None:
        """If the prompt is already rendered: the mark that shows it, prompt with opening, and answer; else None.

        ``has_marks`` says whether the texts contain special tokens.
        """
        messages = self.messages
        if [message["role"] for message in messages] != ["user", "assistant"]:
            return None
        question, answer = (message["content"] for message in messages)
        opening = self._until(1, True).removeprefix(self._until(1))
        mark = opening.strip()
        if has_marks and mark and question.rstrip().endswith(mark):
            return mark, question, answer
        head, tail = (part.strip() for part in self._template.user_frame)
        if len(head) < 3 or len(tail) < 3 or head not in question or not question.rstrip().endswith(tail):
            return None
        behind = self._template.user_frame[1]
        question = question.rstrip() + behind[len(behind.rstrip()) :]
        start = answer.find(mark) + len(mark) if mark and answer.lstrip().startswith(mark) else 0
        space = opening[len(opening.rstrip()) :] if mark else ""
        return tail, question + opening, answer[start:].removeprefix(space) if start else answer

    def pieces(self, turns: list[int]) -> list[Piece]:
        """The pieces of the conversation: answers in ``turns`` carry a loss unless the template rewrites them later."""
        self._settle_calls(turns[-1])
        turns = self._settle_system(turns)
        prompt, answer = self._answer(turns[-1])
        self._check_prompt(prompt, turns[-1])
        pieces: list[Piece] = []
        done = 0
        for at in turns[:-1]:
            region = self._earlier(prompt, at)
            if region is None or region[0] < done or not self._is_whole(at, prompt[region[0] : region[1]]):
                self._check_fields(at, self._until(at + 1).removeprefix(self._before(at)))
                self._remark(ONE_OF_SEVERAL)
                continue
            self._check_fields(at, prompt[region[0] : region[1]])
            pieces += [(prompt[done : region[0]], False), (prompt[region[0] : region[1]], True)]
            done = region[1]
        return [*pieces, (prompt[done:], False), (answer, True)]

    # --- the prompt

    def _settle_calls(self, last: int) -> None:
        """Write the arguments of tool calls as JSON text if the template does not take objects."""
        if not any(message.get("tool_calls") for message in self.messages[: last + 1]):
            return
        try:
            self._until(last + 1)
        except UnusableRowError:
            as_text = tuple(_with_text_arguments(message) for message in self.messages)
            with contextlib.suppress(UnusableRowError):
                self._render(as_text[: last + 1], False)
                self.messages, self._rendered = as_text, {}

    def _settle_system(self, turns: list[int]) -> list[int]:
        """Put the system turn into the first user turn if the template does not take it."""
        first = self.messages[0]
        if first["role"] not in ("system", "developer"):
            if self._template.default_system:
                self._remark(SYSTEM_ADDED, self._template.default_system)
            return turns
        try:
            if self._writes_system(turns[0]):
                if self._template.system_addition:
                    self._remark(SYSTEM_EXTENDED, self._template.system_addition)
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

    def _writes_system(self, until: int) -> bool:
        """Whether the template writes the first system turn, even if another turn has the same text."""
        first, *others = self.messages[:until]
        written = _holds(self._until(until, True), first["content"])
        if not written or not any(_holds(message["content"], first["content"]) for message in others):
            return written
        return _STAND_IN in self._render([first | {"content": _STAND_IN}, *others], True)

    def _check_prompt(self, prompt: str, last: int) -> None:
        """Note what the template leaves out of the prompt."""
        for message in self.messages[:last]:
            if message["role"] != "assistant" and not _holds(prompt, message["content"]):
                self._remark(PROMPT_LOST, message["role"])
        if self._tools and self._until(last, True) == self._template.render(self.messages[:last], True, self._where):
            self._remark(TOOLS_LOST, str(self._tools[0].get("function", self._tools[0]).get("name", "")))

    # --- the answer

    def _answer(self, at: int) -> tuple[str, str]:
        """The prompt of the answer at ``at`` as in generation, and the answer with its end of turn."""
        message = self.messages[at]
        content = message["content"]
        prompt, answered = self._until(at, True), self._until(at + 1)
        appends = answered.startswith(prompt) and answered != prompt
        self._check_fields(at, answered[len(prompt) :] if appends else answered)
        opened = _opened_twice(prompt, content)  # the prompt ends with what the answer begins with
        twice = opened and (not appends or _opened_twice(prompt, answered[len(prompt) :]))
        twice = twice or self._doubles_thoughts(message, answered[len(self._before(at)) :])
        if appends and not twice and answered.startswith(content, len(prompt)):
            return prompt, answered[len(prompt) :]
        bare = self._before(at)
        if not answered.startswith(bare):
            return self._behind_another_prompt(prompt, answered, at)
        header, body = prompt.removeprefix(bare) if prompt.startswith(bare) else "", answered[len(bare) :]
        head, tail = frame = self._frame(at) or ("", "")
        start = len(header) if appends else _common(header, body)
        start = min(start, len(head)) if head and not appends else start
        written = body[start:].removesuffix(tail)
        if twice or not _holds(written, content.lstrip().removeprefix(_THINK) if opened else content):
            # the plain text of the data would lack the tool calls
            mended = None if message.get("tool_calls") else self._mended(prompt, bare, content, frame)
            if mended:
                if twice and _holds(written, content):
                    self._remark(*((OPENED_TWICE, _THINK) if opened else (THOUGHTS_ADDED,)))
                else:
                    self._remark(LOST, content)
                return mended
            if not appends:
                raise self._rewritten()
            self._remark(LOST_FOR_GOOD, content)
        elif not opened and content not in written:
            self._remark(WHITE_SPACE, content)
        same = _common(head, header)
        lead = head[same:].strip() if not header[same:].strip() else ""
        if lead and written.lstrip().startswith(lead) and lead not in content and not _has_reasoning(message):
            self._remark(ADDED, lead)
        if not appends and header[start:].strip():
            self._remark(OPENED, header[start:])
        if not body[start:]:
            raise self._rewritten()
        return bare + body[:start], body[start:]

    def _behind_another_prompt(self, prompt: str, answered: str, at: int) -> tuple[str, str]:
        """The answer of a template that changes the prompt once it is answered.

        The answer follows the last text, opening included, that both renderings have in common.
        """
        content, asked = self.messages[at]["content"], self.messages[at - 1]["content"].strip()
        begin = prompt.rfind(asked)
        start = answered.rfind(prompt[begin:]) if asked and begin >= 0 else -1
        answer = answered[start + len(prompt) - begin :]
        if start < 0 or not answer or not _holds(answer, content):
            raise self._rewritten()
        self._remark(PROMPT_REWRITTEN)
        return prompt, answer

    def _doubles_thoughts(self, message: Message, answered: str) -> bool:
        """Whether the template adds thoughts before those that the answer begins with."""
        content: str = message["content"].lstrip()
        if not content.startswith(_THINK) or _has_reasoning(message):
            return False
        return answered.count(_THINK) > content.count(_THINK)

    def _frame(self, at: int) -> tuple[str, str] | None:
        """What the template puts before and after the answer at ``at``, found with a placeholder text."""
        bare = self._before(at)
        other = self._render([*self.messages[:at], {"role": "assistant", "content": _STAND_IN}], False)
        if not other.startswith(bare) or other.count(_STAND_IN, len(bare)) != 1:
            return None
        head, _, tail = other[len(bare) :].partition(_STAND_IN)
        return head, tail

    def _ignores_calls(self, at: int) -> bool:
        """Whether an answer is rendered the same without its tool calls."""
        message = {name: value for name, value in self.messages[at].items() if name != "tool_calls"}
        try:
            return self._render([*self.messages[:at], message], False) == self._until(at + 1)
        except UnusableRowError:
            return False

    def _check_fields(self, at: int, answered: str) -> None:
        """Note tool calls and reasoning that the template leaves out."""
        message = self.messages[at]
        calls = message.get("tool_calls") or ()
        ignored = bool(calls) and self._ignores_calls(at)
        for call in calls:
            if ignored or call["function"]["name"] not in answered:
                self._remark(CALLS_LOST, call["function"]["name"])
                if not message["content"].strip():
                    raise UnusableRowError(
                        "tool calls that the chat template does not write",
                        f"{self._where}: found an answer of only tool calls, which the chat template does not write; "
                        "give another as `chat_template`",
                    )
        for name in _REASONING:
            if message.get(name) and not _holds(answered, message[name]):
                self._remark(REASONING_LOST, name)

    def _mended(self, prompt: str, bare: str, content: str, frame: tuple[str, str]) -> tuple[str, str] | None:
        """The answer as the data have it, between the opening and the end that the template gives a placeholder."""
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
        """Start and end of an earlier answer with its end of turn in the last one's prompt; None if not found."""
        content = self.messages[at]["content"]
        opened, answered = self._until(at, True), self._until(at + 1)
        if prompt.startswith(answered) and answered.startswith(opened) and _holds(answered[len(opened) :], content):
            return len(opened), len(answered)
        bare, start = self._before(at), len(opened)
        head, tail = self._frame(at) or ("", "")
        if prompt.startswith(answered) and answered.startswith(
            bare
        ):  # without the full opening of the generation prompt
            body = answered[len(bare) :]
            begin = _common(opened.removeprefix(bare), body)
            begin = min(begin, len(head)) if head else begin
            if _holds(body[begin:], content):
                return len(bare) + begin, len(answered)
        if prompt.startswith(opened):  # written with less around it, or another end
            lead = (bare + head).removeprefix(opened) if (bare + head).startswith(opened) else ""
            written = answered.removeprefix(opened).removeprefix(lead)
            for found in (written, written[: self._end_of(written, content)], f"{lead}{content}" if content else ""):
                if found and prompt.startswith(found, start):
                    return start, start + len(found)
        start = prompt.find(content, len(bare)) if content and tail and prompt.startswith(bare) else -1
        while start >= 0 and opened.removeprefix(bare).startswith(prompt[len(bare) : start]):  # a shorter opening
            if prompt.startswith(tail, start + len(content)):
                return start, start + len(content) + len(tail)
            start = prompt.find(content, start + 1)
        return None

    def _is_whole(self, at: int, written: str) -> bool:
        """Whether an earlier answer is written as if it were the last; notes text that is never written."""
        message, alone = self.messages[at], self._until(at + 1)
        thoughts = [str(message.get(name) or "") for name in _REASONING]
        if any(_holds(alone, thought) and not _holds(written, thought) for thought in thoughts):
            return False
        if not _holds(written, message["content"]):
            if not message.get("tool_calls") or _holds(alone.removeprefix(self._before(at)), message["content"]):
                return False
            self._remark(LOST_FOR_GOOD, message["content"])
        return True

    def _end_of(self, written: str, content: str) -> int:
        """Where the first special token after an answer ends, or 0."""
        found = self._marks.search(written, len(content)) if self._marks and written.startswith(content) else None
        return found.end() if found else 0

    def _rewritten(self) -> UnusableRowError:
        return UnusableRowError(
            "an answer that cannot be separated from its prompt",
            f"{self._where}: found a chat template that rewrites the prompt once it is answered, so the answer "
            "cannot be separated; expected one that appends; give another as `chat_template`, or use the text form",
        )


def _with_text_arguments(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append(call | {"function": call["function"] | {"arguments": arguments}})
    return message | {"tool_calls": calls}


def _holds(text: str, part: str) -> bool:
    """Whether a text contains another, ignoring white space."""
    return part in text or "".join(part.split()) in "".join(text.split())


def _has_reasoning(message: Message) -> bool:
    return any(bool(message.get(name)) for name in _REASONING)


def _opened_twice(prompt: str, content: str) -> bool:
    return prompt.rstrip().endswith(_THINK) and content.lstrip().startswith(_THINK)


def _common(one: str, other: str) -> int:
    """The length of the common beginning of two texts."""
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length
