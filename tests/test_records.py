"""The log and the results: every entry has its headline and stands in the index; nothing large."""

import re
from itertools import pairwise
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
LOG = (DOCS / "log.md").read_text()
MOST_BYTES = 600_000


def entries():
    return [part.partition("\n") for part in LOG.split("\n## ")[1:] if not part.startswith("Index")]


def anchor(title):
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip())


def test_every_entry_of_the_log_begins_with_its_four_lines():
    for title, _, text in entries():
        heads = re.findall(r"^- \*\*(\w+)\*\*: \S", text.lstrip("\n").split("\n\n")[0], flags=re.MULTILINE)
        assert heads == ["Question", "Verdict", "Effect", "Decision"], title


def test_the_index_of_the_log_names_every_entry_once_and_newest_first():
    index = LOG.split("\n## Index\n")[1].split("\n## ")[0]
    found = re.findall(r"^\| (\S+) \| \[[^\]]+\]\(#([^)]+)\) \| \S", index, flags=re.MULTILINE)
    assert found == [(title[:10], anchor(title)) for title, _, _ in entries()]
    assert all(later >= earlier for (later, _), (earlier, _) in pairwise(found))


def test_results_stay_small():
    sizes = {path: path.stat().st_size for path in (DOCS / "results").rglob("*") if path.is_file()}
    assert sum(sizes.values()) < MOST_BYTES
    assert not [path for path in sizes if path.suffix == ".html"]
