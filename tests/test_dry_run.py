"""A dry run says what the run would be, writes nothing, and fails where the run would."""

import importlib
import json
import shutil
from types import SimpleNamespace

import pytest
from tiny import make_model

import aletheia
from aletheia.errors import ArtifactError, CacheError, DataError, PlanError, TrainingError
from aletheia.planning.cost import LayerCosts
from aletheia.planning.outlook import training_seconds
from aletheia.training import train as train_module
from aletheia.training.processes import Launch

dry_run_module = importlib.import_module("aletheia.job.dry_run")
TRAINING = {"steps": 4, "batch_size": 2, "learning_rate": 0.01, "evaluations": 2}


@pytest.fixture
def quiet():
    return lambda line: None


@pytest.fixture
def data(data_file):
    return {"data": [str(data_file)], "max_length": 96}


def everything(folder):
    """Every path below a folder, with the time it was changed."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def asked(model_folder, data, tmp_path, monkeypatch, quiet):
    """Look ahead in an empty folder, which is as it was afterwards, whatever comes of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALETHEIA_CACHE", str(tmp_path / "cache"))

    def ask(plan=None, training=TRAINING, model=str(model_folder), rows=data, out="run", **more):
        before = everything(tmp_path)
        try:
            return aletheia.dry_run(model, rows, out, plan, training, say=quiet, **more)
        finally:
            assert everything(tmp_path) == before

    return ask


@pytest.mark.parametrize("plan", [{"policy": "last", "rank": 4, "freeze_after": 0.5}, {"target": "quality"}])
def test_it_tells_the_run_that_then_takes_place(asked, model_folder, data, tmp_path, quiet, plan):
    found = asked(plan)
    run = aletheia.fine_tune(str(model_folder), data, tmp_path / "run", plan, TRAINING, say=quiet)
    assert found.plan.adapters == run.plan.adapters
    assert (found.plan.layers, found.plan.early_layers) == (run.plan.layers, run.plan.early_layers)
    assert found.steps == run.metrics.planned_steps == 4
    assert found.rows_per_step == 2
    assert found.held_out_rows == run.metrics.held_out_rows
    assert found.evaluations == run.metrics.settings.evaluations == 2
    assert found.recompute == run.metrics.settings.gradient_checkpointing
    assert 0 < found.memory_bytes < found.usable_memory_bytes  # of a fresh process; this one has run other tests
    assert set(found.files) == {path.name for path in run.path.iterdir()} - {".lock"}
    adapter = (run.path / "adapter_model.safetensors").stat().st_size
    assert found.disk_bytes["adapter"] <= adapter <= found.disk_bytes["adapter"] + 20_000  # names stand in it, too
    assert found.seconds.keys() == {"load", "probe", "training", "evaluation"}
    assert all(value > 0 for value in found.seconds.values())
    assert "".join(piece.text for piece in found.row.pieces if piece.labelled).startswith("red")


def test_a_plan_that_is_given_is_followed_without_a_probe(asked, model_folder, data, tmp_path, quiet):
    done = aletheia.fine_tune(str(model_folder), data, tmp_path / "done", {"policy": "last"}, TRAINING, say=quiet)
    found = asked(tmp_path / "done" / "plan.json")
    assert found.plan == done.plan
    assert "probe" not in found.seconds
    assert "scores.json" not in found.files


