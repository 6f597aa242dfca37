"""Answers side by side if the terminal is wide enough, otherwise one below the other."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from aletheia.names import printable
from aletheia.runs.answers import Answer

NARROWEST = 34  # columns of an answer next to another
PROMPT_LINES = 12


def render_answers(answers: Sequence[Answer], width: int) -> RenderableType:
    """Each prompt with its answers, for a terminal of ``width`` columns."""
    parts: list[RenderableType] = []
    for answer in answers:
        parts += [_prompt(answer), *_texts(answer, width), Text()]
    return Group(*parts[:-1])


def _prompt(answer: Answer) -> RenderableType:
    lines = answer.prompt.strip().splitlines()
    shown = lines if len(lines) <= PROMPT_LINES else [*lines[: PROMPT_LINES // 2], "...", *lines[-PROMPT_LINES // 2 :]]
    head = Text(printable(answer.where), style="bold cyan")
    return Group(head, Padding(Text(_lines(shown), style="dim", overflow="fold"), (0, 0, 0, 2)))


def _texts(answer: Answer, width: int) -> list[RenderableType]:
    """The answers by name: in columns, or one below the other."""
    has_base = answer.base is not None
    named = [("with the adapter" if has_base else "answer", _text(answer.answer, answer.ended))]
    if answer.base is not None:
        named.append(("base alone", _text(answer.base, bool(answer.base_ended))))
    if answer.reference is not None:
        named.append(("reference", _text(answer.reference, True)))
    if len(named) > 1 and width >= NARROWEST * len(named) + 2 * (len(named) - 1):
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), expand=True, header_style="bold")
        for name, _ in named:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*(text for _, text in named))
        return [table]
    return [part for name, text in named for part in (Text(name, style="bold"), Padding(text, (0, 0, 0, 2)))]


def _text(answer: str, ended: bool) -> Text:
    text = Text(_lines(answer.splitlines()) or "(empty)", overflow="fold")
    if not ended:
        text.append(" [cut]", style="yellow")
    return text


def _lines(lines: Sequence[str]) -> str:
    return "\n".join(printable(line.expandtabs(4)) for line in lines)
