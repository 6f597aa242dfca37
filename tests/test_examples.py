"""The examples run as they stand, on a tiny model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import count_rows

import aletheia
from aletheia.job.settings import JobSettings
from aletheia.planning.targets import DEFAULT_TARGET

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = ("trl_sft.py", "trainer.py")


@pytest.fixture
def place(tmp_path, model_folder, monkeypatch):
    """A folder with rows of a prompt and a completion, a model, and the commands of this environment in reach."""
    rows = [{"prompt": row["question"], "completion": row["answer"]} for row in count_rows(24)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(model_folder, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALETHEIA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def make_plan():
    base = aletheia.load("model", "float32")
    scores = aletheia.probe(base.model, aletheia.load_data("train.jsonl", base.tokenizer), batches=2)
    aletheia.plan(scores, policy="last", freeze_after=0.25).write("plan.json")


def done(*command):
    ended = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_trains_and_saves_an_adapter(script, place):
    pytest.importorskip("trl")
    make_plan()
    told = done(sys.executable, EXAMPLES / script, "model", "train.jsonl", "plan.json", "out")
    assert (place / "out" / "adapter_model.safetensors").exists()
    assert script != "trainer.py" or "prefix cache: memory" in told


def test_the_job_of_the_example_runs(run, place):
    code, _, told = run("train", "model", "--config", EXAMPLES / "run.yaml", "--out", "run", "--dtype", "float32")
    assert code == 0, told
    assert aletheia.Run.read("run").metrics.settings.keep == "best"


@pytest.mark.slow
def test_two_processes_train_on_this_machine(place):
    done(EXAMPLES / "two_cpu_processes.sh", "model", "train.jsonl", "out")
    assert aletheia.Run.read("out/command").metrics.settings.processes == 2
    state = json.loads((place / "out/trl/checkpoint-9/trainer_state.json").read_text())
    assert state["max_steps"] == 9  # three epochs of 24 rows, 2 x 4 at a time


@pytest.mark.parametrize("name", ["run.yaml", "one_node_8_gpus.yaml"])
def test_the_settings_of_an_example_are_accepted(name, place):
    sections = yaml.safe_load((EXAMPLES / name).read_text())
    JobSettings.of("model", sections["data"], sections.get("plan"), sections["training"])


def test_what_an_example_calls_the_default_is_one():
    line = next(line for line in (EXAMPLES / "run.yaml").read_text().splitlines() if "# the default" in line)
    assert yaml.safe_load(line) == {"target": DEFAULT_TARGET}


@pytest.mark.parametrize("path", sorted(EXAMPLES.iterdir()), ids=lambda path: path.name)
def test_an_example_says_what_it_shows_and_how_to_run_it(path):
    text = path.read_text()
    assert text.startswith(("#", '"""'))
    assert f"examples/{path.name}" in text
    if path.suffix == ".sh":
        assert subprocess.run(["sh", "-n", path], check=False).returncode == 0
