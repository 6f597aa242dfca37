"""How an error ends a command: one line and an exit code."""

import os

from aletheia.cli.usage import usage
from aletheia.cli.wording import translate
from aletheia.errors import AletheiaError
from aletheia.files import is_full_disk

NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory")
LESS = (
    "lower `batch_size` or `max_length`, set `gradient_checkpointing` selective, or read the model layer by layer with "
    "`stream`"
)
INPUT, OURS = 2, 1  # exit codes: bad input, and a bug in Aletheia


def message_and_code(error: BaseException) -> tuple[str, int]:
    """The line to print, without ``error:``, and the exit code."""
    if isinstance(error, AletheiaError):
        return translate(str(error)), getattr(error, "exit_code", INPUT)
    if (line := usage(error)) is not None:
        return translate(line), INPUT
    if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
        return translate(f"there is not enough memory ({_first_line(error)}); {LESS}"), INPUT
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return (
            f"{error.object[:300]!r} is not valid UTF-8, which a library needs; rename the file",
            INPUT,
        )
    if isinstance(error, OSError) and error.errno is not None:
        return _of_system(error), INPUT
    what = f"{type(error).__name__}: {_first_line(error)}" if str(error) else type(error).__name__
    return (
        f"{what} (this is a bug in Aletheia; run 'aletheia --debug ...' or set ALETHEIA_DEBUG=1 for the traceback, and "
        "report it)"
    ), OURS


def _of_system(error: OSError) -> str:
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    then = "; free some space or write elsewhere" if is_full_disk(error) else ""
    return f"{where}{error.strerror or error}{then}"


def _first_line(error: BaseException) -> str:
    """The first line of a library's message, which may have more paragraphs."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
