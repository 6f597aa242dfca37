"""Everything to be measured on a GPU, in one command: on a bare machine without a network, from the wheels of `gpu_kit.py`.

    python benchmarks/gpu_session.py --out results [--seconds 540] [--from NAME | --only NAME,...]
    python benchmarks/gpu_session.py --out results --device cpu --tiny --seconds 7200

Steps run one after another. One that fails or hangs is recorded, and the next one starts. In the output folder are
`session.json` (how each step ended), `results.json` (every `gpu.json`, by step) and `log.txt` (what steps printed).
They are written after each step, and a second call adds to them.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

STARTED = time.monotonic()
ROOT = Path(__file__).parents[1]
# Name, command, most seconds; the last ones matter least. Seconds are one and a half times those of an H200 or, where
# a way was not measured yet, of an estimate. All take longer than one call, so go on with --from.
STEPS = [
    ("recording", "pytest tests/test_gpu_steps.py -k 'record and not compiled'", 60),  # does recording work at all?
    (
        "gpu-tests",
        "pytest {gpu_tests} -k 'not compiled and not record'",
        180,
    ),  # which ways of a step work on this card?
    ("host-time", "host_time.py --device {device}", 60),  # what launching a layer costs, with and without graphs
    # the five figures that everything is compared with
    ("compared", "gpu.py --models 8b --arms plain,trl,trl-best,every-layer,upper-half", 110),
    # recorded layers, off by default until this is measured
    ("recorded", "gpu.py --models 8b,1.5b --arms every-layer-graphs,upper-half-graphs", 135),
    # with its recomputation and without
    ("unsloth", "gpu.py --models 8b --arms unsloth,unsloth-kept --unsloth {unsloth}", 180),
    # where launching kernels takes longest
    ("small", "gpu.py --models 1.5b --arms plain,trl-best,every-layer,upper-half", 90),
    ("compiled", "gpu.py --models 8b --arms upper-half-compiled,every-layer-compiled", 180),
    ("alone", "gpu.py --models 8b --arms cached-alone,every-layer-alone", 60),  # what the loop around a step costs
    (
        "predicted",
        "gpu.py --models 8b,1.5b --arms predicted,predicted-graphs",
        300,
    ),  # against measured, time and memory
    ("nf4", "gpu.py --models 8b --arms upper-half-nf4,recomputed", 90),
    ("compiled-tests", "pytest tests/test_gpu_steps.py -k compiled", 240),  # minutes of compiling
    ("whole-runs", "gpu.py --models 1.5b --arms plain --end-to-end {rows}", 180),  # on a real model
]
ON_A_CPU = 10  # times as long
LEAST_SECONDS, GRACE_SECONDS = 10, 4  # of a step; between being asked to stop and being killed
NO_NEW_ARM_SECONDS = 15  # before a step's end
INSTALL_SECONDS = 120
LOG_BYTES, LAST_LINES, LINE_CHARACTERS = 2**20, 5, 300  # kept of a step


class Session:
    """Steps of one call, and what is kept of them in a folder."""

    def __init__(self, out: Path, seconds: float, started: float = STARTED) -> None:
        self.log, self.now, self._out = out / "log.txt", out / "now", out
        self._deadline = started + seconds
        out.mkdir(parents=True, exist_ok=True)
        self.steps: dict[str, Any] = self._read("session.json")
        self._results: dict[str, Any] = self._read("results.json")
        for name in [name for name, step in self.steps.items() if step["ended"] == "running"]:
            self._ended(name, self.steps[name] | {"ended": "killed with an earlier session"} | self._collected(name))

    def _read(self, name: str) -> dict[str, Any]:
        file = self._out / name
        return dict(json.loads(file.read_text())) if file.exists() else {}

    def _write(self) -> None:
        for name, found in (("session.json", self.steps), ("results.json", self._results)):
            half = self._out / f"{name}.new"
            half.write_text(json.dumps(found, indent=1) + "\n")
            half.replace(self._out / name)

    def seconds_for(self, most: float) -> float | None:
        """What a step may take; None if that is too little to begin."""
        seconds = min(most, self._deadline - time.monotonic() - GRACE_SECONDS)
        return seconds if seconds >= LEAST_SECONDS else None

    def skip(self, name: str, reason: str) -> None:
        """A step that does not run."""
        self._ended(name, {"ended": f"skipped: {reason}"})

    def take(self, name: str, command: list[str], environment: dict[str, str], seconds: float) -> bool:
        """Run a step for at most ``seconds``; whether it succeeded."""
        self.steps[name] = {"ended": "running", "command": shlex.join(command)}  # seen where this process is killed
        self._write()
        with self.log.open("ab") as log:
            log.write(f"\n=== {name}: {shlex.join(command)}\n".encode())
        before, began, code = self.log.stat().st_size, time.monotonic(), None
        try:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as own:  # models of killed steps go with it
                code = run(command, environment | {"TMPDIR": own}, self.log, seconds)
        finally:
            taken = time.monotonic() - began
            stopped = f"stopped at its limit of {seconds:.0f} s" if taken >= seconds else "stopped with the session"
            ended = stopped if code is None else "done" if code == 0 else "failed"
            found = {"ended": ended, "code": code, "seconds": round(taken, 1), "command": shlex.join(command)}
            self._ended(name, found | self._collected(name) | {"last_lines": self._last_lines(before)})
        return code == 0

    def _ended(self, name: str, found: dict[str, Any]) -> None:
        self.steps[name] = found
        self._write()
        known = f"{found['seconds']:.0f} s" if "seconds" in found else ""
        arms = f"{found['arms']} results" if "arms" in found else ""
        failed = [f"{arm}: {reason[:100]}" for arm, reason in found.get("failed_arms", {}).items()]
        print("; ".join(filter(None, [f"{name}: {found['ended']}", known, arms, *failed])), flush=True)
        for line in found.get("last_lines", []) if found.get("code") != 0 else []:
            print(f"    {line}", flush=True)

    def _collected(self, name: str) -> dict[str, Any]:
        file = self.now / "gpu.json"
        if not file.exists():
            return {}
        self._results[name] = json.loads(file.read_text())
        shutil.rmtree(self.now)
        arms = self._results[name]["arms"]
        runs = list(filter(None, self._results[name]["end_to_end"].values()))
        failed = {f"{arm['model']} {arm['arm']}": arm["failed"] for arm in arms if "failed" in arm}
        return {"arms": len(arms) - len(failed) + len(runs), "failed_arms": failed}

    def _last_lines(self, before: int) -> list[str]:
        """Of what a step has printed since its log had ``before`` bytes; a very long output is cut."""
        with self.log.open("r+b") as log:
            log.seek(before)
            said = log.read()
            if len(said) > LOG_BYTES:
                said = b"...\n" + said[-LOG_BYTES:]
                log.seek(before)
                log.write(said)
                log.truncate()
        lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
        return [line[:LINE_CHARACTERS] for line in lines[-LAST_LINES:]]


def run(command: list[str], environment: dict[str, str], log: Path, seconds: float) -> int | None:
    """Exit code, or None where the command had to be stopped; no process of its group is left."""
    code = None
    with log.open("ab") as sink:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, cwd=ROOT, env=environment, start_new_session=True
        )  # fmt: skip
    try:
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(seconds)
    finally:
        if code is None:
            os.killpg(process.pid, signal.SIGINT)  # pytest then says what has failed so far
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a process that waits for a device may not even die
            process.wait(GRACE_SECONDS)
    return code


def install(session: Session, kit: Path, site: Path) -> None:
    """Put wheels of the kit that are not in the folder ``site`` there, Unsloth's into a folder of their own."""
    listed = site / "installed.json"
    with tempfile.TemporaryDirectory() as joined:
        wheels = [*kit.glob("*/*.whl"), *whole_wheels(kit, Path(joined))]
        for name, to in (("install", site), ("install-unsloth", site / "unsloth")):
            have = json.loads(listed.read_text()) if listed.exists() else []
            ours = [file for file in wheels if file.parent.name.startswith("unsloth") == (to != site)]
            new = sorted(file for file in ours if f"{name} {file.name}" not in have)
            if not new or (seconds := session.seconds_for(INSTALL_SECONDS)) is None:
                continue
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
            command += ["--no-cache-dir", "--upgrade", "--target", str(to), *map(str, new)]
            if session.take(name, command, dict(os.environ), seconds):
                listed.write_text(json.dumps([*have, *(f"{name} {file.name}" for file in new)]))


