"""Rows as people have them: other names for roles and columns, calls of tools, numbers, and rows without an answer."""

import json
from pathlib import Path

import pytest
from tiny import make_tokenizer

from aletheia.data.encode import load_data
from aletheia.data.forms import Row
from aletheia.data.rows import Rows, load_rows
from aletheia.errors import DataError


def loaded(folder: Path, *rows: object, **settings) -> Rows:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_rows(str(path), **settings)


def first(folder: Path, row: object) -> Row:
    return loaded(folder, row).rows[0]


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


PAIR = (said("user", "q"), said("assistant", "a"))


@pytest.mark.parametrize("column", ["messages", "conversations", "conversation", "dialog"])
@pytest.mark.parametrize("roles", [("human", "gpt"), ("user", "assistant"), ("prompter", "chatgpt"), ("human", "bing")])
def test_conversations_of_other_names_are_messages(tmp_path, column, roles):
    turns = [{"from": role, "value": text} for role, text in zip(roles, "qa", strict=True)]
    rows = loaded(tmp_path, {column: turns})
    assert rows.rows[0].messages == PAIR
    assert rows.identity.form == column
    assert rows.notes == ()


@pytest.mark.parametrize(
    "names",
    [
        ("prompt", "response"),
        ("query", "response"),
        ("input", "output"),
        ("instruction", "response"),
        ("question", "response"),
    ],
)
def test_pairs_of_columns_are_a_question_and_its_answer(tmp_path, names):
    assert first(tmp_path, dict(zip(names, "qa", strict=True))).messages == PAIR


def test_the_context_of_a_question_is_used_and_said(tmp_path):
    rows = loaded(tmp_path, {"question": "q", "answer": "a", "context": "Once."})
    assert rows.rows[0].messages[0]["content"] == "Once.\n\nq"
    assert "the column 'context' is put before the question (1 row" in rows.notes[0]
    assert first(tmp_path, {"instruction": "q", "response": "a", "context": "c"}).messages[0]["content"] == "q\n\nc"


def test_system_history_and_tools_of_their_own_columns(tmp_path):
    tools = [{"name": "f", "parameters": {}}]
    row = {"system": "s", "history": [["q0", "a0"]], "instruction": "q", "output": "a", "tools": json.dumps(tools)}
    rows = loaded(tmp_path, row, row | {"system": "", "history": [], "tools": ""})
    assert rows.rows[0].messages == (said("system", "s"), said("user", "q0"), said("assistant", "a0"), *PAIR)
    assert rows.rows[0].tools == ({"type": "function", "function": tools[0]},)
    assert (rows.rows[1].messages, rows.rows[1].tools) == (PAIR, ())
    assert [note.partition(" (1 row, first ")[0] for note in rows.notes] == [
        "the column 'system' is used as a system turn",
        "the column 'history' is used as earlier turns",
    ]
    twice = loaded(tmp_path, {"system": "s", "messages": [said("system", "own"), *PAIR]})
    assert twice.rows[0].messages[0]["content"] == "own"
    assert "'system' is not used where the messages begin with a system turn" in twice.notes[0]


def test_columns_that_are_not_used_are_named_once(tmp_path):
    row = {"prompt": "q", "completion": "a", "id": 1, "licence": "x"}
    (note,) = loaded(tmp_path, row, row, row | {"source": "web"}).notes
    assert note.startswith("rows are read as prompt, completion; the columns 'id', 'licence', 'source' are not used (3")
    bare = {"prompt": "q", "completion": "a"}
    (note,) = loaded(tmp_path, bare, bare | {"source": "web"}).notes
    assert note.startswith("rows are read as prompt, completion; the column 'source' is not used (1 row, first ")
    assert note.endswith("rows.jsonl:2)")
    (note,) = loaded(tmp_path, {"text": "t", "system": "s"}).notes
    assert "the column 'system' is not used" in note


