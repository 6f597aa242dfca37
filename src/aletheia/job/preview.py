"""Rows of a data set as a model will see them, before training. Reads only the tokenizer and the config."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from aletheia.anatomy.load import load_without_weights
from aletheia.anatomy.settings import LoadSettings
from aletheia.data.examples import Example, Examples
from aletheia.data.preview import Preview, ShownRow, shown_row
from aletheia.data.repeats import overlap
from aletheia.data.rows import Row, Rows, load_rows
from aletheia.data.settings import DataSettings
from aletheia.errors import DataError
from aletheia.job.adapter import adapter_folder, base_settings
from aletheia.job.settings import JobSettings
from aletheia.job.source import encoded, split

ROWS_SHOWN = 3


def preview(
    model: str | Mapping[str, Any] | LoadSettings,
    data: str | Mapping[str, Any] | DataSettings,
    rows: Sequence[int] = (),
) -> Preview:
    """What a run would learn from: rows with their labels, and the counts of the whole data set.

    The same as ``aletheia preview``. Rows that would stop a run are counted in ``left_out`` instead.

    Args:
        model: hub id, folder or file, or :class:`aletheia.LoadSettings`; for an adapter folder, its base is used. No
            weights are read.
        data: rows to learn from, or :class:`aletheia.DataSettings`.
        rows: numbers of rows to show, from 1; by default three, of different roles or files if possible.

    Raises:
        AletheiaError: one line with the cause.
    """
    settings = JobSettings.of(model, data)
    asked = settings.data.model_copy(update={"skip_unusable": True})
    found = load_rows(asked.data, True)
    eval_rows = load_rows(asked.eval_data, True) if asked.eval_data else None
    how, folder = settings.model, adapter_folder(settings.model.model)
    how = how if folder is None else base_settings(how, folder)
    base = load_without_weights(how.model, how.trust_remote_code)
    examples, notes = encoded(base, found, asked)
    shared = None
    left_out = examples.skipped
    if eval_rows is not None or len(examples) > 1:
        train, held_out, of_held_out = split(base, examples, eval_rows, asked, settings.training.seed)
        notes += of_held_out
        shared = overlap(train, held_out)
        left_out += held_out.skipped
    if left_out and not settings.data.skip_unusable:
        notes.append(
            "training would stop at the first row that is left out here; set `skip_unusable` to skip such rows"
        )
    shown = _rows_to_show(found, examples, rows, base.tokenizer)
    return Preview.of(examples, shown, shared, list(dict.fromkeys(notes)))


def _rows_to_show(rows: Rows, examples: Examples, asked: Sequence[int], tokenizer: Any) -> list[ShownRow]:
    """The rows ``asked`` for, by number from 1; by default three, of different roles or files if possible.

    Raises:
        DataError: there is no row of that number, or it is left out.
    """
    encoded = {example.where: example for example in examples.examples}
    for number in asked:
        if not 1 <= number <= len(rows.rows):
            raise DataError(f"`row` is {number}; expected a number from 1 to {len(rows.rows)}, the number of rows")
        if (where := rows.rows[number - 1].where) not in encoded:
            raise DataError(f"`row` is {number}, and {where} is left out; expected a row to learn from")
    numbers = list(dict.fromkeys(asked)) or _different(rows.rows, encoded)
    return [
        shown_row(encoded[rows.rows[number - 1].where], number, tokenizer, examples.max_length) for number in numbers
    ]


def _different(rows: Sequence[Row], encoded: Mapping[str, Example]) -> list[int]:
    """Numbers of three rows that differ: first in roles, then in files, then in content."""
    usable = [number for number, row in enumerate(rows, start=1) if row.where in encoded]
    by_roles: dict[tuple[str, ...], int] = {}
    by_file: dict[str, int] = {}
    by_content: dict[bytes, int] = {}
    for number in usable:
        row = rows[number - 1]
        roles = [message["role"] for message in row.messages or ()]
        several = ("several answers",) if roles.count("assistant") > 1 else ()
        by_roles.setdefault((*dict.fromkeys(roles), *several), number)
        by_file.setdefault(re.sub(r"(:| row )\d+$", "", row.where), number)
        if len(by_content) < ROWS_SHOWN:
            by_content.setdefault(encoded[row.where].digest(), number)
    chosen = dict.fromkeys((*by_roles.values(), *by_file.values(), *by_content.values()))
    return sorted(list(chosen)[:ROWS_SHOWN])