def whole_wheels(kit: Path, joined: Path) -> list[Path]:
    """Wheels that the kit has in parts, put together in the folder ``joined``; those with all their parts."""
    for first in kit.glob("*/*.whl.0"):
        parts = sorted(kit.glob(f"*/{first.stem}.*"), key=lambda part: int(part.suffix[1:]))
        with (joined / first.stem).open("wb") as file:
            for part in parts:
                file.write(part.read_bytes())
    return [file for file in joined.iterdir() if zipfile.is_zipfile(file)]


def words(command: str, session: Session, options: argparse.Namespace, seconds: float) -> list[str]:
    """The command line of a step."""
    makefile = (ROOT / "Makefile").read_text()
    [gpu_tests] = re.findall(r"^GPU_TESTS := (.*)$", makefile, re.MULTILINE)
    rows = f"--rows {shlex.quote(str(options.rows.resolve()))}" if options.rows else ""
    places = {"gpu_tests": gpu_tests, "device": options.device, "rows": rows, "unsloth": options.site / "unsloth"}
    program, *rest = shlex.split(command.format(**places))
    if program == "pytest":
        return [sys.executable, "-m", "pytest", "-m", "gpu", "-o", "faulthandler_timeout=120", *rest]
    if program == "gpu.py":
        rest += ["--out", str(session.now), "--seconds", f"{max(seconds - NO_NEW_ARM_SECONDS, 1):.0f}"]
        rest += ["--device", options.device, *(["--tiny", "--steps", "4"] if options.tiny else [])]
        rest += ["--commit", options.commit] if options.commit else []
    return [sys.executable, str(ROOT / "benchmarks" / program), *rest]


