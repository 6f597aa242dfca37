"""Files that are not as they were written: every kind is found out, in one line, or its content is what it was."""

import json
import random
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import edited, make_model, make_tokenizer

import aletheia
from aletheia.anatomy.load import Loaded
from aletheia.cli.config import read_config
from aletheia.data.examples import Example
from aletheia.errors import AletheiaError, ArtifactError
from aletheia.files import is_sealed, read_sealed, sealed_json
from aletheia.lab.campaign.job import main as run_job
from aletheia.lab.campaign.spec import parse_campaign
from aletheia.lab.campaign.store import SEAL_FILE, STORE_FILE, Record, Row, Store
from aletheia.lab.evaluation.evaluate import eval_settings, evaluate
from aletheia.lab.evaluation.journal import JOURNAL_FILE, Journal
from aletheia.lab.evaluation.record import Evaluated
from aletheia.planning.make import plan
from aletheia.planning.plan import Plan
from aletheia.prefix.cache import DiskCache, MemoryCache
from aletheia.prefix.cache_folders import CacheInfo
from aletheia.prefix.fill_streamed import _States
from aletheia.probing.resident import probe
from aletheia.probing.scores import Scores
from aletheia.probing.streamed import _Job
from aletheia.runs.manifest import verified
from aletheia.runs.schema import Run

