"""A full disk: no fault of a row, so the campaign stops and the row stays to be done. Torch-free."""

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aletheia.errors import AletheiaError, CampaignError

NUMBERS = (errno.ENOSPC, errno.EDQUOT)
WORDS = ("No space left on device", "Disk quota exceeded", "database or disk is full")  # of libraries without a number


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that a disk is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NUMBERS:
            return True
        if any(words in str(error) for words in WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def full_disk(folder: Path, what: str) -> CampaignError:
    """The one line with which a campaign stops."""
    return CampaignError(
        f"the disk is full ({what}); expected room for {folder}: free some space and run the campaign again, which "
        "goes on with the rows that are not done"
    )


@contextmanager
def stop_on_full_disk(folder: Path) -> Iterator[None]:
    """Turns any error that comes of a full disk into that line.

    Raises:
        CampaignError: the disk is full.
    """
    try:
        yield
    except (OSError, sqlite3.Error, AletheiaError) as error:
        if isinstance(error, CampaignError) or not is_full_disk(error):
            raise
        raise full_disk(folder, " ".join(str(error).split())) from error
