"""Check a ``tokenizer.json`` that somebody else wrote before a library reads it: what takes hours or all memory?

The check covers what it does to text: replacements that multiply it, templates of thousands of tokens, patterns that
never end. Words are only counted.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aletheia.anatomy.foreign import read_json
from aletheia.errors import ModelError
from aletheia.settings import WIDEST

TOKENIZER_BYTES = 100_000_000  # of one tokenizer.json; the largest known are below 40 MB
MOST_WORDS = 2 * 10**6  # in a vocabulary, and merges; the largest known has 900,000
MOST_ADDED = 100_000  # tokens added to the vocabulary
MOST_STEPS = 500  # all normalizers, splits and templates; known ones have below 50
MOST_GROWTH = 100  # factor by which a text may grow, and characters of an insertion or replacement
LONGEST_PATTERN = 10_000  # characters of a regular expression or a token
LONGEST_WORD = 10_000  # characters looked up at once
MOST_IDS = 16  # for one token of a template
NESTED = re.compile(r"\((?:\?:)?(?:\\.|\[[^\[\]]*\]|[^\\()\[\]])[+*]\)[+*]")  # (a+)+

_SECTIONS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_REMEDY = "fetch the tokenizer again"


def check_tokenizer(path: Path) -> None:
    """Refuse a ``tokenizer.json`` that would take too much time or memory; no known model has one.

    Raises:
        ModelError: names the value and what is allowed.
    """
    found = read_json(path, "a tokenizer", TOKENIZER_BYTES, _REMEDY)
    if isinstance(found, dict):  # else the library reports it
        _check_words(found, path)
        for section in _SECTIONS:
            steps = list(_steps(found.get(section)))
            _at_most(path, f"steps of its {section}", len(steps), MOST_STEPS)
            for step in steps:
                _check_step(step, section, path)
            _check_growth(steps, section, path)


def _check_words(found: dict[str, Any], path: Path) -> None:
    added, model, padding = (found.get(name) for name in ("added_tokens", "model", "padding"))
    for what, held, most in (
        ("added tokens", added, MOST_ADDED),
        *(((what, model.get(what), MOST_WORDS) for what in ("vocab", "merges")) if isinstance(model, dict) else ()),
    ):
        _at_most(path, f"entries of its {what}", len(held) if isinstance(held, dict | list) else 0, most)
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict):
            _at_most(path, "characters of an added token", len(str(token.get("content"))), LONGEST_PATTERN)
    if isinstance(model, dict):
        _at_most(path, "max_input_chars_per_word", model.get("max_input_chars_per_word"), LONGEST_WORD)
    if isinstance(padding, dict):
        strategy = padding.get("strategy")
        for value in (padding.get("pad_to_multiple_of"), *(strategy.values() if isinstance(strategy, dict) else ())):
            _at_most(path, "tokens of padding", value, WIDEST)


def _steps(section: Any) -> Iterator[dict[str, Any]]:
    """Every object inside, outer before inner; Python's JSON reader bounds their depth."""
    if isinstance(section, dict):
        yield section
    for inner in section.values() if isinstance(section, dict) else section if isinstance(section, list) else ():
        yield from _steps(inner)


def _check_step(step: dict[str, Any], section: str, path: Path) -> None:
    where = f"{section} {step.get('type', '')}".strip()
    for key, value in step.items():
        if isinstance(value, str) and key != "precompiled_charsmap":
            most = MOST_GROWTH if key in ("content", "prepend", "replacement") else LONGEST_PATTERN
            _at_most(path, f"characters in {key} of its {where}", len(value), most)
        if isinstance(value, list) and key in ("ids", "tokens"):
            _at_most(path, f"{key} of a token of its {section}", len(value), MOST_IDS)
        if key == "length" and value == 0:
            raise ModelError(f"{path}: length in its {where} is 0; expected at least 1; {_REMEDY}")
    if NESTED.search(str(step.get("Regex", ""))):
        shown = str(step["Regex"])[:60]
        raise ModelError(f"{path}: the pattern {shown!r} of its {section} may never end; {_REMEDY}")


def _check_growth(steps: list[dict[str, Any]], section: str, path: Path) -> None:
    """Check by which factor a text may grow through replacements of inserted text."""
    made: list[tuple[str, int]] = []
    for step in steps:
        if step.get("type") == "Prepend":
            made.append((str(step.get("prepend")), 1))
        pattern = step.get("pattern")
        if step.get("type") != "Replace" or not isinstance(pattern, dict):
            continue
        content, replaced = str(step.get("content")), str(pattern.get("String", ""))
        if not replaced and not pattern.get("Regex"):
            raise ModelError(f"{path}: a Replace of its {section} has an empty pattern; {_REMEDY}")
        before = (growth for text, growth in made if not replaced or set(text) & set(replaced))
        growth = max(1, -(-len(content) // max(1, len(replaced)))) * max(before, default=1)
        _at_most(path, f"factor by which its {section} may lengthen a text", growth, MOST_GROWTH)
        made.append((content, growth))


def _at_most(path: Path, what: str, value: Any, most: int) -> None:
    if isinstance(value, int) and value > most:
        raise ModelError(f"{path}: {what}: {value:,}; expected at most {most:,}; {_REMEDY}")
