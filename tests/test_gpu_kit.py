"""The kit for a machine without a network lacks nothing, and no step of a session there stops the others."""

import json
import os
import re
import sys
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from packaging.requirements import Requirement

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import gpu_session
from gpu_arms import ARMS, UNSLOTH
from gpu_kit import BESIDE_THE_LOCK, GROUPS, Target, in_folders, parts, read_wheel, unmet, wanted_by
from gpu_session import STEPS, Session, chosen, whole_wheels

ROOT = Path(__file__).parents[1]
TARGET = Target("3.12", ("torch", "nvidia-*"))


def wheel(folder, name, version, *requires):
    file = folder / f"{name}-{version}-py3-none-any.whl"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(
            f"{name}-{version}.dist-info/METADATA", "\n".join([*lines, *map("Requires-Dist: {}".format, requires)])
        )
    return read_wheel(file)


def lacking(folder, *wheels, wanted="first"):
    kit = {one.name: one for one in (wheel(folder, *words) for words in wheels)}
    return [str(one) for one in unmet([Requirement(wanted)], kit, TARGET)]


def test_every_group_starts_from_what_the_project_asks_for_and_no_version_is_named_twice():
    assert {group: {one.name for one in wanted_by(group)} for group in GROUPS if group != "core"} == {
        group: set(names) for group, names in GROUPS.items() if group != "core"
    }
    assert {"transformers", "peft", "safetensors"} <= {one.name for one in wanted_by("core")}
    assert not any(f"\n{name}==" in (ROOT / "requirements.lock").read_text() for name in BESIDE_THE_LOCK)


def test_a_kit_is_closed_where_machine_and_wheels_have_all_that_is_asked_for(tmp_path):
    first = (
        "first",
        "1.0",
        "Second_One>=2",
        "torch>=99",
        "nvidia-x",
        "gone; python_version < '3.12'",
        "gone; extra == 'b'",
    )
    assert lacking(tmp_path, first, ("second_one", "2.0", "first")) == []


def test_a_kit_names_what_is_absent_too_old_or_asked_for_by_an_extra(tmp_path):
    first = ("first", "1.0", "second[fast]>=2", "absent; sys_platform == 'linux'")
    found = lacking(tmp_path, first, ("second", "1.5", "rapid; extra == 'fast'", "slow; extra == 'slow'"))
    assert [one.partition(";")[0] for one in found] == [
        "first 1.0 needs absent",
        "first 1.0 needs second[fast]>=2",
        "second 1.5 needs rapid",
    ]
    assert lacking(tmp_path, wanted="never") == ["Aletheia needs never"]


def test_no_folder_is_too_large_and_a_wheel_in_parts_is_put_together_again(tmp_path):
    large, kit = wheel(tmp_path, "large", "1", *("some" + "x" * 90,) * 20).file, tmp_path / "kit"
    whole, most = large.read_bytes(), large.stat().st_size // 2
    made = parts(large, most)
    sizes = {part: part.stat().st_size for part in [*made, wheel(tmp_path, "small", "1").file]}
    for number, some in enumerate(in_folders(sizes, most)):
        assert sum(sizes[file] for file in some) <= most
        (kit / str(number)).mkdir(parents=True)
        for file in some:
            file.rename(kit / str(number) / file.name)
    (tmp_path / "joined").mkdir()
    assert [file.read_bytes() for file in whole_wheels(kit, tmp_path / "joined")] == [whole]
    next(kit.glob(f"*/{made[-1].name}")).unlink()
    assert whole_wheels(kit, tmp_path / "joined") == []


def is_gone(pid):
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE  # nobody has asked for its exit code
    return True


