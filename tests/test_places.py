"""Odd places: full disks, long and strange names, closed and narrow outputs, two commands on one file, the umask."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import count_rows
from tiny import make_model

from aletheia import files
from aletheia.cli import faults
from aletheia.errors import ArtifactError
from aletheia.probing.resident import probe as run_probe

TRAIN = ("--steps", 2, "--dtype", "float32", "--max-length", 64, "--eval-rows", 4, "--evaluations", 1, "--allow-worse")
ALETHEIA = [sys.executable, "-c", "from aletheia.cli.main import main; main()"]


@pytest.fixture(scope="module")
def scores_file(tmp_path_factory, examples):
    path = tmp_path_factory.mktemp("scores") / "scores.json"
    run_probe(make_model("llama"), examples, seed=0).write(path)
    return path


@pytest.fixture
def plan_call(scores_file):
    return ["plan", str(scores_file), "--out"]


def call(*arguments, **options):
    """The command in a process of its own."""
    given = {"capture_output": True, "check": False} | options
    return subprocess.run([*ALETHEIA, *(os.fsencode(str(argument)) for argument in arguments)], **given)


def leftovers(folder):
    return [path for path in Path(folder).rglob("*") if ".aletheia-" in path.name or ".partial" in path.name]


# --- full disks


class FullDisk:
    """The disk is full from the n-th time on that bytes are to reach it or a file is to take its name."""

    def __init__(self, monkeypatch, at):
        self.at, self.count = at, 0
        for name in ("fsync", "replace"):
            monkeypatch.setattr(os, name, self.failing(getattr(os, name)))

    def failing(self, own):
        def write(*given):
            self.count += 1
            if self.count >= self.at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return own(*given)

        return write


def fails_at_every_point(run, monkeypatch, arguments, out, points):
    """Each write point of a command in turn; the last line, and what is left."""
    for at in points:
        with monkeypatch.context() as patched:
            disk = FullDisk(patched, at)
            code, _, err = run(*arguments)
        if disk.count < at:
            assert code == 0, err
            return at - 1
        assert code not in (0, 1), err
        last = err.strip().splitlines()[-1]
        assert re.search(r"^error: .*No space left on device.* [\d,]+ bytes are free", last), err
        assert "Traceback" not in err
        assert leftovers(out) == []
        if "run is complete" in last:  # it need not be trained again
            shutil.rmtree(out / "run")
    return len(points)


@pytest.mark.parametrize("command", ["plan", "plot", "probe"])
def test_a_full_disk_at_every_write_point_of_small_files(
    run, monkeypatch, tmp_path, scores_file, model_folder, data_file, command
):
    out = tmp_path / "out"
    probing = ("--dtype", "float32", "--no-calibrate", "--batches", 1)
    arguments = {
        "plan": ("plan", scores_file, "--out", out / "plan.json"),
        "plot": ("plan", scores_file, "--plot", out / "plan.svg"),
        "probe": ("probe", model_folder, "--data", data_file, "--out", out / "s.json", *probing),
    }
    assert fails_at_every_point(run, monkeypatch, arguments[command], tmp_path, range(1, 9)) == 2


@pytest.mark.slow
def test_a_full_disk_at_every_write_point_of_a_run(run, monkeypatch, tmp_path, model_folder, data_file):
    """Then the same command ends well, and so does a report."""
    train = ("train", model_folder, "--data", data_file, "--out", "run", *TRAIN, "--save-steps", 1, "--cache", "off")
    assert fails_at_every_point(run, monkeypatch, train, tmp_path, range(1, 200)) > 20
    assert (tmp_path / "run" / "metrics.json").exists()
    report = ("report", "run", "--out", "page.html")
    assert fails_at_every_point(run, monkeypatch, report, tmp_path, range(1, 9)) == 2


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a small file system; only root may."""
    mounted = []

    def mount(size_bytes):
        place = tmp_path / f"disk-{size_bytes}"
        place.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", place], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip("a file system cannot be mounted here")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", place], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("size_kib", [4, 16, 32, 64, 96, 128, 192, 256, 384, 512])
