"""From a row to pieces of text, each with or without a loss, so that every answer is learned as it was written.

What a chat template drops, doubles or adds is repaired where that can be done exactly, and always noted. No torch, no
tokenising.
"""

import re
from dataclasses import dataclass, field

from aletheia.data.conversation import Conversation, Piece
from aletheia.data.forms import Row
from aletheia.data.messages import UnusableRowError
from aletheia.data.remarks import (
    DATED,
    MARKS_IN_TEXT,
    NO_TEMPLATE,
    NO_TOKEN,
    ONE_WITHOUT,
    RENDERED,
    WHOLE_TEXT,
)
from aletheia.data.templates import ChatTemplate

_TOKEN = re.compile(r"<\|[^|<>\s]+\|>|<(?:start|end)_of_\w+>|</s>")
Remark = tuple[str, str]  # a sentence for Notes, and its example


@dataclass(frozen=True)
class Script:
    """A row as pieces.

    ``plain`` rows get the tokenizer's special tokens before them if they lack them. ``remarks`` become notes.
    """

    pieces: tuple[Piece, ...]
    plain: bool
    remarks: tuple[Remark, ...] = ()


@dataclass
class Scripts:
    """Turns rows into scripts. ``marks`` finds special tokens; without a template turns are joined by blank lines."""

    template: ChatTemplate | None
    marks: re.Pattern[str] | None
    train_on: str = "all"
    _remarks: list[Remark] = field(default_factory=list)

    def of(self, row: Row) -> Script:
        """The pieces of a row.

        Raises:
            UnusableRowError: the chat template refuses the row, or its answer cannot be separated from its prompt.
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
        # a leading assistant turn answers nothing, so it is context
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
        chat = Conversation(self.template, row.messages, row.tools, row.where, self._remark, self.marks)
        if found := chat.as_rendered(bool(mark)):
            self._remark(RENDERED, found[0])
            return [(found[1], False), (found[2], True)], True
        pieces = chat.pieces(turns)
        text = "".join(text for text, _ in pieces)
        if self.template.writes_date_in(text):
            self._remark(DATED, str(self.template.date))
        self._check_tokens(row, text)
        return pieces, False

    def _check_tokens(self, row: Row, text: str) -> None:
        """Note a special token of the chat template that the tokenizer does not have."""
        assert self.template is not None
        assert row.messages is not None
        for token in dict.fromkeys(_TOKEN.findall(text)):
            if not self.template.knows(token) and not any(token in message["content"] for message in row.messages):
                self._remark(NO_TOKEN, token)
                return

    def _mark(self, text: str) -> str:
        found = self.marks.search(text) if self.marks else None
        return found[0] if found else ""

    def _joined(self, row: Row, turns: list[int]) -> list[Piece]:
        assert row.messages is not None
        last = turns[-1]
        if any(message.get("tool_calls") for message in row.messages[: last + 1]):
            raise UnusableRowError(
                "tool calls without a chat template",
                f"{row.where}: found tool calls, but no chat template to write them; give one as `chat_template`",
            )
        self._remark(NO_TEMPLATE)
        if len(turns) > 1:
            self._remark(ONE_WITHOUT)
        contents = [message["content"] for message in row.messages]
        prompt = "\n\n".join(contents[:last]) + "\n\n"
        return [(prompt, False), (contents[last], True)]
