"""Names that anybody may choose stay names: in the card of a run, on its pages, in the terminal."""

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_reporting import make_data, make_model, make_run, shown

from aletheia.cli.options import print_rich, say
from aletheia.names import markdown, printable
from aletheia.reporting.page import report
from aletheia.reporting.terminal import comparison_table, render
from aletheia.runs.card import model_card
from aletheia.runs.schema import StartingAdapter

NASTY = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a\n---\nlicense: mit\n---\n# owned", "| a | b |",
    "[click](javascript:alert(1))", "![](http://localhost/x.png)", "`code` ```\n```",
    "\x1b[31mred\x1b[0m\x1b]0;title\x07",
    "\u202egnp.exe", "\u2066\u2069\u200f", "{{ 7*7 }} {% for x in y %}", "[bold red]rich[/bold red] :smile:",
    "'\"; DROP",
    "a: b # c\t- d", "&lt;b&gt;&amp;", "\ud800 broken", "\x00\x07\x08\r", "\\", "*a* _b_ ~c~ $x$", "\u2028\u2029\x85",
    "!!python/object/apply:os.system [x]", "&a [*a]", "<<: x", "</td></table>", "]]>", "%s %d {0}", "-" * 300,
    "\U0001f3fb",  # modifies the character before it, and takes no cell of its own
)  # fmt: skip
PIECES = st.one_of(st.sampled_from(NASTY), st.text(st.characters(), max_size=12))
NAMES = st.lists(PIECES, min_size=1, max_size=3).map("".join)
LINE_OF_DASHES = re.compile(r"^---\n", re.MULTILINE)  # what bounds a card's front matter
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff]")


def nasty_run(name):
    run = make_run(model=make_model(name), data=make_data(name), held_out_data=make_data(name, "cd34" * 16))
    origin = StartingAdapter(name=printable(name), sha256="ab" * 32)
    return replace(run, path=Path("runs/plan"), metrics=run.metrics.model_copy(update={"went_on_from": origin}))


def every_name(test):
    for name in NASTY:
        test = example(name)(test)
    return given(NAMES)(settings(max_examples=25)(test))


@every_name
def test_a_name_cannot_become_markup_of_the_card(name):
    card = model_card(nasty_run(name))
    start, front, body = LINE_OF_DASHES.split(card, 2)
    assert start == ""
    about = yaml.safe_load(front)
    assert set(about) - {"base_model", "base_model_relation"} == {"library_name", "pipeline_tag", "tags"}
    assert about.get("base_model", name) == name  # only an id of the hub stands there
    assert not CONTROL.search(card)
    text, code, rest = re.split(r"```(?:python)?\n", body)
    assert rest == ""
    assert "<" not in text
    assert not re.search(r"(?<!\\)[\[\]]", text.replace("\\\\", ""))
    plain, nasty = (LINE_OF_DASHES.split(model_card(nasty_run(one)), 2)[2].splitlines() for one in ("plain", name))
    assert len(plain) == len(nasty)
    for line, other in zip(plain, nasty, strict=True):
        is_cell = line.startswith("| ")
        assert not is_cell or len(re.findall(r"(?<!\\)\|", line)) == len(
            re.findall(r"(?<!\\)\|", other.replace("\\\\", ""))
        )
    tree = ast.parse(code)
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call))
    told = [argument.value for argument in (*call.args, *(keyword.value for keyword in call.keywords))]
    if not name.endswith(".gguf"):
        assert told == [name]


@every_name
def test_a_name_moves_no_cursor_and_is_no_markup_of_the_terminal(name):
    run = nasty_run(name)
    other = make_run(path="runs/other")
    for width in (80, 200):
        for view in (render(run), render(run.plan), comparison_table([other, run])):
            assert not CONTROL.search(shown(view, width))


@pytest.mark.parametrize("name", NASTY)
def test_lines_and_errors_show_names_as_they_are(name, capsys, run):
    print_rich(f"model {printable(name)}")
    say(f"load   {name}")
    out, err = capsys.readouterr()
    assert not CONTROL.search(out + err)
    assert out.replace("\n", "") == f"model {printable(name)}".replace("\n", "")
    assert err.count("\n") == 1
    code, out, err = run("show", f"no {name}".replace("\0", ""))  # no argument of a program holds a null byte
    assert (code, out) == (2, "")
    assert not CONTROL.search(err)
    assert err.count("\n") == 1


def test_a_page_shows_every_nasty_name_as_text(tmp_path):
    names = ["".join(NASTY[at : at + 7]) for at in range(0, len(NASTY), 7)]
    report(
        [replace(nasty_run(name), path=Path("runs") / str(at)) for at, name in enumerate(names)], tmp_path / "r.html"
    )
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    for raw in ("<script>alert", "<img", "</td></table>", "<b>", "]]>"):
        assert raw not in text
    assert not CONTROL.search(text)


def test_markdown_of_plain_names_is_plain():
    assert markdown("Qwen/Qwen2.5-0.5B_x") == "Qwen/Qwen2.5-0.5B_x"
    assert markdown("a|b <c>") == r"a\|b &lt;c&gt;"