def test_a_run_on_a_disk_that_is_really_full(small_disk, model_folder, data_file, size_kib):
    place = small_disk(size_kib << 10)
    options = (*TRAIN, "--save-steps", 1, "--cache", "disk", "--cache-dir", place / "cache")
    done = call("train", model_folder, "--data", data_file, "--out", place / "run", *options, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert leftovers(place) == []
    if done.returncode:
        assert done.returncode == 2
        assert re.search(r"^error: .*bytes are needed|^error: .*free", last), last
        assert not (place / "run" / "metrics.json").exists()


def test_bytes_needed_and_free_are_named(tmp_path, monkeypatch):
    FullDisk(monkeypatch, 1)
    with pytest.raises(ArtifactError, match=r"No space left on device: 5,000 bytes are needed, [\d,]+ bytes are free"):
        files.write_text(tmp_path / "x.json", "x" * 5000)
    assert list(tmp_path.iterdir()) == []


# --- names


def test_the_longest_names_work_and_longer_ones_are_one_line(run, plan_call, model_folder, data_file, tmp_path):
    longest = "p" * 250 + ".json"
    assert run(*plan_call, longest)[0] == 0
    assert run(*plan_call, longest)[0] == 0  # replaced
    assert [path.name for path in tmp_path.iterdir()] == [longest]
    folder = "r" * 255
    train = ("train", model_folder, "--data", data_file, *TRAIN, "--out")
    code, _, err = run(*train, folder)
    assert code == 0, err
    for arguments in ((*plan_call, "p" * 256), (*train, "r" * 256), ("show", "s" * 256), (*plan_call, "a/" * 3000)):
        code, _, err = run(*arguments)
        assert code == 2
        assert err.strip().count("\n") == 0
        assert "File name too long" in err
        assert "load " not in err


@pytest.mark.parametrize("place", ["out", *(pytest.param(one, marks=pytest.mark.slow) for one in ("data", "model"))])
def test_names_that_are_no_utf_8(place, model_folder, data_file, tmp_path):
    if sys.platform != "linux":
        pytest.skip("names are text there")
    strange = os.fsdecode(b"na\xffme")
    names = {"out": tmp_path / "run", "data": data_file, "model": model_folder}
    if place == "out":
        names["out"] = tmp_path / strange
    else:
        (tmp_path / strange).symlink_to(names[place])
        names[place] = tmp_path / strange
    done = call("train", names["model"], "--data", names["data"], "--out", names["out"], *TRAIN)
    told = done.stderr.decode()
    assert "Traceback" not in told
    assert "this is a bug" not in told
    assert done.returncode == 0 or (done.returncode == 2 and "name" in told.splitlines()[-1]), told


# --- outputs


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_terminal_gets_its_text(scores_file, encoding, tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": encoding, "LC_ALL": "C", "COLUMNS": "90"}
    done = call("show", scores_file, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    assert done.stdout.decode(encoding)
    assert b"\\u25" not in done.stdout  # bars and lines are drawn in ASCII
    done = call("show", tmp_path / "nöt hére ☃", env=environment)
    assert done.returncode == 2
    assert done.stderr.decode(encoding).startswith("error: ")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams(scores_file, tmp_path, closed):
    """The file that is written does not take the number of a stream that is closed."""
    code = f"{sys.executable} -c 'from aletheia.cli.main import main; main()' plan {scores_file} --out p.json {closed}"
    done = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert json.loads((tmp_path / "p.json").read_text())["format"] == "aletheia-plan"


def test_a_reader_that_goes_away(scores_file, tmp_path):
    command = f"{sys.executable} -c 'from aletheia.cli.main import main; main()'"
    pipes = f"{command} show {scores_file} 2>err | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", pipes], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "0"
    assert (tmp_path / "err").read_text() == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_an_output_that_is_full_is_told(scores_file, tmp_path):
    with open("/dev/full", "w") as full:
        done = call("show", scores_file, stdout=full, capture_output=False, stderr=subprocess.PIPE)
        assert done.returncode == 2
        assert done.stderr.startswith(b"error: ")
        assert done.stderr.count(b"\n") == 1
        done = call("plan", scores_file, "--out", "p.json", "--json", cwd=tmp_path, capture_output=False,
                    stdout=subprocess.DEVNULL, stderr=full)  # fmt: skip
        assert done.returncode == 0  # no message is worth a result
    assert (tmp_path / "p.json").exists()


# --- two at once, and the umask


@pytest.mark.parametrize("count", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_commands_that_write_one_file_leave_a_whole_one(scores_file, tmp_path, count):
    calls = [
        subprocess.Popen([*ALETHEIA, "plan", scores_file, "--out", "p.json", "--seed", str(seed)], cwd=tmp_path,
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for seed in range(count)
    ]  # fmt: skip
    for one in calls:
        assert one.wait() == 0, one.stderr.read()
        one.stderr.close()
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]
    assert json.loads((tmp_path / "p.json").read_text())["format"] == "aletheia-plan"


RACE = """
import sys, time
from aletheia.errors import ArtifactError
from aletheia.runs.folder import RunFolder
go = float(sys.argv[2])
time.sleep(max(0, go - time.time()))
try:
    with RunFolder.claim(sys.argv[1]):
        print("goes on", flush=True)
        time.sleep(1.5)
except ArtifactError as error:
    print(error)
"""


@pytest.mark.parametrize("races", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_of_two_runs_on_one_folder_exactly_one_goes_on(tmp_path, races):
    """Each race lasts until the winner is done; the other one says why at once, and who it is."""
    for race in range(races):
        go = time.time() + 2.0
        call = [sys.executable, "-c", RACE, tmp_path / f"run-{race}", str(go)]
        both = [subprocess.Popen(call, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        told = [one.communicate(timeout=60)[0].strip() for one in both]
        assert told.count("goes on") == 1, told
        other = next(line for line in told if line != "goes on")
        winner = both[told.index("goes on")].pid
        assert f"is in use by another run (process {winner})" in other or "in use by another run" in other
        assert not (tmp_path / f"run-{race}").exists()


@pytest.mark.parametrize("umask", [0o022, *(pytest.param(one, marks=pytest.mark.slow) for one in (0o077, 0o002))])
def test_files_follow_the_umask(run, model_folder, tmp_path, umask):
    if sys.platform == "win32":
        pytest.skip("no umask there")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in count_rows(30)))
    made = tmp_path / "made"
    options = (*TRAIN[2:], "--epochs", 2, "--save-steps", 4, "--cache", "disk", "--cache-dir", made / "cache")
    old = os.umask(umask)
    try:
        code, _, err = run("train", model_folder, "--data", "train.jsonl", "--out", made / "run", *options)
    finally:
        os.umask(old)
    assert code == 0, err
    found = [path for path in made.rglob("*") if path.name not in (".lock", "lock")]
    assert any("checkpoint-" in str(path) for path in found)
    assert any("cache" in str(path) for path in found)
    for path in found:
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert path.stat().st_mode & 0o777 == expected, (path, oct(path.stat().st_mode))


# --- what libraries say


def test_libraries_say_nothing_while_they_are_imported():
    code = (
        "from aletheia.libraries import quiet_libraries as quiet\nquiet()\nimport torch, transformers, peft, datasets"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


OURS = re.compile(r"(load|probe|plan|cache|train|heldout|wrote|note:|warning:|error:|step \d|resume|time) ?.*")


@pytest.mark.slow
def test_no_command_lets_libraries_speak(model_folder, data_file, tmp_path):
    rows = ("--data", data_file)
    for arguments, codes in (
        (("inspect", model_folder), (0,)),
        (("doctor",), (0,)),
        (("probe", model_folder, *rows, "--out", "s.json"), (0,)),
        (("plan", "s.json", "--out", "p.json"), (0,)),
        (("train", model_folder, *rows, "--out", "run", *TRAIN), (0,)),
        (("report", "run", "--out", "page.html"), (0,)),
        (("show", "run"), (0,)),
        (
            ("eval", model_folder, "--adapter", "run", "--tasks", "heldout", "--eval-data", data_file, "--out", "e"),
            (0,),
        ),
        (("train", "nowhere/at/all", *rows, "--out", "none"), (2,)),
        (("campaign", "status", "nowhere"), (2,)),
    ):
        done = call(*arguments, cwd=tmp_path, text=True)
        assert done.returncode in codes, done.stderr
        foreign = [line for line in done.stderr.splitlines() if line.strip() and not OURS.match(line)]
        foreign = [line for line in foreign if not line.startswith(("row ", "    "))]  # the row that train shows
        assert foreign == [], arguments


# --- whatever else ends a command


def test_a_fault_of_ours_is_one_line_and_debug_shows_where(run, monkeypatch, scores_file):
    def broken(*given, **named):
        raise KeyError("an inner name")

    monkeypatch.setattr("aletheia.planning.make.plan", broken)
    code, _, err = run("plan", scores_file, "--out", "p.json")
    assert code == 1
    assert re.fullmatch(
        r"error: KeyError: 'an inner name' \(this is a bug in Aletheia; .*--debug.*ALETHEIA_DEBUG.*\)\n", err
    )
    monkeypatch.setenv("ALETHEIA_DEBUG", "1")
    _, _, err = run("plan", scores_file, "--out", "p.json")
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: KeyError")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.\nmore"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"),
    ],
)
def test_no_memory_says_what_to_lower(error):
    line, code = faults.message_and_code(error)
    assert code == 2
    assert "there is not enough memory" in line
    assert "--batch-size or --max-length" in line
    assert "\n" not in line


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay", [0.3, pytest.param(0.8, marks=pytest.mark.slow)])
def test_a_signal_while_libraries_load_is_one_line(model_folder, data_file, tmp_path, signum, delay):
    process = subprocess.Popen(
        [*ALETHEIA, "probe", model_folder, "--data", data_file, "--out", tmp_path / "s.json"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    time.sleep(delay)
    process.send_signal(signum)
    told = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + signum, told
    assert told.strip().splitlines()[-1].startswith("error: interrupted; the same command")
    assert "Traceback" not in told
    assert not (tmp_path / "s.json").exists()


OCCUPIED = {
    "probe": ("probe", "{model}", "--data", "{data}", "--out", "{place}"),
    "plan": ("plan", "{scores}", "--out", "{place}"),
    "plot": ("plan", "{scores}", "--plot", "{place}"),
    "train": ("train", "{model}", "--data", "{data}", "--out", "{place}"),
    "eval": ("eval", "{model}", "--tasks", "heldout", "--eval-data", "{data}", "--out", "{place}"),
    "demo": ("demo", "--out", "{place}"),
}


@pytest.mark.parametrize("kind", ["foreign file", "folder with files", "pipe", "endless device"])
@pytest.mark.parametrize("command", OCCUPIED)
def test_a_place_that_is_taken_is_refused_before_the_work(
    run, command, kind, tmp_path, scores_file, model_folder, data_file
):
    place = tmp_path / "taken.svg"
    if kind != "folder with files" and command == "plot":
        pytest.skip("a picture is drawn again")
    if kind == "foreign file":
        place.write_text("precious")
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "endless device":
        place.symlink_to("/dev/zero")
    else:
        place.mkdir()
        (place / "thesis.txt").write_text("precious")
        for arm in ("uniform", "plan"):  # of a demo
            (place / arm).mkdir()
            (place / arm / "thesis.txt").write_text("precious")
    names = {"model": model_folder, "data": data_file, "scores": scores_file, "place": place}
    code, out, err = run(*(str(part).format(**names) for part in OCCUPIED[command]))
    assert code == 2, err
    assert out == ""
    assert err.count("\n") == 1
    if kind in ("pipe", "endless device"):
        assert not place.is_file()
        assert place.exists()
    else:
        assert (place.read_text() if place.is_file() else (place / "thesis.txt").read_text()) == "precious"


@pytest.mark.parametrize("kind", ["pipe", "endless device", "too large"])
def test_a_file_without_end_is_not_read(run, kind, tmp_path):
    file = tmp_path / "s.json"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "endless device":
        file.symlink_to("/dev/zero")
    else:
        with file.open("wb") as handle:
            handle.truncate(2 * files.LARGEST_BYTES)  # takes no room on the disk
    for arguments in (("plan", file, "--out", "p.json"), ("show", file)):
        code, _, err = run(*arguments)
        assert code == 2
        assert err.count("\n") == 1
        assert file.name in err
