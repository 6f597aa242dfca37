"""Rows to tokens and labels: the loss falls on completions only, on every token for plain text.

A row becomes pieces of text, each with or without a loss. Pieces are tokenised one by one and concatenated, so a
completion begins at a token boundary: this is what the model sees when it generates. Tokenizers that put a space in
front of every text (SentencePiece's dummy prefix) do so for the first piece alone.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from aletheia.data.examples import NO_LOSS, Example, Examples, split_held_out
from aletheia.data.rows import Row, Rows, load_rows
from aletheia.data.sources import one_line
from aletheia.data.tokenizer import identify_tokenizer
from aletheia.errors import DataError

__all__ = ["NO_LOSS", "Example", "Examples", "encode", "load_data", "split_held_out"]

_log = logging.getLogger(__name__)
_ANCHOR = "\n"  # a text that tokenizers with a dummy prefix keep apart from what follows
_ROWS_AT_ONCE = 1000  # rows per call of the tokenizer: enough for its threads, little memory


@dataclass(frozen=True, slots=True)
class _Script:
    """A row as pieces (text, whether it carries the loss).

    Plain rows (no chat template) get the tokenizer's own special tokens in front and EOS behind. ``quiet`` tells
    that some assistant turns carry no loss although they could.
    """

    pieces: list[tuple[str, bool]]
    plain: bool
    quiet: bool = False


def load_data(
    data: str | Sequence[str],
    tokenizer: Any,
    max_length: int = 1024,
    skip_emptied: bool = False,
    vocab_size: int | None = None,
) -> Examples:
    """Read files or hub data sets and tokenise them: ``load_rows``, then ``encode``.

    Raises:
        DataError: as these two.
    """
    return encode(load_rows(data), tokenizer, max_length, skip_emptied, vocab_size)


def encode(
    rows: Rows,
    tokenizer: Any,
    max_length: int = 1024,
    skip_emptied: bool = False,
    vocab_size: int | None = None,
) -> Examples:
    """Tokenise rows, label them and cut them on the right to ``max_length`` tokens.

    A row is *emptied* when no label is left beyond position 0, which is never predicted. Emptied rows are an error,
    or dropped and counted with ``skip_emptied``. ``vocab_size``: refuse token ids the model has no embedding for.

    Raises:
        DataError: max_length below 2, an emptied row, no row left, a row the chat template refuses, or a token
            id beyond ``vocab_size``.
    """
    if max_length < 2:
        raise DataError(f"found a maximum length of {max_length}, expected at least 2; raise `max_length`")
    scripts = [_script(row, tokenizer) for row in rows.rows]
    if quiet := sum(script.quiet for script in scripts):
        _log.warning(
            "only the last assistant turn carries a loss in %d of %d rows: the chat template rewrites earlier "
            "turns, or there is none",
            quiet,
            len(scripts),
        )
    kept: list[Example] = []
    emptied: list[tuple[str, int | None]] = []
    truncated = 0
    for row, (input_ids, labels) in zip(rows.rows, _tokens(scripts, tokenizer), strict=True):
        needed = next((at + 1 for at, label in enumerate(labels) if at and label != NO_LOSS), None)
        if needed is None or needed > max_length:
            emptied.append((row.where, needed))
            continue
        example = Example(input_ids[:max_length], labels[:max_length], row.where)
        _check_ids(example, vocab_size)
        truncated += len(input_ids) > max_length
        kept.append(example)
    if emptied and not (skip_emptied and kept):
        raise _emptied(emptied, len(rows.rows), max_length, skip_emptied)
    identity, pad = identify_tokenizer(tokenizer), _pad_token_id(tokenizer)
    left_out = {f"no token to learn within `max_length` {max_length}": len(emptied)} if emptied else {}
    return Examples(
        rows.identity, tuple(kept), max_length, pad, len(emptied), truncated, identity, left_out, rows.notes
    )


def _check_ids(example: Example, vocab_size: int | None) -> None:
    if vocab_size is not None and (largest := max(example.input_ids)) >= vocab_size:
        raise DataError(
            f"{example.where}: found the token id {largest}, expected ids below {vocab_size}, the size of the "
            "model's embedding; use the tokenizer that belongs to the model"
        )


def _emptied(emptied: list[tuple[str, int | None]], rows: int, max_length: int, skip_emptied: bool) -> DataError:
    where, needed = emptied[0]
    found = f"the first of {len(emptied)} row(s), of {rows}, without a token to learn at `max_length={max_length}`"
    if needed is None:
        expected, remedy = "it has none at any length", "remove such rows"
    else:
        expected, remedy = f"expected at least {needed} for it", "raise `max_length`"
    if not skip_emptied:
        remedy += " or give `skip_emptied=True`"
    return DataError(f"{where}: found {found}; {expected}; {remedy}")


def _pad_token_id(tokenizer: Any) -> int:
    """Any valid id would do, because padding is masked."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token_id for token_id in known if token_id is not None)