def test_parts_of_text_are_joined_and_results_of_tools_may_be_objects(tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, "c"]
    messages = [said("user", "q") | {"content": parts}, {"role": "tool", "content": {"n": 1, "none": None}}, PAIR[1]]
    row = first(tmp_path, {"messages": messages})
    assert [message["content"] for message in row.messages] == ["abc", '{"n": 1}', "a"]


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": None, "y": [1]}}}
WRITTEN = [
    {"role": "assistant", "content": None,
     "tool_calls": [{"function": {"name": "f", "arguments": '{"x": null, "y": [1]}'}}]},
    {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"x": null, "y": [1]}'}]},
    {"role": "assistant", "tool_calls": json.dumps([CALL])},
    {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": '{"x": null, "y": [1]}'}},
    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": null, "y": [1]}}'},
]  # fmt: skip


@pytest.mark.parametrize("message", WRITTEN)
def test_tool_calls_of_all_forms_have_objects_as_arguments(tmp_path, message):
    role = {"from": "observation", "value": "r"} if "from" in message else {"role": "ipython", "content": "r"}
    row = first(tmp_path, {"messages": [said("user", "q"), message, role, PAIR[1]]})
    assert row.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert row.messages[2] == said("tool", "r")


def test_nulls_that_a_columnar_file_puts_into_calls_are_left_out(tmp_path):
    call = {"id": None, "function": {"name": "f", "arguments": {"x": None, "y": 1}}}
    row = first(
        tmp_path, {"messages": [said("user", "q"), {"role": "assistant", "content": None, "tool_calls": [call]}]}
    )
    assert row.messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"y": 1}}}]


@pytest.mark.parametrize(("value", "text"), [(4, "4"), (0.5, "0.5"), (True, "true"), (False, "false"), (0, "0")])
def test_numbers_are_text(tmp_path, value, text):
    rows = loaded(tmp_path, {"question": "q", "answer": value}, {"question": 3, "answer": "a"})
    assert rows.rows[0].messages[1]["content"] == text
    assert f"numbers in 'answer' are written as text, such as '{text}' (1 row" in rows.notes[0]
    assert "numbers in 'question'" in rows.notes[1]
    assert first(tmp_path, {"messages": [said("user", "q"), said("assistant", value)]}).messages[1]["content"] == text


def test_preferences_are_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"rows.jsonl:1: found a preference data set .*rename 'chosen'"):
        loaded(tmp_path, {"prompt": "p", "chosen": "good", "rejected": "bad"})
    rows = loaded(tmp_path, {"messages": list(PAIR), "chosen": [], "rejected": []})
    assert "the columns 'chosen', 'rejected' are not used" in rows.notes[0]


MEDIA = [
    {"prompt": "p", "completion": "c", "image": "x.png"},
    {"messages": list(PAIR), "videos": ["x.mp4"]},
    {"text": "t", "audio": {"path": "x.wav"}},
    {"messages": [PAIR[0] | {"images": ["x.png"]}, PAIR[1]]},
    {"messages": [said("user", "q") | {"content": [{"type": "text", "text": "q", "image": "x.png"}]}, PAIR[1]]},
]


@pytest.mark.parametrize("row", MEDIA)
def test_an_image_a_sound_or_a_video_beside_the_text_is_refused_by_name(tmp_path, row):
    with pytest.raises(DataError, match=r"rows.jsonl:1: found '\w+' in .*, expected only text"):
        loaded(tmp_path, row)
    empty = {"prompt": "p", "completion": "c", "image": None, "images": []}
    assert "not used" in loaded(tmp_path, empty).notes[0]


@pytest.mark.parametrize("name", ["label", "kto_tag"])
def test_answers_that_are_rated_as_bad_are_not_learned(tmp_path, name):
    good, bad = ({"messages": list(PAIR), name: value} for value in (True, False))
    with pytest.raises(DataError, match=rf"rows.jsonl:2: found '{name}' false, an answer rated as bad"):
        loaded(tmp_path, good, bad)
    rows = loaded(tmp_path, good, bad, {"messages": []}, skip_unusable=True)
    assert rows.left_out.pop("no messages") == 1
    assert rows.left_out == {"an answer rated as bad": 1}
    assert len(rows.rows) == 1
    assert rows.notes == ()
    assert len(loaded(tmp_path, {"messages": list(PAIR), name: 0}).rows) == 1  # a class, not a rating


