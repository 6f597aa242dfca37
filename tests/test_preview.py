"""Rows as the model will see them: labels, special tokens, counts; in colour, in brackets, on one line when wrong."""

import io
import json
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console
from tiny import make_tokenizer

import aletheia
from aletheia.data.encode import load_data
from aletheia.data.preview import Piece, ShownRow, shown_row
from aletheia.errors import AletheiaError
from aletheia.reporting.preview import quoted, render_preview, row_text


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def talk(*contents: str, system: str | None = None) -> dict[str, object]:
    messages = [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(contents)]
    return {"messages": [{"role": "system", "content": system}, *messages] if system else messages}


@pytest.fixture
def talks(tmp_path):
    """Rows of three kinds, one of them twice."""
    simple, several, system = talk("q", "a"), talk("q", "a\nz", "r", "b"), talk("q", "a", system="s")
    return write(tmp_path / "talks.jsonl", simple, talk("p", "o"), several, system, simple)


# --- what is shown


def test_a_row_in_pieces_is_the_whole_row_with_its_labels(talks, tokenizer):
    examples = load_data(str(talks), tokenizer)
    for number, example in enumerate(examples.examples, start=1):
        row = shown_row(example, number, tokenizer, 1024)
        assert "".join(piece.text for piece in row.pieces) == tokenizer.decode(example.input_ids)
    row = shown_row(examples[2], 3, tokenizer, 1024)
    assert [(piece.text, piece.special) for piece in row.pieces if piece.labelled] == [
        ("a\nz", False), ("<|im_end|>", True), ("b", False), ("<|im_end|>", True),
    ]  # fmt: skip
    assert [piece.text for piece in row.pieces if piece.special] == ["<|im_start|>", "<|im_end|>"] * 4


def test_characters_of_several_tokens_stay_whole(tmp_path, tokenizer):
    examples = load_data(str(write(tmp_path / "rows.jsonl", {"text": "ü 你好 👋🏽"})), tokenizer)
    pieces = shown_row(examples[0], 1, tokenizer, 1024).pieces
    assert [piece.text for piece in pieces] == ["", "ü 你好 👋🏽", "<|im_end|>"]  # the first byte of ü is not predicted


def test_the_first_token_of_a_text_is_never_predicted(tmp_path, tokenizer):
    examples = load_data(str(write(tmp_path / "rows.jsonl", {"text": "abc"})), tokenizer)
    first, *rest = shown_row(examples[0], 1, tokenizer, 1024).pieces
    assert (first.text, first.labelled) == ("a", False)
    assert all(piece.labelled for piece in rest)


def test_long_rows_are_shortened_in_the_middle():
    row = ShownRow(1, "x:1", 9, 3, tuple(Piece(f"{at}" * 500, at % 2 == 1) for at in range(10)))
    short = row.shortened(characters=90, most=9)
    texts = [piece.text for piece in short.pieces]
    assert texts[:3] == ["0" * 60, " [... 410 characters ...] ", "0" * 30]
    assert "[... 21 pieces ...]" in texts
    assert texts[-1] == "9" * 30
    assert row.shortened(5000, 99) == row
    assert row.shortened(5000, 9) == row  # a remark would take the place of one piece


# --- the library


def test_a_preview_counts_what_a_run_would_learn_from(model_folder, talks, tmp_path):
    held_out = write(tmp_path / "held_out.jsonl", talk("q", "a"), talk("q", "other"), talk("new", "a"))
    found = aletheia.preview(str(model_folder), {"data": str(talks), "eval_data": str(held_out)})
    assert (found.rows, found.duplicates, found.truncated, dict(found.left_out)) == (5, 1, 0, {})
    assert (found.held_out.rows, found.held_out.same, found.held_out.same_prompt) == (3, 1, 1)
    examples = load_data(str(talks), make_tokenizer(), max_length=found.max_length)
    assert (found.tokens, found.labelled_tokens) == (examples.tokens, examples.labelled_tokens)
    assert found.longest == max(map(len, examples.examples))
    assert [row.number for row in found.shown] == [1, 3, 4]  # one answer, several, a system turn


