"""Campaigns: the file, the store, the coordinator under kills, executors, the report's bytes."""

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import forked
import pytest
import torch
import yaml
from browser import CHROMIUM, open_page
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from tiny import as_flags, make_model
from transformers import Trainer

from aletheia.errors import ArtifactError, CacheError, CampaignError, SandboxError, SettingsError
from aletheia.files import sealed_json
from aletheia.lab.campaign import behaviour_job
from aletheia.lab.campaign.behaviour_job import run_behaviour
from aletheia.lab.campaign.checks import check_tools, check_workers
from aletheia.lab.campaign.coordinate import run_campaign
from aletheia.lab.campaign.executors import ExecutorSettings, LocalPool
from aletheia.lab.campaign.grid import Row, jobs
from aletheia.lab.campaign.job import main
from aletheia.lab.campaign.process import DISK_FULL, Ending
from aletheia.lab.campaign.spec import BASE, json_schema, parse_campaign, read_campaign
from aletheia.lab.campaign.steps import ATTEMPTS, StepKind, prepared, undisturbed
from aletheia.lab.campaign.store import STORE_FILE, Record, Store
from aletheia.lab.evaluation import sandbox
from aletheia.lab.reporting.campaign_page import to_csv, write_report
from aletheia.lab.reporting.figures_of_campaigns import Scale, layers_row
from aletheia.lab.statistics.results import Estimate, Interval
from aletheia.planning.make import plan
from aletheia.prefix import source
from aletheia.prefix.cache import DiskCache
from aletheia.probing.resident import probe
from aletheia.runs.schema import METRICS_FILE, Metrics
from aletheia.training.train import train

