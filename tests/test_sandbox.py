"""The sandbox holds, and the score cannot be had by leaving early."""

import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hostile import CHEATS, ENDED, PRELUDE, REFUSED
from hypothesis import given
from hypothesis import strategies as st

import aletheia
from aletheia.errors import SandboxError
from aletheia.lab.evaluation import humaneval, jail, sandbox, syscalls
from aletheia.lab.evaluation.humaneval import estimate_pass_at_k, humaneval_program, mbpp_program, run_program, score


def _missing() -> str | None:
    try:
        sandbox.check()
    except SandboxError as error:
        return str(error)
    return None


MISSING = _missing()
contained = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
either = pytest.mark.parametrize("unsafe", [pytest.param(False, marks=contained, id="contained"), True])

DATA = Path(os.environ.get("ALETHEIA_DATA", Path(__file__).parents[1] / "../shared/data"))
HUMANEVAL = DATA / "humaneval" / "HumanEval.jsonl"
MBPP = DATA / "instruct" / "mbpp_train.jsonl"
needs_humaneval = pytest.mark.skipif(not HUMANEVAL.is_file(), reason=f"no {HUMANEVAL}; set ALETHEIA_DATA")
needs_mbpp = pytest.mark.skipif(not MBPP.is_file(), reason=f"no {MBPP}; set ALETHEIA_DATA")

# seconds enough for busy processors; programs that sleep get one
TIGHT = sandbox.Limits(
    wall_seconds=20, cpu_seconds=1, memory_bytes=256 << 20, tmp_bytes=4 << 20, file_bytes=2 << 20, output_bytes=32 << 10
)
MARGIN_SECONDS = 3  # two busy cores
CHECK = "def check(candidate):\n    assert candidate(2) == 4\n"


class Host:
    """What a hostile program must not touch, and what it must not leave behind."""

    def __init__(self, folder: Path) -> None:
        self.marker = f"mark-{uuid.uuid4().hex}"
        self.folder = folder
        self.canary = folder / "canary.txt"
        self.canary.write_text("alive")
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix_path = f"{tempfile.gettempdir()}/{self.marker[:20]}"
        self.unix.bind(self.unix_path)
        self.abstract = socket.socket(socket.AF_UNIX)
        if sys.platform == "linux":
            self.abstract.bind(f"\0{self.marker}")

    def fill_in(self, source: str) -> str:
        places = {
            "CANARY": self.canary,
            "MARKER": self.marker,
            "HOME": Path.home(),
            "CWD": Path.cwd(),
            "PARENT": os.getpid(),
            "PORT": self.tcp.getsockname()[1],
            "SOCKET": self.unix_path,
            "PROJECT": Path(aletheia.__file__).parents[1],
        }
        for name, value in places.items():
            source = source.replace(f"@{name}@", str(value))
        return source

    def processes(self) -> list[str]:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if self.marker.encode() in path.read_bytes():
                    found.append(path.parent.name)
            except OSError:
                continue
        return found

    def assert_untouched(self) -> None:
        assert self.canary.read_text() == "alive"
        assert os.listdir(self.folder) == ["canary.txt"]
        places = ("/", "/tmp", "/dev/shm", Path.home(), Path.cwd(), Path(os.__file__).parent, tempfile.gettempdir())
        assert not [place for place in places if (Path(place) / self.marker).exists()]
        for place in Path(tempfile.gettempdir()).iterdir():
            with suppress(OSError):  # no folder, or another test's that is gone by now
                assert not [path for path in place.iterdir() if path.name.startswith(self.marker)]
        assert self.processes() == []

    def close(self) -> None:
        for one in (self.tcp, self.unix, self.abstract):
            one.close()
        os.unlink(self.unix_path)


@pytest.fixture
def host(tmp_path):
    one = Host(tmp_path)
    yield one
    one.close()


def attack(host: Host, source: str, limits: sandbox.Limits = TIGHT) -> humaneval.Outcome:
    """Run a solution and check what holds for all of them."""
    started = time.monotonic()
    program = humaneval_program(host.marker, PRELUDE, host.fill_in(source), CHECK, "solve")
    outcome = run_program(program, limits=limits)
    assert time.monotonic() - started < limits.wall_seconds + MARGIN_SECONDS
    assert not outcome.passed
    assert "BREACH" not in outcome.output
    assert len(outcome.output) <= TIGHT.output_bytes
    host.assert_untouched()
    return outcome


@contained
@pytest.mark.parametrize("case", REFUSED)
def test_an_attack_is_refused(host, monkeypatch, case):
    monkeypatch.setenv("ALETHEIA_SECRET", "hunter2")
    assert "refused" in attack(host, REFUSED[case]).output


@contained
@pytest.mark.parametrize("case", ENDED)
def test_a_program_that_does_not_end_well(host, case):
    reason, source = ENDED[case]
    outcome = attack(host, source, replace(TIGHT, wall_seconds=1) if reason == "wall time" else TIGHT)
    assert outcome.reason == reason, outcome.output[-500:]


