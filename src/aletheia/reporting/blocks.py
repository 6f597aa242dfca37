"""The parts of a page, before it is HTML or Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class Card:
    """A number at the head of the page."""

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class Table:
    """Rows of cells under a title; the first column names the row.

    ``drawn`` holds a picture for each row, shown after its name; ``scale`` is their common axis.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""
    drawn: tuple[Markup, ...] = ()
    scale: Markup | None = None


@dataclass(frozen=True)
class Figure:
    """A picture with its caption."""

    title: str
    svg: Markup
    note: str = ""


@dataclass(frozen=True)
class Panels:
    """Small tables or figures side by side, as many as the page has room for."""

    title: str
    panels: Sequence[Table] | Sequence[Figure]
    note: str = ""


@dataclass(frozen=True)
class Pre:
    """Text as it is, such as a file."""

    title: str
    text: str


Block = Table | Panels | Pre


@dataclass(frozen=True)
class Page:
    """A report: the verdict in a sentence, then the evidence for it."""

    title: str
    verdict: str
    cards: tuple[Card, ...]
    blocks: tuple[Block, ...]
