"""The whole job from Python: repeated from the file that it leaves, and gone on with only if it is the same."""

from datetime import date
from functools import partial

import pytest
from tiny import CHATML
from transformers import TrainerCallback

import aletheia
from aletheia.cli.config import read_config
from aletheia.errors import SettingsError, TrainingError
from aletheia.job import fine_tune as fine_tune_module
from aletheia.job import push as push_module
from aletheia.job.settings import JobSettings
from aletheia.training import train as train_module

TRAINING = {"steps": 8, "batch_size": 2, "evaluations": 2, "learning_rate": 0.01, "adam_beta2": 0.99}


@pytest.fixture
def job(model_folder, data_file):
    """A small job: early layers, a held-out share and a field of Trainer's given."""
    data = {"data": [str(data_file)], "max_length": 96, "eval_fraction": 0.1}
    return partial(aletheia.fine_tune, str(model_folder), data, say=lambda line: None)


def losses(run):
    return [point.loss for point in (*run.metrics.train_curve, *run.metrics.held_out_curve)]


def adapter(run):
    return (run.path / "adapter_model.safetensors").read_bytes()


def test_a_job_repeats_itself_from_the_file_it_leaves(job, tmp_path):
    plan = {"policy": "last", "rank": 4, "freeze_after": 0.25}
    first = job(tmp_path / "first", plan, TRAINING)
    assert {path.name for path in first.path.iterdir()} - {".lock"} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "plan.json", "scores.json", "metrics.json",
        "config.yaml", "report.html", "manifest.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    sections = read_config(first.path / "config.yaml")
    assert JobSettings.of(**sections).to_yaml() == (first.path / "config.yaml").read_text()
    assert sections["training"].items() >= TRAINING.items()
    again = aletheia.fine_tune(**sections, out=tmp_path / "again", say=lambda line: None)
    assert losses(again) == losses(first)
    assert adapter(again) == adapter(first)
    by_plan = job(tmp_path / "by-plan", first.path / "plan.json", TRAINING)
    assert losses(by_plan) == losses(first)
    assert read_config(by_plan.path / "config.yaml")["plan"] == {"file": str(first.path / "plan.json")}


def test_the_file_of_a_run_that_took_every_step_is_taken_again(job, tmp_path):
    run = job(tmp_path / "run", {"policy": "last", "rank": 4}, TRAINING | {"early_stop": False})
    settings = JobSettings.of(**read_config(run.path / "config.yaml")).training
    assert (settings.early_stop, settings.patience) == (False, None)


