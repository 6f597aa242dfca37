"""Benchmark data from local files, in the splits and columns that the upstream tasks expect. No torch, no hub.

Columns keep the names and order of the hub's data sets, so an item is the same from either source.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aletheia.data.formats import read_table
from aletheia.data.sources import kind, shown_columns
from aletheia.errors import DataError
from aletheia.files import file_sha256

Doc = dict[str, Any]
Splits = dict[str, list[Doc]]

# task -> its files in the data folder, by the split of the upstream task
FILES: dict[str, dict[str, str]] = {
    "mmlu": {"test": "mmlu/test.jsonl", "dev": "mmlu/dev.jsonl"},
    "gsm8k": {"test": "gsm8k/test.jsonl", "train": "gsm8k/train.jsonl"},
    "humaneval": {"test": "humaneval/HumanEval.jsonl"},
    "wikitext": {"test": "wikitext2/test_raw.txt"},
}
# the columns that are checked, in the order of the hub's data set; upstream tasks read columns by name
COLUMNS: dict[str, dict[str, type]] = {
    "mmlu": {"question": str, "subject": str, "choices": list, "answer": int},
    "gsm8k": {"question": str, "answer": str},
    "humaneval": {"task_id": str, "prompt": str, "canonical_solution": str, "test": str, "entry_point": str},
}


def data_hashes(name: str, folder: Path) -> dict[str, str]:
    """The sha256 of every file that a task reads, by its path relative to ``folder``.

    Raises:
        DataError: a file is missing.
    """
    return {file: file_sha256(_existing(folder / file)) for file in FILES.get(name, {}).values()}


def local_splits(name: str, folder: Path) -> Splits:
    """The documents of a task by split.

    Raises:
        DataError: a file is missing or unreadable, or a row lacks a column or has a wrong type in it.
    """
    paths = {split: _existing(folder / file) for split, file in FILES[name].items()}
    if name == "wikitext":
        return {split: [{"page": page} for page in pages(_text(path))] for split, path in paths.items()}
    check = _checker(COLUMNS[name])
    return {split: [check(row, where) for where, row in read_table(path).records] for split, path in paths.items()}


def by_subject(splits: Splits) -> dict[str, Splits]:
    """One set of splits per subject that has test rows, by the subject's name."""
    subjects = sorted({doc["subject"] for doc in splits["test"]})
    parts: dict[str, Splits] = {subject: {split: [] for split in splits} for subject in subjects}
    for split, docs in splits.items():
        for doc in docs:
            if doc["subject"] in parts:
                parts[doc["subject"]][split].append(doc)
    return parts


def pages(text: str) -> list[str]:
    """WikiText as documents, cut as in EleutherAI/wikitext_document_level: at every line ``= Title =``.

    Two lines of running text in the test set look like titles and count as such, so it has 62 pages.
    """
    found: list[list[str]] = [[]]
    for line in text.split("\n"):
        words = line.split()
        if len(words) > 2 and words[0] == words[-1] == "=" and "=" not in (words[1], words[-2]):
            found.append([])
        found[-1].append(line)
    return [page for lines in found if (page := "\n".join(lines)).strip()]


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"{path}: found no such file; put it there, or leave out `data_dir` to use the hub's data")
    return path


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({type(error).__name__}); download it again") from error


def _checker(columns: Mapping[str, type]) -> Callable[[Doc, str], Doc]:
    def check(row: Doc, where: str) -> Doc:
        for name, wanted in columns.items():
            if name not in row:
                raise DataError(f"{where}: found the columns {shown_columns(tuple(row))}; expected {name!r}, too")
            if type(row[name]) is not wanted:
                raise DataError(f"{where}: found {kind(row[name])} in {name!r}; expected {kind(wanted())}")
        if "choices" in columns and not _answers(row["choices"], row["answer"]):
            raise DataError(f"{where}: expected four choices and an answer from 0 to 3; correct or remove the row")
        return {name: row[name] for name in columns}

    return check


def _answers(choices: Sequence[object], answer: int) -> bool:
    return len(choices) == 4 and all(isinstance(choice, str) for choice in choices) and 0 <= answer < 4
