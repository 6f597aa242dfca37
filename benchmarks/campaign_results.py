"""What the repository keeps of a campaign: its tables, one figure, and the figures of every row, packed.

    .venv/bin/aletheia campaign report results/speed && .venv/bin/python benchmarks/campaign_results.py results/speed docs/results/speed

Of the three files of the report, report.md is copied. report.html leaves its first figure behind, as figure.svg, in the
colours of the page. report.csv becomes report.csv.xz, its numbers rounded to six digits; pandas reads that as it is.
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
    """The first figure of a page as a file of its own."""
    svg = re.search(r"<svg.*?</svg>", page, re.DOTALL)
    if not svg:
        raise SystemExit("the page has no figure")
    head = '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" '
    return smaller(svg[0].replace("<svg ", head, 1), colours(page, svg[0]))


def colours(page: str, svg: str) -> str:
    """The page's light and dark values of the variables that ``svg`` names, and its ground and ink."""
    names, found = dict.fromkeys(["--ground", "--ink", *re.findall(r"var\((--[\w-]+)", svg)]), []
    for rule in re.findall(r":root\s*\{([^}]*)\}", page)[:2]:  # light, then dark
        values = dict(re.findall(r"(--[\w-]+):\s*([^;]+);", rule))
        found.append("".join(f"{name}:{values[name]};" for name in names if name in values))
    light, *dark = (f":root{{{values}background:var(--ground);color:var(--ink)}}" for values in found)
    return light + "".join(f"@media (prefers-color-scheme:dark){{{rule}}}" for rule in dark)


def packed(table: str) -> bytes:
    """The table with its numbers rounded, compressed; the same table gives the same bytes."""
    rounded = re.sub(
        r"(?<![\w.])\d+\.\d{4,}(?:e-?\d+)?(?![\w.])", lambda number: f"{float(number[0]):.{DIGITS}g}", table
    )
    return lzma.compress(rounded.encode(), preset=9 | lzma.PRESET_EXTREME)


def with_figure(report: str, figure: str) -> str:
    """The report with the figure in front of its first table; what the figure shows is its text for those who do not see it."""
    head, mark, rest = report.partition("\n## ")
    label = re.search(r'aria-label="([^"]*)"', figure)
    return f"{head}\n![{label[1] if label else 'Figure'}](figure.svg)\n{mark}{rest}"


if __name__ == "__main__":
    main()
