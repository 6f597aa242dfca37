"""Small SVG files: the output of matplotlib with short coordinates, and styles and names written once."""

import io
import re

from matplotlib import rc_context
from matplotlib.figure import Figure


def small_svg(figure: Figure) -> str:
    """The figure as text of an SVG file, words as words; the same figure gives the same text."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "aletheia"}):
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return smaller(re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL))


def smaller(svg: str, css: str = "") -> str:
    """The same picture in fewer bytes: coordinates to a tenth of a unit, a class for every style; ``css`` goes first."""
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"\d+\.\d{2,}", _tenths, tag[0]), svg)
    text = re.sub(r' transform="rotate\(-?0 [^"]*"', "", re.sub(r"\s*([<>])\s*", r"\1", text))
    text = re.sub(r' aria-labelledby="[^"]*"', "", text)
    styles = list(dict.fromkeys(re.findall(r'<(?:(?!class=)[^>])*style="([^"]*)"(?:(?!class=)[^>])*>', text)))
    for at, own in enumerate(styles):
        text = re.sub(
            rf'(<(?:(?!class=)[^>])*)style="{re.escape(own)}"((?:(?!class=)[^>])*>)', rf'\1class="s-{at}"\2', text
        )
    for at, name in enumerate(dict.fromkeys(re.findall(r' id="([^"]*)"', text))):
        short = f"\\1i{at}" if f"#{name}" in text else None
        text = re.sub(rf'(["#]){re.escape(name)}(?=["()])', short, text) if short else text.replace(f' id="{name}"', "")
    rules = css + "".join(f".s-{at}{{{own}}}" for at, own in enumerate(styles))
    return text.replace(">", f"><style>{rules}</style>", 1) + "\n"


def _tenths(number: re.Match[str]) -> str:
    return f"{float(number[0]):.1f}".removesuffix(".0")
