"""Checkpoints that are whole or absent, runs that go on where they were, folders that one run holds at a time."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
from checkpointing import ABOUT, STEPS, Curve, make_trainer, weights
from transformers import Trainer, TrainerControl, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from aletheia.errors import ArtifactError, Interrupted, TrainingError
from aletheia.runs import manifest as manifest_module
from aletheia.runs.folder import RunFolder
from aletheia.runs.manifest import (
    MANIFEST_FILE,
    PARTIAL,
    check_same_run,
    checkpoint_folders,
    newest_checkpoint,
    read_manifest,
    verified,
)
from aletheia.training import checkpoints as checkpoints_module
from aletheia.training.checkpoints import trustworthy_checkpoints
from aletheia.training.interrupts import Interrupts, SaveInTime, interrupts

PROGRAM = Path(__file__).with_name("checkpointing.py")


def names(out):
    return sorted(path.name for path in out.iterdir())


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads cost tiny models more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Eight steps with checkpoints after 3, 6 and 8: (folder, losses, final weights)."""
    out, curve = tmp_path_factory.mktemp("trained"), Curve()
    trainer = make_trainer(out, [curve])
    trustworthy_checkpoints(trainer, ABOUT, lambda: {"losses": list(curve.losses.values())})
    trainer.train()
    return out, curve.losses, weights(trainer)


@pytest.fixture
def copy(trained, tmp_path):
    return Path(shutil.copytree(trained[0], tmp_path / "copy"))


# what a checkpoint is


def test_every_file_is_in_the_manifest_and_the_caller_gets_its_state_back(trained):
    out, losses, _ = trained
    assert names(out) == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]
    newest = newest_checkpoint(out)
    assert newest.step == 8
    assert newest.manifest.about == ABOUT
    assert newest.manifest.extra["losses"] == list(losses.values())[:8]
    found = {path.relative_to(newest.path).as_posix() for path in newest.path.rglob("*") if path.is_file()}
    assert set(newest.manifest.files) == found - {MANIFEST_FILE}
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= found
    assert newest.manifest.size_bytes == sum((newest.path / name).stat().st_size for name in newest.manifest.files)


def test_resumed_is_not_resumed_to_the_byte(trained, copy):
    _, losses, expected = trained
    shutil.rmtree(copy / "checkpoint-8")
    shutil.rmtree(copy / "checkpoint-6")
    curve = Curve()
    trainer = make_trainer(copy, [curve])
    made = trustworthy_checkpoints(trainer, ABOUT)
    trainer.train(resume_from_checkpoint=True)
    assert made.resumed.step == 3
    assert curve.losses == {step: loss for step, loss in losses.items() if step > 3}
    for name, value in weights(trainer).items():
        assert torch.equal(value, expected[name])


def test_resumed_after_the_last_step_nothing_is_trained(trained, copy):
    trainer = make_trainer(copy, curve := [Curve()])
    trustworthy_checkpoints(trainer)
    assert trainer.train(resume_from_checkpoint=True).global_step == STEPS
    assert not curve[0].losses
    for name, value in weights(trainer).items():
        assert torch.equal(value, trained[2][name])


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_found_and_the_older_checkpoint_taken(share, copy):
    folder = copy / "checkpoint-8"
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
        faults = []
        assert newest_checkpoint(copy, faults).step == 6
        assert len(faults) == 1
        assert str(path) in faults[0]
        path.write_bytes(whole)
    assert newest_checkpoint(copy).step == 8


