"""Figures as SVG inside the page, whose style sheet sets their colours and fonts.

They are drawn without a plotting library: each figure exists once for a desktop and once for a phone, follows the
page's dark and light colours, and stays a few kilobytes. All text is escaped here.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil, floor, log10

from markupsafe import Markup, escape

from aletheia.names import printable

DESK, HALF, PHONE = 880, 480, 350  # widths of the drawings, in pixels at their own size
RUN_COLORS = 7  # of the style sheet
_DASHES = ("", "7 4", "2 3", "9 3 2 3", "5 2", "1 4", "12 4")
_MARKERS = (  # around the origin, distinct without colour: circle, square, triangle, diamond, cross, plus, bar
    "M-3.6 0a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0-7.2 0z",
    "M-3.3-3.3h6.6v6.6h-6.6z",
    "M0-4.4l4.4 7.6h-8.8z",
    "M0-4.8l4.6 4.8l-4.6 4.8l-4.6-4.8z",
    "M-4-2.4l1.6-1.6l2.4 2.4l2.4-2.4l1.6 1.6l-2.4 2.4l2.4 2.4l-1.6 1.6l-2.4-2.4l-2.4 2.4l-1.6-1.6l2.4-2.4z",
    "M-1.2-4.4h2.4v3.2h3.2v2.4h-3.2v3.2h-2.4v-3.2h-3.2v-2.4h3.2z",
    "M-1.6-4.6h3.2v9.2h-3.2z",
)
_BREAK = 14.0  # pixels that the mark of a cut takes on an axis

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # x, y, width, height


@dataclass(frozen=True)
class Axis:
    """Values from ``low`` to ``high``, mapped to the pixels from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        span = (self.high - self.low) or 1.0
        return self.start + (value - self.low) / span * (self.end - self.start)


@dataclass
class Drawing:
    """Shapes in painting order; sizes in pixels."""

    width: float
    height: float
    parts: list[str] = field(default_factory=list)

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str = "grid") -> None:
        """A straight line."""
        self.parts.append(f'<path class="{css}" d="{line_path([(x1, y1), (x2, y2)])}"/>')

    def curve(self, points: Sequence[Point], css: str, dash: str = "") -> None:
        """A line through points, if there are any."""
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        if points:
            self.parts.append(f'<path class="{css}"{dashed} d="{line_path(points)}"/>')

    def boxes(self, boxes: Iterable[Box], css: str, opacity: float = 1.0) -> None:
        """Rectangles of one colour, as one path."""
        path = "".join(f"M{_pair(x, y)}h{short(w)}v{short(h)}h{short(-w)}z" for x, y, w, h in boxes)
        if path:
            faint = f' opacity="{opacity:.2g}"' if opacity < 1 else ""
            self.parts.append(f'<path class="{css}"{faint} d="{path}"/>')

    def text(self, x: float, y: float, text: str, css: str = "", anchor: str = "start") -> None:
        """One line of text; ``y`` is its baseline."""
        place = "" if anchor == "start" else f' text-anchor="{anchor}"'
        named = f' class="{css}"' if css else ""
        self.parts.append(f'<text{named} x="{short(x)}" y="{short(y)}"{place}>{escape(printable(text))}</text>')

    def marker(self, at: Point, index: int) -> None:
        """The mark of a run at a point."""
        self.parts.append(f'<path class="mark" transform="translate({_pair(*at)})" d="{marker_path(index)}"/>')

    def ring(self, at: Point) -> None:
        """A ring around the mark of the kept adapter."""
        self.parts.append(f'<circle class="ring" cx="{short(at[0])}" cy="{short(at[1])}" r="8"/>')

    def opened(self, css: str) -> None:
        """Begin a group; :meth:`closed` ends it."""
        self.parts.append(f'<g class="{css}">')

    def closed(self) -> None:
        """End a group."""
        self.parts.append("</g>")

    def clipped(self, box: Box) -> None:
        """Begin an area outside of which nothing is drawn; :meth:`unclipped` ends it."""
        x, y, width, height = map(short, box)
        place = f'x="{x}" y="{y}" width="{width}" height="{height}" viewBox="{x} {y} {width} {height}"'
        self.parts.append(f"<svg {place}>")

    def unclipped(self) -> None:
        """End the area."""
        self.parts.append("</svg>")

    def vertical(self, x: float, top: float, bottom: float, cut_top: bool = False, cut_bottom: bool = False) -> None:
        """A vertical axis; a zigzag marks an end where values were cut off."""
        first, last = top + _BREAK * cut_top, bottom - _BREAK * cut_bottom
        points = [(x, first), (x, last)]
        if cut_top:
            points = [(x, top), (x, top + 2), *_zigzag(x, top + 2), *points]
        if cut_bottom:
            points = [*points, *_zigzag(x, last), (x, bottom)]
        self.parts.append(f'<path class="axis" d="{line_path(points)}"/>')


