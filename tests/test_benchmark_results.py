"""What the repository keeps of a campaign and of runs: smaller, and nothing that was published is lost."""

import csv
import io
import lzma
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import campaign_results
import defaults_page
import pictures

sys.path.pop(0)

PAGE = """<style>:root { --ground: #fff; --run-0: #0072b2; --unused: red; }
@media screen and (prefers-color-scheme: dark) { :root { --ground: #000; --run-0: #4aa8e0; } }
.run { stroke: var(--run-0); } .card, .phone { color: red; }
@media print { .run { stroke: black; } }</style>
<svg class="key"></svg>
<svg role="img" viewBox="0 0 10 10" aria-label="Loss by steps: uniform." style="fill: none">
 <path d="M 1.23456 2.5" id="a" style="stroke: var(--run-0, #123456)" />
 <svg viewBox="0 0 5 5"><path class="run" style="fill: none" d="M 0 0" /></svg>
 <use href="#a" x="3.14159" style="stroke: var(--run-0, #123456)" />
 <text id="b" x="4.44444">0.8523</text>
</svg>
<svg role="img" viewBox="0 0 20 20"></svg>"""


def texts(svg):
    return [node.text for node in ElementTree.fromstring(svg).iter() if node.tag.endswith("text")]


def test_the_first_figure_of_a_page_stands_alone():
    svg = campaign_results.first_figure(PAGE)
    assert texts(svg) == ["0.8523"]  # a label is not a coordinate
    assert 'viewBox="0 0 10 10"' in svg
    assert 'd="M 1.2 2.5"' in svg
    assert svg.count("var(--run-0, #123456)") == 1  # one class for both
    assert ".run{stroke: var(--run-0);}" in svg
    assert 'class="run" style="fill: none"' in svg  # a tag has one class
    assert "red" not in svg
    assert "black" not in svg
    assert "--run-0:#0072b2" in svg
    assert "--run-0:#4aa8e0" in svg
    assert "--unused" not in svg
    named = [node.attrib["id"] for node in ElementTree.fromstring(svg).iter() if "id" in node.attrib]
    assert [f'href="#{name}"' in svg for name in named] == [True]


def test_the_report_shows_the_figure_before_its_first_table():
    text = campaign_results.with_figure(
        "# Title\n\nVerdict.\n\n## Scores\n\n| a |\n\n## More\n", campaign_results.first_figure(PAGE)
    )
    assert text == "# Title\n\nVerdict.\n\n![Loss by steps: uniform.](figure.svg)\n\n## Scores\n\n| a |\n\n## More\n"


def test_a_page_without_a_figure_is_refused():
    with pytest.raises(SystemExit, match="no figure"):
        campaign_results.first_figure("<p>nothing</p>")


def test_a_small_picture_keeps_its_words():
    figure = Figure()
    axes = figure.subplots()
    axes.plot([0, 1], [0.123456, 2])
    axes.set_xlabel("tokens per row")
    svg = pictures.small_svg(figure)
    assert "tokens per row" in texts(svg)
    assert svg == pictures.small_svg(figure)
    whole = io.StringIO()
    figure.savefig(whole, format="svg")
    assert len(svg) < len(whole.getvalue()) / 2


def test_a_table_is_rounded_to_six_digits_and_nothing_else_changes():
    row = [
        "about.commit",
        "2.13.0+cpu",
        "0123456789abcdef1.5",
        "2.0",
        "2 (subjects 1.0)",
        "[10, 53.9174884549866, 0.98726]",
        "1.25e-05",
    ]
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(row)
    found = next(csv.reader(io.StringIO(lzma.decompress(campaign_results.packed(out.getvalue())).decode())))
    assert found == [*row[:5], "[10, 53.9175, 0.98726]", "1.25e-05"]


def run_of(points, averages=(), scaled=(), length="epochs"):
    return {
        "task": "gsm8k", "length": length, "steps": 240, "seed": 0, "counts": [2, 2], "points": points, "decays": [],
        "averages": list(averages), "scaled": list(scaled),
    }  # fmt: skip


def test_losses_of_rows_stay_where_they_are_kept():
    points = [[60, [4.0, 2.0]], [120, [3.0, 2.0]], [180, [3.0, 3.0]]]
    averages = [[60, 3, [4.0, 1.0]], [120, 3, [2.0, 1.0]], [120, 8, [1.0, 1.0]]]
    run = run_of(points, averages, [[120, 3, 0.8, [1.5, 1.0]], [120, 3, 0.6, [2.0, 2.0]]])
    slim = defaults_page.slim(run)
    assert slim["points"] == [[60, [6.0]], [120, [3.0, 2.0]], [180, [6.0]]]
    assert slim["averages"] == [[60, 3, [5.0]], [120, 3, [3.0]], [120, 8, [2.0]]]
    assert slim["scaled"] == [[120, 3, 0.8, [1.5, 1.0]], [120, 3, 0.6, [4.0]]]
    assert defaults_page.rows_of_plain(slim) == [3.0, 2.0]
    assert defaults_page.rows_of_ours(slim) == [1.5, 1.0]
    assert defaults_page.slim(slim) == slim


def test_the_store_gives_the_published_tables(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    runs = defaults_page.collected([])
    assert runs == [defaults_page.slim(run) for run in runs]
    own = [run for run in runs if (run["task"], run["length"]) == ("mix", "150")]
    lines = defaults_page.compared(defaults_page.cells(own))
    published = list(csv.reader((defaults_page.PLACE / "arms.csv").open()))
    assert lines == [line for line in published if line[0].startswith("mix 150")]
