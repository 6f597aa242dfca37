"""The store of a campaign: one SQLite file with a row per (model, arm, seed), one writer at a time. Torch-free.

SQLite has no checksums, so each row carries the sha256 of its content, and so does the campaign. While no coordinator
runs, a file next to the store holds the sha256 of the whole file. A killed coordinator leaves no such file; the next
one that ends normally writes it again.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from aletheia.errors import ArtifactError, CampaignError
from aletheia.files import check_writable, file_sha256, write_text
from aletheia.lab.campaign.grid import Row, jobs
from aletheia.lab.campaign.spec import BehaviourCampaign, SpeedCampaign, parse_campaign

STORE_FILE = "campaign.db"
SEAL_FILE = STORE_FILE + ".sha256"
VERSION = 2
DAMAGE = (sqlite3.Error, OSError, UnicodeDecodeError)  # SQLite's messages quote what they found, of any content
Status = Literal["pending", "done", "failed"]
SCHEMA = """
CREATE TABLE campaign (version INTEGER NOT NULL, spec TEXT NOT NULL, sha256 TEXT NOT NULL);
CREATE TABLE rows (
    position INTEGER PRIMARY KEY,
    model TEXT NOT NULL,
    arm TEXT NOT NULL,
    seed INTEGER NOT NULL,
    status TEXT NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'done', 'failed')),
    reason TEXT,
    result TEXT,
    sha256 TEXT NOT NULL,
    UNIQUE (model, arm, seed)
);
"""


@dataclass(frozen=True)
class Record:
    """The state of a row: ``result`` if it is done, ``reason`` if it failed."""

    row: Row
    status: Status
    reason: str | None
    result: dict[str, Any] | None


class Store:
    """The rows of one campaign. Every change is on disk when the call returns (WAL, synchronous=FULL)."""

    def __init__(self, path: Path) -> None:
        """Open an existing store to read it; see :meth:`writing` to change it.

        Raises:
            CampaignError: there is no store, it is of another release, or it was changed after it was written.
        """
        self._path = path
        try:
            if not path.is_file():
                raise CampaignError(f"{path.parent} holds no campaign; start one there with 'aletheia campaign run'")
            self._check_seal()
            self._connection = sqlite3.connect(path, timeout=30, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            found = self._connection.execute("SELECT version FROM campaign").fetchone()
            if found is None or found[0] != VERSION:
                version = found and found[0]
                raise CampaignError(f"{path} has store version {version!r}; expected {VERSION}, choose another `out`")
            self.campaign = parse_campaign(json.loads(self._checked_spec()), str(path))
        except DAMAGE as error:
            reason = " ".join(str(error).split())
            raise CampaignError(f"{path} is not the store of a campaign ({reason}); choose another `out`") from error
        self.records()

    @classmethod
    @contextmanager
    def writing(cls, folder: Path, campaign: SpeedCampaign | BehaviourCampaign) -> Iterator["Store"]:
        """The store of ``folder`` for the one coordinator that may write to it; created if it does not exist.

        Raises:
            CampaignError: another coordinator is running, or the folder holds another campaign.
            ArtifactError: the folder cannot be written.
        """
        check_writable(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "coordinator.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise CampaignError(
                f"{folder}: another 'aletheia campaign run' is running there; wait for it, or stop it"
            ) from None
        try:
            path = folder / STORE_FILE
            if not path.exists():
                (folder / SEAL_FILE).unlink(missing_ok=True)
                _create(path, campaign)
            store = cls(path)
            check_same(store.campaign, campaign, folder)
            (folder / SEAL_FILE).unlink(missing_ok=True)
            try:
                yield store
            finally:
                store._seal()
        finally:
            lock.release()

    def record(self, records: Iterable[Record]) -> None:
        """Store the results of rows, all of them or none; a row that is done stays as it is."""
        self._change(records, " AND status != 'done'")

    def records(self) -> list[Record]:
        """Every row, in the order of the campaign.

        Raises:
            CampaignError: a row is not as it was written, or rows are missing.
        """
        query = "SELECT model, arm, seed, status, reason, result, sha256 FROM rows ORDER BY position"
        try:
            found = self._connection.execute(query).fetchall()
        except DAMAGE as error:
            raise self._damaged(str(error)) from error
        expected = [row for job in jobs(self.campaign) for row in job.rows]
        if len(found) != len(expected):
            raise self._damaged(f"it has {len(found)} rows, the campaign {len(expected)}")
        records = []
        for row, (*fields, digest) in zip(expected, found, strict=True):
            if digest != _sha256(*fields) or fields[:3] != [row.model, row.arm, row.seed]:
                raise self._damaged(f"the sha256 of {row.model}, {row.arm}, seed {row.seed} differs")
            status, reason, result = fields[3:]
            records.append(Record(row, status, reason, None if result is None else json.loads(result)))
        return records

    def forget(self, rows: Iterable[Row]) -> None:
        """Make rows pending again, all of them or none."""
        self._change([Record(row, "pending", None, None) for row in rows])

    def _change(self, records: Iterable[Record], where: str = "") -> None:
        change = (
            f"UPDATE rows SET status = ?, reason = ?, result = ?, sha256 = ? "
            f"WHERE model = ? AND arm = ? AND seed = ?{where}"
        )
        values = [(*_fields(record)[3:], _sha256(*_fields(record)), *_fields(record)[:3]) for record in records]
        with self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany(change, values)
            self._connection.execute("COMMIT")

    def _checked_spec(self) -> str:
        """The campaign as it was written, after a check of the file's pages, tables and indexes."""
        fault = self._connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if fault != "ok":
            raise self._damaged(str(fault))
        if _schema(self._connection) != _schema_of_ours():
            raise self._damaged("its tables are not those of a store")
        rows = self._connection.execute("SELECT spec, sha256 FROM campaign").fetchall()
        if len(rows) != 1 or rows[0][1] != _sha256(rows[0][0]):
            raise self._damaged("the sha256 of the campaign differs")
        return str(rows[0][0])

    def _damaged(self, fault: str) -> CampaignError:
        return CampaignError(
            f"{self._path} was changed after it was written ({' '.join(fault.split())}); restore it, or remove it and "
            "'aletheia campaign run' rebuilds it from the results of its jobs"
        )

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def _seal(self) -> None:
        """Close the file and write its sha256 next to it, unless another process is reading it."""
        with closing(self._connection), suppress(sqlite3.Error):
            is_busy, *_ = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if not is_busy:  # nothing remains to be moved into the file later
                with suppress(OSError, ArtifactError):  # disk full: all rows are stored, and each has its own sha256
                    write_text(self._path.with_name(SEAL_FILE), file_sha256(self._path) + "\n")

    def _check_seal(self) -> None:
        place = self._path.with_name(SEAL_FILE)
        if not place.exists():
            return
        kept = place.read_bytes()
        if kept.decode("ascii", "replace") != file_sha256(self._path) + "\n" and place.exists():
            raise self._damaged(f"its sha256 is not that in {SEAL_FILE}")  # no coordinator started meanwhile


