"""What a person should know of the rows: each kind of thing once, with how many rows and the first place."""

from collections.abc import Mapping
from dataclasses import dataclass, field

_SHOWN = 60  # characters of an example


@dataclass
class Notes:
    """Kinds of remarks in the order in which they came up; each has a count of rows, a first place and an example."""

    _found: dict[str, tuple[int, str, str]] = field(default_factory=dict)

    def add(self, text: str, where: str, example: str = "", rows: int = 1) -> None:
        """Count a remark. ``text`` is the sentence, with ``{}`` where the first example is to stand."""
        count, first, shown = self._found.get(text, (0, where, example))
        self._found[text] = (count + rows, first, shown)

    def lines(self) -> tuple[str, ...]:
        """One line for each kind of remark."""
        return tuple(
            f"{text.format(shorten(example)) if example else text} ({count} row{'s' * (count != 1)}, first {where})"
            for text, (count, where, example) in self._found.items()
        )


def shorten(text: str) -> str:
    """A text in quotes for a message: on one line, at most about 60 characters."""
    shown = repr(text)
    return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 4]}...'"


def add_up(parts: list[Mapping[str, int]]) -> dict[str, int]:
    """Counts by reason, summed over several."""
    total: dict[str, int] = {}
    for part in parts:
        for reason, count in part.items():
            total[reason] = total.get(reason, 0) + count
    return total
