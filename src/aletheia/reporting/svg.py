"""A matplotlib figure as an SVG fragment that can stand in a page: its colours, its font, ids of its own.

matplotlib cannot draw in ``currentColor`` or CSS variables, so figures are drawn in sentinel colours, which
are exchanged here. Every change is made in the parsed tree, never by search in the text, so that no name in a
figure can be taken for markup.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

FONT_SIZE = 10.0
POINTS_PER_INCH = 72

# sentinel -> what the page shows; the fallback serves a figure that is looked at without the page
INK = "#010101"
MUTED = "#020202"
LINE = "#030303"
IDLE = "#040404"
_COLORS = {
    INK: "currentColor",
    MUTED: "var(--muted, #667085)",
    LINE: "var(--line, #d0d5dd)",
    IDLE: "var(--idle, #c3cad5)",
}

# Okabe and Ito's colour-blind-safe palette, its yellow left out (too faint on white); the page's style sheet
# brightens the colours on dark ground
_RUN_COLORS = ("#0072b2", "#d55e00", "#009e73", "#a6407f", "#56b4e9", "#e69f00", "#7a5195")
_RUN_DASHES = ("solid", "dashed", "dotted", "dashdot")
_PHASE_COLORS = {
    "load": "#c3cad5",
    "probe": "#e69f00",
    "plan": "#cc79a7",
    "cache": "#009e73",
    "correction": "#56b4e9",
    "race": "#0072b2",
    "train": "#475467",
    "eval": "#98a2b3",
    "other": "#e4e7ec",
}


def run_color(index: int) -> str:
    """Sentinel colour of run ``index``; after seven runs the colours repeat with another dash."""
    slot = index % len(_RUN_COLORS)
    return f"#0500{slot:02x}"


def run_dash(index: int) -> str:
    """Line style of run ``index``."""
    return _RUN_DASHES[index // len(_RUN_COLORS) % len(_RUN_DASHES)]


def run_css_color(index: int) -> str:
    """Colour of run ``index`` as CSS, for marks outside of figures."""
    slot = index % len(_RUN_COLORS)
    return f"var(--run-{slot}, {_RUN_COLORS[slot]})"


def phase_color(phase: str) -> str:
    """Sentinel colour of a phase of a run."""
    return f"#0600{list(_PHASE_COLORS).index(phase):02x}"


_COLORS |= {run_color(slot): run_css_color(slot) for slot in range(len(_RUN_COLORS))}
_COLORS |= {phase_color(name): f"var(--phase-{name}, {color})" for name, color in _PHASE_COLORS.items()}
_SENTINEL = re.compile("|".join(_COLORS))


@contextmanager
def drawing(identifier: str) -> Iterator[None]:
    """matplotlib's defaults plus ours while a figure is made and written; the user's settings come back after.

    Names are drawn literally (no mathematics between dollar signs). ``identifier`` makes the ids repeatable
    and different from those of other figures.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": identifier,
                "text.parse_math": False,
                "text.usetex": False,
                "font.size": FONT_SIZE,
                "text.color": INK,
                "axes.edgecolor": MUTED,
                "axes.labelcolor": MUTED,
                "axes.linewidth": 0.6,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.facecolor": "none",
                "axes.axisbelow": True,
                "figure.facecolor": "none",
                "savefig.facecolor": "none",
                "grid.color": LINE,
                "grid.linewidth": 0.6,
                "xtick.color": LINE,
                "ytick.color": LINE,
                "xtick.labelcolor": MUTED,
                "ytick.labelcolor": MUTED,
                "xtick.labelsize": FONT_SIZE - 1,
                "ytick.labelsize": FONT_SIZE - 1,
                "legend.frameon": False,
                "legend.fontsize": FONT_SIZE - 0.5,
            }
        )
        yield


def to_svg(figure: Figure, identifier: str, label: str) -> str:
    """The figure as one ``<svg>`` element without prolog, fixed size, fonts, dates or foreign ids.

    Must be called inside :func:`drawing`. ``label`` says in words what the figure shows.
    """
    buffer = io.StringIO()
    metadata: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with warnings.catch_warnings():
        # text is drawn by the browser: a character missing in matplotlib's own font is no loss
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="svg", metadata=metadata)
    root = ElementTree.fromstring(buffer.getvalue())
    _drop(root, "metadata")
    _drop(root, "style")
    _plain_names(root)
    for element in root.iter():
        if "style" in element.attrib:
            element.set("style", _page_style(element.attrib["style"]))
    _own_ids(root, identifier)
    view_box = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib.update(
        {
            "viewBox": view_box,
            "role": "img",
            "aria-label": label,
            "style": "stroke-linejoin: round; stroke-linecap: butt",
        }
    )
    return ElementTree.tostring(root, encoding="unicode")


def _drop(root: ElementTree.Element, name: str) -> None:
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] == name:
                parent.remove(child)


def _plain_names(root: ElementTree.Element) -> None:
    """Names without namespaces: in a page, ``<svg>`` alone says what it is."""
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for name in [name for name in element.attrib if name.startswith("{")]:
            element.set(name.rpartition("}")[2], element.attrib.pop(name))


def _page_style(style: str) -> str:
    style = _SENTINEL.sub(lambda match: _COLORS[match[0]], style)
    # the size of the text stays, its family is the page's
    style = re.sub(r"\bfont: (?:[a-z]+ )*([\d.]+px)[^;]*", r"font-size: \1", style)
    return re.sub(r"\bfont-family: [^;]*(?:; )?", "", style)


def _own_ids(root: ElementTree.Element, identifier: str) -> None:
    """Keep the ids something refers to, under a prefix of this figure's own."""
    references = ("href", "clip-path", "style")
    used: set[str] = set()
    for element in root.iter():
        for name in references:
            found = re.search(r"(?:^|url\()#([\w.-]+)", element.attrib.get(name, ""))
            if found:
                used.add(found[1])
                element.set(name, element.attrib[name].replace(f"#{found[1]}", f"#{identifier}-{found[1]}"))
    for element in root.iter():
        own = element.attrib.pop("id", None)
        if own in used:
            element.set("id", f"{identifier}-{own}")
