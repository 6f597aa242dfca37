"""Pages of the documentation: their blocks of code, their links and anchors, and how a block runs in a test.

``<!-- not run: why -->`` on the line before a block leaves it out, ``<!-- slow: why -->`` leaves it to
``make test-slow``.
"""

import re
import shlex
import shutil
import subprocess
import tomllib
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from packaging.requirements import Requirement

from aletheia.cli.config import parse_config
from aletheia.job.settings import JobSettings
from aletheia.lab.campaign.spec import parse_campaign
from aletheia.planning.plan import PlanSettings

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
SHELL = set("|&;<>()")  # a word of these alone is for a shell
MARK = re.compile(r"<!-- (not run|slow): (.{5,}) -->")
FENCE = re.compile(r"( *)(`{3,})([\w-]*)")
HEADING = re.compile(r"^#{1,6} +(.+?)(?: +\{[^}]*\})?\s*$", re.MULTILINE)
LINK = re.compile(r"\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, what it is in, and its mark, such as ``not run``."""

    line: int
    language: str
    code: str
    mark: str = ""


def blocks_of(text: str) -> Iterator[Block]:
    """The fenced blocks of a page, whatever they hold."""
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        opened = FENCE.match(lines[at])
        if not opened:
            at += 1
            continue
        indent, fence, language = opened.groups()
        end = next(i for i in range(at + 1, len(lines)) if lines[i].strip() == fence)
        mark = MARK.fullmatch(lines[at - 1].strip()) if at else None
        code = "\n".join(line.removeprefix(indent) for line in lines[at + 1 : end])
        yield Block(at + 1, language, code, mark[1] if mark else "")
        at = end + 1


def prose_of(text: str) -> str:
    """A page without its blocks, code spans and comments."""
    return re.sub(r"<!--.*?-->|`[^`\n]+`", "", re.sub(r"^ *(`{3,}).*?^ *\1$", "", text, flags=re.S | re.M), flags=re.S)


def links_of(text: str) -> list[str]:
    """Links to files and anchors of this repository."""
    return [link for link in LINK.findall(prose_of(text)) if "://" not in link and not link.startswith("mailto:")]


def anchors_of(text: str) -> set[str]:
    """Anchors that a page has both on the site and where repositories are browsed, and those it names itself."""
    headings = HEADING.findall(re.sub(r"^ *(`{3,}).*?^ *\1$", "", text, flags=re.S | re.M))
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading).strip().lower() for heading in headings]
    browsed = {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}
    ascii_only = [unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode() for heading in plain]
    built = {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip()) for heading in ascii_only}
    named = {one or other for one, other in re.findall(r"id=\"([^\"]+)\"|\{ #([\w.-]+)", text)}
    return (browsed & built) | named


def check_yaml(code: str) -> None:
    """Read YAML as what it is: the settings of a job, a campaign, or another program's file."""
    found = yaml.safe_load(code)
    if {"models", "arms"} & found.keys():
        parse_campaign(found, "the page")
    elif found.keys() <= {"model", "data", "plan", "training"}:
        sections = parse_config(code, "the page")
        plan = sections.get("plan", {})
        JobSettings.of(
            sections.get("model", "model"), sections.get("data", "train.jsonl"), plan, sections.get("training")
        )
        if "file" not in plan:
            PlanSettings(**plan)


def check_make(words: list[str]) -> None:
    """A call of make names targets that exist."""
    for word in words[1:]:
        assert "=" in word or word in TARGETS, f"make {word}: no such target"


def check_pip(words: list[str]) -> None:
    """What is installed with pip is this package with extras that it has, or a package that it names itself."""
    extras = PROJECT["optional-dependencies"]
    known = {Requirement(one).name for some in (PROJECT["dependencies"], *extras.values()) for one in some}
    for word in words[2:]:
        if word.startswith("-"):
            continue
        named = Requirement(re.sub(r"^\.(?=$|\[)", PROJECT["name"], word))
        assert named.name in known | {PROJECT["name"]}, f"pip install {word}: not a package of pyproject.toml"
        assert named.name != PROJECT["name"] or named.extras <= extras.keys(), f"pip install {word}: no such extra"


def commands_of(code: str) -> tuple[list[list[str]], bool]:
    """The commands of a block in words, and whether only a shell can run them; ``&&`` joins several."""
    commands: list[list[str]] = [[]]
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        commands.append([])
        for word in words:
            commands.append([]) if word == "&&" else commands[-1].append(word)
    needs_shell = "$" in code or "`" in code or any(set(word) <= SHELL for words in commands for word in words)
    return [words for words in commands if words], needs_shell


def run_bash(block: Block, call) -> None:
    """Run a block: commands of ours in this process by ``call``, make and pip checked, anything else in a shell."""
    commands, needs_shell = commands_of(block.code)
    left = []
    for words in commands:
        if words[0] == "make":
            check_make(words)
        elif words[:2] == ["pip", "install"]:
            check_pip(words)
        else:
            left.append(words)
    if not needs_shell and all(Path(words[0]).name == "aletheia" for words in left):
        for words in left:
            code, _, said = call(*words[1:])
            assert code == 0, f"line {block.line}: {shlex.join(words)}: exit code {code}\n{said[-2000:]}"
    else:
        script = re.sub(r"^( *)(make|pip install)\b", r"\1: \2", block.code, flags=re.MULTILINE)
        ended = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, check=False, timeout=180
        )
        assert ended.returncode == 0, f"line {block.line}: exit code {ended.returncode}\n{ended.stderr[-2000:]}"


def remove_outputs(code: str, ready: Iterable[str]) -> None:
    """Remove what lies ready for every page where a block makes it itself: a finished run is never overwritten."""
    for name in set(re.findall(r"(?:--out[ =]|\bout=)[\"']?([\w./-]+)", code)).intersection(ready):
        path = Path(name)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