@contained
@pytest.mark.parametrize("case", CHEATS)
def test_a_cheat_does_not_pass(host, case):
    attack(host, CHEATS[case])


@pytest.mark.parametrize("case", CHEATS)
def test_a_cheat_does_not_pass_in_unsafe_mode(case):
    program = humaneval_program("cheat", PRELUDE, CHEATS[case], CHECK, "solve")
    assert not run_program(program, unsafe=True, limits=TIGHT).passed


@contained
def test_nothing_outlives_the_parent_that_is_killed(host):
    code = (
        "from aletheia.lab.evaluation import sandbox\n"
        f"sandbox.run('import time; print(1); time.sleep(600)', name={host.marker!r},"
        " limits=sandbox.Limits(wall_seconds=600))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": host.fill_in("@PROJECT@")})
    deadline = time.monotonic() + 20
    while len(host.processes()) < 3 and time.monotonic() < deadline:  # bubblewrap, its first process, the program
        time.sleep(0.05)
    assert len(host.processes()) >= 3
    time.sleep(0.5)  # bubblewrap binds its processes to the life of their parent a moment after they begin
    parent.kill()
    parent.wait()
    while host.processes() and time.monotonic() < deadline:
        time.sleep(0.05)
    host.assert_untouched()


@contained
def test_a_program_sees_python_and_nothing_of_ours():
    result = sandbox.run(
        "import json, os, sys\n"
        "fds = [f for f in os.listdir('/proc/self/fd') if os.path.exists(f'/proc/self/fd/{f}')]\n"
        "print(json.dumps([fds, dict(os.environ), os.listdir('/tmp'), os.getcwd(), sys.path, hash('a'),"
        " os.uname()[1]]))"
    )
    descriptors, environment, tmp, folder, path, hashed, name = json.loads(result.text)
    assert set(descriptors) <= {"0", "1", "2", "3"}  # 3 is the listing itself, closed by then or not
    assert environment.keys() <= {"PYTHONHASHSEED", "LC_ALL", "PWD"}
    assert (tmp, folder, name) == ([], "/tmp", "sandbox")
    assert not [entry for entry in path if "site-packages" in entry]
    again = sandbox.run("print(hash('a'))")
    assert int(again.text) == hashed


@either
def test_results_say_how_a_program_ended(unsafe):
    def run(source, limits=TIGHT, **options):
        return sandbox.run(source, limits=limits, unsafe=unsafe, **options)

    assert run("print('hello')") == sandbox.RunResult(0, None, pytest.approx(5, abs=5), b"hello\n")
    assert run("import sys; print(sys.stdin.read()[::-1])", stdin=b"abc").text == "cba\n"
    assert run("import sys; print(len(sys.stdin.read()))", stdin=b"x" * (1 << 20)).text == f"{1 << 20}\n"
    assert run("pass", stdin=b"x" * (1 << 20)).passed  # nobody reads it
    assert run("raise SystemExit(3)").exit_code == 3
    failed = run("1 / 0", name="task/1")
    assert failed.exit_code == 1
    assert "task-1.py" in failed.text
    assert "ZeroDivisionError" in failed.text
    assert run("import os; os.kill(os.getpid(), 9)").exit_code == 137
    slow = run("print('begun', flush=True)\nimport time; time.sleep(60)", replace(TIGHT, wall_seconds=1))
    assert (slow.killed_by, slow.timed_out, slow.passed, slow.text) == ("wall time", True, False, "begun\n")
    loud = run("while True: print('x' * 1000)")
    assert (loud.killed_by, len(loud.output)) == ("output", TIGHT.output_bytes)
    assert run("while True: pass").killed_by == "cpu time"
    assert "MemoryError" in run("bytes(1 << 34)").text
    assert "File too large" in run("open('x', 'wb').write(bytes(4 << 20))").text


def test_the_unsafe_folder_is_removed_and_the_group_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    marker = f"mark-{uuid.uuid4().hex}"
    result = sandbox.run(
        "import os, time\nopen('left', 'w')\nif os.fork() == 0: time.sleep(600)\nprint(os.getcwd())",
        name=marker,
        unsafe=True,
        limits=TIGHT,
    )
    assert result.text.startswith(str(tmp_path))
    assert os.listdir(tmp_path) == []
    if platform.system() == "Linux":
        time.sleep(0.2)
        lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
        assert not [line for line in lines if marker.encode() in line]


