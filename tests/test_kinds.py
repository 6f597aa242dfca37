"""What lies at a path is seen from names and first bytes; nothing is parsed, and nothing is raised."""

import gzip
import json
import os

import pytest

from aletheia.kinds import INSTEAD, USE, WHAT, kind_of, mistaken, near


def sealed(name: str) -> str:
    return json.dumps({"format": f"aletheia-{name}", "version": 2, "sha256": ""}, indent=1)


FILES = {
    "rows.jsonl": ("{}", "rows"),
    "rows.CSV": ("a,b\n", "rows"),
    "rows.parquet": ("PAR1", "rows"),
    "about.json": ('{"text": "the format is \\"format\\": \\"aletheia-plan\\""}', "rows"),
    "config.json": ('{"text": "rows that happen to be called so"}', "rows"),
    "scores.json": (sealed("scores"), "scores"),
    "plan.json": (sealed("plan"), "plan"),
    "metrics.json": (sealed("metrics"), "metrics"),
    "later.json": (sealed("of-a-later-release"), None),
    "run.yaml": ("data: x", "settings"),
    "weights.safetensors": ("", "model file"),
    "model.gguf": ("GGUF", "model"),
    "report.html": ("<html>", "page"),
    "notes.txt": ("hello", None),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_known_by_name_or_first_bytes(tmp_path, name):
    text, kind = FILES[name]
    (tmp_path / name).write_text(text)
    assert kind_of(tmp_path / name) == kind


def test_packed_rows_are_rows(tmp_path):
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    assert kind_of(tmp_path / "rows.jsonl.gz") == "rows"


def test_a_folder_is_known_by_what_it_holds(tmp_path):
    for folder, files, kind in (
        ("run", {"metrics.json": sealed("metrics"), "adapter_config.json": "{}"}, "run"),
        ("adapter", {"adapter_config.json": "{}", "adapter_model.safetensors": ""}, "adapter"),
        ("model", {"config.json": '{"model_type": "llama"}'}, "model"),
        ("evaluation", {"eval.json": "{}"}, "evaluation"),
        ("campaign", {"campaign.db": ""}, "campaign"),
        ("rows", {"train.jsonl": "{}", "config.json": "{}"}, "rows"),
        ("no config", {"tokenizer.json": "{}", "model.safetensors": ""}, None),
        ("empty", {}, None),
    ):
        (tmp_path / folder).mkdir()
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text)
        assert kind_of(tmp_path / folder) == kind
    assert kind_of(tmp_path / "model" / "config.json") == "model file"
    stopped = tmp_path / "stopped"
    (stopped / "checkpoints").mkdir(parents=True)
    (stopped / ".lock").write_text("1")
    assert kind_of(stopped) == "stopped run"


def test_what_cannot_be_seen_is_not_known(tmp_path):
    for path in (tmp_path / "absent", tmp_path / ("x" * 300), tmp_path / "a\0b"):
        assert kind_of(path) is None
        assert mistaken(path, "a plan file", "plan") is None
    assert near(tmp_path / "no-folder" / "x") == ""
    os.mkfifo(tmp_path / "pipe.jsonl")  # must not be waited for
    assert kind_of(tmp_path / "pipe.jsonl") is None


def test_every_message_is_whole(tmp_path):
    """Every kind has its words, and a remedy names the path as a shell takes it."""
    assert WHAT.keys() == USE.keys()
    assert {found for _, found in INSTEAD} <= WHAT.keys()
    (tmp_path / "my rows.jsonl").write_text("{}")
    path = tmp_path / "my rows.jsonl"
    assert mistaken(path, "a scores file", "scores") == (
        f"{path} holds rows of data; expected a scores file; to make them: aletheia probe MODEL --data '{path}' --out "
        "scores.json"
    )
    assert mistaken(path, "rows of data", "rows") is None


def test_names_that_are_alike_are_offered(tmp_path):
    for name in ("train.jsonl", "trainer.txt", "scores.json"):
        (tmp_path / name).write_text("{}")
    assert near(tmp_path / "trian.jsonl", "rows") == f"; did you mean {tmp_path / 'train.jsonl'}?"
    assert near(tmp_path / "other.jsonl", "rows") == ""