def _create(path: Path, campaign: SpeedCampaign | BehaviourCampaign) -> None:
    """Write a whole store: into a temporary file, then under its name, so that a kill leaves no partial store."""
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    rows = [row for job in jobs(campaign) for row in job.rows]
    connection = sqlite3.connect(temporary)
    with connection:
        connection.executescript(SCHEMA)
        spec = campaign.model_dump_json()
        connection.execute("INSERT INTO campaign VALUES (?, ?, ?)", (VERSION, spec, _sha256(spec)))
        fields = [_fields(Record(row, "pending", None, None)) for row in rows]
        connection.executemany(
            "INSERT INTO rows (model, arm, seed, status, reason, result, sha256) VALUES (?, ?, ?, ?, ?, ?, ?)",
            [(*one, _sha256(*one)) for one in fields],
        )
    connection.close()
    temporary.rename(path)


def _fields(record: Record) -> tuple[Any, ...]:
    """The fields of a row of the table."""
    row, result = record.row, record.result
    text = None if result is None else json.dumps(result, sort_keys=True, allow_nan=False)
    return row.model, row.arm, row.seed, record.status, record.reason, text


def _sha256(*fields: Any) -> str:
    return hashlib.sha256(json.dumps(fields, default=repr).encode()).hexdigest()


def _schema(connection: sqlite3.Connection) -> list[tuple[Any, ...]]:
    return connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name").fetchall()


def _schema_of_ours() -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(":memory:")
    connection.executescript(SCHEMA)
    found = _schema(connection)
    connection.close()
    return found


def check_same(
    stored: SpeedCampaign | BehaviourCampaign, given: SpeedCampaign | BehaviourCampaign, folder: Path
) -> None:
    """Refuse a campaign that differs from the one in ``folder``.

    Raises:
        CampaignError: names the first differing key.
    """
    before, now = (_flat(campaign.model_dump(mode="json")) for campaign in (stored, given))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise CampaignError(
                f"{folder} holds a campaign with {key} = {before.get(key)!r}, and the file has {now.get(key)!r}; "
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
