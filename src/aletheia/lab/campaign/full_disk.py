"""A full disk: no fault of a row, so the campaign stops and the row stays to be done. Torch-free."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aletheia.errors import AletheiaError, CampaignError
from aletheia.files import free_bytes, is_full_disk


def full_disk(folder: Path, what: str) -> CampaignError:
    """The one line with which a campaign stops."""
    return CampaignError(
        f"the disk is full ({what}), {free_bytes(folder):,} bytes are free; expected room for {folder}: make some and "
        "run the campaign again, which goes on with the rows that are not done"
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
