"""Habits of the house, checked: documented commands, complete names, one version, a lock that covers everything."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import aletheia
from aletheia.cli.main import app
from aletheia.data.stdlib_task import write_stdlib_task

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_public_name_exists_and_is_documented():
    assert len(set(aletheia.__all__)) == len(aletheia.__all__)
    for name in set(aletheia.__all__) - {"__version__"}:
        assert getattr(aletheia, name).__doc__
    names = set(re.findall(r"aletheia\.(\w+)\(", (ROOT / "README.md").read_text()))
    assert {"probe", "plan", "adapt", "train", "report"} <= names <= set(aletheia.__all__)


def test_importing_the_package_loads_no_torch():
    code = "import sys, aletheia; print('torch' in sys.modules, aletheia.Plan.__name__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "Plan", "False"]


def test_every_command_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    for command in app.registered_commands:
        assert f"aletheia {command.name}" in readme


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, model_folder, data_file):
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(model_folder)).replace("steps=150", "steps=2")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text(data_file.read_text())
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "report.html").exists()
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_the_changelog_is_at_this_version():
    versions = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == aletheia.__version__ == PROJECT["version"]


def test_every_make_target_of_the_readme_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set(re.findall(r"\bmake ([a-z-]+)", (ROOT / "README.md").read_text()))
    assert {"demo", "test"} <= used <= targets


def test_the_lock_pins_every_dependency():
    locked = set(re.findall(r"^([\w.-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    locked = {name.lower().replace("_", "-") for name in locked}
    extras = PROJECT["optional-dependencies"]
    for requirement in PROJECT["dependencies"] + extras["demo"] + extras["dev"]:
        assert re.match(r"[\w.-]+", requirement)[0].lower() in locked


def test_decisions_are_numbered_without_gaps():
    numbers = [int(path.name[:4]) for path in sorted((ROOT / "docs" / "decisions").glob("*.md"))]
    assert numbers == list(range(1, len(numbers) + 1))


def test_the_demo_task_is_real_and_its_held_out_rows_come_from_other_modules(tmp_path):
    train, held_out = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in write_stdlib_task(tmp_path, 240, 64, 0)
    )
    assert len(train) == 240
    assert len(held_out) == 64
    assert not {row["module"] for row in train} & {row["module"] for row in held_out}
    for row in train + held_out:
        assert row["completion"] not in row["prompt"]
        assert "def " in row["prompt"]
