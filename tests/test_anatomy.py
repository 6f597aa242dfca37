"""Taking models apart: layers, modules, roles, fingerprints, and what cannot be read."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, make_config, make_model
from torch import nn

from aletheia.anatomy.fingerprint import identify
from aletheia.anatomy.load import inspect, load, pick_dtype
from aletheia.anatomy.read import adaptable_modules, read_anatomy
from aletheia.errors import ModelError

LAYER_PATHS = {
    "llama": "model.layers",
    "qwen2": "model.layers",
    "phi3": "model.layers",
    "gpt_neox": "gpt_neox.layers",
    "gpt2": "transformer.h",
}
MODULES = {
    "llama": {"attention": 4, "mlp": 3},
    "qwen2": {"attention": 4, "mlp": 3},
    "phi3": {"attention": 2, "mlp": 2},
    "gpt_neox": {"attention": 2, "mlp": 2},
    "gpt2": {"attention": 2, "mlp": 2},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_roles_and_shapes_are_found_by_structure(family):
    model = make_model(family)
    anatomy = read_anatomy(model)
    assert anatomy.layer_path == LAYER_PATHS[family]
    assert anatomy.layer_count == 4
    for layer in range(4):
        roles = [module.role for module in anatomy.in_layer(layer)]
        assert {role: roles.count(role) for role in set(roles)} == MODULES[family]
    weights = adaptable_modules(model)
    assert [module.name for module in anatomy.modules] == list(weights)
    for module in anatomy.modules:
        assert module.parameters == weights[module.name].weight.numel()
        x = torch.randn(1, module.in_features)
        assert weights[module.name](x).shape == (1, module.out_features)
    assert anatomy.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_inspect_needs_the_config_alone(tmp_path):
    make_config("qwen2").save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    assert inspect(str(tmp_path)) == read_anatomy(make_model("qwen2"))


def test_the_fingerprint_survives_dtypes_and_tells_models_apart(tmp_path):
    model = make_model("llama")
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    prints = {identify(load_without_tokenizer(tmp_path, dtype)).fingerprint for dtype in ("float32", "bfloat16")}
    assert len(prints) == 1
    assert identify(make_model("llama", seed=1)).fingerprint not in prints
    assert identify(make_model("llama", layers=5)).fingerprint not in prints
    with torch.no_grad():
        model.model.layers[2].input_layernorm.weight[3] += 0.5
    assert identify(model).fingerprint not in prints


def test_a_merged_adapter_makes_another_model():
    base, merged = identify(make_model("llama")), make_model("llama")
    with torch.no_grad():
        weight = merged.model.layers[3].mlp.up_proj.weight
        weight += 0.05 * torch.randn(48, 1) @ torch.randn(1, 32)
    assert identify(merged).fingerprint == base.fingerprint
    assert not base.is_same_model(identify(merged))
    assert base.is_same_model(identify(merged).model_copy(update={"weights": None}))  # its quantized form


def load_without_tokenizer(folder, dtype):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))


def test_load_gives_model_and_tokenizer_under_the_name_asked_for(model_folder):
    base = load(str(model_folder), "bfloat16")
    assert base.model.dtype == torch.bfloat16
    assert identify(base.model).name == str(model_folder)
    assert base.tokenizer.chat_template


def test_auto_dtype_computes_on_this_machine():
    dtype = pick_dtype(torch.device("cpu"))
    assert dtype in (torch.float32, torch.bfloat16)
    assert torch.isfinite(torch.ones(4, 4, dtype=dtype) @ torch.ones(4, 4, dtype=dtype)).all()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("{tmp}/absent", "no folder"),
        ("{tmp}/absent.gguf", "no file"),
        ("{tmp}", "no config.json"),
        ("{tmp}/file.txt", "is a file"),
        ("nobody/no-such-model", "cannot load nobody/no-such-model"),
    ],
)
def test_a_wrong_model_is_one_clear_line(tmp_path, name, expected):
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(ModelError, match=expected) as caught:
        load(name.format(tmp=tmp_path))
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_says_so(tmp_path, tokenizer):
    make_config("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot load"):
        load(str(tmp_path))


def test_a_checkpoint_with_gaps_is_not_trained_on_random_numbers(tmp_path, model_folder):
    weights = load_file(model_folder / "model.safetensors")
    shutil.copytree(model_folder, tmp_path / "gaps")
    kept = {name: tensor for name, tensor in weights.items() if "layers.2." not in name}
    save_file(kept, tmp_path / "gaps" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"has 9 missing keys, first model\.layers\.2"):
        load(str(tmp_path / "gaps"))


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("model.safetensors", "", "0.0 MB of weights|cannot load"),
        ("config.json", "{", "config.json is not JSON of settings"),
        (
            "config.json",
            '{"model_type": "llama", "hidden_size": "abc"}',
            "hidden_size is 'abc'; expected a whole number",
        ),
        ("tokenizer.json", "{}", "cannot load"),
    ],
)
def test_a_damaged_folder_is_one_clear_line(tmp_path, model_folder, file, text, expected):
    shutil.copytree(model_folder, tmp_path / "damaged")
    (tmp_path / "damaged" / file).write_text(text)
    with pytest.raises(ModelError, match=expected) as caught:
        load(str(tmp_path / "damaged"))
    assert "\n" not in str(caught.value)


def test_an_unknown_dtype_is_refused(model_folder):
    with pytest.raises(ModelError, match="'int8'; expected auto"):
        load(str(model_folder), "int8")


def test_what_was_not_found_is_named():
    with pytest.raises(ModelError, match="no list of decoder layers"):
        read_anatomy(nn.Sequential(nn.Linear(2, 2)))
    bare = nn.Module()
    bare.blocks = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(ModelError, match="has no config"):
        read_anatomy(bare)
