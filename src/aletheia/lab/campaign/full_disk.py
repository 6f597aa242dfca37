"""A full disk is not the fault of a row: the campaign stops, and the row stays pending. Torch-free."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aletheia.errors import AletheiaError, CampaignError
from aletheia.files import free_bytes, is_full_disk


def full_disk(folder: Path, what: str) -> CampaignError:
    """The error that stops a campaign."""
    return CampaignError(
        f"the disk is full ({what}), {free_bytes(folder):,} bytes are free; free some space for {folder} and run the "
        "campaign again, which resumes with the rows that are not done"
    )


@contextmanager
def stop_on_full_disk(folder: Path) -> Iterator[None]:
    """Turn any error that a full disk causes into that error.

    Raises:
        CampaignError: the disk is full.
    """
    try:
        yield
    except (OSError, sqlite3.Error, AletheiaError) as error:
        if isinstance(error, CampaignError) or not is_full_disk(error):
            raise
        raise full_disk(folder, " ".join(str(error).split())) from error
