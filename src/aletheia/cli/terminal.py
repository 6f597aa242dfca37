"""Standard output and error that may be closed, unread or in any encoding: none of that ends a command."""

import codecs
import io
import os
import sys
from typing import Any, TextIO

PLAIN = str.maketrans("█▏▎▍▌▋▊▉─●✗·→…", "#      #-*x.>~")


def open_outputs() -> None:
    """Make the three standard streams safe to use, whatever was done to them.

    A closed stream is sent to the null device. Otherwise the next file that is opened would get its number, and with
    it what is printed. When a reader goes away (``| head -1``), the rest is discarded, too. Characters that an encoding
    lacks are printed as plain ones or as escapes.
    """
    codecs.register_error("plain", _plain)
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if descriptor == 0 else os.O_WRONLY)  # takes the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "w" if descriptor else "r", closefd=False))  # noqa: SIM115
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, _safe(stream, _Messages if name == "stderr" else _Output))


def _safe(stream: io.TextIOWrapper, kind: "type[_Output]") -> TextIO:
    stream.flush()
    buffer = io.BufferedWriter(kind(stream.fileno(), "w", closefd=False))
    by_line = stream.line_buffering or kind is _Messages
    return io.TextIOWrapper(buffer, stream.encoding, "plain", line_buffering=by_line)


def lose_output() -> None:
    """Discard what stdout could not take; otherwise the interpreter would fail again when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        _lead_nowhere(sys.stdout.fileno())


class _Output(io.FileIO):
    """A stream whose output is discarded once nobody reads it any more."""

    lost: tuple[type[OSError], ...] = (BrokenPipeError,)

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except self.lost:
            _lead_nowhere(self.fileno())
            return len(memoryview(data).cast("B"))


class _Messages(_Output):
    """Messages: whatever keeps one from being written, the command continues."""

    lost = (OSError,)


def _lead_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """A similar ASCII character for one that the encoding lacks, otherwise an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(PLAIN)
    return text.encode("ascii", "backslashreplace").decode(), error.end