def test_what_would_end_the_run_is_said_before(asked, model_folder, data, tmp_path, quiet, monkeypatch):
    aletheia.fine_tune(str(model_folder), data, tmp_path / "done", None, TRAINING, say=quiet)
    with pytest.raises(ArtifactError, match="done holds a finished run"):
        asked(out="done")
    assert asked(out="done", overwrite=True).steps == 4
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match="file is a file"):
        asked(out="file")
    with monkeypatch.context() as patched:
        patched.setattr("os.access", lambda path, mode: path != tmp_path)
        with pytest.raises(ArtifactError, match=r"cannot write to .*: permission denied"):
            asked(out="deep/run")
    with pytest.raises(DataError, match="no such file"):
        asked(rows=data | {"eval_data": ["held.jsonl"]})
    (tmp_path / "silent.jsonl").write_text('{"question": "a", "answer": ""}\n' * 3)
    with pytest.raises(DataError, match=r"silent.jsonl:1: found empty text"):
        asked(rows={"data": ["silent.jsonl"]})
    shutil.copytree(model_folder, tmp_path / "other")
    make_model("llama", seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(PlanError, match="the plan was made for"):
        asked(tmp_path / "done" / "plan.json", model=str(tmp_path / "other"))
    monkeypatch.setattr("aletheia.runs.folder.free_bytes", lambda folder: 100)
    with pytest.raises(ArtifactError, match="the adapter needs"):
        asked()


def test_a_disk_that_cannot_hold_the_cache_is_said_before(asked, monkeypatch):
    assert asked({"policy": "last"}, TRAINING | {"cache": "disk"}).cache == "disk"
    monkeypatch.setattr("aletheia.prefix.cache.free_bytes", lambda folder: 10**6)
    with pytest.raises(CacheError, match="the prefix cache needs"):
        asked({"policy": "last"}, TRAINING | {"cache": "disk"})
    assert asked({"policy": "last"}, TRAINING | {"cache": "off"}).disk_bytes["cache"] == 0


class BreakingTrainer(train_module.RowTrainer):
    """Ends as a process that is killed: after a checkpoint, without a word."""

    def training_step(self, *arguments, **named):
        if self.state.global_step == 3:
            raise MemoryError
        return super().training_step(*arguments, **named)


def test_an_interrupted_run_goes_on_only_with_its_own_settings(asked, model_folder, data, tmp_path, quiet, monkeypatch):
    training = TRAINING | {"save_steps": 2}
    with monkeypatch.context() as patched:
        patched.setattr(train_module, "RowTrainer", BreakingTrainer)
        with pytest.raises(MemoryError):
            aletheia.fine_tune(str(model_folder), data, tmp_path / "run", None, training, say=quiet)
    out = str(tmp_path / "run")
    assert asked(None, training, out=out).resumed_step == 2
    with pytest.raises(TrainingError, match=r"holds an interrupted run with `learning_rate`"):
        asked(None, training | {"learning_rate": 0.02}, out=out)
    assert asked(None, training | {"learning_rate": 0.02}, out=out, resume="never").resumed_step == 0


def test_models_that_are_not_timed_say_why(asked, model_folder, data, tmp_path, quiet):
    found = asked(model={"model": str(model_folder), "stream": True})
    assert not found.seconds
    assert found.why_no_seconds == "the model is streamed, layer by layer"
    assert found.cache == "disk"
    aletheia.fine_tune(str(model_folder), data, tmp_path / "done", None, TRAINING, say=quiet)
    found = asked(model=str(tmp_path / "done"))
    assert "adapter" in found.why_no_seconds


def test_seconds_follow_the_phases_of_a_plan(asked):
    plan = asked({"policy": "last", "percent": 50, "freeze_after": 0.5}).plan
    costs = LayerCosts(forward=(1.0,) * 4, backward=(2.0,) * 4, adapter=(0.5,) * 4, head=3.0, baseline=20.0)
    early, cached = 4 + 8 + 2 + 3, 2 + 4 + 1 + 3
    assert training_seconds(plan, costs, 8, 4.0, is_cached=True) == 4 * early + 4 * (cached + 2 / 2)
    assert training_seconds(plan, costs, 8, 4.0, is_cached=False) == 4 * early + 4 * (cached + 2)


@pytest.mark.parametrize(
    "training", [{"gradient_checkpointing": "full"}, {"packing": "on"}, {"compile_layers": True}, {"seed": 3}]
)
def test_the_steps_of_the_run_are_timed(asked, training, monkeypatch):
    timed, own = [], dry_run_module.calibrate

    def calibrate(model, data, settings, **more):
        timed.append(settings)
        return own(model, data, settings.model_copy(update={"compile_layers": False}), **more)

    monkeypatch.setattr(dry_run_module, "calibrate", calibrate)
    assert asked({"policy": "last"}, TRAINING | training).seconds["training"] > 0
    assert {name: getattr(timed[0], name) for name in training} == training
    assert timed[0].gradient_checkpointing != "auto"


def test_several_processes_are_not_timed():
    job, ready = SimpleNamespace(launch=Launch(0, 2)), SimpleNamespace(base=None, adapted=None)
    seconds, why = dry_run_module._seconds(job, ready, 4, True, "off")
    assert not seconds
    assert why == "several processes train, and steps are timed in one"


def test_the_command_prints_it(run, model_folder, data_file, tmp_path):
    command = ("train", model_folder, "--data", data_file, "--steps", 4, "--max-length", 96, "--out", "run")
    code, out, err = run(*command, "--dry-run")
    assert code == 0, err
    for part in (
        "row 1 ",
        "[[",
        "plan ",
        "steps ",
        "4 of 4 rows",
        "time ",
        "memory ",
        "disk ",
        "writes ",
        "run: adapter_",
    ):
        assert part in out, part
    assert max(map(len, out.splitlines())) <= 100
    assert "without --dry-run" in err
    assert not (tmp_path / "run").exists()
    code, out, err = run(*command, "--dry-run", "--json")
    found = json.loads(out)
    assert found["plan"]["layer_count"] == 4
    assert found["total_seconds"] == pytest.approx(sum(found["seconds"].values()))
