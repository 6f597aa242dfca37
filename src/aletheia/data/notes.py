"""Notes on the rows for people: one line per kind, with the number of rows and the first place."""

from collections.abc import Mapping
from dataclasses import dataclass, field

_SHOWN = 60  # characters of an example


@dataclass
class Notes:
    """Kinds of remarks in order of appearance; each has a count of rows, a first place and an example."""

    _found: dict[str, tuple[int, str, str]] = field(default_factory=dict)

    def add(self, text: str, where: str, example: str = "", rows: int = 1) -> None:
        """Count a remark. ``text`` is the sentence; ``{}`` in it is replaced by the first example."""
        count, first, shown = self._found.get(text, (0, where, example))
        self._found[text] = (count + rows, first, shown)

    def lines(self) -> tuple[str, ...]:
        """One line per kind of remark."""
        return tuple(
            f"{text.format(shorten(example)) if example else text} ({count} row{'s' * (count != 1)}, first {where})"
            for text, (count, where, example) in self._found.items()
        )


def shorten(text: str) -> str:
    """A text in quotes for a message, on one line of at most 60 characters."""
    shown = repr(text)
    return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 4]}...'"


def add_up(parts: list[Mapping[str, int]]) -> dict[str, int]:
    """The sums of several counts by reason."""
    total: dict[str, int] = {}
    for part in parts:
        for reason, count in part.items():
            total[reason] = total.get(reason, 0) + count
    return total
