"""Rows that stand in a data set twice, or among the held-out rows too: counted, said once, and split together."""

import json
import random

import pytest

import aletheia
from aletheia.anatomy.schema import DataIdentity
from aletheia.data.encode import load_data
from aletheia.data.examples import NO_LOSS, Example, Examples, split_held_out
from aletheia.data.repeats import Overlap, duplicates, overlap


def made(*rows: tuple[list[int], list[int]]) -> Examples:
    """Examples of (prompt, answer), of which the answer is labelled."""
    examples = tuple(
        Example(prompt + answer, [NO_LOSS] * len(prompt) + answer, f"made:{at}")
        for at, (prompt, answer) in enumerate(rows, 1)
    )
    identity = DataIdentity(name="made", fingerprint="0", form="text", rows=len(rows))
    return Examples(identity, examples, max_length=64, pad_token_id=0, skipped=0, truncated=0)


def test_duplicates_have_the_same_tokens_and_labels():
    assert duplicates(made(([1], [2]), ([1], [2]), ([1], [3]), ([1], [2]))) == 2
    assert duplicates(made(([1], [2]), ([], [1, 2]))) == 0  # the same tokens, other labels
    assert duplicates(made(([1], [2]), ([1, 2], []))) == 0
    assert duplicates(made()) == 0


def test_overlap_counts_whole_rows_and_prompts_apart():
    train = made(([1], [2]), ([3], [4]), ([], [7, 8]))
    held_out = made(([1], [2]), ([3], [5]), ([3], [5]), ([6], [2]), ([], [9]))
    found = overlap(train, held_out)
    assert found == Overlap(5, same=1, same_prompt=2)
    assert found.notes() == [
        "1 of the 5 held-out rows is also among the training rows",
        "2 more of the 5 held-out rows have the prompt of a training row, with another answer",
    ]
    assert overlap(train, made(([6], [6]))).notes() == []


def test_the_prompt_of_a_conversation_is_all_before_its_last_answer():
    def talk(*turns: tuple[int, bool]) -> Example:
        return Example([token for token, _ in turns], [token if on else NO_LOSS for token, on in turns], "made:1")

    one = talk((1, False), (2, True), (3, False), (4, True), (5, False))
    other = talk((1, False), (2, True), (3, False), (9, True))
    third = talk((1, False), (8, True), (3, False), (4, True))
    assert one.prompt_digest() == other.prompt_digest() != third.prompt_digest()
    assert talk((1, True), (2, True)).prompt_digest() is None


@pytest.mark.parametrize("rows", [10, 100])
@pytest.mark.parametrize("seed", [0, 1])
def test_without_duplicates_the_split_is_a_plain_random_one(rows, seed):
    examples = made(*[([at], [at]) for at in range(rows)])
    _, held_out = split_held_out(examples, 0.2, seed, max_rows=12)
    drawn = sorted(random.Random(seed).sample(range(rows), min(12, rows // 5)))
    assert [row.where for row in held_out] == [f"made:{at + 1}" for at in drawn]


@pytest.mark.parametrize("seed", range(20))
def test_no_copy_of_a_held_out_row_is_learned_from(seed):
    draw = random.Random(seed)
    kinds = [draw.randrange(30) for _ in range(100)]
    train, held_out = split_held_out(made(*[([kind], [kind]) for kind in kinds]), 0.2, seed, max_rows=15)
    assert overlap(train, held_out).same == 0
    assert len(train) + len(held_out) == 100
    assert 1 <= len(held_out) <= 15
    assert split_held_out(made(*[([kind], [kind]) for kind in kinds]), 0.2, seed, max_rows=15) == (train, held_out)


def test_where_every_row_has_many_copies_one_is_held_out_with_all_of_them():
    examples = made(*[([at % 3], [at % 3]) for at in range(30)])
    train, held_out = split_held_out(examples, 0.1, seed=0)
    assert (len(train), len(held_out)) == (20, 10)
    assert overlap(train, held_out).same == 0


def test_rows_that_are_all_the_same_are_split_all_the_same():
    train, held_out = split_held_out(made(*[([1], [2])] * 10), 0.1, seed=0)
    assert (len(train), len(held_out), overlap(train, held_out).same) == (9, 1, 1)


def test_a_run_says_what_is_duplicated_and_shared_once(model_folder, data_file, tokenizer, tmp_path):
    rows = [json.loads(line) for line in data_file.read_text().splitlines()][:12]
    train, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows[:3]]))
    held_out.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:2], rows[2] | {"answer": "other"}]))
    assert duplicates(load_data(str(train), tokenizer)) == 3
    said: list[str] = []
    data = {"data": str(train), "eval_data": str(held_out)}
    plan = {"policy": "last", "rank": 4, "freeze_after": 0}
    aletheia.fine_tune(str(model_folder), data, tmp_path / "run", plan, {"steps": 1, "cache": "off"}, say=said.append)
    notes = [line for line in said if line.startswith("note: ") and ("duplicates" in line or "held-out rows" in line)]
    assert notes == [
        f"note: 3 of 15 rows are duplicates of an earlier one ({train})",
        "note: 2 of the 3 held-out rows are also among the training rows",
        "note: 1 more of the 3 held-out rows has the prompt of a training row, with another answer",
    ]


def test_the_probe_says_what_is_duplicated(run, model_folder, data_file, tmp_path):
    train = tmp_path / "train.jsonl"
    train.write_text(data_file.read_text() + data_file.read_text()[:200].split("\n")[0] + "\n")
    code, _, err = run("probe", model_folder, "--data", train, "--out", "s.json", "--no-calibrate", "--batches", 1)
    assert code == 0, err
    assert err.count("1 of 61 rows is a duplicate of an earlier one") == 1