def test_rows_of_other_files_come_before_more_of_the_same(model_folder, tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, *({"question": f"{name} {at}", "answer": "a"} for at in range(5)))
    found = aletheia.preview(str(model_folder), str(tmp_path))
    assert [row.number for row in found.shown] == [1, 2, 6]
    assert any("2 files read (a.jsonl, b.jsonl)" in note for note in found.notes)


def test_rows_that_would_stop_a_run_are_counted(model_folder, tmp_path):
    rows = [{"question": "q" * length, "answer": "a" * 40} for length in (5, 400, 6, 30)]
    data = {"data": str(write(tmp_path / "rows.jsonl", *rows)), "max_length": 90}
    found = aletheia.preview(str(model_folder), data)
    assert (found.rows, sum(found.left_out.values()), found.truncated) == (3, 1, 1)
    assert any("training would stop at the first row" in note for note in found.notes)
    assert [row.is_longest_allowed for row in found.shown] == [False, False, True]
    assert len(aletheia.preview(str(model_folder), data, rows=[4, 1]).shown) == 2
    for number, words in ((0, "from 1 to 4"), (5, "from 1 to 4"), (2, "rows.jsonl:2 is left out")):
        with pytest.raises(AletheiaError, match=words):
            aletheia.preview(str(model_folder), data, rows=[number])


def test_held_out_rows_that_would_stop_a_run_are_told_of(model_folder, talks, tmp_path):
    held_out = write(tmp_path / "held_out.jsonl", talk("p", "a"), {"messages": []})
    data = {"data": str(talks), "eval_data": str(held_out)}
    found = aletheia.preview(str(model_folder), data)
    assert dict(found.left_out) == {}
    assert any(note.startswith("held-out rows: 1 row is left out: 1 with ") for note in found.notes)
    assert any("training would stop at the first row" in note for note in found.notes)
    found = aletheia.preview(str(model_folder), data | {"skip_unusable": True})
    assert not any("training would stop" in note for note in found.notes)


def test_what_the_notes_on_the_data_say_is_not_said_again_for_held_out_rows(model_folder, talks, tmp_path):
    rows = [talk("p", "o") | {"weight": 0.5, "topic": "t"}, talk("r", "o") | {"weight": 0.5, "topic": "t"}]
    train, held_out = write(tmp_path / "train.jsonl", *rows, talk("s", "t")), write(tmp_path / "test.jsonl", rows[0])
    data = {"data": str(train), "eval_data": str(held_out), "max_length": 100_000}
    notes = aletheia.preview(str(model_folder), data).notes
    assert any("(2 rows, first" in note for note in notes)
    assert sum("is lowered to that" in note for note in notes) == 1
    assert not any("held-out rows: " in note for note in notes), notes
    alone = aletheia.preview(str(model_folder), data | {"data": str(talks)}).notes
    assert any(note.startswith("held-out rows: ") for note in alone)


def test_a_single_row_has_no_held_out_rows(model_folder, tmp_path):
    found = aletheia.preview(str(model_folder), str(write(tmp_path / "rows.jsonl", talk("q", "a"))))
    assert (found.rows, found.held_out) == (1, None)


def test_a_preview_reads_no_weights(model_folder, talks, tmp_path):
    folder = tmp_path / "no-weights"
    folder.mkdir()
    for file in model_folder.iterdir():
        if "safetensors" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    assert aletheia.preview(str(folder), str(talks)) == aletheia.preview(str(model_folder), str(talks))


# --- in a terminal


def rendered(found, encoding="utf-8", **settings) -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=80, highlight=False, **settings)
    console.print(render_preview(found, console))
    file.flush()
    return file.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize(("encoding", "marks"), [("utf-8", "⟦⟧↵"), ("latin-1", ("[[", "]]", "\\n")), ("ascii", None)])
def test_without_colour_what_is_learned_stands_in_brackets(model_folder, talks, encoding, marks):
    start, end, line_end = marks or ("[[", "]]", "\\n")
    text = rendered(aletheia.preview(str(model_folder), str(talks)), encoding, color_system=None)
    assert "\x1b" not in text
    assert f"<|im_start|>assistant\n{start}a{line_end}\nz<|im_end|>{end}\n<|im_start|>user" in text
    assert text.count(start) == 5  # the legend and four answers
    assert all(len(line) <= 80 for line in text.splitlines())
    assert re.search(r"^rows +5 +messages *$", text, re.MULTILINE)
    assert re.search(r"^duplicates +1 +of an earlier row *$", text, re.MULTILINE)