def surroundings(site: Path, device: str) -> dict[str, str]:
    """Environment variables of steps."""
    runtimes = [str(folder) for folder in site.glob("unsloth/nvidia/*/lib")]  # of another CUDA, for xformers
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "src"), str(site), os.environ.get("PYTHONPATH")])),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [os.environ.get("LD_LIBRARY_PATH"), *runtimes])),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "ALETHEIA_GPU_TESTS_ON": device,
    }


def chosen(only: str | None, since: str | None) -> list[tuple[str, str, int]]:
    """Steps that run.

    Raises:
        ValueError: there is no step of such a name.
    """
    names = [name for name, _, _ in STEPS]
    if unknown := {*(only.split(",") if only else []), *([since] if since else [])} - {*names}:
        raise ValueError(f"no step {', '.join(sorted(unknown))}; expected {', '.join(names)}")
    if only:
        return [step for step in STEPS if step[0] in only.split(",")]
    return STEPS[names.index(since) if since else 0 :]


def main() -> None:
    options, steps = parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # so that the step is ended, too
    session = Session(options.out.resolve(), options.seconds)
    options.site.mkdir(parents=True, exist_ok=True)
    install(session, options.kit.resolve(), options.site)
    environment = surroundings(options.site, options.device)
    for name, command, most in steps:
        if "{unsloth}" in command and not (options.site / "unsloth").exists():
            session.skip(name, "no Unsloth in the kit")
        elif (seconds := session.seconds_for(most * (ON_A_CPU if options.device == "cpu" else 1))) is None:
            session.skip(name, "no time left")
        else:
            session.take(name, words(command, session, options, seconds), environment, seconds)
    ends = [session.steps[name]["ended"] for name, _, _ in steps]
    print(f"{ends.count('done')} of {len(ends)} steps done, {time.monotonic() - STARTED:.0f} s in all")
    sys.exit(any(one == "failed" or one.startswith("stopped") for one in ends))


def parsed() -> tuple[argparse.Namespace, list[tuple[str, str, int]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of session.json, results.json and log.txt")
    parser.add_argument("--seconds", type=float, default=540, help="of the whole call (540)")
    parser.add_argument("--only", metavar="NAME,...", help=f"steps; of {', '.join(name for name, _, _ in STEPS)}")
    parser.add_argument("--from", dest="since", metavar="NAME", help="the first step; those before it are left out")
    parser.add_argument("--kit", type=Path, default=ROOT / ".gpu-kit", help="folder of gpu_kit.py (.gpu-kit)")
    site = Path(tempfile.gettempdir()) / "aletheia-gpu-site"
    parser.add_argument("--site", type=Path, default=site, help=f"folder the wheels are installed in ({site})")
    parser.add_argument(
        "--rows", type=Path, help="of whole runs: JSON lines of question and answer (Python's functions)"
    )
    parser.add_argument("--commit", help="of the code, where this is no checkout")
    parser.add_argument("--device", default="cuda", help="cuda or, to try this, cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try this")
    options = parser.parse_args()
    try:
        return options, chosen(options.only, options.since)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
