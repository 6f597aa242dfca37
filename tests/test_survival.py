"""A run of ``aletheia train`` that is killed, stopped or short of disk, and the same command again."""

import hashlib
import json
import os
import random
import re
import signal
import time

import forked
import pytest
from conftest import count_rows
from tiny import make_model

from aletheia.runs.folder import RunFolder
from aletheia.runs.saved import load_adapter

# two epochs and more with early layers, a cache on disk and evaluations; a checkpoint every third step
STEPS = 40
OPTIONS = ["--steps", STEPS, "--batch-size", 4, "--max-length", 64, "--dtype", "float32", "--cache", "disk"]
OPTIONS += ["--evaluations", 5, "--save-steps", 3, "--eval-rows", 6, "--seed", 1]
SAVING = """
import os, signal, sys
from aletheia.training import checkpoints
{patch}
from aletheia.cli.main import main
sys.argv = ["aletheia", *sys.argv[1:]]
main()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, model_folder):
    """A folder with the data; what an uninterrupted run leaves there."""
    folder = tmp_path_factory.mktemp("survival")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in count_rows(46)))
    done = command(folder, model_folder, "whole")
    assert done.returncode == 0, done.stderr
    return folder


def environment(folder):
    return os.environ | {"ALETHEIA_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def arguments(model_folder, out, *more):
    return [*map(str, ("train", model_folder, "--data", "train.jsonl", "--out", out, *OPTIONS, *more))]


def command(folder, model_folder, out, *more, patch=""):
    """``aletheia train`` in a process of its own."""
    code = SAVING.format(patch=patch)
    return forked.run(code, arguments(model_folder, out, *more), folder, environment(folder))


def start(folder, model_folder, out):
    """The same, going on beside the test; it writes its lines to ``OUT.log``."""
    log = folder / f"{out}.log"
    code = SAVING.format(patch="")
    return forked.Forked(code, arguments(model_folder, out), folder, environment(folder), log, log)


def adapter(folder, out):
    return hashlib.sha256((folder / out / "adapter_model.safetensors").read_bytes()).hexdigest()


def curves(folder, out):
    metrics = json.loads((folder / out / "metrics.json").read_text())
    return [[(point["step"], point["loss"]) for point in metrics[name]] for name in ("train_curve", "held_out_curve")]


def ends_the_same(folder, out):
    assert adapter(folder, out) == adapter(folder, "whole")
    assert curves(folder, out) == curves(folder, "whole")


def wait_for(reached, process, seconds=120.0):
    """Until something is so, or the process has ended; returns whether it still runs."""
    limit = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < limit:
        if reached():
            return True
        time.sleep(0.002)
    return process.poll() is None


def steps_saved(folder, out):
    names = [path.name for path in (folder / out / "checkpoints").glob("checkpoint-*")]
    return max((int(name.partition("-")[2]) for name in names), default=0)


KILL_IN_SAVE = """
import aletheia.runs.manifest as manifest
saves = 0
kill_at = {at}
def dying(name, own):
    def call(*given, **named):
        global saves
        saves += 1
        if saves == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        found = own(*given, **named)
        return found
    return call