def _script(row: Row, tokenizer: Any) -> _Script:
    if row.text is not None:
        return _Script([(row.text, True)], plain=True)
    assert row.messages is not None
    # A leading assistant turn answers nothing: it is context.
    first = max(row.loss_from, 1)
    turns = [at for at in range(first, len(row.messages)) if row.messages[at]["role"] == "assistant"]
    if getattr(tokenizer, "chat_template", None):
        return _templated(row, turns, tokenizer)
    contents = [message["content"] for message in row.messages]
    prompt = "\n\n".join(contents[: turns[-1]]) + "\n\n"
    return _Script([(prompt, False), (contents[turns[-1]], True)], plain=True, quiet=len(turns) > 1)


def _templated(row: Row, turns: list[int], tokenizer: Any) -> _Script:
    """Every assistant turn labelled if the template only ever appends, otherwise the last turn alone."""
    for labelled, generation in ((turns, True), (turns[-1:], True), (turns[-1:], False)):
        pieces = _pieces(row, labelled, tokenizer, generation)
        if pieces is not None:
            return _Script(pieces, plain=False, quiet=len(labelled) < len(turns))
    raise DataError(
        f"{row.where}: found a chat template that rewrites the prompt once it is answered, so its completion "
        "cannot be told apart; expected one that appends; use another chat template or the text form"
    )


def _pieces(row: Row, turns: list[int], tokenizer: Any, generation: bool) -> list[tuple[str, bool]] | None:
    """Prompt and completion of each of ``turns``, or None if a render does not begin with the one before it."""
    assert row.messages is not None
    pieces: list[tuple[str, bool]] = []
    done = ""
    for at in turns:
        prompt = _render(row.messages[:at], tokenizer, generation, row.where)
        answered = _render(row.messages[: at + 1], tokenizer, False, row.where)
        appends = prompt.startswith(done) and answered.startswith(prompt) and answered != prompt
        if not appends:
            return None
        pieces += [(prompt[len(done) :], False), (answered[len(prompt) :], True)]
        done = answered
    return pieces


def _render(messages: Sequence[dict[str, str]], tokenizer: Any, generation: bool, where: str) -> str:
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation)
        return text
    except Exception as error:  # a template is a program and may raise anything
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"{where}: found messages the chat template refuses ({one_line(error)}), expected roles it knows "
            f"(here: {roles}); change the roles or use another chat template"
        ) from error


def _tokens(scripts: Sequence[_Script], tokenizer: Any) -> Iterator[tuple[list[int], list[int]]]:
    """(input ids, labels) of each script, not truncated; the tokenizer is called on many pieces at once."""
    for start in range(0, len(scripts), _ROWS_AT_ONCE):
        block = scripts[start : start + _ROWS_AT_ONCE]
        plain = _ids([script.pieces[0][0] for script in block if script.plain], tokenizer, special=True)
        templated = _ids([script.pieces[0][0] for script in block if not script.plain], tokenizer, special=False)
        later = _later_ids([text for script in block for text, _ in script.pieces[1:]], tokenizer)
        for script in block:
            yield _joined(script, plain if script.plain else templated, later, tokenizer.eos_token_id)


def _ids(texts: list[str], tokenizer: Any, special: bool) -> Iterator[list[int]]:
    if not texts:
        return iter(())
    # verbose: no warning about texts above the model's maximum, they are cut later
    encoded = tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
    return iter(encoded["input_ids"])


def _later_ids(texts: list[str], tokenizer: Any) -> Iterator[list[int]]:
    """Ids of texts that stand behind others, without what the tokenizer puts in front of a text on its own."""
    (anchor, alone, behind) = _ids([_ANCHOR, "a", f"{_ANCHOR}a"], tokenizer, special=False)
    if [*anchor, *alone] == behind:
        yield from _ids(texts, tokenizer, special=False)
        return
    anchored = _ids([_ANCHOR + text for text in texts], tokenizer, special=False)
    for ids, own in zip(anchored, _ids(texts, tokenizer, special=False), strict=True):
        yield ids[len(anchor) :] if ids[: len(anchor)] == anchor else own  # the anchor was merged with the text


def _joined(
    script: _Script, opening: Iterator[list[int]], later: Iterator[list[int]], eos_token_id: int | None
) -> tuple[list[int], list[int]]:
    input_ids: list[int] = []
    labels: list[int] = []
    for at, (_, labelled) in enumerate(script.pieces):
        ids = list(next(later if at else opening))
        if script.plain and len(ids) > 1 and ids[-1] == eos_token_id:
            ids.pop()  # a tokenizer that closes every text itself: EOS comes once, behind the last piece
        input_ids += ids
        labels += ids if labelled else [NO_LOSS] * len(ids)
    if script.plain and eos_token_id is not None:
        input_ids.append(eos_token_id)
        labels.append(eos_token_id)
    return input_ids, labels
