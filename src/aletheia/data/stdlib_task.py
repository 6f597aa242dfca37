"""A real task that any machine can create: write the summary line of a Python function.

Rows come from the standard library's own source: a function without its docstring is the prompt, the first line of
the docstring is the completion. Training and held-out functions come from different modules.
"""

import ast
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from aletheia.errors import DataError
from aletheia.files import write_text

QUESTION = "Write the one-line summary of this Python function.\n\n"
HELD_OUT_SHARE = 0.2
SOURCE_CHARACTERS = (80, 500)
SUMMARY_CHARACTERS = (20, 100)


def write_stdlib_task(folder: Path, train_rows: int, held_out_rows: int, seed: int) -> tuple[Path, Path]:
    """Write ``train.jsonl`` and ``held_out.jsonl`` (prompt, completion, module) and return their paths.

    Raises:
        DataError: the standard library's source is missing or has too few functions.
    """
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(seed).shuffle(modules)
    held_out_modules = round(len(modules) * HELD_OUT_SHARE)
    paths = []
    for name, some, wanted in (
        ("held_out.jsonl", modules[:held_out_modules], held_out_rows),
        ("train.jsonl", modules[held_out_modules:], train_rows),
    ):
        rows = [row for module in some for row in summary_rows(module)]
        if len(rows) < wanted:
            raise DataError(
                f"the standard library's source has {len(rows)} functions for {name}; expected {wanted}; "
                "ask for fewer rows"
            )
        random.Random(seed).shuffle(rows)
        path = folder / name
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows[:wanted]))
        paths.append(path)
    return paths[1], paths[0]


def summary_rows(module: Path) -> Iterator[dict[str, str]]:
    """The functions of one source file with a docstring and a suitable length, as rows."""
    try:
        tree = ast.parse(module.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, OSError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
            continue
        summary = (ast.get_docstring(node) or "").split("\n")[0].strip()
        if not SUMMARY_CHARACTERS[0] <= len(summary) <= SUMMARY_CHARACTERS[1] or not summary.endswith("."):
            continue
        bare = ast.FunctionDef(**{**dict(ast.iter_fields(node)), "body": node.body[1:]})
        source = ast.unparse(ast.fix_missing_locations(bare))
        if SOURCE_CHARACTERS[0] <= len(source) <= SOURCE_CHARACTERS[1]:
            yield {"prompt": f"{QUESTION}{source}", "completion": summary, "module": module.stem}