import torch, safetensors.torch
torch.save = dying("torch.save", torch.save)
import peft.peft_model
peft.peft_model.safe_save_file = dying("adapter", peft.peft_model.safe_save_file)
checkpoints.write_manifest = dying("manifest", checkpoints.write_manifest)
checkpoints.move_in = dying("move", checkpoints.move_in)
"""


def killed(folder, model_folder, seeds, in_save):
    """Kill one run at each of the seeded moments, going on with the same command, and let it end."""
    out = f"killed-{in_save}-{seeds[0]}"
    for seed in seeds:
        draw = random.Random(seed)
        if in_save:
            done = command(folder, model_folder, out, patch=KILL_IN_SAVE.format(at=draw.randint(1, 45)))
            assert done.returncode == -signal.SIGKILL, done.stderr
            continue
        before, further = steps_saved(folder, out), draw.random()
        process = start(folder, model_folder, out)
        alive = wait_for(lambda start=before: steps_saved(folder, out) > start, process)
        if alive:
            time.sleep(0.25 * further)
            process.send_signal(signal.SIGKILL)
        process.wait()
        if process.returncode == 0:  # it was quicker than that
            return out
    done = command(folder, model_folder, out)
    assert done.returncode == 0, done.stderr
    assert "resume from step" in done.stderr or "starts from the beginning" in done.stderr
    return out


@pytest.mark.parametrize("in_save", [pytest.param(False, marks=pytest.mark.slow), True])
def test_killed_and_called_again_ends_the_same(place, model_folder, in_save):
    ends_the_same(place, killed(place, model_folder, [1], in_save))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(18))
def test_killed_at_many_moments_ends_the_same(place, model_folder, seed):
    """18 runs, each killed twice at any moment: 36 moments."""
    ends_the_same(place, killed(place, model_folder, [100 + 2 * seed, 101 + 2 * seed], False))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(7))
def test_killed_inside_many_saves_ends_the_same(place, model_folder, seed):
    """7 runs, each killed twice inside a save: 14 moments."""
    ends_the_same(place, killed(place, model_folder, [200 + 2 * seed, 201 + 2 * seed], True))


def stopped(folder, model_folder, signum, seed):
    """Send a signal in mid-run; what the command says, and the run it leaves to go on with."""
    out = f"stopped-{signum}-{seed}"
    process = start(folder, model_folder, out)
    moment = random.Random(seed).randint(1, 3)
    assert wait_for(lambda: steps_saved(folder, out) >= 3 * moment, process)
    time.sleep(0.05 * random.Random(seed).random())
    process.send_signal(signum)
    code = process.wait(timeout=60)
    return out, code, (folder / f"{out}.log").read_text()


def stops_and_goes_on(place, model_folder, signum, seed):
    out, code, log = stopped(place, model_folder, signum, seed)
    assert code == 128 + signum, log
    last = log.strip().splitlines()[-1]
    found = re.search(rf"interrupted after step (\d+) of {STEPS}; the same command resumes from there", last)
    assert found, log
    assert "Traceback" not in log
    done = command(place, model_folder, out)
    assert done.returncode == 0, done.stderr
    assert f"resume from step {found[1]} of {STEPS}" in done.stderr
    ends_the_same(place, out)


@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_says_how_to_go_on(place, model_folder, signum):
    stops_and_goes_on(place, model_folder, signum, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 10))
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signals_at_many_moments(place, model_folder, signum, seed):
    stops_and_goes_on(place, model_folder, signum, seed)


# where a signal comes outside of the steps: module, function and which of its calls
MOMENTS = {
    "rows": ("aletheia.job.fine_tune", "load_rows", 1),
    "load": ("aletheia.job.fine_tune", "load_for", 1),
    "probe": ("aletheia.probing.resident", "_score_batch", 3),
    "plan": ("aletheia.job.fine_tune", "make_plan", 1),
    "adapt": ("aletheia.job.fine_tune", "adapt", 1),
    "start": ("aletheia.training.train", "digest_of_b", 1),
    "held-out loss": ("aletheia.training.loop", "loss_over", 2),
    "checkpoint": ("aletheia.training.checkpoints", "write_manifest", 2),
    "save": ("aletheia.training.train", "save", 1),
    "report": ("aletheia.job.fine_tune", "report", 1),
}
SIGNAL = """
import aletheia.job.fine_tune, importlib
module = importlib.import_module({module!r})
own, calls = getattr(module, {name!r}), 0
def call(*given, **named):
    global calls
    calls += 1
    if calls == {at}:
        os.kill(os.getpid(), {signum})
    return own(*given, **named)
