"""The documentation holds: its commands and Python run, its links lead somewhere, its reference misses nothing."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from conftest import count_rows
from pages import (
    LINKED,
    PAGES,
    ROOT,
    Block,
    anchors_of,
    blocks_of,
    check_yaml,
    links_of,
    remove_outputs,
    run_bash,
)

import aletheia
from aletheia.cli.app import app
from aletheia.settings import Settings

sys.path.insert(0, str(ROOT / "docs"))
import hooks

RUN = ("bash", "sh", "python", "yaml")  # languages of blocks that must hold; output is console, text or json
HUB = ("HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen2.5-0.5B-Instruct", "MODEL")  # stand for the tiny model
READY = ("train.jsonl", "eval.jsonl", "more.jsonl", "scores.json", "plan.json", "run")
COMMANDS = dict(hooks.commands_of(typer.main.get_command(app)))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="session")
def ready(tmp_path_factory, model_folder):
    """A folder with what every block may use: a tiny model, rows, scores, a plan and a finished run."""
    folder = tmp_path_factory.mktemp("ready")
    for name, start, count in (("train", 0, 60), ("eval", 60, 20), ("more", 80, 20)):
        rows = "".join(json.dumps(row) + "\n" for row in count_rows(count, start))
        (folder / f"{name}.jsonl").write_text(rows)
    base = aletheia.load(str(model_folder), "float32")
    data = aletheia.load_data(str(folder / "train.jsonl"), base.tokenizer)
    scores = aletheia.calibrate(base.model, data)
    scores = aletheia.probe(base.model, data).model_copy(update={"timings": scores})
    scores.write(folder / "scores.json")
    aletheia.plan(scores, epochs=3).write(folder / "plan.json")
    aletheia.fine_tune(str(model_folder), str(folder / "train.jsonl"), folder / "run", training={"steps": 4})
    return folder


@pytest.fixture
def place(ready, model_folder, tmp_path, monkeypatch):
    """An empty folder with a copy of what is ready, and the commands of this environment in reach."""
    shutil.copytree(ready, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model").symlink_to(model_folder)
    for name in HUB:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(model_folder)
    for name in ("examples", "benchmarks", "campaigns"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    monkeypatch.setenv("ALETHEIA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def run_page(page, call, also_slow=False):
    """Run the blocks of a page in their order, one namespace for its Python; returns how many ran."""
    blocks = [block for block in blocks_of(page.read_text()) if block.language in RUN and block.mark != "not run"]
    blocks = [block for block in blocks if also_slow or block.mark != "slow"]
    for block in blocks:  # files first: a page may show a command before the file that it reads
        if block.language == "yaml":
            check_yaml(block.code)
            named = re.match(r"# ([\w.-]+\.yaml)$", block.code, re.MULTILINE)
            Path(named[1] if named else "run.yaml").write_text(block.code)
    names = {"__name__": "__main__"}
    for block in blocks:
        remove_outputs(block.code, READY)
        if block.language == "python":
            exec(compile("\n" * block.line + block.code, str(page), "exec"), names)
        elif block.language != "yaml":
            run_bash(block, call)
    return len(blocks)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_the_blocks_of_a_page_run(page, place, run):
    run_page(page, run)


@pytest.mark.slow
def test_the_tutorial_runs_on_the_real_model(place, run, capsys):
    pytest.importorskip("gguf")
    for name in ("model", *READY):
        path = place / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    assert run_page(ROOT / "docs" / "tutorial.md", run, also_slow=True) > 5
    assert aletheia.Run.read("run").metrics.held_out_loss_after < 0.1


@pytest.mark.parametrize("page", LINKED, ids=_name)
def test_the_links_of_a_page_lead_somewhere(page):
    for link in links_of(page.read_text()):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in anchors_of(_whole(target)), f"{link}: no such anchor in {_name(target)}"


def _whole(page: Path) -> str:
    """A page with what is made from the code; names of Python have their own anchors."""
    text = hooks.put_in(page.read_text())
    return re.sub(r"^::: (aletheia\.\w+)$", r"{ #\1 }", text, flags=re.MULTILINE)


@pytest.mark.parametrize("path", COMMANDS)
def test_the_reference_has_every_option_and_a_valid_example_of_each_command(path):
    text = hooks.commands()
    section = text.split(f"## `{path}`\n")[1].split("\n## ")[0]
    slug = path.split(" ", 1)[1].replace(" ", "-")
    for one in hooks.parameters_of(COMMANDS[path]):
        shown = max(one.opts, key=len) if one.param_type_name == "option" else f"-{one.name.replace('_', '-')}"
        assert f"{{ #{slug}{shown} }}\n:   " in section
        assert one.param_type_name == "argument" or f"`{shown}" in section
    example = re.search(r"```bash\n(.+)\n```", section)[1]
    words = shlex.split(example)
    assert example.startswith(f"{path} ") or example == path
    assert {word for word in words if word.startswith("--")} <= {
        flag for one in COMMANDS[path].params for flag in (*one.opts, *one.secondary_opts)
    }


@pytest.mark.parametrize("section", hooks.SECTIONS)
def test_the_reference_has_every_setting_with_its_values(section):
    found: type[Settings] = hooks.SECTIONS[section]
    text = hooks.settings().split(f"## {section}\n")[1].split("\n## ")[0]
    for name in found.model_fields:
        assert f"{{ #{section}-{'name' if (section, name) == ('model', 'model') else name} }}" in text
    assert text.count("on the command line `") == len(found.model_fields)


def test_the_reference_has_every_public_name():
    shown = re.findall(r"^::: aletheia\.(\w+)$", (ROOT / "docs/reference/python.md").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(set(aletheia.__all__) - {"__version__"})


def test_the_readme_names_the_two_entrances_of_python_and_two_targets_of_make():
    readme = (ROOT / "README.md").read_text()
    assert {"fine_tune", "attach"} <= set(re.findall(r"aletheia\.(\w+)\(", readme))
    assert {"demo", "test"} <= set(re.findall(r"\bmake ([a-z-]+)", readme))


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="no mkdocs (the extra docs)")
def test_the_site_builds_without_a_warning_and_asks_other_servers_for_nothing(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for page in ("index.html", "reference/commands/index.html"):
        html = (tmp_path / "site" / page).read_text()
        assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"?https?:", html)
    assert 'id="train--learning-rate"' in html


@pytest.mark.parametrize(
    "code",
    [
        "make nothing-of-the-kind",
        "pip install 'aletheia-tune[nothing]'",
        "pip install some-other-package",
        "aletheia show missing.json  # a comment",
        "ls train.jsonl && ls missing.jsonl",
        "cat missing.jsonl | wc -l",
    ],
)
def test_a_block_that_does_not_hold_is_found(code, place, run):
    with pytest.raises(AssertionError):
        run_bash(Block(1, "bash", code), run)


def test_blocks_links_and_anchors_are_read_as_people_see_them():
    text = "# A *title*: one\n<!-- not run: two GPUs -->\n```bash\n# no title\n[no](link)\n```\n[a](x.md#y) `[b](z)`\n"
    [block] = blocks_of(text)
    assert (block.language, block.mark, block.code) == ("bash", "not run", "# no title\n[no](link)")
    assert links_of(text) == ["x.md#y"]
    assert anchors_of(text) == {"a-title-one"}


def test_a_link_out_of_docs_leads_to_a_copy_in_the_site():
    assert hooks.outside("how-to/gpu.md", "../../examples/run.yaml") == "examples/run.yaml"
    assert hooks.outside("index.md", "../CONTRIBUTING.md#habits") == "CONTRIBUTING.md"
    assert hooks.outside("how-to/gpu.md", "../reference/files.md") is None
    assert hooks.outside("index.md", "https://example.org/x.md") is None