LLAMA = {
    **{"model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}
SPEC = {
    "kind": "speed",
    "name": "test",
    "models": [{"name": f"m{index}", "config": LLAMA} for index in range(3)],
    "arms": ["uniform", "paper", "depth-aware"],
    "seeds": [0, 1, 2],
    "data": "train.jsonl",
    "rows": 8,
    "max_length": 128,
    "batch_size": 2,
    "steps": 8,
    "rounds": 2,
}
# a job that takes a moment and returns what depends on its rows alone: recorded rows are the same whoever ran them
STAND_IN = """
    import hashlib, json, os, random, sys, threading, time
    from pathlib import Path
    def watch():
        os.read(0, 1)
        os._exit(75)
    threading.Thread(target=watch, daemon=True).start()
    place = Path(sys.argv[1])
    told = json.loads((place / "job.json").read_text())
    with open(Path(told["folder"]) / "started.txt", "a") as log:
        log.write(place.name + "\\n")
    time.sleep(0.08)
    found = {}
    for model, arm, seed in told["rows"]:
        draw = random.Random(f"{model} {seed}")
        base = [draw.uniform(1, 2) for _ in range(12)]
        scale = {"uniform": 1.0, "paper": 0.8, "depth-aware": 0.4}[arm]
        result = {"step_seconds": [scale * value for value in base], "early_step_seconds": [], "early_steps": 0,
                  "prefix_seconds": [], "probe_seconds": 0.5,
                  "random_weights": True, "layers": [2, 3] if arm != "uniform" else [0, 1, 2, 3],
                  "layer_count": 4, "predicted_speedup": 1 / scale, "model_parameters": 1000, "job_seconds": 0.1,
                  "about": {"packages": {"torch": "1"}, "commit": None, "is_dirty": False, "machine": "m",
                            "device": "cpu", "threads": 1, "python": "3"}}
        found[arm] = {"result": result}
    if place.name in os.environ.get("FAILS", "").split(","):
        print("error: out of luck", flush=True)
        sys.exit(2)
    temporary, text = place / "result.new", json.dumps({"sha256": "", **found}, indent=1)
    digest = hashlib.sha256(text.encode()).hexdigest()
    temporary.write_text(text.replace('"sha256": "', f'"sha256": "{digest}', 1))
    temporary.rename(place / "result.json")
"""
COORDINATOR = """
    import json, sys
    from pathlib import Path
    from aletheia.lab.campaign.executors import LocalPool
    from aletheia.lab.campaign.coordinate import run_campaign
    from aletheia.lab.campaign.spec import parse_campaign
    spec, out, stand_in = sys.argv[1:]
    run_campaign(parse_campaign(json.loads(spec), "spec"), Path(out), LocalPool(2, (sys.executable, stand_in)))
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    for name, text in (("stand_in.py", STAND_IN), ("coordinator.py", COORDINATOR)):
        (folder / name).write_text(textwrap.dedent(text))
    return folder


def campaign(**changes):
    return parse_campaign(SPEC | changes, "spec")


def pool(scripts, workers=2):
    return LocalPool(workers, (sys.executable, str(scripts / "stand_in.py")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: speed\nname: [", "spec.yaml:2: "),
        ("- a\n- b", "found list; expected a mapping"),
        ("name: x", "Unable to extract tag using discriminator 'kind'"),
        (json.dumps(SPEC | {"stepps": 3}), "stepps: Extra inputs are not permitted"),
        (json.dumps(SPEC | {"arms": ["uniform", "papr"]}), "'papr' is not a predefined arm (uniform, paper,"),
        (json.dumps(SPEC | {"arms": ["paper"]}), "'uniform' is to be compared and is not among the arms (paper)"),
        (json.dumps(SPEC | {"seeds": [0, 0]}), "seeds: 0 twice"),
        (json.dumps(SPEC | {"models": [{"name": "a", "path": "x", "config": LLAMA}]}), "either a path or a config"),
        (json.dumps(SPEC | {"models": [{"name": "../a", "path": "x"}]}), "models.0.name: String should match"),
        (json.dumps(SPEC | {"comparisons": [["paper", "last"]]}), "'last' is to be compared"),
        ("kind: speed\nname: !!python/object/apply:os.system [touch x]", "spec.yaml:2: found a tag"),
    ],
)
def test_bad_files_get_one_line(tmp_path, text, message):
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(CampaignError) as error:
        read_campaign(tmp_path / "spec.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_arms_are_filled_in_from_their_names():
    arms = {arm.name: arm for arm in campaign(arms=["uniform", "paper-asym", {"name": "paper", "rank": 4}]).arms}
    assert (arms["paper-asym"].policy, arms["paper-asym"].ranks) == ("top-percent", "by-role")
    assert (arms["paper"].policy, arms["paper"].rank) == ("top-percent", 4)


def test_the_schema_names_both_kinds():
    assert json_schema()["discriminator"]["mapping"].keys() == {"speed", "behaviour"}


def test_a_behaviour_campaign_begins_with_the_untrained_models():
    found = jobs(
        parse_campaign(
            {key: value for key, value in SPEC.items() if key != "rounds"}
            | {"kind": "behaviour", "held_out": "test.jsonl"},
            "spec",
        )
    )
    assert [job.rows[0].arm for job in found[:3]] == [BASE] * 3
    assert len(found) == 3 + 27
    assert {len(job.rows) for job in found} == {1}


def test_rows_are_recorded_and_failures_keep_their_reason(tmp_path, scripts, monkeypatch):
    monkeypatch.setenv("FAILS", "m1--1")
    records = run_campaign(campaign(), tmp_path, pool(scripts))
    assert len(records) == 27
    failed = [record for record in records if record.status == "failed"]
    assert {record.row for record in failed} == {Row("m1", arm, 1) for arm in ("uniform", "paper", "depth-aware")}
    assert {record.reason for record in failed} == {"exit code 2: error: out of luck"}
    assert run_campaign(campaign(), tmp_path, pool(scripts)) == records  # failures are kept ...
    monkeypatch.delenv("FAILS")
    again = run_campaign(campaign(), tmp_path, pool(scripts), retry_failed=True)  # ... until asked for
    assert all(record.status == "done" for record in again)
    started = (tmp_path / "started.txt").read_text().split()
    assert len(started) == 10
    assert started.count("m1--1") == 2


def test_a_retried_job_of_a_speed_campaign_is_timed_as_a_whole(tmp_path, scripts):
    run_campaign(campaign(), tmp_path, pool(scripts))
    rows = [Row("m1", arm, 1) for arm in ("uniform", "paper", "depth-aware")]
    with Store.writing(tmp_path, campaign()) as store:
        store.forget(rows)
        store.record([Record(rows[0], "done", None, {"step_seconds": [9.9]}), Record(rows[1], "failed", "why", None)])
    results = {record.row: record.result for record in run_campaign(campaign(), tmp_path, pool(scripts), None, True)}
    assert [len(results[row]["step_seconds"]) for row in rows] == [12, 12, 12]


def test_folders_may_move_and_data_may_not_change(tmp_path, scripts, monkeypatch):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    (data / "train.jsonl").write_text("rows")
    monkeypatch.setenv("FAILS", "m1--1")
    run_campaign(campaign(), out, pool(scripts), data)
    (out / "jobs" / "m1--1" / "half-done").write_text("hours of work")
    monkeypatch.delenv("FAILS")
    data, out = data.rename(tmp_path / "other-data"), out.rename(tmp_path / "other-out")
    records = run_campaign(campaign(), out, pool(scripts), data, retry_failed=True)
    assert all(record.status == "done" for record in records)
    assert (out / "jobs" / "m1--1" / "half-done").exists()
    (data / "train.jsonl").write_text("other rows")
    with pytest.raises(CampaignError, match=r"train\.jsonl was changed since m0--0 ran"):
        run_campaign(campaign(), out, pool(scripts), data)


def test_jobs_of_an_earlier_store_are_taken_in_or_refused_and_never_deleted(tmp_path, scripts):
    records = run_campaign(campaign(), tmp_path, pool(scripts))
    started = (tmp_path / "started.txt").read_text()
    (tmp_path / STORE_FILE).unlink()
    assert run_campaign(campaign(), tmp_path, pool(scripts)) == records
    assert (tmp_path / "started.txt").read_text() == started  # no job ran again
    (tmp_path / STORE_FILE).unlink()
    with pytest.raises(CampaignError, match=r"m0--0 holds a campaign with rounds = 2, and the file has 3"):
        run_campaign(campaign(rounds=3), tmp_path, pool(scripts))
    assert not (tmp_path / STORE_FILE).exists()
    assert len(list((tmp_path / "jobs").glob("*/result.json"))) == 9


def test_work_on_other_data_is_set_aside(tmp_path, scripts, monkeypatch):
    (tmp_path / "train.jsonl").write_text("rows")
    monkeypatch.setenv("FAILS", "m1--1")
    run_campaign(campaign(models=SPEC["models"][1:2], seeds=[1]), tmp_path / "out", pool(scripts), tmp_path)
    (tmp_path / "out" / "jobs" / "m1--1" / "half-done").write_text("hours of work")
    (tmp_path / "train.jsonl").write_text("other rows")
    monkeypatch.delenv("FAILS")
    again = campaign(models=SPEC["models"][1:2], seeds=[1])
    records = run_campaign(again, tmp_path / "out", pool(scripts), tmp_path, retry_failed=True)
    assert {record.status for record in records} == {"done"}
    assert (tmp_path / "out" / "jobs" / "m1--1.before-1" / "half-done").exists()
    assert not (tmp_path / "out" / "jobs" / "m1--1" / "half-done").exists()


def faulty(scripts, tmp_path, first_lines):
    """A pool of stand-in jobs that begin with these lines; ``attempts`` is how often this job was started before."""
    begin = """
told_attempts = place / "attempts"
attempts = int(told_attempts.read_text()) if told_attempts.exists() else 0
told_attempts.write_text(str(attempts + 1))
"""
    text = (scripts / "stand_in.py").read_text()
    script = tmp_path / "faulty.py"
    script.write_text(text.replace("time.sleep(0.08)\n", begin + textwrap.dedent(first_lines) + "\n"))
    return LocalPool(2, (sys.executable, str(script)))


def small():
    return campaign(models=SPEC["models"][:1], seeds=[0, 1])


@pytest.mark.parametrize("kills", [1, 2])
def test_a_job_that_a_signal_ends_runs_again(tmp_path, scripts, kills):
    executor = faulty(
        scripts,
        tmp_path,
        f"""
        if place.name == "m0--0" and attempts < {kills}:
            os.kill(os.getpid(), {signal.SIGKILL.value})
        """,
    )
    records = run_campaign(small(), tmp_path / "out", executor)
    assert [record.reason for record in records] == [None] * 6
    started = (tmp_path / "out" / "started.txt").read_text().split()
    assert (started.count("m0--0"), started.count("m0--1")) == (1 + kills, 1)


def test_a_job_that_is_killed_each_time_fails_with_the_name_of_the_signal(tmp_path, scripts):
    executor = faulty(
        scripts,
        tmp_path,
        f"""
        if place.name == "m0--0":
            print("at item", attempts, flush=True)
            os.kill(os.getpid(), {signal.SIGTERM.value})
        """,
    )
    records = run_campaign(small(), tmp_path / "out", executor)
    assert {record.reason for record in records if record.row.seed == 1} == {None}
    assert {record.reason for record in records if record.row.seed == 0} == {
        "killed by SIGTERM: at item 2 (the last of 3 times)"
    }


def test_a_job_that_fails_by_itself_does_not_run_again(tmp_path, scripts):
    executor = faulty(scripts, tmp_path, 'sys.exit("error: a bug")')
    records = run_campaign(small(), tmp_path / "out", executor)
    assert {record.reason for record in records} == {"exit code 1: error: a bug"}
    assert len((tmp_path / "out" / "started.txt").read_text().split()) == 2


def test_a_full_disk_stops_the_campaign_and_the_row_stays_to_be_done(tmp_path, scripts):
    executor = faulty(
        scripts,
        tmp_path,
        f"""
        if place.name == "m0--1" and attempts == 0:
            time.sleep(1.0)
            print("error: cannot write x: No space left on device", flush=True)
            sys.exit({DISK_FULL})
        """,
    )
    with pytest.raises(
        CampaignError, match=r"the disk is full \(m0--1: .*No space left.* [\d,]+ bytes are free"
    ) as error:
        run_campaign(small(), tmp_path / "out", executor)
    assert "\n" not in str(error.value)
    found = {record.row.seed: record.status for record in Store(tmp_path / "out" / STORE_FILE).records()}
    assert found == {0: "done", 1: "pending"}
    records = run_campaign(small(), tmp_path / "out", faulty(scripts, tmp_path, ""))
    assert [record.reason for record in records] == [None] * 6


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), DISK_FULL, "No space left on device"),
        (RuntimeError("Error: No space left on device (os error 28)"), DISK_FULL, "os error 28"),
        (CampaignError("too few\nrows"), 2, "error: too few rows\n"),
    ],
)
def test_a_job_tells_a_full_disk_from_a_fault_of_its_own(tmp_path, monkeypatch, capfd, raised, code, said):
    told = {"campaign": small().model_dump(mode="json"), "rows": [["m0", "paper", 0]], "data_dir": ".", "folder": "."}
    (tmp_path / "job.json").write_text(sealed_json(told))

    def run_speed(*given):
        raise raised

    monkeypatch.setattr("aletheia.lab.campaign.speed_job.run_speed", run_speed)
    monkeypatch.setattr("aletheia.lab.campaign.job._end_with_input", lambda: None)
    assert main(tmp_path) == code
    assert said in capfd.readouterr().out


def test_a_full_disk_under_the_coordinator_stops_it_with_one_line(tmp_path, scripts, monkeypatch):
    def write_text(path, text):
        raise ArtifactError(f"cannot write {path}") from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("aletheia.lab.campaign.coordinate.write_text", write_text)
    with pytest.raises(CampaignError, match=r"the disk is full \(cannot write .*job\.json\)"):
        run_campaign(small(), tmp_path, pool(scripts))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"workers": 2}, "`workers` is 2 with 1 device, and this campaign measures times"),
        ({"executor": "ray", "gpus": 0.5}, "`gpus` is 0.5, .* expected 1, or `executor` local"),
    ],
)
def test_jobs_that_would_time_each_other_are_refused(monkeypatch, given, message):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(CampaignError, match=message):
        check_workers(campaign(), ExecutorSettings(**given))


def test_settings_of_the_other_executor_are_refused():
    with pytest.raises(SettingsError, match="`gpus` is not for the local executor"):
        ExecutorSettings(gpus=1)
    with pytest.raises(SettingsError, match="`executor` is 'cloud'; expected one of local, ray"):
        ExecutorSettings(executor="cloud")


def test_another_campaign_in_the_folder_is_refused(tmp_path, scripts):
    run_campaign(campaign(), tmp_path, pool(scripts))
    with pytest.raises(CampaignError, match=r"holds a campaign with rounds = 2, and the file has 3"):
        run_campaign(campaign(rounds=3), tmp_path, pool(scripts))
    (tmp_path / STORE_FILE).write_bytes(b"no database" * 100)
    with pytest.raises(CampaignError, match="was changed after it was written"):
        run_campaign(campaign(), tmp_path, pool(scripts))


def test_of_two_coordinators_one_goes_on(tmp_path, scripts):
    at_work = pytest.raises(CampaignError, match="another 'aletheia campaign run' is running there")
    with Store.writing(tmp_path, campaign()), at_work:
        run_campaign(campaign(), tmp_path, pool(scripts))


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_a_killed_coordinator_loses_no_row_and_doubles_none(tmp_path, scripts, kills):
    undisturbed = tmp_path / "undisturbed"
    run_campaign(campaign(), undisturbed, pool(scripts))
    expected = [path.read_bytes() for path in write_report(Store(undisturbed / STORE_FILE), tmp_path / "expected")]
    draw = random.Random(kills)
    killed, folder = 0, 0
    while killed < kills:
        out = tmp_path / f"killed-{folder}"
        folder += 1
        done: set[Row] = set()
        for _ in range(30):
            process = coordinator(scripts, out)
            try:
                process.wait(timeout=draw.uniform(0.5, 1.6))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                killed += 1
            else:
                assert process.returncode == 0
                break
            if (out / STORE_FILE).exists():
                recorded = {record.row for record in Store(out / STORE_FILE).records() if record.status == "done"}
                assert done <= recorded
                done = recorded
        records = Store(out / STORE_FILE).records()
        assert len(records) == len({record.row for record in records}) == 27
        assert all(record.status == "done" for record in records)
        found = [path.read_bytes() for path in write_report(Store(out / STORE_FILE), tmp_path / f"report-{folder}")]
        assert found == expected


def coordinator(scripts, out, stderr=subprocess.DEVNULL):
    return subprocess.Popen(
        [sys.executable, scripts / "coordinator.py", json.dumps(SPEC), out, scripts / "stand_in.py"],
        start_new_session=True,
        stderr=stderr,
        text=True,
    )


@pytest.mark.parametrize("races", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_of_two_coordinators_that_start_together_one_goes_on(tmp_path, scripts, races):
    for race in range(races):
        out = tmp_path / f"race-{race}"
        both = [coordinator(scripts, out, subprocess.PIPE) for _ in range(2)]
        told = [one.communicate(timeout=120)[1] for one in both]
        codes = [one.returncode for one in both]
        assert sorted(codes) == [0, 1], told
        assert "another 'aletheia campaign run' is running there" in told[codes.index(1)].splitlines()[-1]
        records = Store(out / STORE_FILE).records()
        assert [record.status for record in records] == ["done"] * 27


def test_no_job_outlives_its_coordinator(tmp_path, scripts):
    (tmp_path / "slow.py").write_text(
        (scripts / "stand_in.py").read_text().replace("time.sleep(0.08)", f"time.sleep(60)  # {tmp_path}")
    )
    process = subprocess.Popen(
        [sys.executable, scripts / "coordinator.py", json.dumps(SPEC), tmp_path / "out", tmp_path / "slow.py"],
        start_new_session=True,
    )
    started = tmp_path / "out" / "started.txt"
    deadline = time.monotonic() + 30
    while not (started.exists() and len(started.read_text().split()) == 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while (left := running(tmp_path / "slow.py")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


def running(script):
    found = subprocess.run(["pgrep", "-f", str(script)], capture_output=True, text=True, check=False)
    return found.stdout.split()


def test_names_cannot_break_out_of_the_report(tmp_path):
    bad = "</td><script>alert(1)</script>|`\x1b[2J![x](http://nowhere)"
    with Store.writing(tmp_path, campaign()) as store:
        store.record([Record(Row("m0", "paper", 0), "failed", bad, None)])
        done = json.loads(subprocess_result())
        store.record([Record(Row("m0", arm, 0), "done", None, done) for arm in ("uniform", "depth-aware")])
    html, markdown, csv = (path.read_text() for path in write_report(Store(tmp_path / STORE_FILE), tmp_path))
    assert "<script>alert" not in html
    assert "<script>alert" not in markdown
    assert "\x1b" not in html + markdown
    assert "![x]" not in markdown
    assert csv.count("\n") == 28


def subprocess_result():
    return json.dumps(
        {
            **{"step_seconds": [1.0 + index / 10 for index in range(8)], "early_step_seconds": [], "early_steps": 0},
            **{"prefix_seconds": [], "probe_seconds": 0.0, "layers": [0, 1], "layer_count": 4, "predicted_speedup": 1},
            **{"model_parameters": 10, "job_seconds": 1.0, "random_weights": True},
            "about": {
                **{"packages": {"<b>": "1"}, "commit": None, "is_dirty": False, "machine": "m", "device": "cpu"},
                **{"threads": 1, "python": "3"},
            },
        }
    )


def test_the_csv_has_a_line_per_row():
    result = {"x": [1, 2], "y": {"z": None}, "path": "/home/me/rows.jsonl", "t": [0.1234567, 1.0]}
    records = [
        Record(Row("m", "a", 0), "done", None, result),
        Record(Row("m", "b", 0), "pending", None, None),
    ]
    assert to_csv(records) == (
        "model,arm,seed,status,reason,path,t,x,y.z\nm,a,0,done,,rows.jsonl,0.123457 1,1 2,\nm,b,0,pending,,,,,\n"
    )


@pytest.mark.slow
def test_a_speed_campaign_on_tiny_models(tmp_path, data_file):
    models = [SPEC["models"][0], {"name": "neox", "config": {**LLAMA, "model_type": "gpt_neox"}}]
    spec = campaign(models=models, seeds=[0], arms=["uniform", "paper-asym", "depth-aware", "random", "last"])
    records = run_campaign(spec, tmp_path, LocalPool(), data_dir=data_file.parent)
    assert [record.reason for record in records] == [None] * 10
    by_arm = {record.row.arm: record.result for record in records if record.row.model == "m0"}
    assert by_arm["uniform"]["layers"] == [0, 1, 2, 3]
    assert by_arm["last"]["layers"] == [2, 3]
    assert len(by_arm["depth-aware"]["early_step_seconds"]) == len(by_arm["depth-aware"]["prefix_seconds"]) == 2
    for result in by_arm.values():
        assert len(result["step_seconds"]) == 2
        assert min(result["step_seconds"]) > 0
        assert result["about"]["packages"]["torch"]
    assert all(path.stat().st_size > 500 for path in write_report(Store(tmp_path / STORE_FILE), tmp_path))


def test_steps_that_other_work_disturbed_are_taken_again(monkeypatch):
    others = iter([0.0, 9.0, 9.0, 9.001, *[20.0 * count for count in range(1, 9)]])  # busy seconds around each attempt
    monkeypatch.setattr("aletheia.lab.campaign.steps._busy_seconds", lambda: next(others))
    taken = []

    def step():
        time.sleep(0.05)
        taken.append(len(taken))
        return taken[-1]

    assert undisturbed(step) == 1  # the second one was left alone
    assert undisturbed(step) in (2, 3, 4, 5)  # none was: the least disturbed counts
    assert len(taken) == 2 + ATTEMPTS


@pytest.mark.slow
def test_a_ray_cluster_of_two_workers_one_of_them_killed(tmp_path, scripts):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    from aletheia.lab.campaign.executors import RayCluster

    slow = tmp_path / "slow.py"
    waits = (scripts / "stand_in.py").read_text().replace("time.sleep(0.08)", "time.sleep(1.5)")
    slow.write_text(waits.replace('place.name + "\\n"', 'f"{place.name} {os.getppid()}\\n"'))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    killed = []

    def started():
        return [line.split() for line in (tmp_path / "out" / "started.txt").read_text().splitlines()]

    def kill_one(store, running):
        done = {record.row for record in store.records() if record.status == "done"}
        if done and not killed:
            job, worker = next(found for found in reversed(started()) if found[0] in {job.name for job in running})
            os.kill(int(worker), signal.SIGKILL)
            killed.append(job)

    try:
        executor = RayCluster(cluster.address, cpus=1, command=(sys.executable, str(slow)))
        records = run_campaign(campaign(), tmp_path / "out", executor, watch=kill_one)
    finally:
        cluster.shutdown()
    assert len(records) == 27
    assert [record.reason for record in records if record.status != "done"] == []
    names = [job for job, _ in started()]
    assert names.count(killed[0]) == 2  # it ran again, on another worker
    assert len(names) == 10
    assert len({worker for _, worker in started()}) == 3


def behaviour_result(loss, right):
    return {
        **{"layers": [2, 3], "layer_count": 4, "early_steps": 0, "trainable_parameters": 100, "steps": 8},
        **{"learning_rate": 1e-3, "cache": "disk", "peak_memory_bytes": 1, "job_seconds": 1.0, "versions": {}},
        "seconds": {"probe": 1.0, "cache": 0.0, "train": 2.0},
        "held_out_curve": [[0, 0.0, 2.0], [8, 2.0, loss]],
        "items": {
            "heldout": {
                "value": [loss * (10 + index / 100) for index in range(12)],
                "weight": [10] * 12,
                "digest": "a",
            },
            "mmlu": {
                **{"value": right, "digest": "b", "cluster": [f"s{index % 4}" for index in range(12)]},
                "answers": {"A": 12} if loss == 2.0 else {"A": 6, "B": 6},
            },
        },
        "about": {
            **{"packages": {"torch": "1"}, "commit": None, "is_dirty": False, "machine": "m", "device": "cpu"},
            **{"threads": 1, "python": "3"},
        },
    }


def behaviour_campaign(**changes):
    spec = {key: value for key, value in SPEC.items() if key not in ("rounds", "models")}
    tasks = {"mmlu": {"limit": 12, "margin": 0.03}}
    return parse_campaign(
        spec
        | {"kind": "behaviour", "models": [{"name": "m", "config": LLAMA}], "held_out": "train.jsonl"}
        | {
            "held_out_rows": 8,
            "held_out_margin": 0.01,
            "tasks": tasks,
            "comparisons": [["depth-aware", "paper"]],
            "seeds": [0],
        }
        | changes,
        "spec",
    )


def write_behaviour(folder):
    with Store.writing(folder, behaviour_campaign()) as store:
        for arm, loss, wrong in (("base", 2.0, 6), ("uniform", 1.0, 3), ("paper", 1.2, 3), ("depth-aware", 0.9, 2)):
            right = [float(index >= wrong) for index in range(12)]
            store.record([Record(Row("m", arm, 0), "done", None, behaviour_result(loss, right))])


def test_the_behaviour_report_says_what_cannot_be_shown(tmp_path):
    write_behaviour(tmp_path)
    _, markdown, csv = (path.read_text() for path in write_report(Store(tmp_path / STORE_FILE), tmp_path))
    assert "worse than uniform by at most 0.0100 nats of held-out loss per token?" in markdown
    assert "Worse by more: paper. Shown: depth-aware." in markdown
    assert "depth-aware and paper chose the same layers in every run, so selection explains no difference." in markdown
    assert "| depth-aware against paper | -0.3016 (" in markdown
    against_base = markdown.split("## Forgetting")[1].split("### Held-out loss")[1].split("###")[0]
    assert "| depth-aware | -1.1060 (" in against_base
    arms = re.findall(r"^\| ([a-z-]+) \|", against_base, re.MULTILINE)
    assert arms == ["arm", "---", "depth-aware", "uniform", "paper"]  # by effect
    assert "too few items" in markdown  # three points of accuracy on twelve items
    assert "if nearly all items get one answer: base answers A to 12 of 12 items of mmlu." in markdown
    assert csv.count("\n") == 5


def test_a_behaviour_page_draws_each_arm_before_all_others_which_are_drawn_once(tmp_path):
    write_behaviour(tmp_path)
    html = write_report(Store(tmp_path / STORE_FILE), tmp_path)[0].read_text()
    panels = html.split("<h2>Held-out loss while training</h2>")[1].split("<h2>")[0]
    assert re.findall(r"<h3>(.*?)</h3>", panels) == ["depth-aware", "uniform", "paper"]  # the lowest loss first
    assert panels.count('id="curves-0"') == 1
    assert panels.count('<use href="#curves-0"/>') == 2
    assert panels.count('class="run r0"') == 3
    assert "does not start at zero" in panels


def test_intervals_are_drawn_where_they_lie():
    estimates = [Estimate(1.5, Interval(1.25, 2.0, 0.95, "t"), 3), Estimate(0.9, None, 1, "one value")]
    scale = Scale(0.5, 2.5, equal=1.0)
    clear, unknown = (scale.row(found, more_is_better=True) for found in estimates)
    assert '<svg class="bar good"' in clear
    assert '<line x1="37.5%" x2="75%"' in clear
    assert '<circle cx="50%"' in clear
    assert '<svg class="bar same"' in unknown
    assert 'y1="50%"' not in unknown
    assert 'class="bar bad"' in scale.row(estimates[0], more_is_better=False)
    around = Scale.around(estimates, equal=1.0, margin=0.5)
    assert around.low < 0.5
    assert around.high > 2.0


def test_layers_are_drawn_as_boxes_of_neighbours():
    assert re.findall(r'<rect x="(.*?)" width="(.*?)" height="100%"(.*?)/>', layers_row([1, 1, 0, 0.5])) == [
        ("0%", "50%", ""),
        ("75%", "25%", ' opacity="0.5"'),
    ]


def test_pages_of_campaigns_are_small(tmp_path, scripts):
    """A page that is kept in git: its style sheet, and few hundred bytes for each thing that was measured."""
    spec = campaign(models=[{"name": f"m{index}", "config": LLAMA} for index in range(9)])
    run_campaign(spec, tmp_path, pool(scripts))
    html = write_report(Store(tmp_path / STORE_FILE), tmp_path)[0].read_text()
    style = len(html.split("<style>")[1].split("</style>")[0])
    assert style < 10_000
    assert html.count("<style>") == 1
    assert len(html) < style + 9 * 2 * 900 + 8_000  # nine models, two arms beside the baseline


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [390, 1280])
def test_pages_open_in_a_browser_without_overflow_errors_or_requests(tmp_path, scripts, width):
    run_campaign(campaign(), tmp_path / "speed", pool(scripts))
    write_behaviour(tmp_path / "behaviour")
    for kind in ("speed", "behaviour"):
        page, *_ = write_report(Store(tmp_path / kind / STORE_FILE), tmp_path / kind)
        opened = open_page(page, width, tmp_path / f"browser-{kind}")
        assert opened.overflowing == []
        assert opened.scroll_width <= width
        assert opened.requests == [page.as_uri()]
        assert opened.errors == []


JOB = """
import sys
from pathlib import Path
from aletheia.lab.campaign import job
job._end_with_input = lambda: None
sys.exit(job.main(Path(sys.argv[1])))
"""


class ForkedJobs:
    """An executor whose jobs run in processes of their own that begin at once."""

    def submit(self, folder):
        ended = Future()
        done = forked.run(JOB, [folder], folder, os.environ)
        ended.set_result(Ending("failed", done.stdout + done.stderr) if done.returncode else Ending("through"))
        return ended

    def close(self):
        pass


@pytest.mark.parametrize("match", [pytest.param("steps", marks=pytest.mark.slow), "compute"])
def test_a_behaviour_campaign_on_a_tiny_model(tmp_path, data_file, match):
    arms = ["uniform", {"name": "depth-aware", "freeze_after": 0}, {"name": "last", "execution": "fast"}]
    changes = {"arms": arms, "tasks": {}, "comparisons": [["depth-aware", "last"]], "match": match, "steps": 6}
    records = run_campaign(behaviour_campaign(**changes), tmp_path, ForkedJobs(), data_dir=data_file.parent)
    assert [record.reason for record in records] == [None] * 4
    results = {record.row.arm: record.result for record in records}
    steps = {arm: result["steps"] for arm, result in results.items() if arm != BASE}
    assert steps["uniform"] == 6
    assert steps["last"] == 6 if match == "steps" else steps["last"] > 6
    assert (
        steps["depth-aware"] == 6 if match == "steps" else 6 < steps["depth-aware"] < steps["last"]
    )  # its probe counts
    assert results["last"]["layers"] == [2, 3]
    losses = {arm: sum(result["items"]["heldout"]["value"]) for arm, result in results.items()}
    assert losses["uniform"] < losses[BASE]
    write_report(Store(tmp_path / STORE_FILE), tmp_path)


def trained_rows(monkeypatch, folder, data_file, name, arm, break_cache):
    """Losses and adapter of one row of a behaviour campaign, run here; ``break_cache`` spoils one cache."""
    base = behaviour_campaign(arms=["uniform", arm], tasks={}, comparisons=[], steps=6)
    place = folder / name
    place.mkdir(exist_ok=True)
    with monkeypatch.context() as patched:
        break_cache(patched)
        run_behaviour(base, Row("m", arm["name"], 0), data_file.parent, folder, place)
    metrics = Metrics.read(place / "run" / METRICS_FILE)
    losses = [point.loss for point in (*metrics.train_curve, *metrics.held_out_curve)]
    return metrics.settings.cache, losses, load_file(place / "run" / "adapter_model.safetensors")


def damaged(patched):
    """A cache on disk whose entries turn out damaged again and again as they are read."""
    read, count = DiskCache.get, iter(range(10**9))

    def get(self, row):
        if next(count) % 3 == 0:
            raise CacheError("its entry was damaged")
        return read(self, row)

    patched.setattr(DiskCache, "get", get)


def not_exact(patched):
    """A model whose stored states turn out not to be what its layers give."""
    patched.setattr(source, "why_not_exact", lambda *given: ("the layers draw at random", torch.float32))


def no_cache(patched):
    """The run is told from the start to do without a cache."""
    patched.setattr(behaviour_job, "train", lambda *given, **more: train(*given, **more | {"cache": "off"}))


def test_a_cache_that_fails_changes_no_result(monkeypatch, tmp_path, data_file):
    """Without one the run begins anew, from fresh adapters; damaged entries are computed again."""
    arm = {"name": "last", "execution": "fast", "learning_rate": 0.01}
    rows = partial(trained_rows, monkeypatch, tmp_path, data_file)
    cache, losses, adapter = rows("without", arm, no_cache)
    assert cache == "off"
    again = rows("refused", arm, not_exact)
    assert again[0] == "off"
    assert again[1] == losses
    assert all(torch.equal(again[2][name], tensor) for name, tensor in adapter.items())
    again = rows("damaged", arm, damaged)
    assert again[0] == "disk"
    assert again[1] == pytest.approx(losses, rel=1e-5)


def test_a_killed_row_goes_on_from_its_checkpoint(monkeypatch, tmp_path, data_file):
    arm = {"name": "last", "execution": "fast", "learning_rate": 0.01}
    rows = partial(trained_rows, monkeypatch, tmp_path, data_file)
    _, losses, adapter = rows("whole", arm, lambda patched: None)
    steps = []

    def killed(patched):
        step = Trainer.training_step

        def stop(*given, **more):
            if len(steps) == 4:
                raise MemoryError
            steps.append(1)
            return step(*given, **more)

        patched.setattr(behaviour_job, "train", lambda *given, **more: train(*given, **more, save_steps=3))
        patched.setattr(Trainer, "training_step", stop)

    with pytest.raises(MemoryError):
        rows("killed", arm, killed)
    assert (tmp_path / "killed" / "run" / "checkpoints" / "checkpoint-3").is_dir()
    again = rows("killed", arm, lambda patched: None)
    assert again[1] == losses
    assert all(torch.equal(again[2][name], tensor) for name, tensor in adapter.items())


def test_after_an_error_in_a_step_the_model_carries_no_adapters(examples):
    model = make_model()
    made = plan(probe(model, examples, batches=1), policy="last")
    with pytest.raises(CacheError), prepared(model, StepKind.fast("fast", made)):
        raise CacheError("its entry was damaged")
    assert not any(isinstance(module, LoraLayer) for module in model.modules())


def test_without_a_sandbox_the_campaign_says_where_to_do_without(monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("PATH", "/nowhere")
    sandbox.check.cache_clear()
    campaign = read_campaign(Path(__file__).parent.parent / "campaigns/behaviour-instruct.yaml")
    with pytest.raises(SandboxError, match=r"bubblewrap.*sandbox with `unsafe_exec`$"):
        check_tools(campaign)
    check_tools(campaign.model_copy(update={"unsafe_exec": True}))


def test_the_command_line_from_dry_run_to_report(run, tmp_path, data_file):
    spec = tmp_path / "spec.yaml"
    spec.write_text(yaml.safe_dump(SPEC | {"models": SPEC["models"][:1], "arms": ["uniform", "last"], "seeds": [0]}))
    asked = ("campaign", "run", spec, "--out", "out", "--data-dir", data_file.parent)
    code, out, _ = run(*asked, "--dry-run")
    assert code == 0
    assert "2 rows in 1 jobs, 0 rows done" in out
    assert "hours to go (a rough guess from operations" in out
    assert not (tmp_path / "out").exists()
    code, _, err = run("campaign", "status", "out")
    assert (code, err) == (2, "error: out holds no campaign; start one there with 'aletheia campaign run'\n")
    bad = SPEC | {"models": [{"name": "bad", "config": LLAMA | {"pad_token_id": 999}}]}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(bad))
    code, _, err = run(*asked[:2], "bad.yaml", *asked[3:], "--dry-run")
    assert code == 2
    assert "error: model bad: transformers cannot build this config (" in err.splitlines()[-1]
    code, _, err = run(*asked[:-1], tmp_path / "nowhere")
    assert code == 2
    assert "train.jsonl is missing; put it there, or set another --data-dir" in as_flags(err)
    code, _, err = run(*asked)
    assert code == 0, err
    assert "done   m0 last 0" in err
    code, out, _ = run("campaign", "status", "out", "--json")
    assert [row["status"] for row in json.loads(out)] == ["done", "done"]
    code, out, _ = run(*asked, "--dry-run")
    assert "2 rows done" in out
    assert "0.0 hours to go (from the rows that are done)" in out
    code, _, err = run("campaign", "report", "out", "--to", "report")
    assert code == 0
    code, _, err = run(*asked, "--executor", "ray", "--workers", 2)
    assert code == 2
    assert "--workers is not for the ray executor" in as_flags(err)
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.html", "report.md", "report.csv"}
    (tmp_path / "out" / "report.html").write_text("a page of somebody else")
    code, _, err = run("campaign", "report", "out")
    assert code == 2
    assert "is not a report of Aletheia" in err
    code, out, _ = run("campaign", "schema")
    assert json.loads(out)["oneOf"]
