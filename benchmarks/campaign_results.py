"""What the repository keeps of a campaign: its tables, one figure, and the numbers of every row, compressed.

    .venv/bin/aletheia campaign report results/speed && .venv/bin/python benchmarks/campaign_results.py results/speed docs/results/speed

report.md is copied. The first figure of report.html becomes figure.svg, in the colours of the page. report.csv becomes
report.csv.xz, with numbers rounded to six digits; pandas reads it directly.
"""

import lzma
import re
import sys
from pathlib import Path

from pictures import smaller

DIGITS = 6


def main() -> None:
    source, to = map(Path, sys.argv[1:])
    to.mkdir(parents=True, exist_ok=True)
    figure = first_figure((source / "report.html").read_text())
    (to / "figure.svg").write_text(figure)
    (to / "report.csv.xz").write_bytes(packed((source / "report.csv").read_text()))
    (to / "report.md").write_text(with_figure((source / "report.md").read_text(), figure))


def first_figure(page: str) -> str:
    """The first figure of a page as a separate file."""
    start = re.search(r'<svg [^>]*role="img"', page)
    if not start:
        raise SystemExit("the page has no figure")
    depth = 0
    for tag in re.finditer(r"<svg\b|</svg>", page[start.start() :]):  # a figure may contain others
        depth += 1 if tag[0] == "<svg" else -1
        if not depth:
            break
    svg = page[start.start() : start.start() + tag.end()]
    head = '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="12.5" '
    return smaller(svg.replace("<svg ", head, 1), style(page, svg))


def style(page: str, svg: str) -> str:
    """The page's rules for the classes of ``svg``, and its light and dark colours, including background and text."""
    css = "".join(re.findall(r"<style>(.*?)</style>", page, re.DOTALL))
    everywhere = re.sub(r"@[^{]*\{(?:[^{}]*\{[^{}]*\})*[^{}]*\}", "", css)  # no rule for paper or narrow windows
    classes = {name for names in re.findall(r'class="([^"]*)"', svg) for name in names.split()} - {"phone"}
    rules = ""
    for selector, body in re.findall(r"([^{}]+)\{([^{}]*)\}", everywhere):
        if classes & set(re.findall(r"\.([\w-]+)", selector)) or re.search(r"\bsvg text\b", selector):
            rules += f"{selector.strip()}{{{' '.join(body.split())}}}"
    names, found = dict.fromkeys(["--ground", "--ink", *re.findall(r"var\((--[\w-]+)", svg + rules)]), []
    for colours in re.findall(r":root\s*\{([^}]*)\}", css)[:2]:  # light, then dark
        values = dict(re.findall(r"(--[\w-]+):\s*([^;]+);", colours))
        found.append("".join(f"{name}:{values[name]};" for name in names if name in values))
    light, *dark = (f":root{{{values}background:var(--ground);color:var(--ink)}}" for values in found)
    return light + "".join(f"@media (prefers-color-scheme:dark){{{rule}}}" for rule in dark) + rules


def packed(table: str) -> bytes:
    """The table with its numbers rounded, compressed; the same table gives the same bytes."""
    rounded = re.sub(
        r"(?<![\w.])\d+\.\d{4,}(?:e-?\d+)?(?![\w.])", lambda number: f"{float(number[0]):.{DIGITS}g}", table
    )
    return lzma.compress(rounded.encode(), preset=9 | lzma.PRESET_EXTREME)


def with_figure(report: str, figure: str) -> str:
    """The report with the figure in front of its first table; the figure's description is its alternative text."""
    head, mark, rest = report.partition("\n## ")
    label = re.search(r'aria-label="([^"]*)"|<desc[^>]*>([^<]*)', figure)
    return f"{head}\n![{(label[1] or label[2]) if label else 'Figure'}](figure.svg)\n{mark}{rest}"


if __name__ == "__main__":
    main()
