"""``python -m aletheia.lab.campaign.job FOLDER``: run one job and leave ``result.json``. See ``process.py``."""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from aletheia.errors import AletheiaError
from aletheia.files import write_text
from aletheia.lab.campaign.grid import Row
from aletheia.lab.campaign.process import JOB_FILE, RESULT_FILE
from aletheia.lab.campaign.spec import SpeedCampaign, parse_campaign

ABANDONED = 75
LOCK_SECONDS = 60  # for a copy to end whose Ray worker died


def main(place: Path) -> int:
    """Run the job in ``place``; exit code 0, or 2 with a line that says why not."""
    threading.Thread(target=_end_with_input, daemon=True).start()
    lock = FileLock(place / "job.lock")
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        print("error: another process runs this job; wait until it ends", flush=True)
        return 2
    told = json.loads((place / JOB_FILE).read_text(encoding="utf-8"))
    campaign = parse_campaign(told["campaign"], str(place / JOB_FILE))
    rows = [Row(*row) for row in told["rows"]]
    try:
        found = _run(campaign, rows, Path(told["data_dir"]), Path(told["folder"]), place)
    except AletheiaError as error:
        print(f"error: {' '.join(str(error).split())}", flush=True)
        return 2
    write_text(place / RESULT_FILE, json.dumps(found, indent=1, allow_nan=False) + "\n")
    return 0


def _run(campaign: Any, rows: list[Row], data_dir: Path, folder: Path, place: Path) -> dict[str, Any]:
    started = time.perf_counter()
    import torch

    from aletheia.execution.peak_memory import peak_memory_bytes
    from aletheia.lab.campaign.about import about

    if isinstance(campaign, SpeedCampaign):
        from aletheia.lab.campaign.speed import run_speed

        found = run_speed(campaign, rows, data_dir, folder)
    else:
        from aletheia.lab.campaign.behaviour import run_behaviour

        found = run_behaviour(campaign, rows[0], data_dir, folder, place)
    shared = {
        "about": about(),
        "process_peak_bytes": peak_memory_bytes(torch.device("cpu")),
        "job_seconds": (time.perf_counter() - started) / len(found),  # a row's share
    }
    return {arm: {"result": value["result"] | shared} if "result" in value else value for arm, value in found.items()}


def _end_with_input() -> None:
    """End at once when whoever waits for this job is gone."""
    while os.read(0, 4096):  # not sys.stdin, whose lock would be held when the interpreter shuts down
        pass
    os._exit(ABANDONED)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