def test_keys_of_messages_that_are_not_used_are_named_once(tmp_path):
    row = {
        "messages": [PAIR[0] | {"documents": [{"text": "d"}], "name": "Ann", "mask": None}, PAIR[1] | {"prefix": True}]
    }
    assert [note.partition(" (")[0] for note in loaded(tmp_path, row, row).notes] == [
        "the key 'documents' of messages holds no text and is not used",
        "the key 'prefix' of messages holds no text and is not used",
    ]


@pytest.mark.parametrize("flag", [{"weight": "0"}, {"train": "false"}, {"loss": "False"}])
def test_weights_may_be_text(tmp_path, flag):
    row = first(tmp_path, {"messages": [*PAIR, PAIR[0], PAIR[1] | flag]})
    assert row.no_loss == {3}


def test_roles_are_known_in_capitals_and_conversations_as_json_text(tmp_path):
    turns = [{"from": "Human", "value": "q"}, {"from": "GPT", "value": "a"}]
    assert first(tmp_path, {"conversations": turns}).messages == PAIR
    assert first(tmp_path, {"conversations": json.dumps(turns)}).messages == PAIR


def test_lists_of_texts_are_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"found a list of texts in 'prompt', expected text, or a list of messages"):
        loaded(tmp_path, {"prompt": ["p", "q"], "completion": ["a", "b"]})


BAD = [
    ({"prompt": "p", "completion": ""}, "no text"),
    ({"prompt": "p", "completion": None}, "no text"),
    ({"prompt": "p"}, "no column 'completion'"),
    ({"prompt": [], "completion": "c"}, "no messages"),
    ({"prompt": "p", "completion": [said("user", "q")]}, "no answer"),
    ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "completion": "c"},
     "a part of type 'image' in a message"),
    ({"prompt": "p", "completion": "c", "weight": 0}, "weight 0"),
    ({"prompt": "p", "completion": "c\ud800"}, "half of a surrogate pair"),
    ({"prompt": [said("robot", "p")], "completion": "c"}, "an unknown role"),
]  # fmt: skip


def test_rows_without_an_answer_are_refused_or_left_out_and_counted_by_reason(tmp_path):
    good = {"prompt": "p", "completion": "c"}
    for row, _ in BAD:
        with pytest.raises(DataError, match=r"rows.jsonl:2: .*; `skip_unusable=True` leaves such rows out"):
            loaded(tmp_path, good, row)
    rows = loaded(tmp_path, good, *(row for row, _ in BAD), good, skip_unusable=True)
    reasons = [reason for _, reason in BAD]
    assert rows.left_out == {reason: reasons.count(reason) for reason in reasons}
    assert [row.where.rpartition(":")[2] for row in rows.rows] == ["1", str(len(BAD) + 2)]
    assert rows.identity.rows == 2
    with pytest.raises(DataError, match=r"rows.jsonl:1: .*the first of 2 rows, none of which can be used"):
        loaded(tmp_path, BAD[0][0], BAD[1][0], skip_unusable=True)


def test_rows_left_out_anywhere_are_counted_together(tmp_path):
    bad = {"messages": [said("user", "q"), said("assistant", "a") | {"weight": 0}]}
    rows = [{"messages": list(PAIR)}, bad, {"messages": [said("user", "x" * 90), PAIR[1]]}, {"messages": []}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = load_data(str(path), make_tokenizer(), max_length=64, skip_unusable=True)
    assert (len(examples), examples.skipped) == (1, 3)
    assert examples.left_out == {
        "no messages": 1,
        "no answer that carries a loss": 1,
        "no token to learn within `max_length`": 1,
    }


def test_fields_that_a_csv_holds_as_text_mean_the_same(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion,weight,history\nq,a,1,"[[""q0"", ""a0""]]"\nq,a,0,\n')
    rows = load_rows(str(path), skip_unusable=True)
    assert [message["content"] for message in rows.rows[0].messages] == ["q0", "a0", "q", "a"]
    assert rows.left_out == {"weight 0": 1}