def test_a_flipped_bit_is_found_in_every_file(copy):
    dice = random.Random(0)
    for path in sorted((copy / "checkpoint-8").iterdir()):
        whole = path.read_bytes()
        for _ in range(16):
            damaged = bytearray(whole)
            damaged[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(TrainingError, match=path.name):
                verified(path.parent)
        path.write_bytes(whole)
    assert verified(copy / "checkpoint-8").step == 8


def test_a_missing_file_a_missing_manifest_and_a_foreign_folder_are_not_whole(copy):
    (copy / "checkpoint-8" / "optimizer.pt").unlink()
    (copy / "checkpoint-6" / MANIFEST_FILE).unlink()
    (copy / "checkpoint-900").mkdir()
    (copy / "checkpoint-x").mkdir()
    faults = []
    assert newest_checkpoint(copy, faults).step == 3
    assert "checkpoint-900 has no manifest.json" in faults[0]
    assert "optimizer.pt is missing" in faults[1]
    assert "checkpoint-6 has no manifest.json" in faults[2]
    shutil.rmtree(copy / "checkpoint-3")
    assert newest_checkpoint(copy) is None
    assert newest_checkpoint(copy / "nowhere") is None


def test_files_that_come_later_do_no_harm(copy):
    (copy / "checkpoint-8" / "note.txt").write_text("from a callback")
    assert newest_checkpoint(copy).step == 8


def test_an_explicit_checkpoint_is_verified_and_trainer_alone_would_not(copy):
    (copy / "checkpoint-8" / "optimizer.pt").unlink()
    assert get_last_checkpoint(str(copy)) == str(copy / "checkpoint-8")
    trainer = make_trainer(copy)
    made = trustworthy_checkpoints(trainer)
    with pytest.raises(TrainingError, match=r"checkpoint-8/optimizer\.pt is missing") as caught:
        trainer.train(resume_from_checkpoint=str(copy / "checkpoint-8"))
    assert "\n" not in str(caught.value)
    assert made.resume_path(True) == str(copy / "checkpoint-6")
    assert len(made.faults) == 1
    assert made.resume_path(None) is None
    for path in checkpoint_folders(copy):
        (path / "optimizer.pt").unlink(missing_ok=True)
    with pytest.raises(TrainingError, match="holds no complete checkpoint"):
        made.resume_path(True)


def test_another_run_is_refused_with_both_values(copy):
    trainer = make_trainer(copy)
    trustworthy_checkpoints(trainer, ABOUT | {"learning_rate": 0.02})
    with pytest.raises(TrainingError, match=r"`learning_rate` 0\.01, but this one has 0\.02; expected"):
        trainer.train(resume_from_checkpoint=True)


def test_the_first_difference_is_named_and_hashes_are_short():
    check_same_run({"data": [1, 2]}, {"data": (1, 2)})
    one, other = "a" * 64, "b" * 64
    with pytest.raises(
        TrainingError, match=r"^run holds .* `data` rows\.jsonl aaaaaaaaaaaa, .* rows\.jsonl bbbbbbbbbbbb;"
    ):
        check_same_run({"data": f"rows.jsonl {one}", "x": 1}, {"data": f"rows.jsonl {other}", "x": 2}, "run")
    with pytest.raises(TrainingError, match="`seed` absent, but this one has 0"):
        check_same_run({}, {"seed": 0})
    with pytest.raises(TrainingError, match="`seed` 0, but this one has absent"):
        check_same_run({"seed": 0}, {})


# Trainer's own features


def test_undone_it_is_a_trainer_as_before(tmp_path):
    trainer = make_trainer(tmp_path)
    before = set(trainer.__dict__)
    with trustworthy_checkpoints(trainer):
        trustworthy_checkpoints(trainer)  # a second time takes the place of the first
    trustworthy_checkpoints(trainer).undo()
    trainer.train()
    assert set(trainer.__dict__) >= before
    assert not any(name in trainer.__dict__ for name in checkpoints_module.REPLACED_METHODS)
    assert newest_checkpoint(tmp_path) is None  # plain Trainer writes no manifest


def test_the_private_names_of_trainer_do_what_is_relied_on(tmp_path):
    """Each is there, and Trainer's own code calls it when it saves or steps: renamed, saves would be in place again."""
    called = []

    class Spied(Trainer):
        def _save_checkpoint(self, model, trial):
            called.append("_save_checkpoint")
            super()._save_checkpoint(model, trial)

        def _get_output_dir(self, trial):
            called.append("_get_output_dir")
            return super()._get_output_dir(trial)

        def _run_epoch(self, **given):
            called.append("_run_epoch")
            super()._run_epoch(**given)

        def _push_from_checkpoint(self, checkpoint_folder):
            called.append(("pushed", Path(checkpoint_folder)))

    trainer = make_trainer(tmp_path, trainer_class=Spied, max_steps=1)
    trainer.args.push_to_hub = True
    trainer._finish_current_push = lambda: None
    trainer.train()
    assert called[:4] == ["_run_epoch", "_save_checkpoint", "_get_output_dir", ("pushed", tmp_path / "checkpoint-1")]
    called.clear()
    trustworthy_checkpoints(trainer)
    trainer.train()
    assert ("pushed", tmp_path / "checkpoint-1") in called  # the real folder, when it is whole
    assert all(name in str(called) for name in ("_run_epoch", "_save_checkpoint", "_get_output_dir"))
    assert newest_checkpoint(tmp_path).step == 1


@pytest.mark.parametrize("limit", [1, 2])
def test_the_best_and_the_newest_are_kept(limit, tmp_path):
    worst_first = iter([3.0, 1.0, 2.0, 4.0])

    class Scored(Trainer):
        def evaluate(self, *given, **named):
            metrics = {"eval_loss": next(worst_first)}
            self.log(metrics)
            self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    trainer = make_trainer(tmp_path, trainer_class=Scored, save_total_limit=limit, **settings)
    trustworthy_checkpoints(trainer)
    trainer.train()
    best = tmp_path / "checkpoint-4"
    assert trainer.state.best_model_checkpoint == str(best)
    assert names(tmp_path) == (["checkpoint-4"] if limit == 1 else ["checkpoint-4", "checkpoint-8"])
    stored = json.loads((best / "trainer_state.json").read_text())
    assert stored["best_model_checkpoint"] == str(best)
    from safetensors.torch import load_file

    saved = load_file(best / "adapter_model.safetensors")
    for name, value in weights(trainer).items():
        assert torch.equal(value, saved[name.replace(".default", "")])


def test_rotation_keeps_what_this_run_wrote_last(copy):
    """Resumed from an older checkpoint, a damaged one of a later step must not push out what comes."""
    (copy / "checkpoint-8" / "optimizer.pt").unlink()
    trainer = make_trainer(copy, max_steps=STEPS, save_steps=7, save_total_limit=1)
    trustworthy_checkpoints(trainer)
    trainer.add_callback(stop := Interrupts())
    stop.signal = signal.SIGTERM
    trainer.train(resume_from_checkpoint=True)
    assert names(copy) == ["checkpoint-7"]
    assert newest_checkpoint(copy).step == 7


def test_a_checkpoint_of_the_same_step_is_replaced(copy):
    before = read_manifest(copy / "checkpoint-8")
    trainer = make_trainer(copy)
    trustworthy_checkpoints(trainer, {"run": 2})
    trainer.train()
    assert names(copy) == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]
    assert newest_checkpoint(copy).manifest.about == {"run": 2} != before.about


