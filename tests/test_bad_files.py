"""Thirty bad files, and what a person expects of each: a run, or one line with the place and the remedy."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

GOOD = {"prompt": "p", "completion": "c"}
LINE = json.dumps(GOOD).encode() + b"\n"


def rows(*some: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in some).encode()


def talk(*roles: str, **more: object) -> dict[str, object]:
    return {"messages": [{"role": role, "content": f"{role} says"} | more for role in roles]}


@dataclass
class Case:
    """What is in the file, and what comes of it: refused with ``words``, or used with ``words`` as a note."""

    content: bytes
    words: tuple[str, ...] = ()
    is_refused: bool = True


def used(content: bytes, *words: str) -> Case:
    return Case(content, words, is_refused=False)


def refused(content: bytes, *words: str) -> Case:
    return Case(content, words)


TALK = talk("user", "assistant")
CASES = {
    "empty file": refused(b"", "rows.jsonl: found an empty file, expected rows"),
    "missing path": refused(LINE, "absent.jsonl: found no such file; check the path"),
    "folder": refused(LINE, "folder: found nothing to read, expected data files"),
    "unreadable": refused(LINE, "rows.jsonl: cannot be read (Permission denied); check its permissions"),
    "BOM": used(b"\xef\xbb\xbf" + LINE * 3),
    "UTF-16": refused(LINE.decode().encode("utf-16"), "rows.jsonl:1: found UTF-16, expected UTF-8; save"),
    "invalid UTF-8": refused(LINE + b'{"text": "\xff"}', "rows.jsonl:2: found the byte 0xff, expected UTF-8; save"),
    "NUL byte": refused(LINE + b'{"text": "\0"}', "rows.jsonl:2: found a NUL byte", "save it as UTF-8"),
    "CRLF": used(LINE.replace(b"\n", b"\r\n") * 3),
    "gzip named .jsonl": used(gzip.compress(LINE * 3)),
    "truncated JSON": refused(LINE * 2 + LINE[:20], "rows.jsonl:3: found invalid JSON", "correct or remove the line"),
    "JSON array": used(json.dumps([GOOD] * 3).encode()),
    "trailing comma": refused(LINE + LINE[:-1] + b",\n", "rows.jsonl:2: found invalid JSON", "correct or remove"),
    "top-level scalar": refused(b"42\n", "rows.jsonl:1: found a number (42), expected a JSON object; write"),
    "missing key": refused(rows(GOOD, {"prompt": "p"}), "rows.jsonl:2: ", "expected 'completion' too"),
    "null": refused(rows(GOOD, GOOD | {"completion": None}), "rows.jsonl:2: found null in 'completion'", "or remove"),
    "number as text": used(rows(GOOD, GOOD | {"completion": 7}), "numbers in 'completion' are written as text"),
    "nested dict": refused(rows(GOOD, GOOD | {"prompt": {"a": 1}}), "rows.jsonl:2: found an object in 'prompt'"),
    "empty string": refused(rows(GOOD, GOOD | {"completion": ""}), "rows.jsonl:2: found empty text in 'completion'"),
    "white space only": refused(rows(GOOD, GOOD | {"completion": " \n"}), "rows.jsonl:2: found only white space in"),
    "10 MB row": used(
        rows({"text": "word " * 200_000, "note": "x" * 9_000_000}, {"text": "b"}),
        "1 of 2 rows is cut to",
        "--max-length",
    ),
    "unknown role": refused(rows(TALK, talk("user", "robot")), "rows.jsonl:2: found the role 'robot' in messages[1]"),
    "two consecutive assistants": refused(
        rows(TALK, talk("user", "assistant", "assistant")), "rows.jsonl:2: found two assistant turns in a row", "join"
    ),
    "no assistant": refused(rows(TALK, talk("user")), "rows.jsonl:2: found no assistant message", "or remove the row"),
    "labels fully masked": refused(
        rows(TALK, talk("user", "assistant", weight=0)), "rows.jsonl:2: found no answer that carries a loss", "remove"
    ),
    "rows truncated to the prompt": refused(
        rows(GOOD, GOOD | {"prompt": "p " * 2000}), "rows.jsonl:2: ", "without a token to learn", "raise --max-length"
    ),
    "duplicates": used(LINE * 3 + rows(GOOD | {"prompt": "q"}), "2 of 4 rows are duplicates of an earlier one"),
    "train / eval overlap": used(rows(GOOD, GOOD | {"prompt": "q"}), "also learned", " 2 "),
    "mixed schemas": refused(
        rows(GOOD, {"question": "q", "answer": "a"}), "rows.jsonl:2: found the columns 'question'"
    ),
    "token id beyond the vocabulary": refused(LINE * 2, "rows.jsonl:1: found the token id", "expected ids below 90"),
}


def small_vocabulary(model_folder: Path, folder: Path) -> Path:
    """The model as if it had an embedding for 90 tokens only; no weights."""
    folder.mkdir()
    for file in model_folder.glob("*.json"):
        (folder / file.name).write_text(file.read_text())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 90}))
    return folder


def test_there_are_thirty():
    assert len(CASES) == 30


@pytest.mark.parametrize("name", CASES)
def test_a_bad_file_has_the_outcome_that_a_person_expects(run, monkeypatch, model_folder, tmp_path, name):
    case, path, model = CASES[name], tmp_path / "rows.jsonl", model_folder
    path.write_bytes(case.content)
    probe = ("probe", model, "--out", "s.json", "--no-calibrate", "--batches", 1, "--data")
    arguments: tuple[object, ...] = (*probe, path)
    if name == "missing path":
        arguments = (*probe, tmp_path / "absent.jsonl")
    elif name == "folder":
        (tmp_path / "folder").mkdir()
        arguments = (*probe, tmp_path / "folder")
    elif name == "unreadable":

        def denied(path):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "read_bytes", denied)
    elif name == "train / eval overlap":
        arguments = ("preview", model, "--data", path, "--eval-data", path)
    elif name == "token id beyond the vocabulary":
        arguments = ("preview", small_vocabulary(model_folder, tmp_path / "small"), "--data", path)
    code, out, err = run(*arguments)
    said = err if case.is_refused or "preview" not in arguments else out
    assert "Traceback" not in out + err
    assert code == (2 if case.is_refused else 0), err
    assert err.count("error: ") == case.is_refused
    last = said.splitlines()[-1] if case.is_refused else said
    for words in case.words:
        assert words in last, said