def test_without_bubblewrap_it_refuses(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    sandbox.check.cache_clear()
    for action in (lambda: sandbox.run("print(1)"), sandbox.check, lambda: score([mbpp_program("1", "", [])])):
        with pytest.raises(SandboxError, match=r"install the package 'bubblewrap'.*`unsafe_exec`") as raised:
            action()
        assert "\n" not in str(raised.value)
    assert sandbox.run("print(1)", unsafe=True).text == "1\n"


def test_a_bubblewrap_that_cannot_work_is_named(tmp_path, monkeypatch):
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(jail, "find_bubblewrap", lambda: str(broken))
    sandbox.check.cache_clear()
    with pytest.raises(SandboxError, match=r"uid map: Permission denied.*bubblewrap 0\.7.*`unsafe_exec`"):
        sandbox.check()


def test_a_sandbox_that_does_not_hold_is_named(monkeypatch):
    run = sandbox.run
    monkeypatch.setattr(sandbox, "run", lambda source, **options: run(source, **options, unsafe=True))
    sandbox.check.cache_clear()
    with pytest.raises(SandboxError, match="does not hold"):
        sandbox.check()


def test_a_machine_without_a_list_of_calls_is_refused():
    with pytest.raises(SandboxError, match="no sandbox for vax machines"):
        syscalls.filter_bytes("vax")
    for machine in ("x86_64", "aarch64"):
        assert len(syscalls.filter_bytes(machine)) % 8 == 0


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def humaneval_set(take: slice, change) -> list[humaneval.Program]:
    return [
        humaneval_program(
            row["task_id"], row["prompt"], change(row["canonical_solution"]), row["test"], row["entry_point"]
        )
        for row in rows(HUMANEVAL)[take]
    ]


def broken(solution: str) -> str:
    return "    raise ValueError('broken')\n" if len(solution) % 2 else "    return object()\n"


def check_humaneval(take: slice) -> None:
    good = score(humaneval_set(take, lambda solution: solution), workers=2)
    assert [outcome for outcome in good if not outcome.passed] == []
    bad = score(humaneval_set(take, broken), workers=2)
    assert [outcome for outcome in bad if outcome.passed] == []
    assert len(good) == len(bad) == len(rows(HUMANEVAL)[take])
    assert (humaneval.pass_at_k(good), humaneval.pass_at_k(bad)) == (1.0, 0.0)


@contained
@needs_humaneval
def test_a_sample_of_humaneval():
    check_humaneval(slice(0, 164, 8))


@contained
@needs_humaneval
@pytest.mark.slow
def test_all_of_humaneval():
    check_humaneval(slice(None))


@contained
@needs_mbpp
def test_a_sample_of_mbpp():
    programs = []
    for number, row in list(enumerate(rows(MBPP)))[::20]:
        tests = row["prompt"].split("Your code should pass these tests:\n")[1].splitlines()
        programs.append(mbpp_program(str(number), row["completion"], tests))
        programs.append(mbpp_program(f"{number} empty", "pass", tests))
    assert [outcome.passed for outcome in score(programs, workers=2)] == [True, False] * (len(programs) // 2)


@either
def test_score_keeps_the_order_and_names_the_reason(unsafe):
    solutions = ["def solve(x): return 4", "def solve(x): return 5", "while True: pass", "def solve(x): return 2 * x"]
    programs = [humaneval_program("t", "", one, CHECK, "solve") for one in solutions]
    found = score(programs, workers=2, unsafe=unsafe, limits=TIGHT)
    assert [outcome.reason for outcome in found] == ["passed", "failed", "cpu time", "passed"]
    assert humaneval.pass_at_k(found) == 0.5
    assert humaneval.pass_at_k(found, 2) == pytest.approx(1 - 1 / 6)
    assert score([], unsafe=unsafe) == []
    with pytest.raises(SandboxError, match="found 0 workers"):
        score(programs, workers=0, unsafe=unsafe)


@either
def test_a_good_solution_may_print_and_ask_for_input(unsafe):
    noisy = "print('x' * 100)\ntry: input()\nexcept EOFError: print('empty')\ndef solve(x): print(x); return 4"
    outcome = run_program(mbpp_program("1", noisy, ["assert solve(2) == 4"], "import math"), unsafe=unsafe)
    assert (outcome.passed, outcome.reason) == (True, "passed")
    main = "def solve(x): return 4\nif __name__ == '__main__': raise SystemExit"
    assert run_program(mbpp_program("1", main, ["assert solve(2) == 4"]), unsafe=unsafe).passed


def test_truncation():
    assert humaneval.truncate("    return 1\n\ndef other():\n    pass") == "    return 1\n"
    assert humaneval.truncate("    x = 1\n    return x\nprint(1)\nclass A: pass") == "    x = 1\n    return x"
    assert humaneval.truncate("    return 1") == "    return 1"
    assert humaneval.truncate("") == ""


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_lucky_draws(drawn):
    samples, correct, k = drawn
    unlucky = 1.0
    for taken in range(k):  # drawing k without putting back, all wrong
        unlucky *= max(samples - correct - taken, 0) / (samples - taken)
    assert estimate_pass_at_k(samples, correct, k) == pytest.approx(1 - unlucky)
    assert estimate_pass_at_k(samples, correct, 1) == pytest.approx(correct / samples)


@pytest.mark.parametrize(("samples", "correct", "k"), [(0, 0, 1), (2, 3, 1), (2, 1, 3), (2, -1, 1), (2, 1, 0)])
def test_pass_at_k_refuses_what_cannot_be(samples, correct, k):
    with pytest.raises(ValueError, match="expected"):
        estimate_pass_at_k(samples, correct, k)
    with pytest.raises(ValueError, match="no outcome"):
        humaneval.pass_at_k([])
