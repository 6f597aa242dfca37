"""The model of a job and its rows: resident, or read layer by layer where it does not fit."""

import sys
from collections.abc import Callable

from aletheia.anatomy.access import stop_ids_of, text_config
from aletheia.anatomy.checkpoint import Checkpoint
from aletheia.anatomy.load import Loaded, free_memory_bytes, load, pick, pick_device
from aletheia.anatomy.settings import LoadSettings
from aletheia.anatomy.shards import weights_bytes
from aletheia.data.encode import encode
from aletheia.data.examples import Examples
from aletheia.data.rows import Rows
from aletheia.data.settings import DataSettings
from aletheia.data.templates import read_template
from aletheia.planning.estimate import RESIDENT_SHARE
from aletheia.probing.preflight import preflight

Say = Callable[[str], None]
Source = Loaded | Checkpoint


def to_stderr(line: str) -> None:
    """A line for people, so that stdout stays clean for results."""
    print(line, file=sys.stderr, flush=True)


def is_streamed(how: LoadSettings, say: Say = to_stderr) -> bool:
    """Whether to read the weights layer by layer: as asked, or where they would take most of the memory."""
    if how.stream is not None or how.quantize:
        return bool(how.stream)
    device = pick_device()
    needed = weights_bytes(how.model, pick(how.dtype, device))
    limit = free_memory_bytes(device) if how.max_memory is None else how.max_memory
    if needed is None or needed <= RESIDENT_SHARE * limit:
        return False
    say(f"stream {needed / 1e9:.1f} GB of weights, {limit / 1e9:.1f} GB of memory: layer by layer")
    return True


def encode_for(base: Source, rows: Rows, data: DataSettings, say: Say = to_stderr) -> Examples:
    """Tokenise rows for a model: no longer than its positions, no token it has no embedding for.

    The chat template of ``data`` becomes that of the model's tokenizer. Prints what a person should know of the rows.
    """
    if data.chat_template is not None:
        base.tokenizer.chat_template = read_template(data.chat_template)
    positions = getattr(text_config(base.model), "max_position_embeddings", None) or data.max_length
    if positions < data.max_length:
        say(f"note: the model has {positions} positions; `max_length` {data.max_length} is lowered to that")
    length = min(data.max_length, positions)
    stops = stop_ids_of(base.model)
    examples = encode(rows, base.tokenizer, length, data.skip_unusable, base.vocab_size, stops, data.train_on)
    for note in examples.notes:
        say(f"note: {note}")
    if examples.truncated:
        say(
            f"note: {examples.truncated} of {len(examples)} rows are cut to {examples.max_length} tokens (`max_length`)"
        )
    if examples.left_out:
        reasons = ", ".join(f"{count} with {reason}" for reason, count in examples.left_out.items())
        say(f"note: {sum(examples.left_out.values())} rows are left out: {reasons}")
    return examples


def load_for(how: LoadSettings, rows: Rows, data: DataSettings, say: Say = to_stderr) -> tuple[Loaded, Examples]:
    """The model and its rows, computed in a way that stays finite where float16 does not."""
    base = load(how.model, how.dtype, None, how.quantize, how.attention)
    examples = encode_for(base, rows, data, say)
    base, changed = preflight(base, examples)
    if changed:
        say(f"note: {changed}")
    return base, examples
