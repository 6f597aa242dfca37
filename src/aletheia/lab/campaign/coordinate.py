"""The coordinator: gives jobs to an executor, and keeps what comes back. Torch-free."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing
from pathlib import Path
from typing import Any

from aletheia.errors import ArtifactError, CampaignError, SandboxError
from aletheia.files import file_sha256, read_json, write_text
from aletheia.lab.campaign.executors import Executor
from aletheia.lab.campaign.grid import Job, Row, jobs
from aletheia.lab.campaign.process import JOB_FILE, LOG_FILE, RESULT_FILE
from aletheia.lab.campaign.spec import BehaviourCampaign, SpeedCampaign
from aletheia.lab.campaign.store import Record, Store
from aletheia.lab.evaluation.local_data import FILES

JOBS = "jobs"
Watcher = Callable[[Store, Sequence[Job]], None]


def run_campaign(
    campaign: SpeedCampaign | BehaviourCampaign,
    folder: Path,
    executor: Executor,
    data_dir: Path | None = None,
    retry_failed: bool = False,
    watch: Watcher = lambda store, running: None,
) -> list[Record]:
    """Run every row that is not recorded yet, and return all rows.

    A row is recorded in the store once its job is through; whatever interrupts the campaign, the next call goes on
    with the rows that are not, and takes in results that were written but not recorded. Failed rows keep their reason.

    Args:
        campaign: what to run; the same as before, if the folder holds one.
        folder: where the store, the jobs and their artefacts go.
        executor: where jobs run; closed at the end.
        data_dir: instead of the campaign's ``data_dir``.
        retry_failed: run rows that failed once more.
        watch: called whenever something changed, with the store and the jobs that run or wait.

    Raises:
        CampaignError: the folder holds another campaign, or another coordinator is at work.
    """
    folder = folder.resolve()
    data = data_dir or Path(campaign.data_dir)
    with closing(executor), Store.writing(folder, campaign) as store, closing(executor):  # before the lock goes, too
        hashes = {name: file_sha256(data / name) for name in data_files(campaign) if (data / name).is_file()}
        _check_data_unchanged(store, folder, hashes)
        if retry_failed:
            _forget_failures(store, folder)
        waiting: dict[Future[str | None], Job] = {}
        for job in _pending(store):
            place = folder / JOBS / job.name
            _prepare(place, campaign, job, data, hashes, folder)
            if (place / RESULT_FILE).exists():
                store.record(_outcome(job, place, None))
            else:
                waiting[executor.submit(place)] = job
        watch(store, list(waiting.values()))
        while waiting:
            done, _ = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in done:
                job = waiting.pop(future)
                error = future.exception()
                why = f"{type(error).__name__}: {error}" if error else future.result()
                store.record(_outcome(job, folder / JOBS / job.name, why))
            watch(store, list(waiting.values()))
        return store.records()


def _forget_failures(store: Store, folder: Path) -> None:
    """Jobs with a failed row run again as a whole, since arms are paired round by round.

    What they left goes before the store forgets them.
    """
    failed = {record.row for record in store.records() if record.status == "failed"}
    for job in jobs(store.campaign):
        if failed.intersection(job.rows):
            (folder / JOBS / job.name / RESULT_FILE).unlink(missing_ok=True)
            store.forget(job.rows)


def _check_data_unchanged(store: Store, folder: Path, hashes: Mapping[str, str]) -> None:
    """Refuse to mix rows of different data.

    Raises:
        CampaignError: names a file that is not what it was for a row that is recorded.
    """
    recorded = {record.row for record in store.records() if record.status == "done"}
    for job in jobs(store.campaign):
        if recorded.intersection(job.rows):
            earlier = _told(folder / JOBS / job.name).get("data", {})
            if changed := [name for name in earlier if name in hashes and earlier[name] != hashes[name]]:
                raise CampaignError(
                    f"{changed[0]} is not what it was when {job.name} ran; expected the same data for every row, "
                    "so bring it back or choose another --out"
                )


def _told(place: Path) -> dict[str, Any]:
    """What a job was told to do at an earlier attempt; nothing if there was none."""
    try:
        found = read_json(place / JOB_FILE)
    except ArtifactError:
        return {}
    return dict(found) if isinstance(found, Mapping) else {}


def _pending(store: Store) -> list[Job]:
    """Jobs with a row that is neither done nor failed."""
    open_rows = {record.row for record in store.records() if record.status == "pending"}
    return [job for job in jobs(store.campaign) if open_rows.intersection(job.rows)]


def _prepare(
    place: Path,
    campaign: SpeedCampaign | BehaviourCampaign,
    job: Job,
    data_dir: Path,
    hashes: Mapping[str, str],
    folder: Path,
) -> None:
    """Write what the job is to do. What an earlier attempt at the same left stays, and is gone on with."""
    told = {
        "data": hashes,
        "campaign": campaign.model_dump(mode="json"),
        "rows": [[row.model, row.arm, row.seed] for row in job.rows],
        "data_dir": str(data_dir.resolve()),
        "folder": str(folder),
    }
    text = json.dumps(told, indent=1) + "\n"
    earlier, same = _told(place), json.loads(text)
    if place.exists() and any(earlier.get(part) != same[part] for part in ("data", "campaign", "rows")):
        shutil.rmtree(place)  # of another campaign, or other data; folders may have moved
    place.mkdir(parents=True, exist_ok=True)
    (place / LOG_FILE).unlink(missing_ok=True)
    write_text(place / JOB_FILE, text)


def data_files(campaign: SpeedCampaign | BehaviourCampaign) -> list[str]:
    """Files of rows and benchmarks, under ``data_dir``."""
    if isinstance(campaign, SpeedCampaign):
        return [campaign.data]
    benchmarks = [name for task in campaign.tasks for name in FILES[task].values()]
    return list(dict.fromkeys(name for name in (campaign.data, campaign.held_out, *benchmarks) if name))


def _outcome(job: Job, place: Path, why: str | None) -> list[Record]:
    """A record for each row of a job: its result, its own reason, or the job's."""
    found: dict[str, Any] = {}
    if why is None:
        try:
            told = read_json(place / RESULT_FILE)
            found = dict(told) if isinstance(told, Mapping) else {}
        except ArtifactError as error:
            why = str(error)
    return [_record(row, found.get(row.arm), why) for row in job.rows]