HEADER = {"settings": {"limit": 3}, "packages": {"torch": "2"}}
INFO = CacheInfo(model="tiny", key="ab" * 32, boundary=1, dtype="float32", width=4)
ROWS = [Example([number, 5, 6], [5, 6, 7], f"row {number}") for number in range(6)]
CAMPAIGN = parse_campaign(
    {
        "kind": "speed", "name": "tiny", "data": "train.jsonl", "rows": 8, "arms": ["uniform", "paper"],
        "models": [{"name": "m0", "path": "here"}], "seeds": [0, 1],
    },
    "spec",
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A file that we write, and how it is read: raises, or gives what it holds and what was said meanwhile."""

    path: Path
    read: Any
    repairs: bool = False  # what is damaged is computed again, so a reader may give a part of it


@pytest.fixture(scope="module")
def made(tmp_path_factory, model_folder, data_file, examples):
    """One of everything, as the product writes it."""
    home = tmp_path_factory.mktemp("made")
    probe(make_model(), examples, batches=1).write(home / "scores.json")
    plan(Scores.read(home / "scores.json")).write(home / "plan.json")
    data = {"data": [str(data_file)], "max_length": 64, "eval_fraction": 0.1}
    training = {"steps": 2, "batch_size": 2, "evaluations": 1, "save_steps": 2}
    aletheia.fine_tune(str(model_folder), data, home / "run", {"policy": "last"}, training, say=lambda line: None)
    settings = eval_settings(None, None, model="tiny", tasks=["heldout"], eval_data=str(data_file), limit=4)
    base = Loaded(make_model(), make_tokenizer(), None)
    evaluate(base, settings, home / "eval", show_progress=False)
    journal = Journal(home / "journal", HEADER)
    journal.add("mmlu", [0, 1, 2], [[-1.5, -2.25], [-3.5, -0.125], [-4.0, -5.0]])
    journal.add("gsm8k", [0, 1], ["18 ducks", "é\u2028\n"])
    with Store.writing(home / "campaign", CAMPAIGN) as store:
        store.record([Record(Row("m0", "paper", 0), "done", None, {"step_seconds": [0.5, 0.25]})])
        store.record([Record(Row("m0", "uniform", 1), "failed", "no luck", None)])
    shutil.copytree(home / "campaign", home / "killed")
    (home / "killed" / SEAL_FILE).unlink()
    (home / "job.json").write_text(sealed_json({"rows": [["m0", "paper", 0]], "data_dir": "."}))
    cache = DiskCache(home / "cache", INFO)
    for number, row in enumerate(ROWS):
        cache.put(row, torch.full((3, 4), float(number)))
    cache.close()
    _States(home / "states.safetensors").write(2, torch.ones(1, 3, 4), [True])
    (home / "probe").mkdir()
    _Job(home / "probe", "key").write("states-0", {"0": torch.ones(1, 3, 4)}, {"outputs": None})
    return home


def read_run(path):
    run = Run.read(path.parent)
    return run.metrics, run.plan, run.notes


def read_checkpoint(folder, path):
    return verified(folder).manifest


def read_cache(path):
    cache = DiskCache(path.parent.parent, INFO)
    try:
        lost = {row.where for row in cache.missing(ROWS)}
        return [None if row.where in lost else cache.get(row).tolist() for row in ROWS], tuple(cache.notes)
    finally:
        cache.close()


def read_journal(path):
    return Journal(path.parent, HEADER).answers


def read_store(path):
    store = Store(path)
    try:
        return store.campaign, store.records()
    finally:
        store.close()


def read_states(path):
    states = _States(path)
    return None if states.layer < 0 else (states.layer, states.outputs, states.read(torch.device("cpu")).tolist())


def read_probe(path):
    kept = path.read_bytes()
    job = _Job(path.parent, "key")  # removes what is damaged
    found = (job.read("states-0")["0"].tolist(), job.about("states-0")) if job.has("states-0") else None
    path.write_bytes(kept)
    return found


def kinds(home: Path) -> dict[str, Kind]:
    """Every kind of file, by a name for people."""
    run, checkpoint, cache = home / "run", home / "run" / "checkpoints" / "checkpoint-2", home / "cache" / ("ab" * 16)
    found = {"scores": Kind(home / "scores.json", Scores.read), "plan": Kind(home / "plan.json", Plan.read)}
    of_run = sorted(path for path in run.iterdir() if path.is_file() and path.name != ".lock")
    found |= {f"run/{path.name}": Kind(path, read_run) for path in of_run}
    found["run/config.yaml, as settings"] = Kind(run / "config.yaml", read_config)
    for path in sorted(checkpoint.rglob("*")):
        found[f"checkpoint/{path.name}"] = Kind(path, partial(read_checkpoint, checkpoint))
    for name in ("plan.json", "scores.json"):
        found[f"checkpoints/{name}"] = Kind(run / "checkpoints" / name, Plan.read if "plan" in name else Scores.read)
    for path in sorted((home / "eval").iterdir()):
        found[f"eval/{path.name}"] = Kind(path, lambda path: Evaluated.read(path.parent))
    found |= {
        "journal": Kind(home / "journal" / JOURNAL_FILE, read_journal, repairs=True),
        "store": Kind(home / "campaign" / STORE_FILE, read_store),
        "its seal": Kind(home / "campaign" / SEAL_FILE, lambda path: read_store(path.with_name(STORE_FILE))),
        "store of a killed one": Kind(home / "killed" / STORE_FILE, read_store),
        "job": Kind(home / "job.json", read_sealed),
        "cache/cache.json": Kind(cache / "cache.json", read_cache, repairs=True),
        "cache/bin": Kind(next(cache.glob("*.bin")), read_cache, repairs=True),
        "cache/idx": Kind(next(cache.glob("*.idx")), read_cache, repairs=True),
        "states of a fill": Kind(home / "states.safetensors", read_states, repairs=True),
        "states of a probe": Kind(home / "probe" / "states-0.safetensors", read_probe, repairs=True),
    }
    return found


def damages(whole: bytes, draw: random.Random, flips: int) -> list[tuple[str, bytes]]:
    """Seeded single-bit flips, and the file cut to 0, 1, 50 and 99 percent and by its last byte."""
    found = [(f"cut to {size}", whole[:size]) for size in cut_sizes(len(whole))]
    for at in draw.sample(range(len(whole)), min(flips, len(whole))):
        bit = 1 << draw.randrange(8)
        found.append((f"bit {bit} of byte {at}", whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :]))
    return found


def cut_sizes(size):
    return sorted({0, size // 100, size // 2, size * 99 // 100, size - 1})


def is_part(found: Any, whole: Any) -> bool:
    """Whether what a reader gives is what was written, less what is to be computed again."""
    if isinstance(found, dict):
        return found.items() <= whole.items()
    if found is None:
        return True
    values, _ = found if isinstance(found[0], list) else ([found], ())
    expected, _ = whole if isinstance(whole[0], list) else ([whole], ())
    return all(value in (None, original) for value, original in zip(values, expected, strict=True))


def accepted_in_silence(name: str, kind: Kind, draw: random.Random, flips: int) -> tuple[int, list[str]]:
    """How many damages were tried, and those after which a reader gave something else than what was written."""
    whole, accepted, tried = kind.path.read_bytes(), [], 0
    expected = kind.read(kind.path)
    beside = [kind.path.with_name(kind.path.name + ending) for ending in ("-wal", "-shm")]
    for what, damaged in damages(whole, draw, flips):
        kind.path.write_bytes(damaged)
        tried += 1
        try:
            found = kind.read(kind.path)
        except AletheiaError as error:
            if not str(error).strip() or "\n" in str(error):
                accepted.append(f"{name}: {what}: told in more than a line or in none")
        else:
            same = is_part(found, expected) if kind.repairs else found == expected
            told = name in ("run/README.md", "run/report.html") and found[:2] == expected[:2] and len(found[2]) == 1
            # SQLite's file has bytes that mean nothing, and the beginning of a journal is as good as the whole
            harmless = same and (kind.repairs or name == "store of a killed one")
            if not (told or harmless):
                accepted.append(f"{name}: {what}")
        finally:
            for path in beside:
                path.unlink(missing_ok=True)
            kind.path.write_bytes(whole)
    assert kind.read(kind.path) == expected
    return tried, accepted


def test_no_damage_is_accepted_in_silence(made):
    """All kinds of files, at least 200 damages in all: told in one line, or the content is what it was."""
    draw, tried, accepted = random.Random(0), 0, []
    every = kinds(made)
    assert len(every) >= 25
    for name, kind in every.items():
        count, found = accepted_in_silence(name, kind, draw, flips=6)
        tried, accepted = tried + count, accepted + found
    assert accepted == []
    assert tried >= 200


@pytest.mark.slow
def test_no_byte_of_any_file_is_accepted_in_silence(made):
    """A bit of every byte of what is small, of 200 bytes of what is not."""
    accepted = []
    for name, kind in kinds(made).items():
        flips = 2000 if kind.path.stat().st_size < 2000 else 200
        accepted += accepted_in_silence(name, kind, random.Random(name), flips)[1]
    assert accepted == []


def flip(path, at=None):
    """Change one bit in the middle of a file."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2 if at is None else at] ^= 4
    path.write_bytes(raw)


@pytest.fixture
def copy(made, tmp_path):
    """One of everything, to be damaged."""
    shutil.copytree(made, tmp_path / "made")
    return tmp_path / "made"


COMMANDS = {
    "plan": ("scores.json", "plan {home}/scores.json --out new.json"),
    "show a plan": ("plan.json", "show {home}/plan.json"),
    "train by a plan": ("plan.json", "train {model} --data {data} --plan {home}/plan.json --out new"),
    "show a run": ("run/adapter_model.safetensors", "show {home}/run"),
    "report": ("run/metrics.json", "report {home}/run --out new.html"),
    "repeat a run": ("run/config.yaml", "train --config {home}/run/config.yaml --out new"),
    "evaluate a run": (
        "run/adapter_config.json",
        "eval {model} --adapter {home}/run --tasks heldout --eval-data {data} --out new",
    ),
    "show an evaluation": ("eval/eval.json", "eval --out {home}/eval"),
    "its items": ("eval/items.parquet", "eval --out {home}/eval"),
    "campaign report": ("campaign/campaign.db", "campaign report {home}/campaign --to new"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_command_tells_damage_in_one_line(run, copy, model_folder, data_file, tmp_path, case):
    name, command = COMMANDS[case]
    if name.endswith(".db"):  # a byte of a result, which SQLite itself takes as it comes
        at = (copy / name).read_bytes().index(b"step_seconds")
        flip(copy / name, at)
    else:
        flip(copy / name)
    code, out, err = run(*command.format(home=copy, model=model_folder, data=data_file).split())
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert str(copy / name) in lines[0]
    assert "Traceback" not in err
    assert not (tmp_path / "new" / "metrics.json").exists()


def test_the_card_and_the_page_may_be_rewritten(run, copy):
    for name in ("README.md", "report.html"):
        with (copy / "run" / name).open("a") as file:
            file.write("mine")
    code, _, err = run("show", copy / "run")
    assert code == 0
    assert err.count("was changed after the run") == 2
    (copy / "run" / "README.md").unlink()
    (copy / "run" / "notes.txt").write_text("mine, too")
    assert run("report", copy / "run", "--out", "new.html")[0] == 0


def test_a_run_without_its_manifest_is_no_adapter_of_ours(copy):
    (copy / "run" / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"has no manifest\.json; expected all files of the run"):
        aletheia.load_adapter(make_model(), copy / "run")


def test_a_folder_of_others_may_have_files_of_these_names(copy):
    """A PEFT adapter beside a manifest and metrics of other programs, and a file of settings there."""
    (copy / "run" / "plan.json").unlink()
    for name in ("manifest.json", "metrics.json"):
        (copy / "run" / name).write_text('{"name": "not ours"}')
    flip(copy / "run" / "README.md")
    assert aletheia.load_adapter(make_model(), copy / "run")
    assert read_config(copy / "run" / "config.yaml")["training"]["steps"] == 2


def test_plain_peft_loads_a_run_with_its_manifest(copy, model_folder):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[5, 6, 7]])
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), copy / "run").eval()
    ours = aletheia.load_adapter(AutoModelForCausalLM.from_pretrained(model_folder), copy / "run")
    assert torch.equal(plain(ids).logits, ours(ids).logits)


