"""What lies where caches lie: foreign, empty and damaged things block nothing, and are named once."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from test_cache import BOUNDARY, adapted, disk, filled

import aletheia
from aletheia.anatomy.versions import PACKAGES, computing_versions, sources_sha256
from aletheia.errors import CacheError
from aletheia.prefix import choose
from aletheia.prefix.cache_folders import stored_caches
from aletheia.prefix.choose import CachePlace, open_cache, prefix_key

NAME = "k" * 32  # of the folder that disk() opens


def loop(path):
    """A link that leads to itself."""
    path.symlink_to(path)


IN_ITS_PLACE = {
    "an empty file": lambda path: path.write_text(""),
    "a link that leads to itself": loop,
    "a link that leads nowhere": lambda path: path.symlink_to(path.with_name("nowhere")),
    "a pipe": os.mkfifo,
}


@pytest.mark.parametrize("case", IN_ITS_PLACE)
def test_a_thing_with_the_name_of_a_cache_is_passed_over(tmp_path, examples, case):
    IN_ITS_PLACE[case](tmp_path / NAME)
    cache, rows = disk(tmp_path), examples.examples
    assert cache.notes == [f"{tmp_path / NAME} is not a folder and is skipped"]
    filled(cache, adapted(), rows)
    again = disk(tmp_path)
    assert again.folder == cache.folder == tmp_path / f"{NAME}-1"
    assert not again.missing(rows)
    assert os.path.lexists(tmp_path / NAME)  # nothing of others is removed


MARKERS = {
    "empty": lambda path: path.write_text(""),
    "half-written": lambda path: path.write_bytes(path.read_bytes()[:60]),
    "of another program": lambda path: path.write_text('{"name": "vite"}'),
    "flipped": lambda path: path.write_text(path.read_text().replace("tiny", "tidy")),
    "no text": lambda path: path.write_bytes(b"\xff\x00"),
}


@pytest.mark.parametrize("case", MARKERS)
def test_a_damaged_marker_is_written_anew_and_entries_stay(tmp_path, examples, case):
    cache, rows = disk(tmp_path), examples.examples
    filled(cache, adapted(), rows)
    cache.close()
    MARKERS[case](tmp_path / NAME / "cache.json")
    cache = disk(tmp_path)
    assert cache.notes == [f"{tmp_path / NAME / 'cache.json'} was damaged and is rewritten"]
    assert not cache.missing(rows)
    assert disk(tmp_path).notes == []
    assert [stored.folder for stored in stored_caches(tmp_path)] == [cache.folder]


def test_a_folder_where_the_marker_belongs_is_passed_over(tmp_path, examples):
    (tmp_path / NAME / "cache.json").mkdir(parents=True)
    cache = disk(tmp_path)
    assert cache.notes == [f"{tmp_path / NAME / 'cache.json'} is not a file, so {tmp_path / NAME} is skipped"]
    filled(cache, adapted(), examples.examples)
    assert not disk(tmp_path).missing(examples.examples)


def test_files_named_like_entries_are_passed_over_and_named_once(tmp_path, examples):
    cache, rows = disk(tmp_path), examples.examples
    filled(cache, adapted(), rows)
    stored = {row.where: cache.get(row).clone() for row in rows}
    whole = next(cache.folder.glob("*.idx")).read_bytes()
    cache.close()
    (cache.folder / "a.idx").mkdir()
    loop(cache.folder / "b.idx")
    os.mkfifo(cache.folder / "c.idx")
    (cache.folder / "d.idx").write_bytes(b"\xff\xfe 1 2 3\n" + b"9" * 5000 + b" 1 2 3\n" + "² ² ² ²\n".encode() + whole)
    (cache.folder / "d.bin").mkdir()
    (cache.folder / "e.idx").write_bytes(b"".join(line[:33] + b"0 0 0\n" for line in whole.splitlines()))
    (cache.folder / "e.bin").write_bytes(b"")
    (cache.folder / "f.idx").write_bytes(whole)
    loop(cache.folder / "f.bin")
    cache = disk(tmp_path)
    cache.refresh()
    assert sorted(note.partition(" ")[0][-5:] for note in cache.notes) == ["a.idx", "b.idx", "c.idx"]
    assert not cache.missing(rows)
    assert all(torch.equal(cache.get(row), stored[row.where]) for row in rows)


def test_what_was_passed_over_is_said_with_the_place(tmp_path):
    model = adapted()
    (tmp_path / prefix_key(model, BOUNDARY)[:32]).write_text("")
    cache, decision = open_cache(model, BOUNDARY, torch.float32, CachePlace("disk", tmp_path), lambda: 0.0)
    assert decision.reason.startswith(f"as asked, in {cache.folder}; ")
    assert decision.reason.endswith("is not a folder and is skipped")


def test_something_under_all_names_is_one_clear_line(tmp_path):
    for number in range(10):
        (tmp_path / (f"{NAME}-{number}" if number else NAME)).write_text("")
    with pytest.raises(CacheError, match=r"have all names for this cache, first .*; move them elsewhere"):
        disk(tmp_path)


def test_the_command_names_what_is_no_cache_and_keeps_what_is_used(run, tmp_path):
    root = tmp_path / "caches"
    held, unused = disk(root), disk(root, key="b" * 64)
    unused.close()
    (root / "notes.txt").write_text("mine")
    (root / "empty").mkdir()
    loop(root / "loop")
    (root / "torn").mkdir()
    (root / "torn" / "cache.json").write_text("{")
    code, out, err = run("cache", "--cache-dir", root, "--json")
    assert (code, len(json.loads(out))) == (0, 2)
    assert err == f"note: skipped in {root}, because they are not prefix caches: empty, loop, notes.txt and 1 more\n"
    code, out, err = run("cache", "--cache-dir", root, "--delete-unused", 0)
    assert code == 0
    assert f"{held.folder} is in use by a run and is kept" in err
    assert not unused.folder.exists()
    assert {path.name for path in root.iterdir()} == {held.folder.name, "notes.txt", "empty", "loop", "torn"}
    assert run("cache", "--cache-dir", root / "notes.txt")[0] == 0


def test_the_key_holds_the_versions_of_everything_that_computes(monkeypatch, tmp_path):
    """Packages, kernels and the build of torch; ours by its sources, so that an edit computes anew."""
    assert {"aletheia-tune", "torch", "transformers", "peft", "bitsandbytes"} <= set(PACKAGES)
    known = computing_versions()
    assert known["torch build"] == torch.__version__
    model = adapted()
    key = prefix_key(model, BOUNDARY)
    for name in known:
        monkeypatch.setattr(choose, "computing_versions", lambda name=name: known | {name: "another"})
        assert prefix_key(model, BOUNDARY) != key
    ours = Path(aletheia.__file__).parent
    shutil.copytree(ours, tmp_path / "aletheia")
    assert sources_sha256(tmp_path / "aletheia") == known["sources"]
    (tmp_path / "aletheia" / "reporting" / "page.py").write_text("")  # has no part in it
    assert sources_sha256(tmp_path / "aletheia") == known["sources"]
    with (tmp_path / "aletheia" / "execution" / "fast.py").open("a") as file:
        file.write("# edited\n")
    assert sources_sha256(tmp_path / "aletheia") != known["sources"]
