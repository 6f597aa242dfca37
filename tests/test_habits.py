"""Habits of the house, checked: documented commands, complete names, one version, a lock that covers everything."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import aletheia
from aletheia.data.stdlib_task import write_stdlib_task

ROOT = Path(__file__).parent.parent
SOURCES = {
    str(path.relative_to(ROOT / "src")): path.read_text() for path in sorted((ROOT / "src" / "aletheia").rglob("*.py"))
}
WITHOUT_TORCH = (
    *("settings", "anatomy.settings", "data.settings", "training.settings", "job.settings", "planning.make"),
    *("runs.schema", "cli.config", "cli.app", "reporting.page", "lab.statistics.results"),
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_public_name_exists_and_is_documented():
    assert len(set(aletheia.__all__)) == len(aletheia.__all__)
    for name in set(aletheia.__all__) - {"__version__"}:
        assert getattr(aletheia, name).__doc__


def test_importing_the_package_loads_no_torch():
    code = "import sys, aletheia; print('torch' in sys.modules, aletheia.Plan.__name__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "Plan", "False"]


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_settings_plans_and_pages_load_no_torch(module):
    code = f"import sys, aletheia.{module}; print(sorted({{'torch', 'transformers', 'peft'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]"]


def test_type_checkers_see_the_names_that_are_imported_on_first_use():
    tree = ast.parse(SOURCES["aletheia/__init__.py"])
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    homes = {f"{node.module}.{name.name}" for node in block.body for name in node.names}
    assert homes == {f"{home}.{name}" for name, home in aletheia._HOMES.items()}
    assert set(aletheia.__all__) == {*aletheia._HOMES, "__version__"}


def _functions():
    """Every function of the package: its file, its node, and whether it is a command, whose parameters are options."""
    for file, text in SOURCES.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                annotations = [ast.unparse(arg.annotation or ast.Constant("")) for arg in node.args.args]
                is_command = file.startswith("aletheia/cli/") and any("typer." in one for one in annotations)
                yield file, node, is_command


def _body_lines(function):
    first = function.body[1] if ast.get_docstring(function) and len(function.body) > 1 else function.body[0]
    return function.body[-1].end_lineno - first.lineno + 1


def _parameters(function):
    given = function.args
    names = [arg.arg for arg in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def test_files_and_functions_are_short_and_take_few_parameters():
    assert [file for file, text in SOURCES.items() if len(text.splitlines()) > 400] == []
    assert [f"{file}: {node.name}" for file, node, _ in _functions() if _body_lines(node) > 60] == []
    public = [
        (file, node)
        for file, node, is_command in _functions()
        if not is_command and (node.name == "__init__" or not node.name.startswith("_"))
    ]
    assert [f"{file}: {node.name}" for file, node in public if len(_parameters(node)) > 8] == []


def test_every_setting_has_a_help_text():
    fields = [
        (file, node)
        for file, text in SOURCES.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "option"
    ]
    assert len(fields) > 50
    for file, node in fields:
        parts = ast.walk(node.args[1]) if len(node.args) > 1 else ()  # a text, or an f-string of several
        text = "".join(str(part.value) for part in parts if isinstance(part, ast.Constant))
        assert re.match(r"[A-Z].{10,}", text), f"{file}:{node.lineno}: {text!r}"


def test_messages_of_the_library_name_no_flags_of_the_command_line():
    flags = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
    for file, text in SOURCES.items():
        if file.startswith("aletheia/cli/"):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Raise):
                told = " ".join(str(part.value) for part in ast.walk(node) if isinstance(part, ast.Constant))
                assert not flags.search(told), f"{file}:{node.lineno}: {told}"


def test_the_changelog_is_at_this_version():
    versions = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == aletheia.__version__ == PROJECT["version"]


def test_the_lock_pins_every_dependency():
    locked = set(re.findall(r"^([\w.-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    locked = {name.lower().replace("_", "-") for name in locked}
    extras = PROJECT["optional-dependencies"]
    for requirement in PROJECT["dependencies"] + extras["demo"] + extras["dev"] + extras["docs"]:
        assert re.match(r"[\w.-]+", requirement)[0].lower() in locked


def _requirements():
    listed = [*PROJECT["dependencies"], *chain.from_iterable(PROJECT["optional-dependencies"].values())]
    return [Requirement(one) for one in listed]


def _bounds(operator):
    """The version after ``operator`` of each package that has one."""
    return {
        requirement.name.lower(): Version(bound.version)
        for requirement in _requirements()
        for bound in requirement.specifier
        if bound.operator == operator
    }


def test_the_oldest_versions_tested_are_the_lower_bounds():
    text = (ROOT / "requirements-oldest.txt").read_text()
    pins = {name: Version(version) for name, version in re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE)}
    bounds = _bounds(">=")
    del bounds["liger-kernel"]  # needs triton, which the tests on a processor go without
    assert pins == bounds
    assert next(iter(pins)) == "torch"  # which build it is decides what else it needs
    assert len(pins) == len([line for line in text.splitlines() if not line.startswith("#")])


@pytest.mark.parametrize("name", ["torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "trl"])
def test_the_training_stack_ends_before_the_next_major_version(name):
    text = (ROOT / "requirements.lock").read_text()
    locked = Version(re.search(rf"^{name}==(\S+)$", text, re.MULTILINE)[1])
    assert _bounds("<")[name] == Version(str(locked.major + 1))


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