def test_it_works_on_trl(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tiny import make_model, make_tokenizer

    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=2, save_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, bf16=False
    )
    rows = Dataset.from_list([{"text": f"row {number} of some"} for number in range(8)])
    trainer = trl.SFTTrainer(
        make_model(layers=1), args=arguments, train_dataset=rows, processing_class=make_tokenizer()
    )
    trustworthy_checkpoints(trainer)
    trainer.train()
    assert newest_checkpoint(tmp_path).step == 2
    assert not (tmp_path / PARTIAL).exists()


# saves that fail


WRITE_POINTS = {
    "the adapter": "peft.peft_model.safe_save_file",
    "a pickle": "torch.save",
    "the tokenizer": "transformers.PreTrainedTokenizerFast.save_pretrained",
    "the state": "transformers.trainer_callback.TrainerState.save_to_json",
    "a sync": "aletheia.runs.manifest.sync",
    "the manifest": "aletheia.runs.manifest.write_text",
    "the move": "aletheia.runs.manifest.os.rename",
}


@pytest.mark.parametrize("point", WRITE_POINTS)
def test_a_full_disk_leaves_earlier_checkpoints_and_one_line(point, copy, monkeypatch):
    trainer = make_trainer(copy, max_steps=STEPS + 1)
    trustworthy_checkpoints(trainer, ABOUT)
    before = {name: verified(copy / name).manifest for name in names(copy)}

    def full(*given, **named):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(WRITE_POINTS[point], full)
    with pytest.raises(TrainingError) as caught:
        trainer.train(resume_from_checkpoint=str(copy / "checkpoint-8"))
    monkeypatch.undo()
    told = str(caught.value)
    assert "checkpoint-9 cannot be written (No space left on device)" in told
    assert f"{before['checkpoint-8'].size_bytes:,} bytes" in told
    assert "resumes from step 8" in told
    assert "\n" not in told
    assert {name: verified(copy / name).manifest for name in names(copy)} == before


