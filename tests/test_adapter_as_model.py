"""An adapter folder as MODEL: trained on from where it is, or merged first."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import aletheia
from aletheia.adapters.saved_config import as_stored, read_lora_config
from aletheia.errors import AdapterError, AletheiaError, ModelError, PlanError, SettingsError
from aletheia.files import file_sha256
from aletheia.planning.plan import Plan
from aletheia.training.train import Prepared

TRAINING = {"steps": 3, "batch_size": 2, "evaluations": 1, "learning_rate": 0.01, "cache": "off"}


def make_adapter(model_folder, folder, **settings):
    """A PEFT adapter that changes what the model says."""
    base = aletheia.load(str(model_folder), "float32").model
    told = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | settings
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **told))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture
def foreign(model_folder, tmp_path):
    return make_adapter(model_folder, tmp_path / "adapter", rank_pattern={"down_proj": 2}, alpha_pattern={"q_proj": 3})


def fine_tune(folder, data_file, out, plan=None, model=None, **training):
    data = {"data": str(data_file), "max_length": 64}
    told = {"model": str(folder), "dtype": "float32"} | (model or {})
    return aletheia.fine_tune(told, data, out, plan, TRAINING | training, say=lambda line: None)


def test_training_goes_on_from_a_peft_adapter_as_peft_would(foreign, model_folder, data_file, tmp_path):
    run = fine_tune(foreign, data_file, tmp_path / "on")
    assert run.metrics.went_on_from.sha256 == file_sha256(foreign / "adapter_model.safetensors")
    assert run.metrics.went_on_from.name == str(foreign)
    ranks = {adapter.name.rpartition(".")[2]: (adapter.rank, adapter.alpha) for adapter in run.plan.adapters}
    assert ranks == {"q_proj": (4, 3.0), "down_proj": (2, 8.0)}
    assert run.plan.layers == (0, 1, 2, 3)

    base = aletheia.load(str(model_folder), "float32")
    model = PeftModel.from_pretrained(base.model, foreign, is_trainable=True)
    rows = aletheia.load_data(str(data_file), base.tokenizer, max_length=64)
    rows, held_out = aletheia.split_held_out(rows)
    again = aletheia.train(
        model, rows, run.plan, tmp_path / "peft", held_out, prepared=Prepared(went_on_from=run.metrics.went_on_from),
        **TRAINING,
    )  # fmt: skip
    ours, theirs = (load_file(one.path / "adapter_model.safetensors") for one in (run, again))
    before = load_file(foreign / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys() == before.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(not torch.equal(ours[name], before[name]) for name in ours)
    assert run.metrics.held_out_loss_before == again.metrics.held_out_loss_before


def test_the_first_loss_is_that_of_the_adapter(foreign, model_folder, data_file, tmp_path):
    run = fine_tune(foreign, data_file, tmp_path / "on", steps=1)
    base = aletheia.load(str(model_folder), "float32")
    rows = aletheia.load_data(str(data_file), base.tokenizer, max_length=64)
    _, held_out = aletheia.split_held_out(rows)
    model = PeftModel.from_pretrained(base.model, foreign).eval()
    assert run.metrics.held_out_loss_before == pytest.approx(aletheia.held_out_loss(model, held_out, 2), rel=1e-5)


def test_a_run_goes_on_with_its_own_plan_and_can_be_gone_on_with_again(model_folder, data_file, tmp_path):
    first = fine_tune(model_folder, data_file, tmp_path / "first", {"policy": "last", "rank": 2})
    second = fine_tune(tmp_path / "first", data_file, tmp_path / "second")
    assert second.plan == first.plan
    assert second.metrics.held_out_loss_before == pytest.approx(first.metrics.held_out_loss_after, rel=1e-5)
    third = fine_tune(tmp_path / "second", data_file, tmp_path / "third")
    assert third.metrics.went_on_from.name == str(tmp_path / "second")
    assert json.loads((tmp_path / "third" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        model_folder
    )
    loaded = aletheia.load_adapter(aletheia.load(str(model_folder), "float32").model, tmp_path / "third")
    assert isinstance(loaded, PeftModel)


def test_fresh_merges_the_adapter_and_adapts_what_that_gives(foreign, model_folder, data_file, tmp_path, run):
    merged = fine_tune(foreign, data_file, tmp_path / "run", {"policy": "last", "rank": 2}, {"fresh": True})
    on = fine_tune(foreign, data_file, tmp_path / "on", steps=1)
    assert merged.metrics.held_out_loss_before == pytest.approx(on.metrics.held_out_loss_before, rel=1e-4)
    assert merged.metrics.went_on_from is None
    assert {adapter.rank for adapter in merged.plan.adapters} == {2}
    code, _, err = run(
        "probe", foreign, "--data", data_file, "--out", "s.json", "--fresh", "--no-calibrate", "--batches", 1
    )
    assert code == 0, err
    assert (tmp_path / "s.json").exists()


def test_the_card_of_a_merged_start_has_code_that_loads_it(foreign, model_folder, data_file, tmp_path):
    said = []
    data = {"data": str(data_file), "max_length": 64}
    model = {"model": str(foreign), "dtype": "float32", "fresh": True}
    run = aletheia.fine_tune(model, data, tmp_path / "run", {"policy": "last", "rank": 2}, TRAINING, say=said.append)
    notes = [line for line in said if f"needs {model_folder} with {foreign} merged into it" in line]
    assert len(notes) == 1
    code = (run.path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    exec(code.replace("this folder", str(run.path)), names)
    base = aletheia.load(str(model_folder), "float32")
    _, held_out = aletheia.split_held_out(aletheia.load_data(str(data_file), base.tokenizer, max_length=64))
    loss = aletheia.held_out_loss(names["model"].float().eval(), held_out, 2)
    assert loss == pytest.approx(run.metrics.held_out_loss_after, rel=1e-4)

    merged = PeftModel.from_pretrained(base.model, foreign).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    base.tokenizer.save_pretrained(tmp_path / "merged")
    ours = aletheia.load_adapter(aletheia.load(str(tmp_path / "merged"), "float32").model, run.path)
    assert aletheia.held_out_loss(ours, held_out, 2) == pytest.approx(loss, rel=1e-4)
    with pytest.raises(PlanError):  # the base without the first adapter
        aletheia.load_adapter(aletheia.load(str(model_folder), "float32").model, run.path)
    with pytest.raises(ModelError, match="another adapter folder; expected a base model; merge that adapter"):
        fine_tune(run.path, data_file, tmp_path / "on")


@pytest.mark.parametrize("command", ["probe", "inspect", "eval"])
def test_other_commands_say_that_it_is_an_adapter_and_of_which_base(foreign, model_folder, data_file, run, command):
    more = {
        "probe": ("--data", data_file, "--out", "s.json"),
        "eval": ("--out", "e", "--tasks", "heldout", "--eval-data", data_file),
    }
    code, _, err = run(command, foreign, *more.get(command, ()))
    assert code == 2
    line = err.splitlines()[-1]
    assert f"is an adapter of the base model {model_folder}" in line
    assert ("--adapter" if command == "eval" else "--fresh") in line


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head, which is not a matrix of a decoder layer"),
    ],
)
def test_what_is_not_trained_here_is_refused_by_name(model_folder, data_file, tmp_path, settings, words):
    folder = make_adapter(model_folder, tmp_path / "adapter", **settings)
    with pytest.raises(AdapterError, match=words) as caught:
        fine_tune(folder, data_file, tmp_path / "run")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "plan", "training", "words"),
    [
        ({}, {"percent": 25}, {}, "`percent` is given and MODEL is an adapter folder"),
        ({}, "plan.json", {}, "`plan` is given and MODEL is an adapter folder"),
        ({"quantize": "nf4"}, None, {"correct_quantization": True}, "`correct_quantization` is given and MODEL is"),
        ({"stream": True}, None, {"cache": "auto"}, "`stream` is given and MODEL is an adapter folder"),
    ],
)
def test_what_contradicts_going_on_is_refused(foreign, data_file, tmp_path, model, plan, training, words):
    with pytest.raises((SettingsError, AletheiaError)) as caught:
        fine_tune(foreign, data_file, tmp_path / "run", plan, model, **training)
    assert words in str(caught.value)
    with pytest.raises(SettingsError, match="`fresh` is given and"):
        fine_tune(foreign.parent, data_file, tmp_path / "run", None, {"fresh": True})


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r"model\.layers\.\d+\.self_attn\.(q|k)_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 3], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["o_proj"]},
        {
            "rank_pattern": {r"model\.layers\.1\.self_attn\.q_proj": 7},
            "alpha_pattern": {"^model.layers.2.self_attn.q_proj": 5},
        },
        {"target_modules": "all-linear", "use_rslora": True},
    ],
)
def test_names_read_from_the_weights_are_what_peft_makes_of_its_patterns(model_folder, tmp_path, settings):
    folder = make_adapter(model_folder, tmp_path / "adapter", **settings)
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        ours = aletheia.load_adapter(aletheia.load(str(model_folder), "float32").model, folder)(tokens).logits
        theirs = (
            PeftModel.from_pretrained(aletheia.load(str(model_folder), "float32").model, folder).eval()(tokens).logits
        )
    assert torch.equal(ours, theirs)
    config = as_stored(read_lora_config(folder), folder, aletheia.load(str(model_folder), "float32").model)
    assert all("." in name for name in config.target_modules)
    assert config.exclude_modules is None


def test_an_adapter_that_changed_is_not_gone_on_with(foreign, data_file, tmp_path):
    run = fine_tune(foreign, data_file, tmp_path / "on")
    assert Plan.read(run.path / "plan.json") == run.plan
    values = json.loads((foreign / "adapter_config.json").read_text())
    (foreign / "adapter_config.json").write_text(json.dumps(values | {"r": 3}))
    with pytest.raises(AdapterError, match="its config says 3"):
        fine_tune(foreign, data_file, tmp_path / "again")


def test_going_on_with_a_quantized_base(foreign, data_file, tmp_path):
    run = fine_tune(foreign, data_file, tmp_path / "on", None, {"quantize": "nf4"}, steps=1)
    assert run.metrics.settings.quantization == "nf4"
    assert run.metrics.went_on_from is not None
    with pytest.raises(AdapterError, match="is quantized"):
        fine_tune(foreign, data_file, tmp_path / "merged", None, {"quantize": "nf4", "fresh": True})


def test_a_base_that_would_be_streamed_is_refused(foreign, data_file, tmp_path):
    for more in ({}, {"fresh": True}):
        with pytest.raises(ModelError, match="takes over half the memory"):
            fine_tune(foreign, data_file, tmp_path / "on", None, {"max_memory": 1000} | more)


def test_the_command_line_goes_on_with_an_adapter(foreign, data_file, tmp_path, run):
    asked = (
        "train",
        foreign,
        "--data",
        data_file,
        "--max-length",
        64,
        "--dtype",
        "float32",
        "--steps",
        1,
        "--out",
        "run",
    )
    code, _, err = run(*asked, "--freeze-after", 0, "--seed", 3, "--cache", "off", "--eval-rows", 1)
    assert code == 0, err
    assert f"adapt  trains {foreign} further on " in err
    assert "trained further from" in (tmp_path / "run" / "README.md").read_text()
    first = json.loads((tmp_path / "run" / "metrics.json").read_text())
    code, _, err = run(*asked[:-2], "--config", "run/config.yaml", "--out", "again", "--cache", "off")
    assert code == 0, err
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["held_out_loss_after"] == first["held_out_loss_after"]
    code, _, err = run(*asked[:-1], "other", "--freeze-after", 0.5)
    assert code == 2
    assert "--freeze-after is given and MODEL is an adapter folder" in err


def test_weights_beside_the_adapter_are_not_lost_in_silence(foreign, model_folder, data_file, tmp_path):
    folder = tmp_path / "beside"
    shutil.copytree(foreign, folder)
    weights = load_file(folder / "adapter_model.safetensors")
    embedding = load_file(model_folder / "model.safetensors")["model.embed_tokens.weight"]
    weights["base_model.model.model.embed_tokens.weight"] = embedding + 1
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match=r"embed_tokens\.weight as well as its adapter, which would be lost"):
        aletheia.fine_tune(str(folder), str(data_file), tmp_path / "run", training={"steps": 1})
