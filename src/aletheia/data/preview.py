"""Rows as the model sees them, and the counts of a data set, as plain data. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import median
from typing import Any

from aletheia.data.examples import NO_LOSS, Example, Examples
from aletheia.data.repeats import Overlap, duplicates


@dataclass(frozen=True)
class Piece:
    """Adjacent tokens of one kind as text: ``labelled`` ones carry a loss, a ``special`` token has its own piece.

    ``left_out`` marks a remark in place of text that was cut out.
    """

    text: str
    labelled: bool
    special: bool = False
    left_out: bool = False


@dataclass(frozen=True)
class ShownRow:
    """One row as the model sees it. ``number`` counts the rows of the data set from 1, in reading order.

    ``is_longest_allowed``: it has the most tokens that a row may have, so some may be cut off.
    """

    number: int
    where: str
    tokens: int
    labelled_tokens: int
    pieces: tuple[Piece, ...]
    is_longest_allowed: bool = False

    def shortened(self, characters: int, most: int) -> "ShownRow":
        """The row with the middle cut out: about ``characters`` of each piece, and about ``most`` pieces."""
        pieces = [part for piece in self.pieces for part in _shortened(piece, characters)]
        # cutting only a few words would not help, here and in _shortened
        if len(pieces) > most * 4 // 3:
            head, tail = most - most // 2, most // 2
            between = Piece(f"[... {len(pieces) - most} pieces ...]", labelled=False, left_out=True)
            pieces = [*pieces[:head], between, *pieces[len(pieces) - tail :]]
        return replace(self, pieces=tuple(pieces))


@dataclass(frozen=True)
class Preview:
    """What a run would learn from: some rows as the model sees them, counts of all rows, and notes.

    ``left_out`` counts the unusable rows by reason. ``held_out`` describes the held-out rows; None if there are none.
    """

    name: str
    form: str
    max_length: int
    shown: tuple[ShownRow, ...]
    rows: int
    tokens: int
    labelled_tokens: int
    longest: int
    median: float
    truncated: int
    left_out: Mapping[str, int]
    duplicates: int
    held_out: Overlap | None
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls,
        examples: Examples,
        shown: Sequence[ShownRow],
        held_out: Overlap | None = None,
        notes: Sequence[str] = (),
    ) -> "Preview":
        """The preview of ``examples``, with the rows to show."""
        lengths = [len(example) for example in examples.examples]
        return cls(
            name=examples.identity.name,
            form=examples.identity.form,
            max_length=examples.max_length,
            shown=tuple(shown),
            rows=len(examples),
            tokens=examples.tokens,
            labelled_tokens=examples.labelled_tokens,
            longest=max(lengths),
            median=median(lengths),
            truncated=examples.truncated,
            left_out=dict(examples.left_out),
            duplicates=duplicates(examples),
            held_out=held_out,
            notes=tuple(notes),
        )


def shown_row(example: Example, number: int, tokenizer: Any, max_length: int) -> ShownRow:
    """A tokenised row as pieces of text; ``number`` is its place in the data set, from 1."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    kinds = [
        (position > 0 and label != NO_LOSS, position if token in special else -1)  # position 0 is never predicted
        for position, (token, label) in enumerate(zip(example.input_ids, example.labels, strict=True))
    ]
    pieces: list[Piece] = []
    end, before = 0, ""
    for (labelled, alone), run in groupby(kinds):
        start, end = end, end + len(list(run))
        after = _decoded(example.input_ids[:end], tokenizer)
        if end < len(example):
            after = after.rstrip("\N{REPLACEMENT CHARACTER}")  # incomplete characters go to the next piece
        grew = after.startswith(before)  # the text of a token depends on those before it
        text = after[len(before) :] if grew else _decoded(example.input_ids[start:end], tokenizer)
        pieces.append(Piece(text, labelled, alone >= 0))
        before = after
    is_longest = len(example) == max_length
    return ShownRow(number, example.where, len(example), example.labelled_tokens, tuple(pieces), is_longest)


def _decoded(ids: list[int], tokenizer: Any) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _shortened(piece: Piece, characters: int) -> list[Piece]:
    if len(piece.text) <= characters * 4 // 3:
        return [piece]
    head, tail = characters - characters // 3, characters // 3
    cut = Piece(f" [... {len(piece.text) - head - tail:,} characters ...] ", piece.labelled, left_out=True)
    return [replace(piece, text=piece.text[:head]), cut, replace(piece, text=piece.text[len(piece.text) - tail :])]
