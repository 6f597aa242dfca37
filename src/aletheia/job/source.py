"""The model of a job and its rows: resident, or read layer by layer where it does not fit."""

import re
from dataclasses import replace
from typing import Any

from aletheia.anatomy.access import stop_ids_of, text_config
from aletheia.anatomy.checkpoint import Checkpoint
from aletheia.anatomy.device_memory import usable_memory_bytes
from aletheia.anatomy.load import Loaded, load, pick, pick_device
from aletheia.anatomy.quantized import unquantized_note
from aletheia.anatomy.read import read_anatomy
from aletheia.anatomy.schema import Anatomy
from aletheia.anatomy.settings import LoadSettings
from aletheia.anatomy.shards import weights_bytes
from aletheia.data.encode import encode
from aletheia.data.examples import Examples, split_held_out
from aletheia.data.preview import shown_row
from aletheia.data.repeats import duplicates, overlap
from aletheia.data.rows import Rows
from aletheia.data.settings import DataSettings
from aletheia.data.templates import read_template, use_template
from aletheia.errors import ModelError, SettingsError
from aletheia.job.adapter import adapter_folder, base_settings
from aletheia.planning.memory import RESIDENT_SHARE
from aletheia.probing.passes import check_passes
from aletheia.probing.preflight import preflight
from aletheia.progress import Say, to_stderr
from aletheia.reporting.preview import quoted
from aletheia.runs.saved import merge_adapter

Source = Loaded | Checkpoint
NOTE = "note: "
FEW_HELD_OUT_ROWS = 8  # whose loss says little about other rows
_LOWERED = " is lowered to that"
_HOW_MANY = re.compile(r" \(\d+ rows?, first .*\)$")  # how many rows a note is of, and where the first stands


def is_streamed(how: LoadSettings, say: Say = to_stderr) -> bool:
    """Whether to read the weights layer by layer: as asked, or where they would take most of the memory.

    Raises:
        ModelError: MODEL cannot be found or read; an adapter's base would have to be streamed.
    """
    if how.fresh and (folder := adapter_folder(how.model)) is not None:
        check_whole(base_settings(how, folder))
        return False
    if how.stream is not None or how.quantize:
        return bool(how.stream)
    device = pick_device()
    needed = weights_bytes(how.model, pick(how.dtype, device), how.trust_remote_code)
    limit = usable_memory_bytes(device) if how.max_memory is None else how.max_memory
    if needed is None or needed <= RESIDENT_SHARE * limit:
        return False
    say(f"stream {needed / 1e9:.1f} GB of weights, {limit / 1e9:.1f} GB of memory: layer by layer")
    return True


def check_whole(base: LoadSettings) -> None:
    """Refuse an adapter's base that would have to be streamed: what it gets is put on all of its layers.

    Raises:
        ModelError: it takes most of the memory.
    """
    if is_streamed(base, lambda line: None):
        raise ModelError(
            f"{base.model} takes over half the memory; expected the base of an adapter folder to fit as a whole; "
            "`quantize` makes it smaller"
        )


def encode_for(base: Source, rows: Rows, data: DataSettings, say: Say = to_stderr) -> Examples:
    """:func:`encoded`, saying its notes and the counts."""
    examples, notes = encoded(base, rows, data)
    for note in (*notes, *count_notes(examples)):
        say(NOTE + note)
    return examples


def encoded(base: Source, rows: Rows, data: DataSettings) -> tuple[Examples, list[str]]:
    """Rows as tokens for a model: no longer than its positions, none it has no embedding for; and notes on them.

    The chat template of ``data`` becomes that of the model's tokenizer.
    """
    notes = []
    if data.chat_template is not None:
        use_template(base.tokenizer, read_template(data.chat_template))
    positions = getattr(text_config(base.model), "max_position_embeddings", None) or data.max_length
    positions = positions if positions > 0 else data.max_length  # -1: without bounds
    if positions < data.max_length:
        notes.append(f"the model has {positions} positions; `max_length` {data.max_length}{_LOWERED}")
    length = min(data.max_length, positions)
    stops = stop_ids_of(base.model)
    examples = encode(
        rows, base.tokenizer, length, data.skip_unusable, base.vocab_size, stops, data.train_on, data.template_date
    )
    return examples, [*notes, *examples.notes]


def count_notes(examples: Examples) -> list[str]:
    """How many rows are cut, left out or there already, where there are any."""
    notes = []
    if examples.truncated:
        are = "is" if examples.truncated == 1 else "are"
        notes.append(
            f"{examples.truncated} of {len(examples)} rows {are} cut to {examples.max_length} tokens (`max_length`)"
        )
    if examples.skipped:
        reasons = ", ".join(f"{count} with {reason}" for reason, count in examples.left_out.items())
        are = "row is" if examples.skipped == 1 else "rows are"
        notes.append(f"{examples.skipped} {are} left out: {reasons}")
    if twice := duplicates(examples):
        are = "is a duplicate" if twice == 1 else "are duplicates"
        notes.append(f"{twice} of {len(examples)} rows {are} of an earlier one ({examples.identity.name})")
    return notes


