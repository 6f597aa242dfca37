"""The store of a campaign: one SQLite file with a row per (model, arm, seed), one writer at a time. Torch-free."""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from aletheia.errors import CampaignError
from aletheia.files import check_writable
from aletheia.lab.campaign.grid import Row, jobs
from aletheia.lab.campaign.spec import BehaviourCampaign, SpeedCampaign, parse_campaign

STORE_FILE = "campaign.db"
VERSION = 1
Status = Literal["pending", "done", "failed"]
SCHEMA = """
CREATE TABLE campaign (version INTEGER NOT NULL, spec TEXT NOT NULL);
CREATE TABLE rows (
    position INTEGER PRIMARY KEY,
    model TEXT NOT NULL,
    arm TEXT NOT NULL,
    seed INTEGER NOT NULL,
    status TEXT NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'done', 'failed')),
    reason TEXT,
    result TEXT,
    UNIQUE (model, arm, seed)
);
"""


@dataclass(frozen=True)
class Record:
    """What is known of a row: ``result`` if it is done, ``reason`` if it failed."""

    row: Row
    status: Status
    reason: str | None
    result: dict[str, Any] | None


class Store:
    """The rows of one campaign. Every change is on disk when the call returns (WAL, synchronous=FULL)."""

    def __init__(self, path: Path) -> None:
        """Open a store that is there, to read; see :meth:`writing` to change it."""
        try:
            if not path.is_file():
                raise CampaignError(f"{path.parent} holds no campaign; run one there with 'aletheia campaign run'")
            self._connection = sqlite3.connect(path, timeout=30, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            found = self._connection.execute("SELECT version, spec FROM campaign").fetchone()
        except sqlite3.DatabaseError as error:
            raise CampaignError(f"{path} is no store of ours ({error}); choose another `out`") from error
        if found is None or found[0] != VERSION:
            raise CampaignError(f"{path} has store version {found and found[0]!r}; this release reads {VERSION}")
        self.campaign = parse_campaign(json.loads(found[1]), str(path))

    @classmethod
    @contextmanager
    def writing(cls, folder: Path, campaign: SpeedCampaign | BehaviourCampaign) -> Iterator["Store"]:
        """The store of ``folder`` for the one coordinator that may write to it; made if it is not there.

        Raises:
            CampaignError: another coordinator is at work, or the folder holds another campaign.
            ArtifactError: the folder cannot be written.
        """
        check_writable(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "coordinator.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise CampaignError(
                f"{folder}: another 'aletheia campaign run' is at work; wait for it, or stop it"
            ) from None
        try:
            path = folder / STORE_FILE
            if not path.exists():
                _create(path, campaign)
            store = cls(path)
            check_same(store.campaign, campaign, folder)
            try:
                yield store
            finally:
                store.close()
        finally:
            lock.release()

    def record(self, records: Iterable[Record]) -> None:
        """Keep what came of rows, all of them or none; a row that is done stays as it is."""
        values = [
            (
                record.status,
                record.reason,
                None if record.result is None else json.dumps(record.result, sort_keys=True, allow_nan=False),
                record.row.model,
                record.row.arm,
                record.row.seed,
            )
            for record in records
        ]
        change = (
            "UPDATE rows SET status = ?, reason = ?, result = ? "
            "WHERE model = ? AND arm = ? AND seed = ? AND status != 'done'"
        )
        with self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany(change, values)
            self._connection.execute("COMMIT")

    def records(self) -> list[Record]:
        """Every row, in the order of the campaign."""
        query = "SELECT model, arm, seed, status, reason, result FROM rows ORDER BY position"
        return [
            Record(Row(model, arm, seed), status, reason, None if result is None else json.loads(result))
            for model, arm, seed, status, reason, result in self._connection.execute(query)
        ]

    def forget(self, rows: Iterable[Row]) -> None:
        """Rows become pending again, all of them or none."""
        change = (
            "UPDATE rows SET status = 'pending', reason = NULL, result = NULL WHERE model = ? AND arm = ? AND seed = ?"
        )
        with self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany(change, [(row.model, row.arm, row.seed) for row in rows])
            self._connection.execute("COMMIT")

    def close(self) -> None:
        """Close the file."""
        self._connection.close()


def _create(path: Path, campaign: SpeedCampaign | BehaviourCampaign) -> None:
    """Write a store whole: into a temporary file, then under its name, so that a kill leaves none by halves."""
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    rows = [row for job in jobs(campaign) for row in job.rows]
    connection = sqlite3.connect(temporary)
    with connection:
        connection.executescript(SCHEMA)
        connection.execute("INSERT INTO campaign VALUES (?, ?)", (VERSION, campaign.model_dump_json()))
        connection.executemany(
            "INSERT INTO rows (model, arm, seed) VALUES (?, ?, ?)", [(row.model, row.arm, row.seed) for row in rows]
        )
    connection.close()
    temporary.rename(path)


def check_same(
    stored: SpeedCampaign | BehaviourCampaign, given: SpeedCampaign | BehaviourCampaign, folder: Path
) -> None:
    """Refuse to go on with another campaign than the one that ``folder`` holds.

    Raises:
        CampaignError: names the first key that differs.
    """
    before, now = (_flat(campaign.model_dump(mode="json")) for campaign in (stored, given))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise CampaignError(
                f"{folder} holds a campaign with {key} = {before.get(key)!r}, the file says {now.get(key)!r}; "
                "choose another `out`"
            )


def _flat(value: Any, at: str = "") -> dict[str, Any]:
    """Leaves of nested mappings and lists by their dotted path."""
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {at: value}
    return {key: leaf for name, part in items for key, leaf in _flat(part, f"{at}.{name}" if at else str(name)).items()}
