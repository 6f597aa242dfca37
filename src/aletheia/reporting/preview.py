"""Rows as the model will see them, in a terminal; learned text is marked by colour or brackets."""

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from aletheia.data.preview import Piece, Preview, ShownRow
from aletheia.names import printable
from aletheia.reporting.format import human_percent

WIDTH = 80
INDENT = "    "
_PLACE = 28  # characters of the place of a row; its end distinguishes files
BRACKETS = ("\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}", "\N{MATHEMATICAL RIGHT WHITE SQUARE BRACKET}")
ASCII_BRACKETS = ("[[", "]]")
_RETURN = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
_CHARACTERS, _PIECES = 600, 40  # per piece, and pieces per row, unless rows are asked for
_QUOTED_CHARACTERS, _QUOTED_PIECES, _QUOTED_LINES = 120, 16, 12
# colours with a background are readable on any terminal
_LEARNED, _LEARNED_SPECIAL = "black on green", "black on yellow"
_GIVEN, _GIVEN_SPECIAL = "dim", "magenta"


def render_preview(preview: Preview, console: Console, whole: bool = False) -> RenderableType:
    """Rows and counts for ``console``: learned text in colour if the console has colours, else in brackets.

    ``whole`` rows are not shortened.
    """
    has_colour = console.color_system is not None and not console.no_color
    encoding = console.encoding
    brackets = None if has_colour else BRACKETS if _fits(BRACKETS[0], encoding) else ASCII_BRACKETS
    parts: list[RenderableType] = []
    for row in preview.shown:
        shown = row if whole else row.shortened(_CHARACTERS, _PIECES)
        parts += [_headline(row), row_text(shown, brackets, encoding), Text()]
    return Group(_legend(brackets), Text(), *parts, _counts(preview), *_notes(preview))


def quoted(row: ShownRow) -> list[str]:
    """A row in a few lines of plain ASCII text, under a headline."""
    text = row_text(row.shortened(_QUOTED_CHARACTERS, _QUOTED_PIECES), ASCII_BRACKETS, "ascii")
    width = WIDTH - len(INDENT)
    lines = [INDENT + line.plain.rstrip() for line in text.wrap(Console(width=width), width)]
    if len(lines) > _QUOTED_LINES:
        head = _QUOTED_LINES // 2
        lines = [*lines[:head], f"{INDENT}...", *lines[len(lines) - head :]]
    start, end = ASCII_BRACKETS
    return [f"{_headline(row).plain}, between {start} and {end}:", *lines]


def row_text(row: ShownRow, brackets: tuple[str, str] | None, encoding: str = "utf-8") -> Text:
    """A row with its line breaks; learned text in colour, or between ``brackets``."""
    text = Text(overflow="fold", no_wrap=False)
    inside = False
    for piece in row.pieces:
        if brackets and piece.labelled != inside:
            _mark(text, brackets[inside])
            inside = piece.labelled
        text.append(_visible(piece, encoding), _style(piece) if brackets is None else "")
    if brackets and inside:
        _mark(text, brackets[1])
    text.rstrip()
    return text


def _mark(text: Text, bracket: str) -> None:
    """Append a bracket; a closing one goes before a line end, which has its own sign."""
    ends_line = text.plain.endswith("\n") and bracket in (BRACKETS[1], ASCII_BRACKETS[1])
    if ends_line:
        text.right_crop()
    text.append(f"{bracket}\n" if ends_line else bracket)


def _visible(piece: Piece, encoding: str) -> str:
    """The text of a piece without characters that move the cursor; a learned line end is shown as a character."""
    arrow = _RETURN if _fits(_RETURN, encoding) else "\\n"
    shown = "".join(char if char.isprintable() or char == "\n" else _escaped(char) for char in piece.text)
    shown = shown.encode(encoding, "backslashreplace").decode(encoding)
    return shown.replace("\n", f"{arrow}\n") if piece.labelled else shown


def _escaped(char: str) -> str:
    return INDENT if char == "\t" else char.encode("unicode_escape").decode()


def _fits(char: str, encoding: str) -> bool:
    try:
        char.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _style(piece: Piece) -> str:
    if piece.left_out:
        return "italic dim"
    if piece.labelled:
        return _LEARNED_SPECIAL if piece.special else _LEARNED
    return _GIVEN_SPECIAL if piece.special else _GIVEN


def _headline(row: ShownRow) -> Text:
    where = printable(row.where)
    where = where if len(where) <= _PLACE else f"...{where[3 - _PLACE :]}"
    most = " (the limit)" if row.is_longest_allowed else ""
    return Text.assemble(
        (f"row {row.number}", "bold"), f"  {where}  {row.tokens:,} tokens{most}, {row.labelled_tokens:,} learned"
    )


def _legend(brackets: tuple[str, str] | None) -> Text:
    if brackets is not None:
        return Text(f"Learned: {brackets[0]}between brackets{brackets[1]}. Given: all other text.")
    return Text.assemble(
        ("learned", _LEARNED), "  ", ("special token, learned", _LEARNED_SPECIAL), "  ",
        ("given", _GIVEN), "  ", ("special token, given", _GIVEN_SPECIAL),
    )  # fmt: skip


def _counts(preview: Preview) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    share = preview.labelled_tokens / preview.tokens
    lines: list[tuple[str, int, str]] = [
        ("rows", preview.rows, f"{preview.form}"),
        ("tokens", preview.tokens, f"longest row {preview.longest:,}, median {preview.median:,.0f}"),
        ("learned tokens", preview.labelled_tokens, f"{human_percent(share)} of all"),
        ("rows cut", preview.truncated, f"to {preview.max_length:,} tokens"),
        ("rows left out", sum(preview.left_out.values()), _reasons(preview)),
        ("duplicates", preview.duplicates, "of an earlier row"),
    ]
    if preview.held_out is not None:
        shared = preview.held_out
        lines += [
            ("held-out rows", shared.rows, ""),
            ("  also learned", shared.same, "the same row is among the training rows"),
            ("  same prompt", shared.same_prompt, "with another answer among the training rows"),
        ]
    for name, count, more in lines:
        table.add_row(Text(name), Text(f"{count:,}", "bold" if count else ""), Text(printable(more)))
    return table


def _reasons(preview: Preview) -> str:
    if len(preview.left_out) == 1:
        return next(iter(preview.left_out))
    return ", ".join(f"{count:,} with {reason}" for reason, count in preview.left_out.items())


def _notes(preview: Preview) -> list[Text]:
    return [Text(), *(Text(f"note: {printable(note)}") for note in preview.notes)] if preview.notes else []
