"""Figures of a campaign's report: plain data in, SVG out. Numbers are next to each figure, never only in it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup

from aletheia.lab.campaign.behaviour_summary import Curve
from aletheia.lab.statistics.results import Estimate
from aletheia.reporting.svg import Axis, Drawing, line_path, panel, short, tick_texts, ticks

PANEL_WIDTH, PANEL_HEIGHT = 172, 128  # two fit side by side on a phone


@dataclass(frozen=True)
class Scale:
    """The common scale of several intervals; ``equal`` is the value of no difference.

    ``margin`` is the worst value that counts as not worse; ``unit`` multiplies the numbers on the scale. Pictures on it
    are in per cent of their width.
    """

    low: float
    high: float
    equal: float
    margin: float | None = None
    unit: float = 1.0

    @classmethod
    def around(
        cls, estimates: Iterable[Estimate], equal: float, margin: float | None = None, unit: float = 1.0
    ) -> "Scale":
        """A scale from the lowest end to the highest, with room on both sides."""
        values = [equal, *([] if margin is None else [margin])]
        for found in estimates:
            values += [found.value, *((found.interval.low, found.interval.high) if found.interval else ())]
        room = 0.06 * ((max(values) - min(values)) or 1.0)
        return cls(min(values) - room, max(values) + room, equal, margin, unit)

    @property
    def head(self) -> Markup:
        """Round values along the scale."""
        values = ticks(self.low * self.unit, self.high * self.unit, 3)
        every = 2 if len(values) > 3 else 1  # more do not fit next to each other
        texts = "".join(
            f'<text x="{self._at(value / self.unit)}" y="75%">{text}</text>'
            for value, text in list(zip(values, tick_texts(values), strict=True))[(len(values) - 1) % every :: every]
        )
        return Markup(f'<svg class="bar">{texts}</svg>')

    def row(self, found: Estimate, more_is_better: bool) -> Markup:
        """A point with its interval; coloured if the interval excludes the value of no difference."""
        interval = found.interval
        css = "same"
        if interval and not interval.low <= self.equal <= interval.high:
            css = "good" if (found.value > self.equal) is more_is_better else "bad"
        lines = self._upright("equal", self.equal) + (
            "" if self.margin is None else self._upright("margin", self.margin)
        )
        if interval:
            ends = f'x1="{self._at(interval.low)}" x2="{self._at(interval.high)}"'
            lines += f'<line {ends} y1="50%" y2="50%"/>'
        point = f'<circle cx="{self._at(found.value)}" cy="50%" r="4"/>'
        return Markup(f'<svg class="bar {css}">{lines}{point}</svg>')

    def _upright(self, css: str, value: float) -> str:
        return f'<line class="{css}" x1="{self._at(value)}" x2="{self._at(value)}" y2="100%"/>'

    def _at(self, value: float) -> str:
        return f"{short(100 * (value - self.low) / (self.high - self.low))}%"


def layers_row(shares: Sequence[float]) -> Markup:
    """A strip of the layers from embedding to head: coloured if adapted, paler if only in some runs."""
    boxes, start = "", 0
    for share, same in groupby(shares):
        width = len(list(same))
        if share:
            pale = f' opacity="{share:.2g}"' if share < 1 else ""
            left, wide = (f"{short(100 * layers / len(shares))}%" for layers in (start, width))
            boxes += f'<rect x="{left}" width="{wide}" height="100%"{pale}/>'
        start += width
    return Markup(f'<svg class="strip">{boxes}</svg>')


@dataclass(frozen=True)
class CurvePanels:
    """Held-out losses of one model during training: each panel shows one arm in front of all arms."""

    curves: Sequence[Curve]
    identifier: str

    def svg(self, arm: str, is_first: bool) -> Markup:
        """The panel of an arm; the first one on the page holds the lines of all arms, which the others reuse."""
        trained = [[point for point in curve.points if point[0] > 0] for curve in self.curves]
        losses = [loss for points in trained for _, _, loss in points]
        low, high = min(losses), max(losses)
        margin = 0.06 * ((high - low) or 0.1)
        last = max(points[-1][0] for points in trained)
        drawing = Drawing(PANEL_WIDTH, PANEL_HEIGHT)
        x, y = Axis(0, last, 40, PANEL_WIDTH - 8), Axis(low - margin, high + margin, PANEL_HEIGHT - 22, 6)
        values = ticks(y.low, y.high, 3)
        for value, text in zip(values, tick_texts(values), strict=True):
            drawing.line(x.start, y(value), x.end, y(value))
            drawing.text(x.start - 7, y(value) + 4, text, "muted", "end")
        drawing.vertical(x.start, y.end, y.start, cut_top=True, cut_bottom=y.low > 0)
        drawing.line(x.start, y.start, x.end, y.start, "axis")
        drawing.text(x.start, PANEL_HEIGHT - 6, "0", "muted", "middle")
        drawing.text(x.end, PANEL_HEIGHT - 6, f"{last:,}", "muted", "end")
        paths = [[(x(step), y(loss)) for step, _, loss in points] for points in trained]
        if is_first:
            every = "".join(map(line_path, paths))
            drawing.parts.append(f'<path class="others" id="{self.identifier}" d="{every}"/>')
        else:
            drawing.parts.append(f'<use href="#{self.identifier}"/>')
        for curve, points in zip(self.curves, paths, strict=True):
            if curve.arm == arm:
                drawing.curve(points, "run r0")
        return panel(drawing, f"Held-out loss of {arm} by step")
