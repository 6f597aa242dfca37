"""Files made to do harm end in one line, quickly; no command asks a question or runs a model's own code by itself."""

import io
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import hostile_artefacts
import pytest
import torch
from tiny import make_tokenizer

import aletheia
from aletheia.errors import ModelError, TrainingError
from aletheia.runs.manifest import FileRecord, Manifest, read_manifest, verified, write_manifest

COMMANDS = {
    "inspect": ("inspect", "{model}"),
    "probe": ("probe", "{model}", "--data", "{data}", "--out", "s.json", "--batches", "1", "--no-calibrate"),
    "probe streamed": ("probe", "{model}", "--data", "{data}", "--out", "s.json", "--stream"),
    "train": ("train", "{model}", "--data", "{data}", "--out", "run", "--steps", "1"),
    "train streamed": ("train", "{model}", "--data", "{data}", "--out", "run", "--steps", "1", "--stream"),
    "eval": ("eval", "{model}", "--out", "e", "--tasks", "heldout", "--eval-data", "{data}"),
    "train from a file": ("train", "--config", "{config}", "--out", "run"),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    return hostile_artefacts.artefacts(*hostile_artefacts.good(folder), folder / "tried")


def test_every_hostile_artefact_ends_in_one_line_within_five_seconds(cases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(cases) >= 260
    folder = cases[0][1].parent
    for name, place, attempt in cases:
        seconds, answer = hostile_artefacts.tried(attempt, place)
        assert "Error: " in answer, (name, answer)
        assert not answer.startswith("NOT OURS"), (name, answer)
        assert "\n" not in answer, (name, answer)
        assert len(answer) < 1000, (name, answer)
        assert seconds < 5, (name, seconds)
        assert not list(place.rglob("canary")), name
        assert {path.name for path in place.iterdir()} <= {
            "m",
            "a",
            "f.yaml",
            "m.gguf",
            "p.json",
            "s.json",
            "outside.safetensors",
        }
    assert {path.name for path in folder.iterdir()} == {place.name for _, place, _ in cases}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_hostile_artefacts_take_less_than_two_gigabytes():
    tests = Path(hostile_artefacts.__file__).parent
    command = [sys.executable, hostile_artefacts.__file__]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tried"] >= 260
    assert found["peak_kib"] < 2 * 2**20
    assert "EXECUTED" not in done.stdout


@pytest.fixture
def own_code(tmp_path, model_folder):
    """A model that only its own code can load; the code leaves a file named canary."""
    return hostile_artefacts._code(tmp_path / "own" / "m", model_folder)


def asked(name, model, data_file, folder):
    config = folder / "own" / "run.yaml"
    config.write_text(json.dumps({"model": {"name": str(model), "trust_remote_code": False}, "data": str(data_file)}))
    return [part.format(model=model, data=data_file, config=config) for part in COMMANDS[name]]


@pytest.mark.parametrize("stdin", ["open", "closed", "yes"])
@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_asks_or_runs_a_models_own_code(run, own_code, data_file, tmp_path, monkeypatch, name, stdin):
    def ask(*prompt):
        raise AssertionError(f"asked {prompt}")

    monkeypatch.setattr("builtins.input", ask)
    ends = pty.openpty() if stdin == "open" else ()
    stream = os.fdopen(ends[1], "r", closefd=False) if ends else io.StringIO("y\n" * 1000 if stdin == "yes" else "")
    if stdin == "closed":
        stream.close()
    monkeypatch.setattr("sys.stdin", stream)
    code, out, err = run(*asked(name, own_code, data_file, tmp_path))
    for end in ends:
        os.close(end)
    assert code == 2
    assert "--trust-remote-code" in err
    assert "error: " in err.splitlines()[-1]
    assert "[y/N]" not in out + err
    assert not (own_code / "canary").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_yes_on_standard_input_runs_nothing(own_code, data_file, tmp_path, command):
    arguments = asked(command, own_code, data_file, tmp_path)
    code = "import sys; from aletheia.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], input="y\n" * 1000, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--trust-remote-code" in done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
    assert not (own_code / "canary").exists()


def test_a_models_own_code_runs_where_it_is_trusted(run, own_code, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    code, _, err = run("inspect", own_code, "--trust-remote-code")
    assert code == 0, err
    assert (own_code / "canary").exists()
    base = aletheia.load(str(own_code), "float32", trust_remote_code=True)
    assert type(base.model).__name__ == "Model"
    with pytest.raises(ModelError, match="trust_remote_code"):
        aletheia.load(str(own_code))


def test_a_model_that_transformers_knows_is_loaded_without_its_code(tmp_path, model_folder):
    folder = hostile_artefacts._code(tmp_path / "m", model_folder, model_type="llama")
    assert type(aletheia.load(str(folder)).model).__name__ == "LlamaForCausalLM"
    assert aletheia.inspect(str(folder)).layer_count == 4
    assert not (folder / "canary").exists()


def test_pickles_are_read_only_where_they_are_allowed(tmp_path, model_folder):
    from tiny import make_model

    make_model().save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save(make_model().state_dict(), tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model.bin is a pickle.*`allow_pickle`"):
        aletheia.load(str(tmp_path / "m"))
    loaded = aletheia.load(str(tmp_path / "m"), "float32", allow_pickle=True)
    assert torch.equal(loaded.model.lm_head.weight, make_model().lm_head.weight)


def test_pickles_in_somebody_elses_checkpoint_run_nothing(run, model_folder, data_file, tmp_path):
    asked = ("train", model_folder, "--data", data_file, "--max-length", 64, "--dtype", "float32", "--save-steps", 1)
    asked = (*asked, "--steps", 2, "--evaluations", 1, "--freeze-after", 0, "--eval-rows", 1)
    code, _, err = run(*asked, "--out", "run")
    assert code == 0, err
    whole = tmp_path / "run" / "checkpoints" / "checkpoint-1"
    about = read_manifest(whole)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.bin"):
        checkpoint = tmp_path / name / "checkpoints" / "checkpoint-1"
        shutil.copytree(whole.parent, checkpoint.parent)
        torch.save({"a": hostile_artefacts.Canary(tmp_path / "canary")}, checkpoint / name)
        torch.save({"a": hostile_artefacts.Canary(tmp_path / "canary")}, checkpoint / "training_args.bin")
        if name == "adapter_model.bin":
            (checkpoint / "adapter_model.safetensors").unlink()
        write_manifest(checkpoint, about.step, about.about, about.extra)
        code, _, err = run(*asked, "--out", f"on-{name}", "--resume", checkpoint)
        assert code == 2
        assert err.splitlines()[-1].startswith("error: ")
        assert name in err.splitlines()[-1]
        assert not (tmp_path / "canary").exists()


def test_a_manifest_leads_nowhere_else(tmp_path):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    nothing = {"size_bytes": 0, "sha256": "0" * 64}
    for name in ("/dev/zero", "../../../../../dev/zero", "pipe"):
        files = {name: FileRecord(**nothing)}
        (folder / "manifest.json").write_text(Manifest(step=1, files=files, about={}, extra={}).to_json())
        with pytest.raises(TrainingError, match="not a file of this checkpoint"):
            verified(folder)