class Broken(TrainerCallback):
    """A machine that fails in the middle of a step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise MemoryError


class BreakingTrainer(train_module.RowTrainer):
    """On such a machine."""

    def __init__(self, *given):
        super().__init__(*given)
        self.add_callback(Broken())


def test_an_interrupted_job_goes_on_only_with_its_own_settings(job, tmp_path, monkeypatch):
    training = TRAINING | {"save_steps": 2}
    plan = {"policy": "last", "rank": 4}
    whole = job(tmp_path / "whole", plan, training)

    with monkeypatch.context() as patched:
        patched.setattr(train_module, "RowTrainer", BreakingTrainer)
        with pytest.raises(MemoryError):
            job(tmp_path / "run", plan, training)
    assert not (tmp_path / "run" / "metrics.json").exists()
    for other, told in (
        ((plan, training | {"learning_rate": 0.02}), r"`learning_rate` 0\.01, but this one has 0\.02"),
        ((plan, training | {"adam_beta2": 0.9}), r"`adam_beta2` 0\.99, but this one has 0\.9"),
        ((plan | {"rank": 8}, training), "`rank` 4, but this one has 8"),
    ):
        with pytest.raises(TrainingError, match=rf"holds an interrupted run with {told}; .*`resume` never"):
            job(tmp_path / "run", *other)
    run = job(tmp_path / "run", plan, training | {"cache": "off"})  # changes no result
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)
    assert run.metrics.steps == 8


class Day(date):
    """A day on which a job is started."""

    @classmethod
    def today(cls):
        return cls(2026, 1, 1)


class NextDay(date):
    """The day after."""

    @classmethod
    def today(cls):
        return cls(2026, 1, 2)


def test_an_interrupted_job_goes_on_with_the_date_that_its_template_wrote(
    model_folder, data_file, tmp_path, monkeypatch
):
    template = tmp_path / "dated.jinja"
    template.write_text('{{ strftime_now("%Y-%m-%d") }}' + CHATML)
    data = {"data": str(data_file), "max_length": 128, "chat_template": template}
    made = partial(
        aletheia.fine_tune, str(model_folder), data, tmp_path / "run", {"policy": "last", "rank": 4},
        TRAINING | {"save_steps": 2}, say=lambda line: None,
    )  # fmt: skip

    with monkeypatch.context() as patched:
        patched.setattr(train_module, "RowTrainer", BreakingTrainer)
        patched.setattr(fine_tune_module, "date", Day)
        with pytest.raises(MemoryError):
            made()
    monkeypatch.setattr(fine_tune_module, "date", NextDay)
    assert read_config(made().path / "config.yaml")["data"]["template_date"] == "2026-01-01"


def test_settings_that_contradict_each_other_are_refused_before_anything_is_read(tmp_path):
    job = partial(aletheia.fine_tune, "nowhere", "nothing.jsonl", tmp_path / "run")
    for more, told in (
        ({"training": {"correct_quantization": True}}, "found `quantize` None, expected nf4"),
        ({"training": {"steps": 2, "epochs": 1}}, "`steps` and `epochs` are both given"),
        ({"training": {"adam_beta3": 1}}, "unknown setting `adam_beta3`"),
        ({"training": {"use_cache": True}}, "`use_cache` cannot be set; expected it to be left out"),
        ({"plan": {"file": "plan.json", "rank": 4}}, "`plan` and `rank` are both given"),
        ({"training": {"free_prefix": True}, "plan": {"target": "speed"}}, "`target` is speed; expected none with"),
        ({"training": {"free_prefix": True}, "plan": {"freeze_after": 0.5}}, "`freeze_after` is 0.5; expected 0 with"),
    ):
        with pytest.raises(SettingsError, match=told):
            job(**more)
    streamed = {"model": "nowhere", "stream": True}
    for more, told in (
        ({"plan": {"freeze_after": 0.5}}, "`freeze_after` is 0.5; expected 0 for a streamed model"),
        ({"plan": {"target": "quality"}}, "`target` is quality; expected none for a streamed model"),
        ({"training": {"cache": "memory"}}, "`cache` is memory; expected auto or disk for a streamed model"),
    ):
        with pytest.raises(SettingsError, match=told):
            aletheia.fine_tune(streamed, "nothing.jsonl", tmp_path / "run", **more)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("refuses", [False, True])
def test_a_finished_run_is_pushed(job, tmp_path, monkeypatch, refuses):
    pushed = []

    class Hub:
        def create_repo(self, name, **options):
            if refuses:
                raise OSError("401 Client Error")
            pushed.append((name, options))
            return type("Repository", (str,), {"repo_id": f"me/{name}"})()

        def create_commit(self, name, operations, **options):
            pushed.append((name, {operation.path_in_repo for operation in operations}))

    monkeypatch.setattr(push_module, "HfApi", Hub)
    training = {"steps": 2, "push_to_hub": True, "hub_model_id": "thing"}
    if refuses:
        with pytest.raises(TrainingError, match=r"run is complete, but uploading .* to thing failed: 401 Client Error"):
            job(tmp_path / "run", None, training)
    else:
        job(tmp_path / "run", None, training)
        assert pushed[0] == ("thing", {"exist_ok": True, "private": True})
        assert pushed[1][0] == "me/thing"
        assert pushed[1][1] >= {"adapter_model.safetensors", "metrics.json", "README.md", "tokenizer.json"}
    assert (tmp_path / "run" / "metrics.json").exists()
    with pytest.raises(SettingsError, match="`hub_token` cannot be set; expected it to be left out"):
        aletheia.TrainSettings(hub_token="secret")