def test_a_plan_edited_by_hand_is_taken_once_its_seal_is_out(run, copy, model_folder, data_file):
    """With its seal it is refused, and the line says what to do; without, it is followed, and that is said."""
    place = copy / "plan.json"
    text = place.read_text().replace('"rslora": false', '"rslora": true')
    place.write_text(text)
    with pytest.raises(ArtifactError, match="to keep your edits, delete its sha256 line"):
        Plan.read(place)
    place.write_text("".join(line for line in text.splitlines(keepends=True) if not line.startswith(' "sha256"')))
    assert Plan.read(place).settings.rslora
    assert not is_sealed(place)
    code, _, err = run("show", place)
    assert (code, err.count("has no sha256 checksum, so it is treated as edited by hand")) == (0, 1)
    command = ("train", model_folder, "--data", data_file, "--plan", place, "--steps", 1, "--max-length", 64)
    code, _, err = run(*command, "--out", "new")
    assert (code, err.count("has no sha256 checksum, so it is treated as edited by hand")) == (0, 1)
    assert is_sealed(Path("new/plan.json"))
    scores = copy / "scores.json"
    edited(scores)
    with pytest.raises(ArtifactError, match="has no sha256; expected it as it was written"):
        Scores.read(scores)


def test_a_journal_names_the_line_and_keeps_what_a_crash_left_whole(copy):
    place = copy / "journal" / JOURNAL_FILE
    whole = place.read_bytes()
    with place.open("ab") as file:
        file.write(b'{"task": "mmlu", "at": 9, "ans')
    assert len(Journal(place.parent, HEADER).answers) == 5
    assert place.read_bytes() == whole
    lines = whole.splitlines(keepends=True)
    for changed in (
        [*lines[:2], lines[2].replace(b"-0.125", b"-0.225"), *lines[3:]],  # a digit
        [*lines[:2], *lines[3:]],  # a line that is gone
        [*lines[:2], lines[3], lines[2], *lines[4:]],  # two that changed places
    ):
        place.write_bytes(b"".join(changed))
        with pytest.raises(ArtifactError, match=r"answers\.partial\.jsonl:[34]: the line was changed"):
            Journal(place.parent, HEADER)


