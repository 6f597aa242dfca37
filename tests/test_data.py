"""Rows of every form, the errors of bad files, labels, truncation, splits and batches."""

import gzip
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import torch
from tiny import CHATML, make_tokenizer
from transformers import PreTrainedTokenizerFast

from aletheia.anatomy.schema import DataIdentity
from aletheia.data.batches import collate, padded_batches, sample_batches
from aletheia.data.encode import NO_LOSS, Example, Examples, encode, load_data, split_held_out
from aletheia.data.rows import load_rows
from aletheia.errors import DataError

# Earlier answers lose what stands before </think>, as in templates of reasoning models.
FORGETFUL = CHATML.replace(
    "{{ message['content'] }}",
    "{% if message['role'] == 'assistant' and not loop.last %}{{ message['content'].split('</think>')[-1] }}"
    "{% else %}{{ message['content'] }}{% endif %}",
)
# The generation prompt opens a thought that the render of a finished answer does not have.
OPENS_THOUGHT = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role\nnot supported') }}{% endif %}"


@pytest.fixture(scope="module")
def chatml():
    return make_tokenizer()


def write_jsonl(folder: Path, *rows: object, name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    messages = [{"role": roles[at % 2], "content": content} for at, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def labelled(example: Example, tokenizer) -> str:
    return tokenizer.decode([label for label in example.labels if label != NO_LOSS])


def refused(source: str | Path, *parts: str) -> str:
    """Loading must fail with one clear line that holds all of ``parts``."""
    with pytest.raises(DataError) as caught:
        load_rows(str(source))
    return one_clear_line(caught, *parts)


def one_clear_line(caught, *parts: str) -> str:
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    assert "Traceback" not in message
    for part in parts:
        assert part in message, message
    return message


# --- forms and formats ---------------------------------------------------------------------------------------


FORM_ROWS = [
    ("messages", {"messages": turns("q", "a")}),
    ("prompt, completion", {"prompt": "q", "completion": "a"}),
    ("prompt, completion", {"prompt": turns("q"), "completion": [{"role": "assistant", "content": "a"}]}),
    ("question, answer", {"question": "q", "answer": "a"}),
    ("instruction, input, output", {"instruction": "q", "output": "a"}),
    ("instruction, input, output", {"instruction": "q", "input": "", "output": "a"}),
    ("instruction, input, output", {"instruction": "q", "input": None, "output": "a"}),
]


@pytest.mark.parametrize(("form", "row"), FORM_ROWS)
def test_each_form_becomes_the_same_messages(tmp_path, form, row):
    rows = load_rows(write_jsonl(tmp_path, row | {"id": 7}))
    assert rows.identity.form == form
    assert rows.rows[0].messages == ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    assert rows.rows[0].text is None


def test_instruction_and_input_are_joined_with_a_blank_line(tmp_path):
    rows = load_rows(write_jsonl(tmp_path, {"instruction": "Add", "input": "1 2", "output": "3"}))
    assert rows.rows[0].messages[0]["content"] == "Add\n\n1 2"


def test_text_form_has_no_messages(tmp_path):
    row = load_rows(write_jsonl(tmp_path, {"text": "once"})).rows[0]
    assert (row.text, row.messages) == ("once", None)


def test_forms_are_tried_in_order_and_extra_columns_ignored(tmp_path):
    columns = ("text", "input", "output", "instruction", "answer", "question", "completion", "prompt")
    everything: dict[str, object] = {name: name for name in columns}
    assert load_rows(write_jsonl(tmp_path, everything)).identity.form == "prompt, completion"
    everything["messages"] = turns("q", "a")
    assert load_rows(write_jsonl(tmp_path, everything)).identity.form == "messages"
    assert load_rows(write_jsonl(tmp_path, {"text": "t", "prompt": "no completion"})).identity.form == "text"


def test_every_file_format_gives_the_same_rows_and_says_where(tmp_path):
    records = [{"question": 'one,\n"1"', "answer": "a"}, {"question": "zwei \u2028 ü", "answer": "b"}]
    jsonl = tmp_path / "rows.jsonl"
    # U+2028 stands raw in the string: it ends a line for str.splitlines, but not in JSON Lines
    jsonl.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in records), encoding="utf-8")
    (tmp_path / "rows.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "rows.csv").write_text('question,answer\n"one,\n""1""",a\nzwei \u2028 ü,b\n', encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "rows.parquet")
    loaded = {suffix: load_rows(str(tmp_path / f"rows.{suffix}")) for suffix in ("json", "csv", "parquet")}
    loaded["jsonl"] = load_rows(str(jsonl))
    places = {suffix: [row.where for row in rows.rows] for suffix, rows in loaded.items()}
    stem = str(tmp_path / "rows")
    assert places == {
        "jsonl": [f"{stem}.jsonl:1", f"{stem}.jsonl:2"],
        "csv": [f"{stem}.csv:2", f"{stem}.csv:4"],  # the first record spans lines 2 and 3
        "json": [f"{stem}.json row 1", f"{stem}.json row 2"],
        "parquet": [f"{stem}.parquet row 1", f"{stem}.parquet row 2"],
    }
    assert len({tuple(row.messages[0]["content"] for row in rows.rows) for rows in loaded.values()}) == 1


def test_identity_names_the_source_and_its_bytes(tmp_path):
    source = write_jsonl(tmp_path, {"text": "a"}, {"text": "b"})
    identity = load_rows(source).identity
    assert (identity.name, identity.rows, identity.form) == (source, 2, "text")
    assert len(identity.fingerprint) == 64
    other = write_jsonl(tmp_path, {"text": "a"}, {"text": "c"}, name="other.jsonl")
    assert load_rows(other).identity.fingerprint != identity.fingerprint


def test_bom_crlf_and_blank_lines_are_accepted(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n\r\n  \n')
    assert [row.text for row in load_rows(str(path)).rows] == ["a", "b"]
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbfprompt, completion\r\np,c\r\n\r\n")
    assert load_rows(str(path)).rows[0].messages[1]["content"] == "c"
    path = tmp_path / "rows.json"
    path.write_bytes(b'\xef\xbb\xbf[{"text": "a"}]\r\n\r\n')
    assert load_rows(str(path)).rows[0].text == "a"


def test_duplicate_rows_and_a_large_csv_field_are_accepted(tmp_path):
    assert len(load_rows(write_jsonl(tmp_path, {"text": "a"}, {"text": "a"})).rows) == 2
    path = tmp_path / "rows.csv"
    path.write_text("text\n" + "x" * 1_000_000 + "\n")
    assert len(load_rows(str(path)).rows[0].text) == 1_000_000


def test_a_prompt_of_messages_keeps_its_earlier_answers_without_loss(tmp_path, chatml):
    row = {"prompt": turns("q1", "a1", "q2"), "completion": [{"role": "assistant", "content": "a2"}]}
    examples = load_data(write_jsonl(tmp_path, row), chatml)
    assert labelled(examples[0], chatml) == "a2<|im_end|>"


def test_other_text_of_a_message_reaches_the_template(tmp_path):
    tokenizer = make_tokenizer(CHATML.replace("{{ message['role'] }}", "{{ message.name or message.role }}"))
    row = {"messages": [{"role": "user", "name": "ann", "content": "q"}, {"role": "assistant", "content": "a"}]}
    examples = load_data(write_jsonl(tmp_path, row), tokenizer)
    assert "<|im_start|>ann\nq" in tokenizer.decode(examples[0].input_ids)


# --- bad files -----------------------------------------------------------------------------------------------

GOOD = b'{"prompt": "p", "completion": "c"}\n'

BAD_BYTES = {
    "empty": ("rows.jsonl", b"", ["rows.jsonl: found an empty file", "check how"]),
    "white space": ("rows.csv", b" \n\t\r\n", ["rows.csv: found only white space"]),
    "only a BOM": ("rows.jsonl", b"\xef\xbb\xbf\n", ["found no rows"]),
    "no rows json": ("rows.json", b"[]", ["rows.json: found no rows", "at least one"]),
    "no rows csv": ("rows.csv", b"text\n", ["rows.csv: found no rows"]),
    "invalid UTF-8": ("rows.jsonl", GOOD + b'{"text": "\xff"}', ["rows.jsonl:2: found the byte 0xff", "save the"]),
    "latin-1 csv": ("rows.csv", b"text\ncaf\xe9\n", ["rows.csv:2: found the byte 0xe9", "expected UTF-8"]),
    "UTF-16": ("rows.jsonl", '{"text": "a"}'.encode("utf-16"), ["rows.jsonl:1: found UTF-16", "save the file"]),
    "UTF-16 no BOM": ("rows.json", '[\n{"a": 1}]'.encode("utf-16-le"), ["rows.json:1: found a NUL byte", "UTF-16"]),
    "NUL": ("rows.jsonl", GOOD + b'{"text": "\0"}', ["rows.jsonl:2: found a NUL byte", "save it"]),
    "half a gzip": ("rows.jsonl", gzip.compress(GOOD)[:-9], ["rows.jsonl: found packed data", "a complete file"]),
    "truncated jsonl": ("rows.jsonl", GOOD * 2 + b'{"prompt": "p", "comp', ["rows.jsonl:3: found invalid JSON"]),
    "trailing comma": ("rows.jsonl", GOOD[:-1] + b",\n", ["rows.jsonl:1: found invalid JSON (Extra data"]),
    "truncated json": ("rows.json", b'[\n{"text": "a"},\n{"te', ["rows.json:3: found invalid JSON", "correct"]),
    "arrays a line": ("rows.jsonl", b'["q", "a"]\n["q", "b"]', ["rows.jsonl:1: found a list", "one object per line"]),
    "deep": ("rows.jsonl", b'{"text":' + b"[" * 200_000 + b"\n", ["rows.jsonl:1: found invalid JSON (nested"]),
    "huge integer": ("rows.jsonl", b'{"text":' + b"9" * 5000 + b"}", ["rows.jsonl:1: found invalid JSON (Exceeds"]),
    "scalar jsonl": ("rows.jsonl", b"42\n", ["rows.jsonl:1: found a number (42)", "write one object per line"]),
    "scalar json": ("rows.json", b'"text"', ["rows.json:1: found text, expected a JSON object"]),
    "object json": ("rows.json", b'{"data": []}', ["rows.json:1: found no rows under 'data'"]),
    "row no object": ("rows.json", b'[{"text": "a"}, null]', ["rows.json row 2: found null"]),
    "csv ragged": ("rows.csv", b"prompt,completion\np,c\np,c,d\n", ["rows.csv:3: found 3 fields", "quotes"]),
    "csv open quote": ("rows.csv", b'text\na\n"b\nc\n', ["rows.csv:3: found invalid CSV", "close every quote"]),
    "csv twice": ("rows.csv", b"text,text\na,b\n", ["rows.csv:1: found the column 'text' twice", "rename"]),
    "csv semicolons": ("rows.csv", b"prompt;completion\np;c\n", ["rows.csv:2: found the columns 'prompt;completion'"]),
    "no parquet": ("rows.parquet", GOOD, ["rows.parquet: found no readable Parquet", "write or copy it again"]),
    "suffix": (
        "rows.txt",
        GOOD,
        ["rows.txt: found the suffix '.txt'", ".jsonl, .ndjson, .json, .csv, .parquet, also", "convert"],
    ),
    "no suffix": ("rows", GOOD, ["found the suffix ''", "expected one of .jsonl"]),
}


@pytest.mark.parametrize("case", BAD_BYTES)
def test_a_bad_file_is_one_line_with_the_place_and_the_remedy(tmp_path, case):
    name, content, parts = BAD_BYTES[case]
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, str(tmp_path), *parts)


def test_truncated_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 100}), path)
    path.write_bytes(path.read_bytes()[:-20])
    refused(path, "rows.parquet: found no readable Parquet", "expected a complete Parquet file")


def test_parquet_without_rows(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], "string")}), tmp_path / "rows.parquet")
    refused(tmp_path / "rows.parquet", "found no rows")


def test_paths_that_are_no_file(tmp_path, monkeypatch):
    refused(tmp_path / "absent.jsonl", "absent.jsonl: found no such file", "check the path")
    refused(tmp_path, f"{tmp_path}: found nothing to read, expected data files (.jsonl", "check the folder")
    os.mkfifo(tmp_path / "pipe.jsonl")
    refused(tmp_path / "pipe.jsonl", "found a device or a pipe", "on disk")
    source = write_jsonl(tmp_path, {"text": "a"})

    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    refused(source, "rows.jsonl: cannot be read (Permission denied)", "check its permissions")


def test_unknown_columns_are_listed_with_the_accepted_forms(tmp_path):
    source = write_jsonl(tmp_path, {"frage": "q", "antwort": "a"})
    refused(
        source,
        "rows.jsonl:1:",
        "'frage', 'antwort'",
        "question, answer | question, response | instruction",
        "rename the columns",
    )
    source = write_jsonl(tmp_path, {f"c{at}": at for at in range(500)})
    refused(source, "'c11' and 488 more")
    refused(write_jsonl(tmp_path, {}), "found the columns none")


FIRST = {"prompt": "p", "completion": "c"}
BAD_ROWS = {
    "missing key": ({"prompt": "p"}, ["found the columns 'prompt', expected 'completion' too", "(prompt, completion)"]),
    "mixed schemas": ({"question": "q", "answer": "a"}, ["'question', 'answer', expected 'prompt' too"]),
    "null": ({"prompt": "p", "completion": None}, ["found null in 'completion', expected text", "correct or remove"]),
    "not a number": ({"prompt": "p", "completion": float("nan")}, ["found a number (nan) in 'completion'"]),
    "nested": ({"prompt": {"a": 1}, "completion": "c"}, ["found an object in 'prompt', expected text"]),
    "empty completion": ({"prompt": "p", "completion": ""}, ["found empty text in 'completion'", "fill in or remove"]),
    "white completion": ({"prompt": "p", "completion": " \n"}, ["found only white space in 'completion'"]),
    "empty prompt": ({"prompt": "", "completion": "c"}, ["found empty text in 'prompt'"]),
    "half surrogate": ({"prompt": "p", "completion": "a\ud800"}, ["surrogate pair in 'completion' (character 2)"]),
    "empty prompt list": ({"prompt": [], "completion": "c"}, ["found an empty list in 'prompt'"]),
    "completion of a user": ({"prompt": "p", "completion": turns("q")}, ["found no assistant message", "add it"]),
    "prompt ends with an answer": ({"prompt": turns("q", "a"), "completion": "c"}, ["two assistant turns in a row"]),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_later_row_is_named_by_its_line(tmp_path, case):
    row, parts = BAD_ROWS[case]
    refused(write_jsonl(tmp_path, FIRST, FIRST, row), "rows.jsonl:3: ", *parts)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"text": " "}, "text"),
        ({"question": "q", "answer": ""}, "answer"),
        ({"instruction": "i", "output": " "}, "output"),
        ({"instruction": " ", "output": "o"}, "instruction"),
        ({"instruction": "i", "input": ["3"], "output": "o"}, "input"),
    ],
)
def test_empty_or_wrong_values_in_the_other_forms(tmp_path, row, name):
    refused(write_jsonl(tmp_path, row), "rows.jsonl:1: found ", f"in '{name}', expected text")


BAD_MESSAGES = {
    "text": ("hello", ["found text in 'messages', expected a list"]),
    "empty list": ([], ["found an empty list in 'messages'", "remove the row"]),
    "no object": (
        ["hi"],
        ["found a list of texts in 'messages', expected text, or a list of messages with role and content"],
    ),
    "no role": ([{"content": "q"}], ["found the keys 'content' in messages[0], expected 'role' too"]),
    "no content": ([{"role": "user"}], ["expected 'content' too", "write each message as role and content"]),
    "unknown role": (
        [{"role": "robot", "content": "q"}],
        ["found the role 'robot' in messages[0]", "developer; rename"],
    ),
    "role no text": ([{"role": ["user"], "content": "q"}], ["found the role ['user']"]),
    "an image": (
        [{"role": "user", "content": [{"type": "image", "image": "x"}]}],
        ["found a part of type 'image' in messages[0].content[0], expected text parts only"],
    ),
    "a part without text": (
        [{"role": "user", "content": [{"type": "text"}]}],
        ["found a part of type 'text' in messages[0].content[0]"],
    ),
    "content null": ([{"role": "user", "content": None}], ["found null in 'messages[0].content'"]),
    "empty answer": (turns("q", " "), ["found only white space in 'messages[1].content'"]),
    "no assistant": (turns("q"), ["found no assistant message", "add it or remove the row"]),
    "only a leading one": (turns("q", "a")[1:], ["found only a leading assistant message"]),
    "two in a row": ([*turns("q", "a"), *turns("q", "a")[1:]], ["two assistant turns", "messages 2 and 3", "join"]),
    "tool calls": (
        [*turns("q"), {"role": "assistant", "content": "a", "tool_calls": [{"id": 1}]}],
        ["found an object as a tool call of messages[1], expected an object with the name"],
    ),
}


@pytest.mark.parametrize("case", BAD_MESSAGES)
def test_bad_messages_are_named_by_their_line(tmp_path, case):
    messages, parts = BAD_MESSAGES[case]
    good = {"messages": turns("q", "a")}
    refused(write_jsonl(tmp_path, good, {"messages": messages}), "rows.jsonl:2: ", *parts)


def test_messages_that_are_no_json_in_a_csv_are_refused(tmp_path):
    (tmp_path / "rows.csv").write_text('messages\n"q, a"\n')
    refused(tmp_path / "rows.csv", "rows.csv:2: found text in 'messages'", "in a .csv write them as JSON")


def test_an_error_stays_one_line_for_huge_or_odd_values(tmp_path):
    refused(write_jsonl(tmp_path, {"x\ny" * 1000: 1}), "rows.jsonl:1: found the columns 'x\\ny")


# --- the hub -------------------------------------------------------------------------------------------------


def test_a_hub_data_set_is_read_with_config_and_split(monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"question": "q", "answer": "a", "image": 0}] * 2)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("owner/name", "owner/name:main", "owner/name:main:test[:5]", "owner/name::test"):
        rows = load_rows(source)
        assert rows.identity.name == source
        assert [row.where for row in rows.rows] == [f"{source} row 1", f"{source} row 2"]
    assert asked == [
        ("owner/name", None, "train"),
        ("owner/name", "main", "train"),
        ("owner/name", "main", "test[:5]"),
        ("owner/name", None, "test"),
    ]
    assert rows.identity.fingerprint
    assert rows.identity.form == "question, answer"


def test_a_hub_data_set_of_unknown_columns_or_without_rows(monkeypatch):
    table = datasets.Dataset.from_dict({"frage": ["q"], "antwort": ["a"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    refused("owner/name", "owner/name row 1: found the columns 'frage', 'antwort'")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table.select([]))
    refused("owner/name", "owner/name: found no rows", "another split")


def test_any_failure_of_the_hub_is_one_line(monkeypatch):
    def load_dataset(*_, **__):
        raise ValueError("Config name is missing.\nPlease pick one among:\n" + "x" * 5000)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    refused("gsm8k", "no file gsm8k, and no data set of that name could be loaded: Config name is missing.", "give a")


def test_offline_is_answered_at_once(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("aletheia.data.hub.getproxies", dict)
    started = time.monotonic()
    refused("owner/absent", "no file owner/absent, and no data set of that name could be loaded", "give a .jsonl")
    refused("some/where/rows", "not the name of a hub data set")
    with pytest.raises(DataError, match="no file xxx"):
        load_rows("x" * 300)  # too long for a file name
    assert time.monotonic() - started < 5
    assert datasets.config.HF_HUB_OFFLINE is False  # put back


@pytest.mark.parametrize("reachable", [True, False])
def test_without_a_connection_datasets_looks_in_its_cache_only(monkeypatch, reachable):
    offline = []

    def load_dataset(*_, **__):
        offline.append(datasets.config.HF_HUB_OFFLINE)
        return datasets.Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("aletheia.data.hub._reachable", lambda endpoint: reachable)
    assert load_rows("owner/name").rows[0].text == "a"
    assert offline == [not reachable]


# --- labels --------------------------------------------------------------------------------------------------


def test_the_loss_falls_on_the_completion_and_its_end_of_turn(tmp_path, chatml):
    example = load_data(write_jsonl(tmp_path, {"question": "2+2?", "answer": "4 ü"}), chatml)[0]
    assert chatml.decode(example.input_ids) == (
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4 ü<|im_end|>\n"
    )
    assert labelled(example, chatml) == "4 ü<|im_end|>"
    assert len(example.labels) == len(example.input_ids)
    pairs = list(zip(example.input_ids, example.labels, strict=True))
    assert all(label in (token, NO_LOSS) for token, label in pairs)


def test_the_prompt_is_what_generation_sees(tmp_path, chatml):
    messages = turns("q1", "a1", "q2", "a2", system="be brief")
    example = load_data(write_jsonl(tmp_path, {"messages": messages}), chatml)[0]
    prompt = chatml.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert example.input_ids[: len(prompt)] == prompt
    assert chatml.decode(example.input_ids) == chatml.apply_chat_template(messages, tokenize=False)


def test_every_assistant_turn_is_labelled(tmp_path, chatml):
    messages = [*turns("q1", "a1", "q2", "a2", system="s"), {"role": "tool", "content": ""}, *turns("q3", "a3")]
    example = load_data(write_jsonl(tmp_path, {"messages": messages}), chatml)[0]
    assert labelled(example, chatml) == "a1<|im_end|>a2<|im_end|>a3<|im_end|>"


def test_turns_after_the_last_answer_and_a_leading_answer_carry_no_loss(tmp_path, chatml):
    messages = [{"role": "assistant", "content": "hello"}, *turns("q", "a", "thanks")]
    example = load_data(write_jsonl(tmp_path, {"messages": messages}), chatml)[0]
    assert labelled(example, chatml) == "a<|im_end|>"
    assert "thanks" not in chatml.decode(example.input_ids)


def test_a_template_that_strips_earlier_thoughts_labels_the_last_turn_only(tmp_path):
    tokenizer = make_tokenizer(FORGETFUL)
    messages = turns("q1", "t1</think>a1", "q2", "t2</think>a2")
    examples = load_data(write_jsonl(tmp_path, {"messages": messages}), tokenizer)
    example = examples[0]
    assert labelled(example, tokenizer) == "t2</think>a2<|im_end|>"
    assert tokenizer.decode(example.input_ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert any("earlier assistant turns carry no loss" in note and "1 row" in note for note in examples.notes)
    single = load_data(write_jsonl(tmp_path, {"messages": messages[:2]}), tokenizer)[0]
    assert labelled(single, tokenizer) == "t1</think>a1<|im_end|>"


def test_a_generation_prompt_that_the_answer_does_not_repeat_is_left_out(tmp_path):
    tokenizer = make_tokenizer(OPENS_THOUGHT)
    examples = load_data(write_jsonl(tmp_path, {"question": "q", "answer": "a"}), tokenizer)
    assert labelled(examples[0], tokenizer) == "a<|im_end|>"
    assert "<think>" not in tokenizer.decode(examples[0].input_ids)
    assert any("generation prompt ends with '<think>'" in note for note in examples.notes)


def test_a_template_without_a_recognisable_completion_is_refused(tmp_path):
    template = "{{ messages[0]['content'] }}"
    source = write_jsonl(tmp_path, {"question": "q", "answer": "a"})
    with pytest.raises(DataError) as caught:
        load_data(source, make_tokenizer(template))
    one_clear_line(caught, "rows.jsonl:1: found a chat template that rewrites", "give another as `chat_template`")


@pytest.mark.parametrize(
    ("template", "reason"), [(NO_SYSTEM, "System role not supported"), ("{{ 1 / 0 }}", "division")]
)
def test_a_template_that_raises_names_the_row(tmp_path, template, reason):
    good = {"messages": turns("q", "a")}
    other = [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]  # no user turn to merge with
    source = write_jsonl(tmp_path, good, {"messages": other})
    with pytest.raises(DataError) as caught:
        load_data(source, make_tokenizer(template + CHATML))
    line = 2 if template is NO_SYSTEM else 1
    one_clear_line(caught, f"rows.jsonl:{line}: found messages the chat template refuses ({reason}", "change the roles")


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_a_dummy_prefix_stands_in_front_of_the_first_piece_alone(tmp_path, scheme):
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=["</s>"], initial_alphabet=list("\n<|>:"), show_progress=False
    )
    raw.train_from_iterator(["user assistant the answer is four what is two and two"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}:\n{{ message['content'] }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"question": "what is two and two", "answer": "four"}))
    (example,) = load_data(str(file), tokenizer).examples
    labelled = [token for token in example.labels if token != NO_LOSS]
    assert "".join(tokenizer.convert_ids_to_tokens(labelled)).startswith("four")
    assert tokenizer.tokenize("four")[0].startswith("▁") == (scheme != "never")
    whole = "user:\nwhat is two and two</s>\nassistant:\nfour</s>\n"
    if scheme != "always":  # which puts one behind every special token, too
        assert example.input_ids == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_without_a_template_prompt_blank_line_completion_and_eos(tmp_path):
    tokenizer = make_tokenizer(None, bos=True)
    row = {"messages": turns("q1", "a1", "q2", "a2", system="s")}
    example = load_data(write_jsonl(tmp_path, row), tokenizer)[0]
    assert tokenizer.decode(example.input_ids) == "<s>s\n\nq1\n\na1\n\nq2\n\na2<|im_end|>"
    assert labelled(example, tokenizer) == "a2<|im_end|>"


def test_without_a_template_and_without_eos(tmp_path):
    tokenizer = make_tokenizer(None, eos=False)
    examples = load_data(write_jsonl(tmp_path, {"prompt": "p", "completion": "c"}), tokenizer)
    assert tokenizer.decode(examples[0].input_ids) == "p\n\nc"
    assert labelled(examples[0], tokenizer) == "c"
    assert examples.pad_token_id == 0


@pytest.mark.parametrize("template", [None, CHATML])
def test_text_carries_the_loss_everywhere_and_ends_with_one_eos(tmp_path, template):
    tokenizer = make_tokenizer(template, bos=True)
    for text in ("once upon", "once upon<|im_end|>"):
        example = load_data(write_jsonl(tmp_path, {"text": text}), tokenizer)[0]
        assert tokenizer.decode(example.input_ids) == "<s>once upon<|im_end|>"
        assert example.labels == example.input_ids
        assert example.labelled_tokens == len(example) - 1  # the first token is never predicted


def test_many_rows_keep_their_own_pieces(tmp_path, chatml):
    rows = [{"messages": turns(*[f"{at}.{turn}" for turn in range(2 * (at % 3) + 2)])} for at in range(2100)]
    examples = load_data(write_jsonl(tmp_path, *rows), chatml)
    for at in (0, 1, 999, 1000, 1001, 2099):
        answers = [f"{at}.{turn}<|im_end|>" for turn in range(1, 2 * (at % 3) + 2, 2)]
        assert labelled(examples[at], chatml) == "".join(answers)
        assert examples[at].where.endswith(f":{at + 1}")


# --- truncation, counts, vocabulary --------------------------------------------------------------------------


@pytest.fixture
def plain_rows(tmp_path):
    """Without a template: 4, 8 and 24 prompt tokens (with the blank line), then 2, 4 and 3 of completion + EOS."""
    rows = [("ab", "c"), ("a" * 6, "def"), ("a" * 22, "gh")]
    return load_rows(write_jsonl(tmp_path, *({"prompt": p, "completion": c} for p, c in rows)))


def test_truncation_on_the_right_is_counted(plain_rows):
    examples = encode(plain_rows, make_tokenizer(None), max_length=25)
    assert [len(example) for example in examples] == [6, 12, 25]
    assert (examples.truncated, examples.skipped, examples.max_length) == (1, 0, 25)
    assert (examples.tokens, examples.labelled_tokens) == (43, 2 + 4 + 1)
    assert encode(plain_rows, make_tokenizer(None), max_length=27).truncated == 0  # the longest row fits exactly


def test_emptied_rows_are_an_error_that_says_how_many_tokens_are_needed(plain_rows):
    tokenizer = make_tokenizer(None)
    with pytest.raises(DataError) as caught:
        encode(plain_rows, tokenizer, max_length=8)
    one_clear_line(
        caught, "rows.jsonl:2: ", "the first of 2 rows, of 3,", "`max_length=8`; expected at least 9 for it",
        "raise `max_length` or give `skip_unusable=True`",
    )  # fmt: skip
    assert len(encode(plain_rows, tokenizer, max_length=9, skip_unusable=True)) == 2  # 9 are enough for row 2


def test_emptied_rows_are_dropped_and_counted_on_request(plain_rows):
    tokenizer = make_tokenizer(None)
    examples = encode(plain_rows, tokenizer, max_length=8, skip_unusable=True)
    assert (len(examples), examples.skipped, examples.truncated) == (1, 2, 0)
    with pytest.raises(DataError) as caught:
        encode(plain_rows, tokenizer, max_length=3, skip_unusable=True)
    message = one_clear_line(caught, "the first of 3 rows, of 3,", "at least 5", "raise `max_length`")
    assert "skip_unusable" not in message


def test_several_files_are_one_data_set(tmp_path, chatml):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text('{"question": "a?", "answer": "b"}\n')
    two.write_text('{"text": "c"}\n{"text": "d"}\n')
    rows = load_rows([str(one), str(two)])
    assert [row.where for row in rows.rows] == [f"{one}:1", f"{two}:1", f"{two}:2"]
    assert rows.identity.sources == (str(one), str(two))
    assert rows.identity.form == "question, answer | text"
    assert rows.identity.rows == 3
    assert len(load_data((str(one), str(two)), chatml)) == 3
    assert load_rows([str(one)]) == load_rows(str(one))
    prints = {rows.identity.fingerprint, load_rows([str(two), str(one)]).identity.fingerprint}
    two.write_text('{"text": "c"}\n{"text": "e"}\n')
    prints |= {load_rows([str(one), str(two)]).identity.fingerprint, load_rows(str(one)).identity.fingerprint}
    assert len(prints) == 4
    with pytest.raises(DataError) as caught:
        load_rows([])
    one_clear_line(caught, "at least one", "`data`")
    two.write_text("{")
    with pytest.raises(DataError) as caught:
        load_rows([str(one), str(two)])
    one_clear_line(caught, f"{two}:1: ")


def test_a_row_with_nothing_to_predict_at_any_length(tmp_path):
    rows = load_rows(write_jsonl(tmp_path, {"text": "ab"}, {"text": "a"}))
    with pytest.raises(DataError) as caught:
        encode(rows, make_tokenizer(None, eos=False))
    one_clear_line(caught, "rows.jsonl:2: ", "1 row, of 2", "none at any length; remove such rows or give")


@pytest.mark.parametrize("max_length", [1, 0, -5])
def test_max_length_below_two(plain_rows, max_length):
    with pytest.raises(DataError) as caught:
        encode(plain_rows, make_tokenizer(None), max_length=max_length)
    one_clear_line(caught, f"maximum length of {max_length}", "raise `max_length`")


def test_a_token_beyond_the_vocabulary_names_the_row(plain_rows):
    tokenizer = make_tokenizer(None)
    eos = tokenizer.eos_token_id
    assert len(encode(plain_rows, tokenizer, vocab_size=eos + 1)) == 3
    with pytest.raises(DataError) as caught:
        encode(plain_rows, tokenizer, vocab_size=60)
    one_clear_line(caught, "rows.jsonl:1: found the token id ", "expected ids below 60", "tokenizer that belongs")


# --- splits and batches --------------------------------------------------------------------------------------


def made(*lengths: int) -> Examples:
    """Examples of the given lengths; token n of example i is 100 i + n, all but the first labelled."""
    tokens = [[100 * at + n for n in range(length)] for at, length in enumerate(lengths)]
    identity = DataIdentity(name="made", fingerprint="0", form="text", rows=len(lengths))
    examples = tuple(Example(ids, [NO_LOSS, *ids[1:]], f"made:{at}") for at, ids in enumerate(tokens, 1))
    return Examples(identity, examples, max_length=64, pad_token_id=7, skipped=0, truncated=0)


def places(examples: Examples) -> list[str]:
    return [example.where for example in examples]


def test_examples_behave_like_a_data_set():
    examples = made(3, 4, 5)
    assert len(examples) == 3
    assert examples[-1] is examples[2]
    with pytest.raises(IndexError):
        examples[3]
    assert places(examples.subset([2, 0])) == ["made:3", "made:1"]
    assert examples.subset([2, 0]).identity == examples.identity


@pytest.mark.parametrize(
    ("fraction", "max_rows", "held"), [(0.1, 96, 10), (0.5, 7, 7), (0.001, 96, 1), (0.999, 500, 99)]
)
def test_the_split_is_disjoint_seeded_and_in_order(fraction, max_rows, held):
    examples = made(*[3] * 100)
    train, held_out = split_held_out(examples, fraction, seed=1, max_rows=max_rows)
    assert (len(train), len(held_out)) == (100 - held, held)
    assert sorted(places(train) + places(held_out)) == sorted(places(examples))
    assert places(train) == [place for place in places(examples) if place in set(places(train))]
    assert held_out == examples.subset(sorted(examples.examples.index(example) for example in held_out))
    again = split_held_out(examples, fraction, seed=1, max_rows=max_rows)
    assert again == (train, held_out)
    assert split_held_out(examples, 0.5, seed=2, max_rows=50) != split_held_out(examples, 0.5, seed=1, max_rows=50)


@pytest.mark.parametrize(
    ("rows", "fraction", "max_rows", "part"),
    [
        (9, 0.0, 5, "fraction 0.0, expected a number between 0 and 1"),
        (9, 1.0, 5, "fraction 1.0"),
        (9, float("nan"), 5, "fraction nan"),
        (9, 0.5, 0, "limit of 0 held-out rows"),
        (1, 0.5, 5, "found 1 usable row, expected at least 2"),
    ],
)
def test_impossible_splits(rows, fraction, max_rows, part):
    with pytest.raises(DataError) as caught:
        split_held_out(made(*[3] * rows), fraction, seed=0, max_rows=max_rows)
    one_clear_line(caught, part)


def test_collate_pads_on_the_right_and_masks_the_padding():
    batch = collate(list(made(2, 4)), pad_token_id=7)
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), torch.int64
    )
    assert batch["input_ids"].tolist() == [[0, 1, 7, 7], [100, 101, 102, 103]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 1, -100, -100], [-100, 101, 102, 103]]


def test_examples_feed_a_torch_data_loader():
    examples = made(2, 3, 4)
    loader = torch.utils.data.DataLoader(examples, batch_size=2, collate_fn=partial(collate, pad_token_id=0))
    assert [batch["input_ids"].shape for batch in loader] == [(2, 3), (1, 4)]


def test_sampled_batches_are_distinct_rows_and_the_same_for_a_seed():
    examples = made(*[2] * 50)
    batches = sample_batches(examples, batches=5, batch_size=4, seed=3)
    drawn = [token for batch in batches for token in batch["input_ids"][:, 0].tolist()]
    assert len(batches) == 5
    assert len(set(drawn)) == 20
    again = sample_batches(examples, batches=5, batch_size=4, seed=3)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))
    other = sample_batches(examples, batches=5, batch_size=4, seed=4)
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, other, strict=True))


def test_fewer_rows_than_asked_for_give_fewer_batches():
    assert [len(batch["labels"]) for batch in sample_batches(made(2, 2, 2), 5, 2, seed=0)] == [2, 1]
    assert [len(batch["labels"]) for batch in sample_batches(made(2), 5, 8, seed=0)] == [1]


def test_padded_batches_hold_every_row_once_with_little_padding():
    examples = made(2, 9, 3, 9, 2)
    batches = list(padded_batches(examples, batch_size=2))
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 9), (2, 3), (1, 2)]
    assert [batch["input_ids"][:, 0].tolist() for batch in batches] == [[100, 300], [200, 0], [400]]
    assert sum(int(batch["attention_mask"].sum()) for batch in batches) == examples.tokens
    assert sum(int((batch["labels"] != NO_LOSS).sum()) for batch in batches) == examples.labelled_tokens


@pytest.mark.parametrize(
    "call",
    [
        lambda: sample_batches(made(), 1, 1, seed=0),
        lambda: sample_batches(made(2), 0, 1, seed=0),
        lambda: sample_batches(made(2), 1, 0, seed=0),
        lambda: padded_batches(made(), 1),
        lambda: padded_batches(made(2), 0),
    ],
)
def test_batches_of_nothing_are_refused_at_the_call(call):
    with pytest.raises(DataError) as caught:
        call()
    one_clear_line(caught, "expected at least")


def test_reading_and_encoding_import_no_torch():
    code = "import sys, aletheia.data.encode; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
