"""From rows to tokens and labels: answers and their end token carry a loss; in plain text every token does.

A row becomes pieces of text, each with or without a loss (:mod:`aletheia.data.scripts`). Pieces are tokenised one by
one and concatenated, so an answer begins at a token boundary, as in generation. Tokenizers that put a space before
every text (SentencePiece's dummy prefix) do so for the first piece only.
"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from itertools import pairwise
from typing import Any

from aletheia.data.contained import contained
from aletheia.data.examples import NO_LOSS, Example, Examples, split_held_out
from aletheia.data.forms import Row
from aletheia.data.messages import UnusableRowError
from aletheia.data.notes import Notes, add_up
from aletheia.data.rows import Rows, load_rows
from aletheia.data.scripts import Script, Scripts
from aletheia.data.settings import TrainOn
from aletheia.data.stops import pad_id, stop_ids
from aletheia.data.templates import ChatTemplate, check_size, template_name
from aletheia.data.tokenizer import identify_tokenizer
from aletheia.errors import DataError

__all__ = ["NO_LOSS", "Example", "Examples", "encode", "load_data", "split_held_out"]

_ANCHOR = "\n"  # tokenizers with a dummy prefix do not merge it with the text after it
_ROWS_AT_ONCE = 1000  # rows per tokenizer call: enough for its threads, little memory
_CUT_OFF = "no token to learn within `max_length`"

STOP_ADDED = "the chat template ends answers with {}, where generation does not stop; {} is added and learned"
OTHER_STOP = "answers end with {}, where the model's settings stop; the tokenizer's own end token, {}, is not learned"
NO_BEGIN = "rows lack {}, which the tokenizer puts before text: the chat template does not write it"
EARLIER_OPEN = "earlier answers end with no token at which generation stops; only the last answer teaches to stop"
NO_STOP = "the model does not learn to stop: the tokenizer has no end token inside the model's embedding"


def load_data(
    data: str | Sequence[str],
    tokenizer: Any,
    max_length: int = 1024,
    skip_unusable: bool = False,
    vocab_size: int | None = None,
    stops: Collection[int] = (),
    train_on: TrainOn = "all",
    template_date: date | None = None,
) -> Examples:
    """Read files or hub data sets with :func:`load_rows`, and tokenise them with :func:`encode`.

    Raises:
        DataError: as both of these.
    """
    rows = load_rows(data, skip_unusable)
    return encode(rows, tokenizer, max_length, skip_unusable, vocab_size, stops, train_on, template_date)


def encode(
    rows: Rows,
    tokenizer: Any,
    max_length: int = 1024,
    skip_unusable: bool = False,
    vocab_size: int | None = None,
    stops: Collection[int] = (),
    train_on: TrainOn = "all",
    template_date: date | None = None,
) -> Examples:
    """Tokenise rows, label them and cut them on the right to ``max_length`` tokens.

    Args:
        rows: the rows to learn from.
        tokenizer: a transformers tokenizer, with the chat template for conversations.
        max_length: most tokens of a row.
        skip_unusable: leave out unusable rows and count them by reason, instead of stopping at the first. These are
            rows that the chat template refuses, and rows without a label after position 0, which is never predicted.
        vocab_size: number of tokens that the model has an embedding for; rows with other ids are refused.
        stops: more ids at which generation stops, next to the tokenizer's end token and those in the model's folder.
        train_on: ``all``: every answer of a conversation carries a loss; ``last``: only the last one.
        template_date: the date for a chat template that writes one; by default today.

    Raises:
        DataError: max_length is below 2, a row is unusable, no row is left, a token id is not below ``vocab_size``,
            or a chat template does not end.
    """
    if max_length < 2:
        raise DataError(f"found a maximum length of {max_length}, expected at least 2; raise `max_length`")
    notes, left_out = Notes(), dict(rows.left_out)
    usable, scripts = _usable(rows, _scripts(rows, tokenizer, train_on, template_date), skip_unusable, notes, left_out)
    closing = _Closing(tokenizer, stop_ids(tokenizer, stops, vocab_size), notes)
    kept: list[Example] = []
    emptied: list[tuple[str, int | None]] = []
    truncated = 0
    for row, (input_ids, labels) in zip(usable, _tokens(scripts, usable, tokenizer, closing), strict=True):
        needed = next((at + 1 for at, label in enumerate(labels) if at and label != NO_LOSS), None)
        if needed is None or needed > max_length:
            emptied.append((row.where, needed))
            continue
        kept.append(Example(input_ids[:max_length], labels[:max_length], row.where))
        _check_ids(kept[-1], vocab_size)
        truncated += len(input_ids) > max_length
    if emptied:
        if not (skip_unusable and kept):
            raise _emptied(emptied, len(usable), max_length, skip_unusable)
        left_out = add_up([left_out, {_CUT_OFF: len(emptied)}])
    pad = pad_id(tokenizer, vocab_size)
    said = (*rows.notes, *notes.lines())
    skipped, identity = sum(left_out.values()), identify_tokenizer(tokenizer)
    return Examples(rows.identity, tuple(kept), max_length, pad, skipped, truncated, identity, left_out, said)


def _usable(
    rows: Rows,
    made: Iterator[Script | UnusableRowError],
    skip_unusable: bool,
    notes: Notes,
    left_out: dict[str, int],
) -> tuple[list[Row], list[Script]]:
    """The rows that have a script, and their scripts; adds to ``notes``, and counts the others in ``left_out``."""
    usable: list[Row] = []
    scripts: list[Script] = []
    first: UnusableRowError | None = None
    for row, script in zip(rows.rows, made, strict=True):
        if isinstance(script, UnusableRowError):
            if not skip_unusable:
                raise DataError(f"{script}; `skip_unusable=True` leaves such rows out")
            first = first or script
            left_out[script.reason] = left_out.get(script.reason, 0) + 1
            continue
        usable.append(row)
        scripts.append(script)
        for text, example in script.remarks:
            notes.add(text, row.where, example)
    if first is not None and not usable:
        raise DataError(f"{first} (the first of {len(rows.rows)} rows, none of which can be used)")
    return usable, scripts


def _scripts(
    rows: Rows, tokenizer: Any, train_on: str, template_date: date | None
) -> Iterator[Script | UnusableRowError]:
    """The script of each row, or why it has none; a chat template runs in a child process."""
    marks = _marks(tokenizer)
    template = getattr(tokenizer, "chat_template", None)
    name = template_name(tokenizer)
    check_size(template, name)

    def work(pulse: Callable[[], None]) -> Iterator[Script | UnusableRowError]:
        makes = Scripts(ChatTemplate(tokenizer, pulse, template_date) if template else None, marks, train_on)
        for row in rows.rows:
            try:
                yield makes.of(row)
            except UnusableRowError as error:
                yield error

    if not template or all(row.messages is None for row in rows.rows):
        return work(lambda: None)
    return contained(work, name)


def _added(tokenizer: Any) -> dict[int, Any]:
    """The tokens that were added to the vocabulary, by id; empty for tokenizers that do not list them."""
    return getattr(tokenizer, "added_tokens_decoder", None) or {}


def _marks(tokenizer: Any) -> re.Pattern[str] | None:
    """A pattern that finds the tokenizer's special tokens; None if it has none."""
    special = {str(token.content) for token in _added(tokenizer).values() if token.special}
    special |= {token for token in tokenizer.all_special_tokens if token.strip()}
    return (
        re.compile("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))) if special else None
    )


def _check_ids(example: Example, vocab_size: int | None) -> None:
    if vocab_size is not None and (largest := max(example.input_ids)) >= vocab_size:
        raise DataError(
            f"{example.where}: found the token id {largest}, expected ids below {vocab_size}, the size of the "
            "model's embedding; use the tokenizer that belongs to the model"
        )


def _emptied(emptied: list[tuple[str, int | None]], rows: int, max_length: int, skip_unusable: bool) -> DataError:
    where, needed = emptied[0]
    count = f"{len(emptied)} row{'s' * (len(emptied) > 1)}"
    found = f"the first of {count}, of {rows}, without a token to learn at `max_length={max_length}`"
    if needed is None:
        expected, remedy = "it has none at any length", "remove such rows"
    else:
        expected, remedy = f"expected at least {needed} for it", "raise `max_length`"
    if not skip_unusable:
        remedy += " or give `skip_unusable=True`"
    return DataError(f"{where}: found {found}; {expected}; {remedy}")


@dataclass
class _Closing:
    """Ends each answer with a token at which generation stops, and keeps everything after it unlearned."""

    tokenizer: Any
    stops: tuple[int, ...]
    notes: Notes
    _blank: dict[int, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        added = _added(self.tokenizer)
        own = self.tokenizer.bos_token_id
        puts = own is not None and self.tokenizer("a")["input_ids"][:1] == [own]
        self.begin: int | None = own if puts else None
        self.begin_text = str(self.tokenizer.bos_token)
        self.special = {*self.tokenizer.all_special_ids, *self.stops, *(at for at in added if added[at].special)}

    def learned(self, ids: list[int]) -> int:
        """How many ids of an answer are learned: white space after a final special token is not.

        A final special token that appears twice is removed once.
        """
        last = self._last(ids)
        if last < 0 or ids[last] not in self.special:
            return len(ids)
        before = self._last(ids[:last])
        if before >= 0 and ids[before] == ids[last]:
            del ids[before + 1 : last + 1]
            last = before
        return last + 1

    def check(self, input_ids: list[int], labels: list[int], row: Row, plain: bool) -> None:
        """Note a missing begin token, and earlier answers that end where generation does not stop."""
        if self.begin is not None and not plain and self.begin not in input_ids[:2]:
            self.notes.add(NO_BEGIN, row.where, self.begin_text)
        ends = [label for label, behind in pairwise(labels) if label != NO_LOSS and behind == NO_LOSS]
        if self.stops and not set(ends if labels[-1] != NO_LOSS else ends[:-1]) <= set(self.stops):
            self.notes.add(EARLIER_OPEN, row.where)

    def close(self, input_ids: list[int], labels: list[int], row: Row, plain: bool) -> None:
        """Append the end token to the last answer, unless it ends with a token at which generation stops."""
        last = self._last(input_ids)
        ends = input_ids[last] if last >= 0 else -1
        own = self.tokenizer.eos_token_id
        if ends in self.stops:
            if ends != own and own is not None and not plain:
                self.notes.add(OTHER_STOP.format(self._name(ends), self._name(own)), row.where)
            return
        if not self.stops:
            self.notes.add(NO_STOP, row.where)
            return
        if ends in self.special:
            del input_ids[last + 1 :], labels[last + 1 :]
        input_ids.append(self.stops[0])
        labels.append(self.stops[0])
        if not plain:
            shown = self._name(ends) if ends in self.special else "no special token"
            self.notes.add(STOP_ADDED.format(shown, self._name(self.stops[0])), row.where)

    def _last(self, ids: Sequence[int]) -> int:
        """Index of the last id that is not white space, or -1."""
        return next((at for at in range(len(ids) - 1, -1, -1) if not self._is_blank(ids[at])), -1)

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = token not in self.special and not self.tokenizer.decode([token]).strip()
        return self._blank[token]

    def _name(self, token: int) -> str:
        return repr(self.tokenizer.convert_ids_to_tokens(token))


def _tokens(
    scripts: Sequence[Script], rows: Sequence[Row], tokenizer: Any, closing: _Closing
) -> Iterator[tuple[list[int], list[int]]]:
    """(input ids, labels) of each script, not truncated; the tokenizer is called on many pieces at once."""
    for start in range(0, len(scripts), _ROWS_AT_ONCE):
        block = scripts[start : start + _ROWS_AT_ONCE]
        plain = _ids([script.pieces[0][0] for script in block if script.plain], tokenizer, special=True)
        templated = _ids([script.pieces[0][0] for script in block if not script.plain], tokenizer, special=False)
        later = _later_ids([text for script in block for text, _ in script.pieces[1:]], tokenizer)
        for script, row in zip(block, rows[start : start + _ROWS_AT_ONCE], strict=True):
            input_ids, labels = _joined(script, plain if script.plain else templated, later, tokenizer, closing)
            closing.check(input_ids, labels, row, script.plain)
            closing.close(input_ids, labels, row, script.plain)
            yield input_ids, labels


def _ids(texts: list[str], tokenizer: Any, special: bool) -> Iterator[list[int]]:
    if not texts:
        return iter(())
    # verbose=False: no warning about long texts, which are cut later
    encoded = tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
    return iter(encoded["input_ids"])


def _later_ids(texts: list[str], tokenizer: Any) -> Iterator[list[int]]:
    """Ids of texts that follow others, without what the tokenizer puts before a separate text."""
    (anchor, alone, behind) = _ids([_ANCHOR, "a", f"{_ANCHOR}a"], tokenizer, special=False)
    if [*anchor, *alone] == behind:
        yield from _ids(texts, tokenizer, special=False)
        return
    anchored = _ids([_ANCHOR + text for text in texts], tokenizer, special=False)
    for ids, own in zip(anchored, _ids(texts, tokenizer, special=False), strict=True):
        yield ids[len(anchor) :] if ids[: len(anchor)] == anchor else own  # the anchor was merged with the text


def _joined(
    script: Script, opening: Iterator[list[int]], later: Iterator[list[int]], tokenizer: Any, closing: _Closing
) -> tuple[list[int], list[int]]:
    input_ids: list[int] = []
    labels: list[int] = []
    for at, (_, labelled) in enumerate(script.pieces):
        ids = list(next(later if at else opening))
        if script.plain and at == 0:
            while len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
                del ids[0]  # the text already begins with it
            if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
                ids.pop()  # some tokenizers end every text; it belongs after the last piece only
        learned = closing.learned(ids) if labelled else 0
        input_ids += ids
        labels += ids[:learned] + [NO_LOSS] * (len(ids) - learned)
    return input_ids, labels