def split_for(
    base: Source, data: Examples, eval_rows: Rows | None, asked: DataSettings, seed: int, say: Say = to_stderr
) -> tuple[Examples, Examples]:
    """:func:`split`, saying its notes and what both have in common."""
    train, held_out, notes = split(base, data, eval_rows, asked, seed)
    for note in (*notes, *overlap(train, held_out).notes()):
        say(NOTE + note)
    if len(held_out) < FEW_HELD_OUT_ROWS:
        say(few_held_out(held_out))
    return train, held_out


def few_held_out(held_out: Examples) -> str:
    """A warning that the held-out loss of so few rows is no basis for a decision."""
    rows, tokens = len(held_out), held_out.labelled_tokens
    return (
        f"warning: only {rows} row{' is' if rows == 1 else 's are'} held out, with {tokens:,} labelled tokens: the "
        f"loss on {'it' if rows == 1 else 'them'} says little about other rows; hold out more with `eval_fraction`, or "
        "give a file of them with `eval_data`"
    )


def split(
    base: Source, data: Examples, eval_rows: Rows | None, asked: DataSettings, seed: int
) -> tuple[Examples, Examples, list[str]]:
    """Rows to learn from and held-out rows: those of ``eval_rows``, else a share of the data; and notes on the latter.

    What the notes on the data say is not said again.
    """
    if eval_rows is None:
        fraction = 0.05 if asked.eval_fraction is None else asked.eval_fraction
        return *split_held_out(data, fraction, seed, asked.eval_rows), []
    known = {_without_count(note) for note in data.notes}
    found, notes = encoded(base, eval_rows, asked)
    new = [
        f"held-out rows: {note}"
        for note in (*notes, *count_notes(found))
        if _without_count(note) not in known and not note.endswith(_LOWERED)
    ]
    return data, found.subset(range(min(asked.eval_rows, len(found)))), new


def _without_count(note: str) -> str:
    return _HOW_MANY.sub("", note)


def show_first(data: Examples, tokenizer: Any, say: Say) -> None:
    """Say how the model will see the first row, in a few lines."""
    for line in quoted(shown_row(data[0], 1, tokenizer, data.max_length)):
        say(line)


def load_for(how: LoadSettings, rows: Rows, data: DataSettings, say: Say = to_stderr) -> tuple[Loaded, Examples]:
    """The model and its rows, computed in a way that stays finite where float16 does not.

    With ``fresh`` the adapter that MODEL is has been merged into its base.

    Raises:
        ModelError: it cannot be loaded, or not be trained as it is, see :func:`~aletheia.probing.passes.check_passes`.
    """
    folder = adapter_folder(how.model) if how.fresh else None
    base = load_as_asked(how if folder is None else base_settings(how, folder))
    examples = encode_for(base, rows, data, say)
    base, changed = preflight(base, examples)
    if changed:
        say(NOTE + changed)
    check_passes(base.model, examples)
    note_unusual(read_anatomy(base.model), say)
    if base.quantize is not None and (unquantized := unquantized_note(base.model)):
        say(NOTE + unquantized)
    if folder is not None:
        base = replace(base, model=merge_adapter(base.model, folder, how.allow_pickle))
        into = base_settings(how, folder).model
        say(f"merge  {folder} into {into}")
        say(
            f"{NOTE}what is trained now fits {into} with {folder} merged into it, not {into} alone; "
            "merge them with PEFT and save that to use it; the README of the run has the code"
        )
    return base, examples


def stream_for(how: LoadSettings, rows: Rows, data: DataSettings, say: Say = to_stderr) -> tuple[Checkpoint, Examples]:
    """The model to be read layer by layer, and its rows."""
    checkpoint = checkpoint_as_asked(how)
    note_unusual(checkpoint.anatomy, say)
    return checkpoint, encode_for(checkpoint, rows, data, say)


def load_as_asked(how: LoadSettings) -> Loaded:
    """:func:`aletheia.load` with all settings.

    Raises:
        ModelError: as there.
        SettingsError: ``base`` is given and MODEL is no adapter folder.
    """
    _refuse_base(how)
    return load(how.model, how.dtype, None, how.quantize, how.attention, how.trust_remote_code, how.allow_pickle)


def checkpoint_as_asked(how: LoadSettings) -> Checkpoint:
    """:class:`aletheia.Checkpoint` with all settings; raises as :func:`load_as_asked`."""
    _refuse_base(how)
    return Checkpoint(how.model, how.dtype, attention=how.attention, trust_remote_code=how.trust_remote_code)


def _refuse_base(how: LoadSettings) -> None:
    if how.base is not None:
        raise SettingsError(f"`base` is given and {how.model} is no adapter folder; expected one, or no `base`")


def note_unusual(anatomy: Anatomy, say: Say) -> None:
    """Say what of the layers LoRA leaves as it is, and what they share, if anything."""
    for note in anatomy.notes:
        say(NOTE + note)
