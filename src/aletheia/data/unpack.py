"""Unpack gzip and Zstandard data, up to a limit."""

import gzip
import io
import zlib
from pathlib import Path
from typing import Protocol

from aletheia.data.sources import one_line
from aletheia.errors import DataError

PACKED = (".gz", ".zst")
GZIP, ZSTANDARD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
ALWAYS_BYTES = 256 * 10**6  # allowed unpacked, whatever the packed size
LARGEST_BYTES = 10**9
LARGEST_RATIO = 30  # rows of text pack by a factor of 3 to 10
_PIECE_BYTES = 1 << 20


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes:
        """Read at most ``size`` bytes; empty at the end."""


def unpacked(path: Path, content: bytes) -> bytes:
    """The content, unpacked if it begins like gzip or Zstandard, whatever the file name.

    Raises:
        DataError: it is damaged, larger than both 256 MB and 30 times its packed size, or larger than 1 GB.
    """
    if content.startswith(GZIP):
        stream: _Stream = gzip.GzipFile(fileobj=io.BytesIO(content))
    elif content.startswith(ZSTANDARD):
        import pyarrow

        stream = pyarrow.CompressedInputStream(pyarrow.BufferReader(content), "zstd")
    else:
        return content
    limit = min(LARGEST_BYTES, max(ALWAYS_BYTES, LARGEST_RATIO * len(content)))
    found = bytearray()
    try:
        while piece := stream.read(_PIECE_BYTES):
            found += piece
            if len(found) > limit:
                raise DataError(
                    f"{path}: found more than {limit / 1e6:,.0f} MB when unpacked, expected at most "
                    f"{ALWAYS_BYTES / 1e6:,.0f} MB or {LARGEST_RATIO} times the packed size, up to "
                    f"{LARGEST_BYTES / 1e9:.0f} GB; unpack it yourself if you trust it"
                )
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: found packed data that cannot be unpacked ({one_line(error)}), expected a complete file; "
            "write or copy it again"
        ) from error
    return bytes(found)