def _record(row: Row, found: Any, why: str | None) -> Record:
    if isinstance(found, Mapping) and "result" in found:
        return Record(row, "done", None, dict(found["result"]))
    reason = found.get("reason") if isinstance(found, Mapping) else None
    return Record(row, "failed", str(reason or why or "the job left no result for this arm"), None)


def check_data(campaign: SpeedCampaign | BehaviourCampaign, data_dir: Path) -> None:
    """Refuse a campaign whose files are not there, before the first row runs.

    Raises:
        CampaignError: names the file.
    """
    for name in data_files(campaign):
        if not (data_dir / name).is_file():
            raise CampaignError(f"{data_dir / name} is missing; expected it there, or another --data-dir")


def check_tools(campaign: SpeedCampaign | BehaviourCampaign) -> None:
    """Refuse benchmarks that cannot run on this machine, before the first row runs.

    Raises:
        EvaluationError: lm-eval is not installed.
        SandboxError: HumanEval is asked for, and there is no sandbox.
    """
    if not isinstance(campaign, BehaviourCampaign) or not campaign.tasks:
        return
    from aletheia.lab.evaluation import sandbox
    from aletheia.lab.evaluation.upstream import check_installed

    check_installed()
    if "humaneval" in campaign.tasks and not campaign.unsafe_exec:
        try:
            sandbox.check()
        except SandboxError as error:
            instead = "'unsafe_exec: true' in the campaign's file"  # of the option of 'aletheia eval'
            raise SandboxError(str(error).replace("--unsafe-exec", instead)) from None