def _zigzag(x: float, y: float) -> list[Point]:
    return [(x - 4, y + 2.5), (x + 4, y + 6), (x - 4, y + 9.5), (x, y + 12)]


def figure(identifier: str, title: str, words: str, draw: Callable[[int], Drawing], wide: int = DESK) -> Markup:
    """A figure in two drawings, ``wide`` and as wide as a phone; the style sheet shows one of them.

    ``title`` names the figure, ``words`` describe it for screen readers.
    """
    return Markup("").join(
        _svg(draw(width), f"{identifier}-{kind}", kind, title, words)
        for kind, width in (("desk", wide), ("phone", PHONE))
    )


def _svg(drawing: Drawing, identifier: str, css: str, title: str, words: str) -> Markup:
    head = (
        f'<svg class="{css}" viewBox="0 0 {short(drawing.width)} {short(drawing.height)}" role="img" '
        f'aria-labelledby="{identifier}-t {identifier}-d"><title id="{identifier}-t">{escape(printable(title))}</title>'
        f'<desc id="{identifier}-d">{escape(printable(words))}</desc>'
    )
    return Markup(head + "".join(drawing.parts) + "</svg>")


def panel(drawing: Drawing, label: str) -> Markup:
    """One of many small figures, drawn once for all widths."""
    box = f'viewBox="0 0 {short(drawing.width)} {short(drawing.height)}"'
    return Markup(f'<svg {box} role="img" aria-label="{escape(printable(label))}">{"".join(drawing.parts)}</svg>')


def run_class(index: int) -> str:
    """The class that carries the colour of run ``index``."""
    return f"r{index % RUN_COLORS}"


def run_dash(index: int) -> str:
    """The dash pattern of run ``index``; runs of one colour have different ones."""
    return _DASHES[(index + index // RUN_COLORS) % len(_DASHES)]


def marker_path(index: int) -> str:
    """The path of the mark of run ``index``, around the origin."""
    return _MARKERS[(index + index // RUN_COLORS) % len(_MARKERS)]


def line_key(index: int) -> Markup:
    """The line and the mark of a run, for a legend."""
    dash = run_dash(index)
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return Markup(
        f'<svg class="key {run_class(index)}" viewBox="0 0 34 12" aria-hidden="true"><path class="run"{dashed} '
        f'd="M0 6h34"/><path class="mark" transform="translate(17 6)" d="{marker_path(index)}"/></svg>'
    )


def ticks(low: float, high: float, most: int, integer: bool = False) -> list[float]:
    """At most ``most`` + 1 round values between ``low`` and ``high``, both included."""
    if not high > low:
        return [low]
    wanted = (high - low) / most
    power = 10.0 ** floor(log10(wanted))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= wanted * (1 - 1e-9))
    step = max(step, 1.0) if integer else step
    return [count * step for count in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


def tick_texts(values: Sequence[float]) -> list[str]:
    """Labels of ticks, with as many decimals as their distance needs."""
    step = min((after - value for value, after in pairwise(values)), default=1.0)
    decimals = max(0, -floor(log10(step) + 1e-9))
    return [f"{value:,.{decimals}f}" for value in values]


def line_path(points: Sequence[Point]) -> str:
    """A path through points, rounded to a tenth of a pixel, each relative to the one before."""
    tenths = [(round(10 * x), round(10 * y)) for x, y in points]
    moves = [_pair((x - before_x) / 10, (y - before_y) / 10) for (before_x, before_y), (x, y) in pairwise(tenths)]
    first = f"M{_pair(tenths[0][0] / 10, tenths[0][1] / 10)}"
    return f"{first}l{' '.join(moves)}".replace(" -", "-") if moves else first


def short(value: float) -> str:
    """A number of pixels, rounded to a tenth."""
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


def _pair(x: float, y: float) -> str:
    return f"{short(x)} {short(y)}".replace(" -", "-")
