"""The coordinator: gives jobs to an executor and stores their results. Torch-free."""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing
from pathlib import Path
from typing import Any

from aletheia.errors import ArtifactError, CampaignError
from aletheia.files import file_sha256, is_full_disk, read_sealed, sealed_json, write_text
from aletheia.lab.campaign.checks import JOBS, check_data_unchanged, check_earlier_jobs, data_files, earlier_job
from aletheia.lab.campaign.executors import Executor
from aletheia.lab.campaign.full_disk import full_disk, stop_on_full_disk
from aletheia.lab.campaign.grid import Job, Row, jobs
from aletheia.lab.campaign.process import JOB_FILE, LOG_FILE, RESULT_FILE, Ending
from aletheia.lab.campaign.spec import BehaviourCampaign, SpeedCampaign, parse_campaign
from aletheia.lab.campaign.store import STORE_FILE, Record, Store

MORE_TRIES = 2  # of a job that was ended by a signal
Watcher = Callable[[Store, Sequence[Job]], None]


def run_campaign(
    campaign: SpeedCampaign | BehaviourCampaign,
    folder: Path,
    executor: Executor,
    data_dir: Path | None = None,
    retry_failed: bool = False,
    watch: Watcher = lambda store, running: None,
    more_tries: int = MORE_TRIES,
) -> list[Record]:
    """Run every row that is not recorded yet, and return all rows.

    A row is recorded in the store when its job has finished. After an interruption, the next call records results that
    were written but not recorded, and runs the remaining rows. Failed rows keep their reason. A job that is ended by a
    signal runs again after the waiting ones. A full disk stops the campaign, and its row stays pending.

    Args:
        campaign: what to run; the same as before, if the folder holds one.
        folder: folder for the store, the jobs and their artefacts.
        executor: where jobs run; closed at the end.
        data_dir: used instead of the campaign's ``data_dir``.
        retry_failed: run failed rows again.
        watch: called after every change, with the store and the jobs that run or wait.
        more_tries: how often a job that was ended by a signal runs again.

    Raises:
        CampaignError: the folder holds another campaign or its jobs, another coordinator is running, or the disk is
            full.
    """
    folder = folder.resolve()
    data = data_dir or Path(campaign.data_dir)
    with closing(executor), stop_on_full_disk(folder):
        if not (folder / STORE_FILE).exists():
            check_earlier_jobs(campaign, folder)
        with Store.writing(folder, campaign) as store, closing(executor):  # also before the lock is released
            hashes = {name: file_sha256(data / name) for name in data_files(campaign) if (data / name).is_file()}
            check_data_unchanged(store, folder, hashes)
            if retry_failed:
                _forget_failures(store, folder)
            waiting: dict[Future[Ending], Job] = {}
            for job in _pending(store):
                place = folder / JOBS / job.name
                _prepare(place, campaign, job, data, hashes)
                if (place / RESULT_FILE).exists():
                    store.record(_outcome(job, place, None))
                else:
                    waiting[executor.submit(place)] = job
            watch(store, list(waiting.values()))
            _finish(waiting, store, folder, executor, watch, more_tries)
            return store.records()


def _finish(
    waiting: dict["Future[Ending]", Job],
    store: Store,
    folder: Path,
    executor: Executor,
    watch: Watcher,
    more_tries: int,
) -> None:
    """Record jobs as they end; submit those again that were ended by a signal."""
    killed: Counter[Job] = Counter()
    while waiting:
        done, _ = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
        no_room = None
        for future in done:
            job = waiting.pop(future)
            place = folder / JOBS / job.name
            ending = _ending(future)
            killed[job] += ending.how == "killed"
            if ending.how == "disk full":
                no_room = f"{job.name}: {ending.reason}"
            elif ending.how == "killed" and killed[job] <= more_tries:
                waiting[executor.submit(place)] = job
            else:
                times = f" (the last of {killed[job]} times)" if killed[job] > 1 and ending.how == "killed" else ""
                store.record(_outcome(job, place, ending.reason + times if ending.how != "through" else None))
        watch(store, list(waiting.values()))
        if no_room:
            raise full_disk(folder, no_room)


def _ending(future: "Future[Ending]") -> Ending:
    """How a job ended, also if it could not start or its worker was lost."""
    error = future.exception()
    if error is None:
        return future.result()
    return Ending("disk full" if is_full_disk(error) else "failed", f"{type(error).__name__}: {error}")


def _forget_failures(store: Store, folder: Path) -> None:
    """Make jobs with a failed row pending again, as a whole, because arms are paired round by round.

    Their results are removed before the store forgets their rows.
    """
    failed = {record.row for record in store.records() if record.status == "failed"}
    for job in jobs(store.campaign):
        if failed.intersection(job.rows):
            (folder / JOBS / job.name / RESULT_FILE).unlink(missing_ok=True)
            store.forget(job.rows)


def _pending(store: Store) -> list[Job]:
    """Jobs with a row that is neither done nor failed."""
    open_rows = {record.row for record in store.records() if record.status == "pending"}
    return [job for job in jobs(store.campaign) if open_rows.intersection(job.rows)]


def _prepare(
    place: Path, campaign: SpeedCampaign | BehaviourCampaign, job: Job, data_dir: Path, hashes: Mapping[str, str]
) -> None:
    """Write the job file. The files of an earlier attempt at the same job stay, and the job resumes from them.

    Files of an attempt with other data are moved aside, as they may be hours of work.
    """
    content = {
        "data": hashes,
        "campaign": campaign.model_dump(mode="json"),
        "rows": [[row.model, row.arm, row.seed] for row in job.rows],
        "data_dir": str(data_dir.resolve()),
        "folder": str(place.parent.parent),
    }
    text = sealed_json(content)
    if place.exists() and any(place.iterdir()) and not _is_same(earlier_job(place), json.loads(text)):
        aside = next(name for count in itertools.count(1) if not (name := Path(f"{place}.before-{count}")).exists())
        place.rename(aside)
    place.mkdir(parents=True, exist_ok=True)
    (place / LOG_FILE).unlink(missing_ok=True)
    write_text(place / JOB_FILE, text)


def _is_same(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two job files describe the same job; folders may have moved, and a newer release may add keys."""
    if any(earlier.get(part) != now[part] for part in ("data", "rows")):
        return False
    try:
        return parse_campaign(earlier["campaign"], JOB_FILE) == parse_campaign(now["campaign"], JOB_FILE)
    except (KeyError, CampaignError):
        return False


def _outcome(job: Job, place: Path, why: str | None) -> list[Record]:
    """A record for each row of a job: its result, or the reason of its failure, its own or the job's."""
    found: dict[str, Any] = {}
    if why is None:
        try:
            found = read_sealed(place / RESULT_FILE)
        except ArtifactError as error:
            why = str(error)
    return [_record(row, found.get(row.arm), why) for row in job.rows]


def _record(row: Row, found: Any, why: str | None) -> Record:
    if isinstance(found, Mapping) and "result" in found:
        return Record(row, "done", None, dict(found["result"]))
    reason = found.get("reason") if isinstance(found, Mapping) else None
    return Record(row, "failed", str(reason or why or "the job left no result for this arm"), None)