def test_in_colour_what_is_learned_has_a_background(model_folder, talks):
    text = rendered(aletheia.preview(str(model_folder), str(talks)), force_terminal=True, color_system="standard")
    assert "\x1b[30;42ma↵\x1b[0m\n\x1b[30;42mz\x1b[0m\x1b[30;43m<|im_end|>\x1b[0m\n" in text
    assert "\x1b[35m<|im_start|>\x1b[0m\x1b[2muser\x1b[0m" in text
    assert "⟦" not in text


def test_no_text_of_a_row_reaches_the_terminal_as_a_command():
    row = ShownRow(1, "x\x1b]0;title\x07:1", 3, 2, (Piece("\x1b[31m\u202e\r\t", True), Piece("\x9b", False)))
    text = row_text(row, ("[[", "]]")).plain + "\n".join(quoted(row))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert "[[\\x1b[31m\\u202e\\r    ]]\\x9b" in text


def test_the_row_that_a_run_shows_is_a_few_plain_lines():
    pieces = (Piece("long prompt\n" * 200, False), Piece("answer\n" * 300, True), Piece("</s>", True, True))
    lines = quoted(ShownRow(1, "rows.jsonl:1", 900, 300, pieces))
    assert lines[0] == "row 1  rows.jsonl:1  900 tokens, 300 learned, between [[ and ]]:"
    assert len(lines) <= 14
    assert all(line.startswith("    ") and len(line) <= 80 and line.isascii() for line in lines[1:])
    assert lines[-1].endswith("</s>]]")


def test_train_shows_one_row_and_leaves_its_text_alone(run, model_folder, tmp_path):
    data = write(tmp_path / "rows.jsonl", *({"question": f"what is `steps` {at}", "answer": "it"} for at in range(4)))
    code, _, err = run(
        "train", model_folder, "--data", data, "--out", "out", "--steps", 1, "--cache", "off", "--freeze-after", 0,
        "--policy", "last", "--eval-rows", 1,
    )  # fmt: skip
    assert code == 0, err
    lines = err.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("row 1"))
    assert lines[at + 2] == "    what is `steps` 0<|im_end|>"
    assert lines[at + 4] == "    [[it<|im_end|>]]"
    assert "learned, between [[ and ]]:" in lines[at]


# --- the command


def test_the_command_prints_rows_and_counts_or_json(run, model_folder, talks):
    code, out, err = run("preview", model_folder, "--data", talks, "--row", 2, "--row", 3)
    assert (code, err) == (0, "")
    assert [line.split("  ")[0] for line in out.splitlines() if re.match(r"row \d", line)] == ["row 2", "row 3"]
    assert "held-out rows" in out
    code, out, _ = run("preview", model_folder, "--data", talks, "--json")
    assert code == 0
    assert json.loads(out)["duplicates"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--row", 6), "--row is 6; expected a number from 1 to 5"),
        (("--row", 0), "--row is 0; expected a number from 1 to 5"),
        (("--max-length", 8, "--row", 1), "--max-length 8"),
        (("--eval-data", "nowhere.jsonl"), "nowhere.jsonl: found no such file"),
    ],
)
def test_what_cannot_be_shown_is_one_line(run, model_folder, talks, arguments, words):
    code, out, err = run("preview", model_folder, "--data", talks, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err


def test_a_terminal_gets_colour(model_folder, talks):
    """The command on a pseudo-terminal, as a person runs it."""
    leader, follower = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    done = subprocess.Popen(
        [sys.executable, "-c", "from aletheia.cli.main import main; main()", "preview", model_folder, "--data", talks],
        stdout=follower, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
        env=environment | {"TERM": "xterm-256color", "COLUMNS": "80"},
    )  # fmt: skip
    os.close(follower)
    found = b""
    with suppress(OSError):  # how Linux tells the end
        while piece := os.read(leader, 65536):
            found += piece
    os.close(leader)
    assert done.wait(timeout=120) == 0, done.stderr.read()
    assert b"\x1b[30;42m" in found


def test_no_color_is_heeded(model_folder, talks):
    text = rendered(aletheia.preview(str(model_folder), str(talks)), force_terminal=True, no_color=True)
    assert "⟦" in text
    assert "\x1b[3" not in text
