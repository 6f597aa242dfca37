"""``python -m aletheia.lab.campaign.job FOLDER``: run one job and write ``result.json``. See ``process.py``."""

import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from aletheia.errors import AletheiaError
from aletheia.files import is_full_disk, read_sealed, sealed_json, write_text
from aletheia.lab.campaign.grid import Row
from aletheia.lab.campaign.process import DISK_FULL, JOB_FILE, RESULT_FILE
from aletheia.lab.campaign.spec import SpeedCampaign, parse_campaign
from aletheia.libraries import quiet_libraries

ABANDONED = 75
LOCK_SECONDS = 60  # to wait for the end of a copy whose Ray worker died


def main(place: Path) -> int:
    """Run the job in ``place``; exit code 0, 2 with a line that gives the reason, or ``DISK_FULL``."""
    threading.Thread(target=_end_with_input, daemon=True).start()
    quiet_libraries()  # otherwise their last line would be reported as the reason of a failure
    try:
        with FileLock(place / "job.lock", timeout=LOCK_SECONDS):
            job = read_sealed(place / JOB_FILE)
            campaign = parse_campaign(job["campaign"], str(place / JOB_FILE))
            rows = [Row(*row) for row in job["rows"]]
            found = _run(campaign, rows, Path(job["data_dir"]), Path(job["folder"]), place)
            write_text(place / RESULT_FILE, sealed_json(found))
    except Timeout:
        _say("error: another process runs this job; wait until it ends")
        return 2
    except Exception as error:
        full = is_full_disk(error)
        if not full and not isinstance(error, AletheiaError):
            raise
        _say(f"error: {error}")
        return DISK_FULL if full else 2
    return 0


def _say(message: str) -> None:
    """Write a line at the end of the log, bypassing buffers, if the disk has room."""
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    with suppress(OSError):
        os.write(1, f"{' '.join(message.split())}\n".encode())


def _run(campaign: Any, rows: list[Row], data_dir: Path, folder: Path, place: Path) -> dict[str, Any]:
    started = time.perf_counter()
    import torch

    from aletheia.execution.peak_memory import peak_memory_bytes
    from aletheia.lab.campaign.about import about

    if isinstance(campaign, SpeedCampaign):
        from aletheia.lab.campaign.speed_job import run_speed

        found = run_speed(campaign, rows, data_dir, folder)
    else:
        from aletheia.lab.campaign.behaviour_job import run_behaviour

        found = run_behaviour(campaign, rows[0], data_dir, folder, place)
    shared = {
        "about": about(),
        "process_peak_bytes": peak_memory_bytes(torch.device("cpu")),
        "job_seconds": (time.perf_counter() - started) / len(found),  # per row
    }
    return {arm: {"result": value["result"] | shared} if "result" in value else value for arm, value in found.items()}


def _end_with_input() -> None:
    """End at once when the process that waits for this job is gone."""
    while os.read(0, 4096):  # not sys.stdin: its lock would be held when the interpreter shuts down
        pass
    os._exit(ABANDONED)


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    if code == DISK_FULL:
        os._exit(code)  # flushing buffers to the full disk would fail and change the exit code
    sys.exit(code)
