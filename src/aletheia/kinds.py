"""What a path holds, judged by names and first bytes, and what to do with it: for messages about a wrong file.

Nothing is parsed and nothing is raised: what names and first bytes do not show counts as unknown.
"""

import re
import shlex
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

Kind = Literal[
    "rows", "scores", "plan", "metrics", "run", "stopped run", "adapter", "model", "model file", "settings",
    "evaluation", "campaign", "page",
]  # fmt: skip

WHAT: dict[Kind, str] = {
    "rows": "holds rows of data",
    "scores": "holds scores",
    "plan": "is a plan",
    "metrics": "holds the metrics of a run",
    "run": "is a run folder",
    "stopped run": "is the folder of an unfinished run",
    "adapter": "is an adapter folder",
    "model": "holds a model",
    "model file": "is one file of a model",
    "settings": "is a settings file",
    "evaluation": "is an evaluation folder",
    "campaign": "holds a campaign",
    "page": "is a web page",
}
# what to do with it, whatever was expected; {path} and {folder} are quoted for a shell
USE: dict[Kind, str] = {
    "rows": "to train on them: aletheia train MODEL --data {path} --out RUN",
    "scores": "to make a plan from them: aletheia plan {path} --out plan.json",
    "plan": "to train by it: aletheia train MODEL --data ROWS --plan {path} --out RUN",
    "metrics": "to see them: aletheia show {path}",
    "run": "to see it: aletheia show {path}",
    "stopped run": "to finish it, repeat the command that started it",
    "adapter": "to train it further: aletheia train {path} --data ROWS --out RUN",
    "model": "to fine-tune it: aletheia train {path} --data ROWS --out RUN",
    "model file": "give the model's folder, {folder}",
    "settings": "to run with it: aletheia train --config {path} --out RUN",
    "evaluation": "to see it: aletheia eval --out {path}",
    "campaign": "to see it: aletheia campaign status {path}",
    "page": "open it in a browser",
}
# by what was expected and what was found, where there is a better remedy
INSTEAD: dict[tuple[Kind, Kind], str] = {
    ("scores", "rows"): "to make them: aletheia probe MODEL --data {path} --out scores.json",
    ("scores", "model"): "to make them: aletheia probe {path} --data ROWS --out scores.json",
    ("scores", "run"): "the run's scores are {path}/scores.json",
    ("scores", "metrics"): "the run's scores are {folder}/scores.json",
    ("plan", "scores"): "to make one from these: aletheia plan {path} --out plan.json",
    ("plan", "rows"): "give rows as `data`",
    ("plan", "run"): "the run's plan is {path}/plan.json",
    ("plan", "metrics"): "the run's plan is {folder}/plan.json",
    ("plan", "settings"): "give settings as `config`",
    ("run", "metrics"): "give its folder, {folder}",
    ("adapter", "metrics"): "give the folder, {folder}",
    ("adapter", "model file"): "give the folder, {folder}",
    ("rows", "settings"): "give settings as `config`",
    ("settings", "run"): "the run's settings are {path}/config.yaml",
}
ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
PACKED = (".gz", ".zst")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
OF_A_MODEL = (
    *("config.json", "generation_config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "vocab.json", "added_tokens.json", "model.safetensors.index.json"),
)
HEAD_BYTES = 4096
_FORMAT = re.compile(rb'\s*\{\s*"format"\s*:\s*"(aletheia-[a-z-]+)"')
OF_FORMAT: dict[str, Kind] = {
    "aletheia-scores": "scores",
    "aletheia-plan": "plan",
    "aletheia-metrics": "metrics",
}  # by the format that a file declares


def kind_of(path: Path) -> Kind | None:
    """The kind of file or folder at ``path``; None where there is nothing, or nothing known."""
    try:
        if path.is_dir():
            return _of_folder(path)
        return _of_file(path) if path.is_file() else None
    except (OSError, ValueError):  # no permission, or not a valid file name
        return None


def mistaken(path: str | Path, expected: str, *kinds: Kind) -> str | None:
    """The message about a path that is not one of ``kinds``; None where it may be one.

    It says what the path is, what was ``expected`` (in words), and a remedy, chosen by the first of ``kinds``.
    """
    path = Path(path)
    found = kind_of(path)
    if found is None or found in kinds:
        return None
    remedy = INSTEAD.get((kinds[0], found), USE[found])
    parent = str(path.parent) if path.is_file() else str(path)
    action = remedy.format(path=shlex.quote(str(path)), folder=shlex.quote(parent))
    return f"{path} {WHAT[found]}; expected {expected}; {action}"


def near(path: str | Path, *kinds: Kind) -> str:
    """``; did you mean ...?`` for the end of a message about a missing path; empty where no name is similar.

    With ``kinds`` only names that hold one of them are suggested.
    """
    path = Path(path)
    try:
        names = [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")]
    except (OSError, ValueError):
        return ""
    stems = {name: Path(name).stem.lower() for name in names}
    close = get_close_matches(path.stem.lower(), list(stems.values()), 3, 0.6)
    alike = sorted((name for name in names if stems[name] in close), key=lambda name: close.index(stems[name]))
    fitting = [name for name in alike if kind_of(path.parent / name) in kinds]
    chosen = (fitting or ([] if kinds else alike))[:2]
    return f"; did you mean {' or '.join(str(path.parent / name) for name in chosen)}?" if chosen else ""


def _of_folder(folder: Path) -> Kind | None:
    if _declared(folder / "metrics.json") == "aletheia-metrics":
        return "run"
    if (folder / "adapter_config.json").is_file():
        return "adapter"
    if (folder / "campaign.db").is_file():
        return "campaign"
    if (folder / "eval.json").is_file():
        return "evaluation"
    if _is_config(folder / "config.json"):
        return "model"
    if (folder / ".lock").is_file() and (folder / "checkpoints").is_dir():
        return "stopped run"
    entries = list(_first(folder.iterdir(), 1000))
    if any(entry.suffix in WEIGHTS for entry in entries):
        return None  # a model that lacks a file, which its reader names
    return "rows" if any(map(_is_rows, entries)) else None


def _of_file(path: Path) -> Kind | None:
    if path.suffix == ".gguf":
        return "model"
    if path.suffix in WEIGHTS or (path.name in OF_A_MODEL and _holds_model(path.parent)):
        return "model file"
    if path.suffix in (".yaml", ".yml"):
        return "settings"
    if path.suffix in (".html", ".htm"):
        return "page"
    if (declared := _declared(path)) is not None:
        return OF_FORMAT.get(declared)
    return "rows" if _is_rows(path) else None


def _declared(path: Path) -> str | None:
    """The format that a file declares, if Aletheia wrote it."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        found = _FORMAT.match(file.read(HEAD_BYTES))
    return found[1].decode() if found else None


def _holds_model(folder: Path) -> bool:
    return _is_config(folder / "config.json") or (folder / "adapter_config.json").is_file()


def _is_config(path: Path) -> bool:
    """Whether the file is the config of a transformers model."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    return b'"model_type"' in head or b'"architectures"' in head


def _is_rows(path: Path) -> bool:
    suffixes = [one.lower() for one in path.suffixes[-2:]]
    last = suffixes[:-1] if suffixes and suffixes[-1] in PACKED else suffixes
    return bool(last) and last[-1] in ROWS and path.is_file()


def _first(entries: Iterable[Path], count: int) -> Iterator[Path]:
    for _, entry in zip(range(count), entries, strict=False):
        yield entry