def test_a_store_that_lost_a_row_or_an_index_is_refused(copy):
    import sqlite3

    for change in (
        "DELETE FROM rows WHERE arm = 'paper'",
        "UPDATE rows SET position = 9 WHERE position = 1",
        "UPDATE rows SET status = 'pending', result = NULL",
        "UPDATE campaign SET spec = replace(spec, 'tiny', 'tidy')",
        "CREATE TRIGGER t AFTER UPDATE ON rows BEGIN DELETE FROM rows; END",
    ):
        place = copy / "campaign" / STORE_FILE
        kept = place.read_bytes()
        with sqlite3.connect(place) as connection:
            connection.execute(change)
        connection.close()
        for seal in (True, False):
            if not seal:
                place.with_name(SEAL_FILE).unlink(missing_ok=True)
            with pytest.raises(AletheiaError, match="was changed after it was written"):
                Store(place)
        place.write_bytes(kept)


def test_a_job_that_was_told_something_else_does_not_run(copy, capfd, monkeypatch):
    monkeypatch.setattr("aletheia.lab.campaign.job._end_with_input", lambda: None)
    flip(copy / "job.json")
    assert run_job(copy) == 2
    assert "job.json was changed after it was written" in capfd.readouterr().out


def test_what_is_damaged_in_a_cache_is_computed_again_at_any_cut(copy):
    """0, 1, 50 and 99 percent of each file: what is left is what was stored, and a refill makes it whole."""
    folder, memory = copy / "cache" / ("ab" * 16), MemoryCache()
    for number, row in enumerate(ROWS):
        memory.put(row, torch.full((3, 4), float(number)))
    for pattern in ("*.bin", "*.idx"):
        place = next(folder.glob(pattern))
        whole = place.read_bytes()
        for share in (0, 1, 50, 99):
            place.write_bytes(whole[: len(whole) * share // 100])
            cache = DiskCache(copy / "cache", INFO)
            lost = cache.missing(ROWS)
            assert lost
            for row in lost:
                cache.put(row, memory.get(row))
            assert all(torch.equal(cache.get(row), memory.get(row)) for row in ROWS)
            cache.close()
            for path in folder.glob("*-*"):
                if path.stem != place.stem:
                    path.unlink()
            place.write_bytes(whole)


def test_a_manifest_of_other_files_is_found_out_though_it_is_whole(copy):
    found = json.loads((copy / "run" / "manifest.json").read_text())
    found["files"]["plan.json"]["sha256"] = "0" * 64
    del found["sha256"]
    head = {name: found.pop(name) for name in ("format", "version")}
    (copy / "run" / "manifest.json").write_text(sealed_json(found, head))
    with pytest.raises(ArtifactError, match=r"plan\.json was changed since it was written"):
        Run.read(copy / "run")