def test_no_room_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    trustworthy_checkpoints(trainer)
    trainable = sum(value.numel() for value in weights(trainer).values())
    monkeypatch.setattr(checkpoints_module, "free_bytes", lambda folder: 12 * trainable - 1)
    with pytest.raises(TrainingError, match=f"{12 * trainable:,} bytes.*no earlier one"):
        trainer.train()
    assert names(tmp_path) == []


def test_other_errors_are_not_called_a_full_disk(tmp_path):
    trainer = make_trainer(tmp_path)
    trustworthy_checkpoints(trainer, extra=lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert names(tmp_path) == []


LIMITED = """
import resource, sys
from checkpointing import make_trainer
from aletheia.errors import TrainingError
from aletheia.training.checkpoints import trustworthy_checkpoints
trainer = make_trainer(sys.argv[1], max_steps=1)
trustworthy_checkpoints(trainer)
for limit in (100, 1_000, 5_000, 9_000, 14_600):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        trainer.train()
    except TrainingError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_real_short_write(tmp_path):
    """The operating system refuses files above a limit: Python, torch and safetensors each fail in their own way."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(PROGRAM.parent), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path], capture_output=True, text=True, env=environment, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 5, done.stderr
    assert all(re.search(r"checkpoint-1 cannot be written \(.+\): .* [\d,]+ bytes, ", line) for line in lines)
    assert names(tmp_path) == []


def killed_at(point, monkeypatch, trainer):
    class Killed(BaseException):
        """Nothing tidies up after a kill."""

    def kill(*given, **named):
        raise Killed

    monkeypatch.setattr(WRITE_POINTS[point], kill)
    monkeypatch.setattr(checkpoints_module, "clear_partial", lambda folder: None)
    with pytest.raises(Killed):
        trainer.train(resume_from_checkpoint=True)
    monkeypatch.undo()


@pytest.mark.parametrize("point", WRITE_POINTS)
def test_killed_inside_a_save_the_run_goes_on_and_ends_the_same(point, trained, copy, monkeypatch):
    shutil.rmtree(copy / "checkpoint-8")
    trainer = make_trainer(copy)
    trustworthy_checkpoints(trainer, ABOUT)
    killed_at(point, monkeypatch, trainer)
    assert (copy / PARTIAL).exists()
    newest = newest_checkpoint(copy)
    # only a checkpoint that was all there when it was to be moved is moved after all
    assert newest.step == (8 if point == "the move" else 6)
    assert not (copy / PARTIAL).exists()
    trainer = make_trainer(copy)
    trustworthy_checkpoints(trainer, ABOUT)
    trainer.train(resume_from_checkpoint=True)
    for name, value in weights(trainer).items():
        assert torch.equal(value, trained[2][name])


def test_killed_between_the_two_renames_of_a_replacement(copy, monkeypatch):
    trainer = make_trainer(copy)
    trustworthy_checkpoints(trainer, {"run": 2})
    rename, calls = os.rename, []

    def once(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(*given)

    monkeypatch.setattr(manifest_module.os, "rename", once)
    monkeypatch.setattr(checkpoints_module, "clear_partial", lambda folder: None)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    monkeypatch.undo()
    assert not (copy / "checkpoint-3").exists()
    newest_checkpoint(copy)
    assert verified(copy / "checkpoint-3").manifest.about == {"run": 2}


# signals and time


def log_of(out):
    return out.with_name(f"{out.name}.log")


def start(out, pause=0.0):
    """The program of checkpointing.py."""
    code = "import sys, checkpointing; checkpointing.main(*sys.argv[1:])"
    return forked.Forked(code, [out, pause], out.parent, os.environ, log_of(out), log_of(out))


def wait_for(out, process, words):
    """Until the program has said so."""
    while process.poll() is None:
        if any(line.startswith(words) for line in log_of(out).read_text().splitlines()):
            return
        time.sleep(0.01)
    raise AssertionError(log_of(out).read_text())


def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(tmp_path):
    signals = (signal.SIGTERM, signal.SIGINT)
    processes = [start(tmp_path / signum.name) for signum in signals]
    for signum, process in zip(signals, processes, strict=True):
        wait_for(tmp_path / signum.name, process, "step 5")
        process.send_signal(signum)
    for signum, process in zip(signals, processes, strict=True):
        assert process.wait(timeout=120) == 128 + signum
        told = log_of(tmp_path / signum.name).read_text()
        newest = newest_checkpoint(tmp_path / signum.name)
        assert newest.step >= 5
        assert f"error: interrupted after step {newest.step} of 30; the same command resumes from there" in told
        assert "Traceback" not in told


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_training_ends_the_run_at_once(signum, code):
    with pytest.raises(Interrupted) as caught, interrupts():
        os.kill(os.getpid(), signum)
    assert caught.value.exit_code == code
    assert (
        str(caught.value) == "interrupted before the first checkpoint; the same command starts again from the beginning"
    )


def test_the_second_ctrl_c_is_obeyed_at_once_and_handlers_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    state, control = TrainerState(global_step=3, max_steps=9), TrainerControl()
    with interrupts() as interrupted:
        interrupted.on_train_begin(None, state, control)
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted.signal == signal.SIGINT
        interrupted.on_step_end(None, state, control)
        assert control.should_save
        assert control.should_training_stop
        assert "before the first checkpoint" in str(interrupted.error())
        interrupted.on_save(None, state, control)
        assert "after step 3 of 9; the same command resumes from there" in str(interrupted.error())
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_an_interruption_that_a_library_wrapped_is_still_one():
    def load():
        with interrupts() as interrupted:
            interrupted.saved_step = 4
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except Exception as error:
                raise ValueError("cannot load") from error

    with pytest.raises(Interrupted, match="resumes from step 4") as caught:
        load()
    assert caught.value.exit_code == 143


class Times:
    """A run whose clock is the test's: steps and saves of given seconds."""

    def __init__(self, step, save, steps=10_000):
        self.now, self.step, self.save = 0.0, step, save
        self.callback = SaveInTime(clock=lambda: self.now)
        self.state, self.saved_at, self.saved_steps = TrainerState(max_steps=steps), [], []

    def run(self, steps):
        control = TrainerControl()
        self.callback.on_train_begin(None, self.state, control)
        for _ in range(steps):
            control.should_save = False
            self.callback.on_step_begin(None, self.state, control)
            self.now += self.step
            self.state.global_step += 1
            self.callback.on_step_end(None, self.state, control)
            self.now += 5
            self.callback.on_evaluate(None, self.state, control)  # no part of a save
            if control.should_save:
                self.saved_at.append(self.now)
                self.saved_steps.append(self.state.global_step)
                self.now += self.save
                self.callback.on_save(None, self.state, control)
        return self


@pytest.mark.parametrize(("step", "save"), [(1, 0.001), (1, 3), (1, 60), (45, 0.1), (500, 1), (900, 1)])
def test_saves_lose_ten_minutes_at_most_and_take_a_hundredth_of_the_time(step, save):
    run = Times(step, save).run(400)
    lost = max(later - earlier for earlier, later in zip([0, *run.saved_at], run.saved_at, strict=False))
    assert lost <= max(600, step) + save + 2 * 5  # a step cannot be cut
    spent = save * (len(run.saved_at) - 1) / run.now  # the first one cannot know
    assert spent <= 0.011 or save * 100 > 600 - step


def test_nothing_is_saved_after_the_last_step():
    assert Times(700, 1, steps=3).run(3).saved_steps == [1, 2]


# the run folder


def test_a_folder_is_new_interrupted_finished_or_foreign(tmp_path):
    out = tmp_path / "run"
    with RunFolder.claim(out) as claimed:
        assert not claimed.resumes
        assert claimed.checkpoints == out / "checkpoints"
    assert not out.exists()  # nothing came of it
    with RunFolder.claim(out):
        (out / "config.yaml").write_text("steps: 3\n")
        (out / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    with RunFolder.claim(out) as claimed:
        assert claimed.resumes
        assert (out / "checkpoints" / "checkpoint-3").exists()
    with RunFolder.claim(out, resume="never") as claimed:
        assert not claimed.resumes
        assert not (out / "checkpoints").exists()
    (out / "metrics.json").write_text('{"format": "aletheia-metrics"}')
    with pytest.raises(ArtifactError, match="run; choose another `out`, or replace it with `overwrite`"):
        RunFolder.claim(out)
    (out / "checkpoints").mkdir()
    with RunFolder.claim(out, overwrite=True) as claimed:
        assert not claimed.resumes
        assert (out / "metrics.json").exists()  # until the new run is saved
        (out / "checkpoints").mkdir()
    with RunFolder.claim(out, overwrite=True) as claimed:
        assert claimed.resumes  # the run that was replacing it


@pytest.mark.parametrize("names", [["notes.txt"], ["config.yaml"], ["checkpoints"], ["metrics.json", "config.yaml"]])
def test_what_is_not_ours_is_left_alone(names, tmp_path):
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ArtifactError, match="holds other files"):
        RunFolder.claim(tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_a_copied_folder_is_known_by_its_checkpoints(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "checkpoints")
    with RunFolder.claim(tmp_path) as claimed:
        assert claimed.resumes
    with pytest.raises(ArtifactError, match=r"is a file"):
        RunFolder.claim(tmp_path / "checkpoints" / "checkpoint-8" / MANIFEST_FILE)
    with pytest.raises(ArtifactError, match=r"needs 1000000000\.00 GB"):
        claimed.check_room(10**18)


def test_one_of_twenty_processes_gets_the_folder_and_a_kill_lets_it_go(tmp_path):
    out = tmp_path / "run"
    code = f"""
import os, sys, time
from aletheia.runs.folder import RunFolder
from aletheia.errors import ArtifactError
assert "torch" not in sys.modules
go = time.time() + 0.5
for _ in range(20):
    if os.fork() == 0:
        time.sleep(max(0, go - time.time()))
        try:
            held = RunFolder.claim({str(out)!r})
            os.write(1, b"held %d\\n" % os.getpid())  # in one piece
            time.sleep(60)
        except ArtifactError as error:
            os.write(1, f"refused {{error}}\\n".encode())
        os._exit(0)
"""
    started = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    lines = [started.stdout.readline() for _ in range(20)]
    holders = [int(line.split()[1]) for line in lines if line.startswith("held")]
    try:
        assert len(holders) == 1
        refused = [line for line in lines if line.startswith("refused")]
        assert len(refused) == 19
        assert all("in use by another run" in line for line in refused)
        with pytest.raises(ArtifactError, match=rf"in use by another run \(process {holders[0]}\)"):
            RunFolder.claim(out)
    finally:
        for holder in holders:
            os.kill(holder, signal.SIGKILL)
        started.wait()
    ended = time.monotonic() + 10
    while True:
        try:
            RunFolder.claim(out).close()
            break
        except ArtifactError:
            assert time.monotonic() < ended
            time.sleep(0.05)


def test_within_a_process_too(tmp_path):
    with RunFolder.claim(tmp_path / "run"), pytest.raises(ArtifactError, match="in use"):
        RunFolder.claim(tmp_path / "run")
    RunFolder.claim(tmp_path / "run").close()
    assert not (tmp_path / "run").exists()


# slow: real kills


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_by_the_system_at_seeded_moments_it_ends_the_same(seed, tmp_path):
    """SIGKILL while steps and stretched saves go on, again and again, until a run gets through."""
    expected = tmp_path / "whole"
    assert start(expected).wait(120) == 0
    out, dice = tmp_path / "killed", random.Random(seed)
    inside = 0
    for _ in range(5):
        log_of(out).unlink(missing_ok=True)
        process = start(out, 0.01)
        wait_for(out, process, "step")
        time.sleep(dice.uniform(0.1, 1.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        inside += (out / PARTIAL).exists()
    assert start(out).wait(120) == 0
    assert inside
    found, whole = (torch.load(folder / "weights.pt") for folder in (out, expected))
    assert all(torch.equal(found[name], whole[name]) for name in whole)


TWO = """
import sys, torch
import torch.distributed as dist
from checkpointing import make_trainer, weights
from aletheia.training.checkpoints import trustworthy_checkpoints
from aletheia.training.interrupts import Interrupts, SaveInTime
from aletheia.runs.manifest import newest_checkpoint
out, mode = sys.argv[1:]
stop = Interrupts()
trainer = make_trainer(out, [stop, SaveInTime()], ddp_backend="gloo")
made = trustworthy_checkpoints(trainer, {"processes": 2})
rank = dist.get_rank()
if mode == "fails" and rank == 1:
    from transformers import Trainer
    def full(self, *given): raise OSError(28, "No space left on device")
    Trainer._save_rng_state = full
if mode == "stops" and rank == 1:
    stop.signal = 15
try:
    trainer.train(resume_from_checkpoint=True if mode == "resumes" else None)
except Exception as error:
    print(rank, type(error).__name__, error, flush=True)
total = float(sum(value.sum() for value in weights(trainer).values()))
print(rank, "step", trainer.state.global_step, "signal", stop.signal, total, flush=True)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_write_one_checkpoint_and_agree(tmp_path):
    program = tmp_path / "two.py"
    program.write_text(TWO)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(PROGRAM.parent), *sys.path]), "OMP_NUM_THREADS": "1"}

    def launch(mode, out):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        done = subprocess.run(
            [*command, program, out, mode], capture_output=True, text=True, env=environment, timeout=200
        )
        return sorted(line for line in done.stdout.splitlines() if line[:2] in ("0 ", "1 ")), done.stderr

    whole, told = launch("runs", tmp_path / "whole")
    assert len(whole) == 2, told
    newest = newest_checkpoint(tmp_path / "whole")
    assert newest.step == STEPS
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(newest.manifest.files)

    stopped, told = launch("stops", tmp_path / "stopped")
    assert [line.split()[:5] for line in stopped] == [[rank, "step", "1", "signal", "15"] for rank in "01"], told
    assert newest_checkpoint(tmp_path / "stopped").step == 1
    resumed, told = launch("resumes", tmp_path / "stopped")
    assert resumed == whole, told

    failed, told = launch("fails", tmp_path / "failed")
    assert sum("TrainingError" in line and "cannot be written" in line for line in failed) == 2, (failed, told)
    assert not (tmp_path / "failed" / PARTIAL).exists()
