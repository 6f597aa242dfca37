"""A run folder holds what the adapter needs, and is of use from anywhere."""

import json
import shutil

import pytest
from peft import AutoPeftModelForCausalLM
from tiny import CHATML, make_model, make_tokenizer
from transformers import AutoTokenizer

import aletheia
from aletheia.data.tokenizer import identify_tokenizer
from aletheia.errors import ModelError, SettingsError
from aletheia.files import whole_path
from aletheia.runs.saved import use_template_of

TRAINING = {"steps": 2, "batch_size": 2, "evaluations": 1, "cache": "off"}
PLAN = {"policy": "last", "rank": 2}


def fine_tune(model, data_file, out, plan=PLAN, say=lambda line: None, **more):
    data = {"data": str(data_file), "max_length": 64}
    told = model if isinstance(model, dict) else {"model": str(model)}
    return aletheia.fine_tune(told | {"dtype": "float32"}, data, out, plan, TRAINING, say=say, **more)


def base_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]


@pytest.fixture
def home(tmp_path, model_folder, monkeypatch):
    """The working folder, with the model in it."""
    shutil.copytree(model_folder, tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_base_that_was_given_by_a_relative_path_is_found_from_anywhere(
    home, data_file, monkeypatch, tmp_path_factory
):
    run = fine_tune("tiny", data_file, "run")
    assert base_of(home / "run") == run.metrics.model.name == run.plan.model.name == str(home / "tiny")
    shutil.move(home / "run", home / "moved")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert AutoPeftModelForCausalLM.from_pretrained(home / "moved").peft_config["default"].r == 2
    on = fine_tune(home / "moved", data_file, "on", None)
    assert on.metrics.went_on_from.name == str(home / "moved")
    assert base_of(on.path) == str(home / "tiny")


def test_the_tokenizer_of_the_folder_is_the_one_that_the_run_learned_with(home, data_file):
    run = fine_tune("tiny", data_file, "run")
    theirs = AutoTokenizer.from_pretrained(run.path)
    assert identify_tokenizer(theirs).difference(run.metrics.tokenizer) is None
    assert theirs.chat_template == CHATML
    names = json.loads((run.path / "manifest.json").read_text())["files"]
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names.keys()


def test_a_run_that_replaces_another_leaves_no_file_of_its_tokenizer(home, data_file):
    fine_tune("tiny", data_file, "run")
    (home / "run" / "mine.txt").write_text("kept")
    plain = make_tokenizer()
    plain.chat_template = None
    make_model().save_pretrained(home / "plain")
    plain.save_pretrained(home / "plain")
    run = fine_tune("plain", data_file, "run", overwrite=True)
    assert not (run.path / "chat_template.jinja").exists()
    assert (run.path / "tokenizer.json").exists()
    assert (run.path / "mine.txt").exists()
    assert aletheia.Run.read("run").metrics == run.metrics


@pytest.mark.parametrize("template", [CHATML.replace("\n", "\r\n"), {"default": CHATML, "tool_use": CHATML + " "}])
def test_a_template_is_the_same_when_it_is_read_again(home, data_file, template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(home / "tiny")
    run = fine_tune("tiny", data_file, "run")
    base = aletheia.load("tiny", "float32")
    use_template_of(run.path, base.tokenizer)
    aletheia.load_adapter(base.model, run.path, tokenizer=identify_tokenizer(base.tokenizer))
    assert (
        fine_tune(run.path, data_file, "on", None).metrics.tokenizer.chat_template
        == run.metrics.tokenizer.chat_template
    )


def test_a_base_that_is_gone_is_named_with_the_way_out(home, data_file):
    run = fine_tune("tiny", data_file, "run")
    shutil.move(home / "tiny", home / "other")
    with pytest.raises(ModelError, match=rf"'{home / 'tiny'}'; found no such model.*set `base` to its present place"):
        fine_tune(run.path, data_file, "on", None)
    on = fine_tune({"model": str(run.path), "base": "other"}, data_file, "on", None)
    assert base_of(on.path) == on.metrics.model.name == str(home / "other")
    with pytest.raises(SettingsError, match="`base` is given and other is not an adapter folder"):
        fine_tune({"model": "other", "base": "other"}, data_file, "x")


def test_a_hub_id_stays_one(examples, tmp_path):
    model = make_model()
    model.config._name_or_path = model.name_or_path = "someone/tiny"
    plan = aletheia.plan(aletheia.probe(model, examples, 1), policy="last", rank=2)
    rows, held_out = aletheia.split_held_out(examples)
    aletheia.train(aletheia.adapt(model, plan), rows, plan, tmp_path / "run", held_out, **TRAINING)
    assert base_of(tmp_path / "run") == "someone/tiny"
    assert whole_path("someone/tiny") == "someone/tiny"


def test_a_tokenizer_that_cannot_be_saved_does_not_spoil_the_run(home, data_file, monkeypatch):
    def refuse(self, *arguments, **more):
        raise NotImplementedError("no vocabulary file")

    said = []
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", refuse)
    run = fine_tune("tiny", data_file, "run", say=said.append)
    assert [line for line in said if "the tokenizer cannot be saved (NotImplementedError: no vocabulary file)" in line]
    assert aletheia.Run.read(run.path).metrics == run.metrics