def test_a_step_that_hangs_is_killed_and_keeps_its_results_and_a_failed_one_stops_no_other(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(gpu_session, "GRACE_SECONDS", 0.3)
    session = Session(tmp_path, 3600)
    arms = {"arms": [{"arm": "a", "model": "m"}, {"arm": "b", "model": "m", "failed": "why"}], "end_to_end": {}}
    hangs = (
        f"trap '' INT; mkdir now; echo '{json.dumps(arms)}' > now/gpu.json; sleep 99 & echo $! > child; wait; sleep 99"
    )
    started = time.monotonic()
    for name, script in (("hangs", hangs), ("fails", "echo said; exit 3"), ("works", "echo fine")):
        session.take(name, ["sh", "-c", f"cd {tmp_path}; {script}"], dict(os.environ), 2)
    assert time.monotonic() - started < 30
    assert is_gone(int((tmp_path / "child").read_text()))
    ended = json.loads((tmp_path / "session.json").read_text())
    assert {name: step["code"] for name, step in ended.items()} == {"hangs": None, "fails": 3, "works": 0}
    assert [step["last_lines"] for step in ended.values()] == [[], ["said"], ["fine"]]
    assert json.loads((tmp_path / "results.json").read_text()) == {"hangs": arms}
    assert "m b: why" in capsys.readouterr().out
    again = Session(tmp_path, 3600)
    again.skip("later", "why not")
    assert list(json.loads((tmp_path / "session.json").read_text())) == ["hangs", "fails", "works", "later"]
    assert json.loads((tmp_path / "results.json").read_text()) == {"hangs": arms}


def test_results_of_a_step_that_was_killed_with_its_session_are_kept(tmp_path):
    (tmp_path / "now").mkdir()
    (tmp_path / "now" / "gpu.json").write_text(json.dumps({"arms": [], "end_to_end": {"TRL": {"seconds": 1}}}))
    (tmp_path / "session.json").write_text(json.dumps({"first": {"ended": "running", "command": []}}))
    session = Session(tmp_path, 3600)
    session.take("second", ["true"], dict(os.environ), 20)
    assert {name: step.get("arms") for name, step in session.steps.items()} == {"first": 1, "second": None}
    assert list(json.loads((tmp_path / "results.json").read_text())) == ["first"]


def test_a_step_gets_what_is_left_of_the_time_or_does_not_begin(tmp_path):
    session = Session(tmp_path, 100, started=time.monotonic() - 50)
    assert session.seconds_for(20) == 20
    assert 40 < session.seconds_for(80) <= 50 - gpu_session.GRACE_SECONDS
    assert Session(tmp_path, 100, started=time.monotonic() - 95).seconds_for(20) is None


def test_of_a_very_long_output_the_end_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_session, "LOG_BYTES", 1000)
    session = Session(tmp_path, 3600)
    session.take("talks", ["sh", "-c", "yes | head -c 100000; echo end"], dict(os.environ), 20)
    assert session.log.stat().st_size < 2000
    assert session.steps["talks"]["last_lines"][-1] == "end"


def test_steps_name_arms_and_tests_that_exist(tmp_path):
    arms = [arm for _, command, _ in STEPS for arm in re.findall(r"--arms (\S+)", command)]
    assert {arm for some in arms for arm in some.split(",")} <= {*ARMS, *UNSLOTH, "predicted", "predicted-graphs"}
    options = gpu_session.argparse.Namespace(rows=None, commit=None, device="cuda", site=Path("site"), tiny=False)
    session = Session(tmp_path, 1)
    for name, command, most in STEPS:
        words = gpu_session.words(command, session, options, most)
        files = [word for word in words if word.endswith(".py")]
        assert files, name
        assert all((ROOT / file).is_file() for file in files), name


def test_a_session_goes_on_from_a_step_or_takes_some():
    names = [name for name, _, _ in STEPS]
    assert [name for name, _, _ in chosen(None, names[2])] == names[2:]
    assert [name for name, _, _ in chosen(f"{names[3]},{names[1]}", None)] == [names[1], names[3]]
    assert len(chosen(None, None)) == len(names)
    with pytest.raises(ValueError, match="no step neither"):
        chosen("neither", None)