module.{name} = call
"""
QUICK = {("probe", signal.SIGINT), ("save", signal.SIGTERM)}
GOES_ON = r"interrupted(.*); the same command (goes on|resumes|starts|begins)"


@pytest.mark.parametrize(
    ("moment", "signum"),
    [
        pytest.param(moment, signum, marks=() if (moment, signum) in QUICK else pytest.mark.slow)
        for moment in MOMENTS
        for signum in (signal.SIGTERM, signal.SIGINT)
    ],
)
def test_a_signal_at_any_moment_says_how_to_go_on(place, model_folder, moment, signum):
    """20 moments: before, between and after the steps. What is being written at the end is written."""
    module, name, at = MOMENTS[moment]
    out = f"at-{moment.replace(' ', '-')}-{signum}"
    done = command(place, model_folder, out, patch=SIGNAL.format(module=module, name=name, at=at, signum=int(signum)))
    assert "Traceback" not in done.stderr
    if moment not in ("save", "report"):
        assert done.returncode == 128 + signum, done.stderr
        assert re.search(GOES_ON, done.stderr.strip().splitlines()[-1]), done.stderr
        assert not (place / out / "metrics.json").exists()
        has_steps = moment in ("held-out loss", "checkpoint")
        assert ("resumes from" in done.stderr.splitlines()[-1]) is has_steps
        assert (place / out / "adapter_model.safetensors").exists() is has_steps
        assert (place / out).exists() is has_steps or (place / out / "checkpoints").exists()
        done = command(place, model_folder, out)
    assert done.returncode == 0, done.stderr
    ends_the_same(place, out)
    assert (place / out / "report.html").exists()


def test_the_adapter_of_an_interrupted_run_can_be_used_and_the_run_goes_on(place, model_folder):
    out, code, log = stopped(place, model_folder, signal.SIGINT, 7)
    assert code == 130, log
    assert log.strip().splitlines()[-1].endswith(f"; {out} holds the adapter so far")
    adapted = load_adapter(make_model("llama"), place / out)
    assert any(value.any() for name, value in adapted.named_parameters() if "lora_B" in name)
    again = RunFolder.claim(place / out)
    assert again.resumes
    again.close()
    done = command(place, model_folder, out, "--resume", "never", patch=SIGNAL.format(
        module="aletheia.job.fine_tune", name="load_rows", at=1, signum=15))  # fmt: skip
    assert done.returncode == 143, done.stderr
    assert not (place / out / "adapter_model.safetensors").exists()  # it was begun anew


FULL = """
import aletheia.training.checkpoints as checkpoints
from aletheia.files import free_bytes
count = 0
def free(folder):
    global count
    count += 1
    return 10_000 if count > 2 else free_bytes(folder)
checkpoints.free_bytes = free
"""


@pytest.mark.slow
def test_a_full_disk_names_the_bytes_and_the_run_goes_on_later(place, model_folder):
    done = command(place, model_folder, "full", patch=FULL)
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert re.search(r"a checkpoint needs about [\d,]+ bytes, but 10,000 bytes are free", line), done.stderr
    saved = steps_saved(place, "full")
    assert saved >= 3
    done = command(place, model_folder, "full")
    assert f"resume from step {saved}" in done.stderr
    ends_the_same(place, "full")


@pytest.mark.slow
def test_other_settings_or_data_are_refused_by_name(place, model_folder):
    process = start(place, model_folder, "other")
    assert wait_for(lambda: steps_saved(place, "other") >= 3, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = command(place, model_folder, "other", "--learning-rate", "0.5")
    assert done.returncode == 2
    assert re.search(r"--learning-rate", done.stderr.splitlines()[-1]), done.stderr
    done = command(place, model_folder, "other", "--rank", "8")
    assert "--rank" in done.stderr.splitlines()[-1]
    data = (place / "train.jsonl").read_text()
    (place / "train.jsonl").write_text(data.replace("red", "rot"))
    done = command(place, model_folder, "other")
    assert done.returncode == 2
    assert "data" in done.stderr.splitlines()[-1], done.stderr
    (place / "train.jsonl").write_text(data)
    done = command(place, model_folder, "other", "--resume", "never")
    assert done.returncode == 0, done.stderr
    assert "resume" not in done.stderr
    ends_the_same(place, "other")


def test_two_runs_on_one_folder(place, model_folder):
    """The second is refused before it loads anything, and leaves the first alone."""
    with RunFolder.claim(place / "twice"):
        done = command(place, model_folder, "twice")
        assert done.returncode == 2
        assert f"in use by another run (process {os.getpid()})" in done.stderr
        assert "load   " not in done.stderr
    assert not (place / "twice").exists()


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(place, model_folder):
    process = start(place, model_folder, "damaged")
    assert wait_for(lambda: steps_saved(place, "damaged") >= 9, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    folder = place / "damaged" / "checkpoints" / f"checkpoint-{steps_saved(place, 'damaged')}"
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    done = command(place, model_folder, "damaged")
    assert done.returncode == 0, done.stderr
    assert "adapter_model.safetensors" in done.stderr  # named
    ends_the_same(place, "damaged")
