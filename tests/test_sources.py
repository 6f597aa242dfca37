"""Which files a source names, and what they hold: JSON by content, packed files, folders, splits, patterns."""

import gzip
import json
import pickle
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from aletheia.data.find import find, whole_source
from aletheia.data.rows import load_rows
from aletheia.data.settings import DataSettings
from aletheia.errors import DataError
from aletheia.job.settings import JobSettings

ROWS = [{"question": f"q{at}?", "answer": f"a{at}"} for at in range(3)]
OTHERS = [{"question": "other?", "answer": "b"}]


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


def lines(rows=ROWS) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def put(path: Path, rows=ROWS) -> Path:
    """Write rows as the suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_bytes(lines(rows))
    return path


def questions(source: str | Path | list[str]) -> list[str]:
    rows = load_rows(source if isinstance(source, list) else str(source)).rows
    return [row.messages[0]["content"] for row in rows]


def refused(source: str | Path, *parts: str) -> str:
    with pytest.raises(DataError) as caught:
        load_rows(str(source))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    for part in parts:
        assert part in message, message
    return message


# --- content before suffix


JSON_TEXTS = {
    "lines": lines(),
    "lines, blank ones between": lines().replace(b"\n", b"\n\n \r\n"),
    "array": json.dumps(ROWS).encode(),
    "array over lines": json.dumps(ROWS, indent=2).encode(),
    "objects over lines": "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
    "wrapped": json.dumps({"version": "1", "data": ROWS}).encode(),
    "wrapped over lines": json.dumps({"Rows": ROWS, "about": {"by": "me"}}, indent=4).encode(),
}


@pytest.mark.parametrize("suffix", ["json", "jsonl", "ndjson"])
@pytest.mark.parametrize("kind", JSON_TEXTS)
def test_json_is_read_by_its_content_whatever_its_suffix(tmp_path, kind, suffix):
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(b"\xef\xbb\xbf" + JSON_TEXTS[kind])
    assert questions(path) == ["q0?", "q1?", "q2?"]


def test_an_object_over_lines_is_placed_where_it_begins(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('\n{\n "text": "a"\n}\n\n{"text":\n"b"}')
    assert [row.where for row in load_rows(str(path)).rows] == [f"{path}:2", f"{path}:6"]


def test_a_single_row_is_a_row_even_with_lists_in_it(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"question": "q?", "answer": "a", "items": [{"x": 1}]}, indent=1))
    assert questions(path) == ["q?"]
    path.write_text(
        json.dumps({"messages": [{"role": "user", "content": "m?"}, {"role": "assistant", "content": "a"}]})
    )
    assert questions(path) == ["m?"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            '{"train": [{"text": "a"}], "test": [{"text": "b"}]}',
            ["lists of rows under 'train', 'test'", "a separate file"],
        ),
        ('{"data": []}', ["rows.json:1: found no rows under 'data'"]),
        ('{\n"data": [{"text": "a"}, 3]}', ["rows.json row 2: found a number (3), expected an object"]),
        ('{\n"text": "a"\n}\n{\n"text": \n', ["rows.json:6: found invalid JSON", "correct the file at that line"]),
        ('{\n"text": "a"\n}\n[1]', ["rows.json:4: found a list, expected a JSON object"]),
        ('{"text": "a"}\n{"text": "b"\n', ["rows.json:2: found invalid JSON", "correct or remove the line"]),
        ('[{"text": "a"},\n{"text"', ["rows.json:2: found invalid JSON", "one array of objects"]),
    ],
)
def test_json_that_is_no_list_of_rows_is_one_clear_line(tmp_path, text, parts):
    (tmp_path / "rows.json").write_text(text)
    refused(tmp_path / "rows.json", *parts)


# --- packed files


PACKED = {
    "rows.jsonl.gz": gzip.compress(lines()),
    "rows.json.zst": zstd(json.dumps(ROWS).encode()),
    "rows.jsonl.zst": zstd(lines(ROWS[:1])) + zstd(lines(ROWS[1:])),
    "rows.ndjson.gz": gzip.compress(lines(ROWS[:2])) + gzip.compress(lines(ROWS[2:])),
    "rows.csv.gz": gzip.compress(b"question,answer\nq0?,a\nq1?,a\nq2?,a\n"),
    "rows.CSV.ZST": zstd(b"question,answer\nq0?,a\nq1?,a\nq2?,a\n"),
    "packed under another name.jsonl": gzip.compress(lines()),
    "packed under another name.json": zstd(lines()),
    "unpacked on the way.jsonl.gz": lines(),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_text_is_unpacked(tmp_path, name):
    (tmp_path / name).write_bytes(PACKED[name])
    assert questions(tmp_path / name) == ["q0?", "q1?", "q2?"]


def test_packed_rows_are_the_same_data_and_keep_their_lines(tmp_path):
    plain, packed = put(tmp_path / "rows.jsonl"), tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes(), mtime=1))
    one, other = load_rows(str(plain)), load_rows(str(packed))
    assert one.identity.fingerprint == other.identity.fingerprint
    assert other.rows[1].where == f"{packed}:2"


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl.zst"])
def test_damaged_packed_files_are_one_line(tmp_path, name):
    content = PACKED[name] if name.endswith("gz") else zstd(lines())
    (tmp_path / name).write_bytes(content[:-6])
    refused(tmp_path / name, f"{name}: found packed data that cannot be unpacked", "write or copy it again")
    (tmp_path / name).write_bytes(content[:6] + b"junk" * 9)
    refused(tmp_path / name, f"{name}: found packed data that cannot be unpacked")


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_a_decompression_bomb_is_refused_by_the_limit(tmp_path, monkeypatch, pack):
    monkeypatch.setattr("aletheia.data.unpack.ALWAYS_BYTES", 10_000_000)
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(pack(b" " * 9_000_000))
    refused(path, "found only white space")
    path.write_bytes(pack(b" " * 20_000_000))
    refused(
        path,
        "found more than 10 MB when unpacked",
        "10 MB or 30 times the packed size, up to 1 GB",
        "unpack it yourself",
    )


# --- several files, folders, patterns


def test_a_folder_is_its_data_files_in_order(tmp_path):
    for name in ("b.jsonl", "a.parquet", "c.json"):
        put(tmp_path / name, [{"question": name, "answer": "a"}])
    for name in (".hidden.jsonl", "README.md", "dataset_infos.json", "_metadata.json", "checkpoint-5/x.jsonl"):
        put(tmp_path / name)
    put(tmp_path / "notes.txt")
    rows = load_rows(str(tmp_path))
    assert [row.messages[0]["content"] for row in rows.rows] == ["a.parquet", "b.jsonl", "c.json"]
    assert rows.identity.name == str(tmp_path)
    assert rows.notes == (
        f"{tmp_path}: 3 files read (a.parquet, b.jsonl, c.json); skipped (unknown format): notes.txt",
    )


LAYOUTS = {
    "flat": ("train.jsonl", "validation.jsonl", "test.jsonl"),
    "several": ("train-0.jsonl", "train-1.jsonl.gz", "dev.jsonl", "test_0.jsonl"),
    "parquet": ("train.parquet", "val.parquet", "test.parquet"),
    "hub": (
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "data/test-00000-of-00001.parquet",
    ),
    "folders": ("train/0.jsonl", "train/1.jsonl", "validation/0.jsonl", "test/0.jsonl"),
    "named last": ("gsm_train.jsonl", "gsm_test.jsonl"),
    "unnamed": ("mine.jsonl", "yours_train.jsonl", "held_out.jsonl", "test.jsonl"),
    "others": ("training.jsonl", "raw.jsonl", "eval.jsonl"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_a_folder_of_splits_only_the_train_split_is_learned_from(tmp_path, layout):
    for name in LAYOUTS[layout]:
        kind = "train" if any(word in name for word in ("train", "mine")) else "held"
        put(tmp_path / name, [{"question": f"{kind} {name}", "answer": "a"}])
    rows = load_rows(str(tmp_path))
    found = [row.messages[0]["content"].split()[0] for row in rows.rows]
    assert found == ["train"] * sum("train" in name or "mine" in name for name in LAYOUTS[layout])
    [note] = rows.notes
    assert "; left out: " in note
    assert f"({tmp_path}:test)" in note
    [of_test] = load_rows(f"{tmp_path}:test").notes
    assert "left out" not in of_test
    assert {row.split()[0] for row in questions(f"{tmp_path}:test")} == {"held"}
    assert questions(f"{tmp_path}::test") == questions(f"{tmp_path}:test")


def test_a_word_in_the_middle_of_a_name_is_no_split(tmp_path):
    put(tmp_path / "unit_test_writing.jsonl", [{"question": "t", "answer": "a"}])
    put(tmp_path / "b.jsonl", [{"question": "b", "answer": "a"}])
    assert questions(tmp_path) == ["b", "t"]


def test_configurations_are_folders(tmp_path):
    for config in ("en", "de"):
        for split in ("train", "test"):
            put(tmp_path / config / f"{split}.jsonl", [{"question": f"{config} {split}", "answer": "a"}])
    assert questions(f"{tmp_path}:de") == ["de train"]
    assert questions(f"{tmp_path}:en:test") == ["en test"]
    refused(tmp_path, "found no data files but the folders de, en", f"as {tmp_path}:de")
    refused(f"{tmp_path}:fr", "found no split or folder of that name; expected one of de, en")
    refused(f"{tmp_path}:de:dev", f"{tmp_path}/de:dev: found no split", "expected one of test, train")


def test_one_inner_folder_is_taken(tmp_path):
    put(tmp_path / "main" / "train-00000-of-00001.parquet")
    assert questions(tmp_path) == ["q0?", "q1?", "q2?"]


def test_splits_of_the_hubs_naming_must_be_chosen_where_none_is_train(tmp_path):
    for split in ("train_sft", "test_sft", "train_gen"):
        put(tmp_path / "data" / f"{split}-00000-of-00001.parquet", [{"question": split, "answer": "a"}])
    refused(tmp_path, "found the splits test_sft, train_gen, train_sft", f"name a split, as {tmp_path}:train_gen")
    assert questions(f"{tmp_path}:train_sft") == ["train_sft"]


def test_the_only_split_with_train_in_its_name_is_learned_from(tmp_path):
    saved = {"test_sft": datasets.Dataset.from_list(OTHERS), "train_sft": datasets.Dataset.from_list(ROWS)}
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "talks")
    assert questions(tmp_path / "talks") == ["q0?", "q1?", "q2?"]
    datasets.DatasetDict({"test_sft": saved["test_sft"], "test_gen": saved["test_sft"]}).save_to_disk(tmp_path / "held")
    refused(tmp_path / "held", "found only held-out rows (test_gen, test_sft)")


def test_held_out_rows_alone_are_not_learned_from(tmp_path):
    put(tmp_path / "test.jsonl")
    put(tmp_path / "dev.jsonl")
    refused(tmp_path, "found only held-out rows (validation, test)", f"as {tmp_path}:validation")


@pytest.mark.parametrize("files", [(), ("a.txt", "b.bin", "c.py"), (".hidden.jsonl", "README.md")])
def test_a_folder_with_nothing_to_read_is_one_line(tmp_path, files):
    for name in files:
        put(tmp_path / name)
    holds = "only a.txt, b.bin, c.py" if "a.txt" in files else "nothing to read"
    refused(tmp_path, f"found {holds}, expected data files (.jsonl", "followed by .gz or .zst", "check the folder")


def test_a_file_in_a_folder_that_is_bad_is_named(tmp_path):
    put(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text("{")
    refused(tmp_path, f"{tmp_path}/b.jsonl:1: found invalid JSON")


def test_a_file_has_no_splits(tmp_path):
    refused(f"{put(tmp_path / 'a.jsonl')}:test", "a.jsonl:test: found a file, which has no splits")


def test_patterns_are_expanded_in_order(tmp_path):
    for name in ("train-2.jsonl", "train-1.jsonl", "test.jsonl", "in/train-3.jsonl", "in/deep/train-4.jsonl"):
        put(tmp_path / name, [{"question": Path(name).stem, "answer": "a"}])
    put(tmp_path / "train-0.txt")
    assert questions(tmp_path / "train-*") == ["train-1", "train-2"]
    assert questions(tmp_path / "train-[2-9].jsonl") == ["train-2"]
    assert questions(tmp_path / "**" / "train-?.jsonl") == ["train-4", "train-3", "train-1", "train-2"]
    [note] = load_rows(str(tmp_path / "train-*")).notes
    assert note.endswith("2 files read (train-1.jsonl, train-2.jsonl); skipped (unknown format): train-0.txt")


def test_a_pattern_reads_held_out_rows_only_where_it_names_them(tmp_path):
    names = ("0.jsonl", "my_train.jsonl", "my_test.jsonl", "dev-1.jsonl", "test_sft-00000-of-00001.jsonl",
             "in/test/0.jsonl", "in/train/0.jsonl")  # fmt: skip
    for name in names:
        put(tmp_path / name, [{"question": name, "answer": "a"}])
    assert questions(tmp_path / "*.jsonl") == ["0.jsonl", "my_train.jsonl"]
    [note] = load_rows(str(tmp_path / "*.jsonl")).notes
    assert note.endswith(
        "2 files read (0.jsonl, my_train.jsonl); left out: dev-1.jsonl (validation), "
        "my_test.jsonl, test_sft-00000-of-00001.jsonl (test)"
    )
    assert questions(tmp_path / "in" / "**" / "*.jsonl") == ["in/train/0.jsonl"]
    assert questions(tmp_path / "in" / "t*" / "0.jsonl") == ["in/train/0.jsonl"]
    assert questions(tmp_path / "*test*.jsonl") == ["my_test.jsonl", "test_sft-00000-of-00001.jsonl"]
    assert questions(tmp_path / "*_test.jsonl") == ["my_test.jsonl"]
    assert questions(tmp_path / "dev-*.jsonl") == ["dev-1.jsonl"]
    assert questions(tmp_path / "**" / "test" / "*.jsonl") == ["in/test/0.jsonl"]
    assert questions(tmp_path / "in" / "test" / "*.jsonl") == ["in/test/0.jsonl"]
    put(tmp_path / "test" / "test-1.jsonl", OTHERS)
    assert questions(tmp_path / "test" / "*.jsonl") == ["other?"]
    refused(tmp_path / "d*.jsonl", "found only held-out rows (dev-1.jsonl)", "to read these, name the files")


def test_patterns_follow_no_loops_and_find_no_hidden_names(tmp_path):
    put(tmp_path / "in" / "a.jsonl")
    put(tmp_path / ".cache" / "b.jsonl")
    put(tmp_path / ".c.jsonl", OTHERS)
    for name in ("loop", "again"):
        (tmp_path / "in" / name).symlink_to(tmp_path)
    (tmp_path / "in" / "link.jsonl").symlink_to(put(tmp_path / "other" / "d.json", OTHERS))
    assert questions(tmp_path / "**" / "*.jsonl") == ["q0?", "q1?", "q2?", "other?"]
    assert questions(tmp_path / ".*.jsonl") == ["other?"]
    for pattern in ("**a/*.jsonl", "***/x", "[/*\0"):
        refused(tmp_path / pattern, "found ", "pattern")


def test_a_pattern_without_a_match_names_what_is_near(tmp_path, monkeypatch):
    put(tmp_path / "train-1.jsonl")
    monkeypatch.chdir(tmp_path)
    refused("tran-*.jsonl", "tran-*.jsonl: found no file that matches", f"looked in {tmp_path}; there is train-1.jsonl")
    refused("nowhere/*.jsonl", "found no file that matches", "no folder nowhere")
    refused("train.jsonl", "train.jsonl: found no such file", "did you mean train-1.jsonl?")
    (tmp_path / "x.txt").touch()
    refused("*.txt", "found only x.txt, expected files in one of the formats")


def test_a_file_that_is_named_twice_is_read_once(tmp_path):
    one, two = put(tmp_path / "one.jsonl"), put(tmp_path / "two.jsonl", OTHERS)
    (tmp_path / "link.jsonl").symlink_to(one)
    for sources in ([one, tmp_path / "*.jsonl"], [tmp_path, one], [tmp_path / "link.jsonl", one, two, two]):
        rows = load_rows([str(source) for source in sources])
        assert len(rows.rows) == 4
        assert any("named more than once, and read once" in note for note in rows.notes)
    assert load_rows([str(one), str(two)]).notes == ()


def test_the_identity_depends_on_the_content_of_all_files_in_order(tmp_path):
    put(tmp_path / "a.jsonl"), put(tmp_path / "b.jsonl", OTHERS)
    both = load_rows(str(tmp_path)).identity.fingerprint
    assert load_rows(str(tmp_path / "*.jsonl")).identity.fingerprint == both
    named = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    assert load_rows(named).identity.fingerprint == both
    assert load_rows(named[::-1]).identity.fingerprint != both
    put(tmp_path / "b.jsonl", [{"question": "other!", "answer": "b"}])
    assert load_rows(str(tmp_path)).identity.fingerprint != both


def test_sources_on_this_machine_are_recorded_by_their_whole_path(tmp_path, monkeypatch):
    put(tmp_path / "d" / "test.jsonl")
    monkeypatch.chdir(tmp_path)
    assert whole_source("d") == str(tmp_path / "d")
    assert whole_source("d:test") == f"{tmp_path}/d:test"
    assert whole_source("d/*.jsonl") == f"{tmp_path}/d/*.jsonl"
    assert whole_source("owner/name:main:train[:50]") == "owner/name:main:train[:50]"
    settings = JobSettings.of("model", DataSettings(data=("d/t*.jsonl",), eval_data=("d:test",)))
    assert settings.sections()["data"]["eval_data"] == [f"{tmp_path}/d:test"]


# --- what save_to_disk writes


def test_saved_data_sets_are_read(tmp_path):
    datasets.Dataset.from_list(ROWS).with_format("numpy").save_to_disk(tmp_path / "one")
    rows = load_rows(str(tmp_path / "one"))
    assert [row.messages[0]["content"] for row in rows.rows] == ["q0?", "q1?", "q2?"]
    assert rows.rows[1].where == f"{tmp_path}/one row 2"
    other = datasets.Dataset.from_list(ROWS).map(lambda row: {"answer": row["answer"] + "!"})
    other.save_to_disk(tmp_path / "two")
    assert load_rows(str(tmp_path / "two")).identity.fingerprint != rows.identity.fingerprint
    refused(f"{tmp_path}/one:test", "one saved data set without splits")


def test_a_saved_dict_has_splits(tmp_path):
    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(OTHERS)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "dict")
    rows = load_rows(f"{tmp_path}/dict")
    assert len(rows.rows) == 3
    assert rows.notes[0].endswith(f"1 file read (train); left out: test ({tmp_path}/dict:test)")
    assert questions(f"{tmp_path}/dict:test") == ["other?"]
    refused(f"{tmp_path}/dict:dev", "found no split or folder of that name; expected one of test, train")
    assert find(f"{tmp_path}/dict/test").paths == (tmp_path / "dict" / "test",)


def test_a_damaged_saved_data_set_is_one_line(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path)
    [arrow] = tmp_path.glob("*.arrow")
    whole = arrow.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"\0" * 100):
        arrow.write_bytes(content)
        refused(tmp_path, "found a saved data set that cannot be read", "save or copy it again")
    arrow.unlink()
    refused(tmp_path, "found a saved data set that cannot be read")


class Canary:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_no_code_of_a_data_set_runs(tmp_path):
    canary = tmp_path / "canary"
    folder = tmp_path / "rows"
    put(folder / "train.jsonl")
    for name in ("rows.py", "dataset.py", "__init__.py"):
        (folder / name).write_text(f"open({str(canary)!r}, 'w')")
    for name in ("state.pkl", "data.pickle", "cache.pt"):
        (folder / name).write_bytes(pickle.dumps(Canary(canary)))
    assert len(questions(folder)) == 3
    refused(folder / "rows.py", "found the suffix '.py'")
    refused(folder / "data.pickle", "found the suffix '.pickle'")
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    [arrow] = (folder / "saved").glob("*.arrow")
    arrow.write_bytes(pickle.dumps(Canary(canary)))
    refused(folder / "saved", "cannot be read")
    assert not canary.exists()
