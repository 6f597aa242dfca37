"""An adapter folder that another program wrote: read, shown, reported."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_model, make_tokenizer

import aletheia
from aletheia.errors import AdapterError, ArtifactError
from aletheia.runs.adapter_folder import AdapterFolder
from aletheia.runs.read_adapter import read_adapter, read_run


def save_adapter(folder, family="llama", **settings):
    """What ``PeftModel.save_pretrained`` leaves, with its model."""
    model = make_model(family, initializer_range=0.3)
    model.name_or_path = "someone/tiny"
    told = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | settings
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **told))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted


def trainable(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def write_state(folder, steps, evaluate=True):
    """The ``trainer_state.json`` of transformers' Trainer."""
    history = [{"epoch": 0.1, "step": step, "loss": 3.0 - step / 100, "learning_rate": 1e-4} for step in steps]
    history += [{"epoch": 0.1, "step": step, "eval_loss": 2.5 - step / 100} for step in steps] if evaluate else []
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": max(steps), "log_history": history}))


def huge_rank(folder):
    """Weights whose header tells of a rank that nobody has."""
    key = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    head = json.dumps({key: {"dtype": "F32", "shape": [100_000, 1], "data_offsets": [0, 4]}}).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + bytes(4))


def test_uniform_lora_is_read_from_its_config_and_the_header_of_its_weights(tmp_path):
    model = save_adapter(tmp_path / "a")
    found = read_adapter(tmp_path / "a")
    assert (found.base, found.rank, found.alpha, found.layers) == ("someone/tiny", 4, 8, (0, 1, 2, 3))
    assert found.parameters == trainable(model) == sum(adapter.parameters for adapter in found.adapters)
    roles = {adapter.name.rpartition(".")[2]: adapter.role for adapter in found.adapters}
    assert roles == {"q_proj": "attention", "down_proj": "mlp"}
    assert found.train_curve == found.held_out_curve == found.outside == found.beside == ()


def test_some_layers_and_ranks_of_their_own(tmp_path):
    patterns = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {r"^model.layers.3.self_attn.q_proj": 16}}
    model = save_adapter(tmp_path / "a", layers_to_transform=[1, 3], use_rslora=True, **patterns)
    found = read_adapter(tmp_path / "a")
    assert found.layers == (1, 3)
    assert found.rslora
    pairs = {
        (adapter.layer, adapter.name.rpartition(".")[2]): (adapter.rank, adapter.alpha) for adapter in found.adapters
    }
    assert pairs == {(1, "q_proj"): (4, 8), (3, "q_proj"): (4, 16), (1, "down_proj"): (2, 8), (3, "down_proj"): (2, 8)}
    assert found.parameters == trainable(model)


def test_stacks_of_experts_and_modules_outside_the_layers(tmp_path):
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    save_adapter(tmp_path / "moe", "mixtral", target_modules=["q_proj"], target_parameters=stacks, lora_dropout=0.0)
    found = read_adapter(tmp_path / "moe")
    assert {(one.rank, one.fused) for one in found.adapters} == {(4, False), (4, True)}
    assert sum(one.fused for one in found.adapters) == 2 * len(found.layers)
    save_adapter(tmp_path / "head", target_modules=["q_proj", "lm_head"])
    assert read_adapter(tmp_path / "head").outside == ("lm_head",)


def test_dora_is_shown_as_something_beside_lora(tmp_path):
    model = save_adapter(tmp_path / "a", use_dora=True)
    found = read_adapter(tmp_path / "a")
    assert found.beside == ("use_dora",)
    assert found.parameters == trainable(model)


@pytest.mark.parametrize("place", [".", "checkpoint-20", "checkpoints/checkpoint-20"])
def test_the_losses_come_from_the_trainers_state_that_went_furthest(tmp_path, place):
    save_adapter(tmp_path / "a")
    write_state(tmp_path / "a" / "checkpoint-10", [5, 10])
    write_state(tmp_path / "a" / place, [5, 10, 20])
    found = read_adapter(tmp_path / "a")
    assert found.train_curve == ((5, 2.95), (10, 2.9), (20, 2.8))
    assert found.held_out_curve == ((5, 2.45), (10, 2.4), (20, 2.3))


def test_show_names_layers_ranks_modules_parameters_and_base(tmp_path, run):
    save_adapter(tmp_path / "a", layers_to_transform=[1, 3], rank_pattern={"down_proj": 2})
    code, out, err = run("show", tmp_path / "a")
    assert code == 0, err
    for words in (
        "someone/tiny",
        "1, 3 (2)",
        "q_proj (2), down_proj (2)",
        "attention 4, mlp 2",
        "8, scaled as alpha / rank",
    ):
        assert words in " ".join(out.split())
    code, out, _ = run("show", tmp_path / "a", "--json")
    assert AdapterFolder.model_validate_json(out) == read_adapter(tmp_path / "a")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"layers_to_transform": [1, 3]},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "lora_only"},
    ],
    ids=str,
)
def test_it_answers_as_in_peft(tmp_path, settings):
    base = make_model(initializer_range=0.3)
    base.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    adapted = save_adapter(tmp_path / "a", **settings).eval()
    told = {"model": str(tmp_path / "a"), "base": str(tmp_path / "base"), "dtype": "float32"}
    (answer,) = aletheia.generate(
        told, "say red", settings={"max_new_tokens": 8}, against="base", say=lambda line: None
    )
    tokenizer = make_tokenizer()
    asked = [{"role": "user", "content": "say red"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = []
    for model in (adapted, base):
        out = model.generate(**ids, max_new_tokens=8, do_sample=False, eos_token_id=257, pad_token_id=0)
        made.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    assert [answer.answer, answer.base] == made
    assert made[0] != made[1]


def test_the_report_has_the_ranks_and_a_curve_where_there_is_one(tmp_path, run):
    save_adapter(tmp_path / "a", layers_to_transform=[1, 3])
    assert run("report", tmp_path / "a", "--out", tmp_path / "r.html")[0] == 0
    page = (tmp_path / "r.html").read_text()
    assert "Ranks by layer" in page
    assert "neither trainer_state.json" in page
    assert "Loss by optimizer step" not in page
    write_state(tmp_path / "a", [5, 10], evaluate=False)
    assert run("report", tmp_path / "a", "--out", tmp_path / "r.html")[0] == 0
    page = (tmp_path / "r.html").read_text()
    assert "Loss by optimizer step" in page
    assert "2.950 (step 5) to 2.900 (step 10)" in page


def test_a_run_of_ours_stands_beside_it(tmp_path, model_folder, data_file):
    training = {"steps": 3, "batch_size": 2, "evaluations": 1}
    data = {"data": str(data_file), "max_length": 64}
    ours = aletheia.fine_tune(
        str(model_folder), data, tmp_path / "ours", {"policy": "last"}, training, say=lambda line: None
    )
    save_adapter(tmp_path / "theirs")
    both = [read_run(tmp_path / "ours"), read_run(tmp_path / "theirs")]
    assert isinstance(both[0], aletheia.Run)
    page = aletheia.report(both, tmp_path / "r.html").read_text()
    assert str(model_folder) in page
    assert "someone/tiny" in page
    assert f"to {ours.metrics.held_out_curve[-1].loss:.3f} (step 3)" in page


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda at: (at / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
        (lambda at: (at / "adapter_model.safetensors").write_bytes(b"\0" * 40), "not a safetensors file"),
        (
            lambda at: (at / "adapter_model.safetensors").rename(at / "adapter_model.bin"),
            "a pickle, which can run code when it is loaded",
        ),
        (lambda at: huge_rank(at), "has rank 100,000; expected at most 65,536"),
        (lambda at: (at / "adapter_config.json").write_text('{"peft_type": "IA3"}'), "expected LORA"),
        (lambda at: (at / "trainer_state.json").write_text("{"), "is not JSON of a Trainer's state"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(tmp_path, run, damage, words):
    save_adapter(tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(AdapterError, match=words):
        read_adapter(tmp_path / "a")
    code, _, err = run("show", tmp_path / "a")
    assert (code, err.count("\n")) == (2, 1)


def test_a_folder_with_neither_is_no_run(tmp_path):
    with pytest.raises(ArtifactError, match="no finished run"):
        read_run(tmp_path)
