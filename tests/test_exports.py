"""A run in the forms of other programs: each gives the logits of the run, by that program's own rule."""

import ast
import inspect
import json
import os
import runpy
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

import aletheia
from aletheia.adapters.adapt import adapted_modules
from aletheia.anatomy.demo import demo_checkpoint
from aletheia.errors import AdapterError, ArtifactError, ModelError, SettingsError
from aletheia.runs.exports.export import FROM_A_PLAN, RECORD_FILE
from aletheia.runs.exports.vllm import RANKS

EXACT = {"atol": 1e-5, "rtol": 1e-5}
IDS = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))
BY_ROLE = {"ranks": "by-role", "attention_rank": 3, "mlp_rank": 10, "policy": "last", "percent": 50}
BY_SCORE = {"ranks": "by-score", "rank": 5, "policy": "top-percent", "percent": 75}
RSLORA = {"ranks": "by-role", "attention_rank": 2, "mlp_rank": 9, "rslora": True, "policy": "uniform"}


def logits_of(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def with_weights(model):
    """The adapted model with a B that changes what it says."""
    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=drawn) * 0.2)
    return model


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A base folder, an adapter folder made by a plan, and the logits of both together; made once each."""
    made = {}

    def make(family, **settings):
        key = json.dumps([family, settings])
        if key not in made:
            root = tmp_path_factory.mktemp(family)
            make_model(family).save_pretrained(root / "base")
            make_tokenizer().save_pretrained(root / "base")
            model = aletheia.load(str(root / "base"), "float32", "cpu").model
            batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS.clone()}
            plan = aletheia.plan(aletheia.probe(model, [batch]), **settings)
            plan.write(root / "plan.json")
            model = with_weights(aletheia.adapt(model, plan))
            model.save_pretrained(root / "adapter")
            made[key] = root, logits_of(model)
        return made[key]

    return make


def base_of(root):
    return AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)


def add(model, name, delta_OI):
    """Add a change, out x in, to a weight; GPT-2's are stored in x out."""
    module = model.get_submodule(name)
    with torch.no_grad():
        module.weight += delta_OI.T if type(module).__name__ == "Conv1D" else delta_OI


PLANS = [(family, plan) for family in ("llama", "phi3", "gpt2", "gpt_neox") for plan in (BY_ROLE, BY_SCORE, RSLORA)]


@pytest.mark.parametrize(("family", "settings"), PLANS)
def test_one_alpha_and_one_rank_give_the_same_logits(family, settings, adapted, tmp_path):
    root, expected = adapted(family, **settings)
    done = aletheia.export(root / "adapter", "vllm", tmp_path / "out")
    config = json.loads((done.path / "adapter_config.json").read_text())
    weights = load_file(done.path / "adapter_model.safetensors")
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    assert config["r"] in RANKS
    assert f"--max-lora-rank {config['r']} " in done.command
    model = base_of(root)
    names = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in weights}
    for name in names:  # as vLLM does: one alpha / r for all
        A, B = (weights[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        assert A.shape[0] == B.shape[1] == config["r"]
        add(model, name, config["lora_alpha"] / config["r"] * B @ A)
    torch.testing.assert_close(logits_of(model), expected, **EXACT)
    assert (logits_of(base_of(root)) - expected).abs().max() > 0.05
    torch.testing.assert_close(logits_of(PeftModel.from_pretrained(base_of(root), done.path)), expected, **EXACT)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "qwen3_moe"])
def test_a_merged_folder_is_a_model_of_its_own(family, adapted, tmp_path):
    root, expected = adapted(family, **BY_ROLE)
    done = aletheia.export(root / "adapter", "merged", tmp_path / "out")
    shutil.copytree(done.path, tmp_path / "moved")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moved")
    torch.testing.assert_close(logits_of(model), expected, **EXACT)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moved")
    assert tokenizer.chat_template == make_tokenizer().chat_template
    assert (done.path / "generation_config.json").is_file()
    assert str(root) not in (done.path / "config.json").read_text()


def test_a_merged_folder_has_the_dtype_that_is_asked_for(adapted, tmp_path):
    root, _ = adapted("llama", **BY_ROLE)
    done = aletheia.export(root / "adapter", "merged", tmp_path / "out", dtype="bfloat16")
    assert {value.dtype for value in load_file(done.path / "model.safetensors").values()} == {torch.bfloat16}
    with pytest.raises(ModelError, match="unknown dtype"):
        aletheia.export(root / "adapter", "merged", tmp_path / "other", dtype="int4")


def test_merging_says_what_memory_it_takes_where_that_is_not_there(adapted, tmp_path, monkeypatch):
    root, _ = adapted("llama", **BY_ROLE)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    with pytest.raises(ModelError, match=r"takes .* GB of memory"):
        aletheia.export(root / "adapter", "merged", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("family", "settings"), PLANS[:9])
def test_mlx_puts_the_same_product_on_the_last_layers(family, settings, adapted, tmp_path):
    root, expected = adapted(family, **settings)
    done = aletheia.export(root / "adapter", "mlx", tmp_path / "out")
    config = json.loads((done.path / "adapter_config.json").read_text())
    weights = load_file(done.path / "adapters.safetensors")
    told = config["lora_parameters"]
    model = base_of(root)
    layers = "transformer.h" if family == "gpt2" else "model.layers"
    count = len(model.get_submodule(layers))
    places = {
        f"{'model.h' if family == 'gpt2' else 'model.layers'}.{layer}.{key}": f"{layers}.{layer}.{key}"
        for layer in range(count - config["num_layers"], count)
        for key in told["keys"]
    }
    assert {key.rpartition(".")[0] for key in weights} <= places.keys()
    for place, name in places.items():  # mlx-lm: y + scale * (x @ lora_a) @ lora_b, lora_b = 0 where none is stored
        if f"{place}.lora_a" in weights:
            lora_a, lora_b = weights[f"{place}.lora_a"], weights[f"{place}.lora_b"]
            assert lora_a.shape[1] == lora_b.shape[0] == told["rank"]
            add(model, name, (told["scale"] * lora_a @ lora_b).T)
    torch.testing.assert_close(logits_of(model), expected, **EXACT)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_mlx_lm_itself_says_the_same(family, adapted, tmp_path):
    mx = pytest.importorskip("mlx.core")
    mlx_lm = pytest.importorskip("mlx_lm.utils")
    tuner = pytest.importorskip("mlx_lm.tuner.utils")
    mx.set_default_device(mx.cpu)
    root, expected = adapted(family, **BY_ROLE)
    done = aletheia.export(root / "adapter", "mlx", tmp_path / "out")
    model = tuner.load_adapters(mlx_lm.load_model(root / "base")[0], str(done.path))
    model.eval()
    said = torch.tensor(model(mx.array(IDS.tolist())).tolist())
    torch.testing.assert_close(said, expected, **EXACT)


def gguf_rows(place, family, config, rows):
    """For each row of a matrix in transformers, where llama.cpp keeps it."""
    heads = config.num_attention_heads
    if family == "llama" and place.endswith(("attn_q.weight", "attn_k.weight")):
        heads = config.num_key_value_heads if "attn_k" in place else heads
        size = rows // heads  # the halves of a head lie next to each other there
        return [h * size + 2 * (i % (size // 2)) + i // (size // 2) for h in range(heads) for i in range(size)]
    if family == "gpt_neox" and "attn_qkv" in place:
        size = rows // heads // 3  # all q, all k, all v there; q, k, v of each head here
        return [(kind * heads + h) * size + i for h in range(heads) for kind in range(3) for i in range(size)]
    return list(range(rows))


@pytest.mark.parametrize(("family", "settings"), PLANS)
def test_llama_cpp_gets_the_same_product_for_its_rows(family, settings, adapted, tmp_path):
    gguf = pytest.importorskip("gguf")
    root, expected = adapted(family, **settings)
    done = aletheia.export(root / "adapter", "gguf", tmp_path / "out")
    reader = gguf.GGUFReader(done.path / "adapter.gguf")
    told = {name: field.contents() for name, field in reader.fields.items()}
    assert (told["general.type"], told["adapter.type"]) == ("adapter", "lora")
    assert told["general.architecture"] == family.replace("_", "")
    found = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    model = base_of(root)
    architecture = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == told["general.architecture"])
    names = gguf.get_tensor_name_map(architecture, 4)
    used = set()
    for name, _ in model.named_modules():
        place = names.get_name(name)
        if f"{place}.weight.lora_a" in found:
            place = f"{place}.weight"
            A, B = found[f"{place}.lora_a"], found[f"{place}.lora_b"]
            used |= {f"{place}.lora_a", f"{place}.lora_b"}
            delta = told["adapter.lora.alpha"] / A.shape[0] * B @ A  # one alpha, by each tensor's rank
            add(model, name, delta[gguf_rows(place, family, model.config, len(delta))])
    assert used == found.keys()
    torch.testing.assert_close(logits_of(model), expected, **EXACT)


def test_ollama_gets_a_modelfile_that_names_base_and_adapter(adapted, tmp_path):
    pytest.importorskip("gguf")
    root, _ = adapted("llama", **BY_ROLE)
    done = aletheia.export(root / "adapter", "ollama", tmp_path / "out")
    lines = (done.path / "Modelfile").read_text().splitlines()
    assert lines[:2] == [f"FROM {root / 'base'}", "ADAPTER ./adapter.gguf"]
    assert (done.path / "adapter.gguf").is_file()


@pytest.mark.parametrize("to", ["vllm", "gguf", "ollama", "mlx"])
def test_experts_are_refused_where_they_cannot_go(to, adapted, tmp_path):
    pytest.importorskip("gguf")
    root, _ = adapted("qwen3_moe", **BY_ROLE)
    with pytest.raises(AdapterError, match=r"experts.*`to` merged"):
        aletheia.export(root / "adapter", to, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_attention_of_a_mixture_goes_to_vllm(adapted, tmp_path):
    root, expected = adapted("qwen3_moe", target_modules=("q_proj", "o_proj"), **BY_SCORE)
    done = aletheia.export(root / "adapter", "vllm", tmp_path / "out")
    torch.testing.assert_close(logits_of(PeftModel.from_pretrained(base_of(root), done.path)), expected, **EXACT)


def foreign(root, folder, **settings):
    """An adapter that PEFT itself made, without files of ours."""
    told = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]} | settings
    model = with_weights(get_peft_model(base_of(root), LoraConfig(task_type="CAUSAL_LM", **told)))
    model.save_pretrained(folder, save_embedding_layers=False)
    return logits_of(model)


def test_an_adapter_trained_elsewhere_goes_the_same_ways(adapted, tmp_path):
    root, _ = adapted("llama", **BY_ROLE)
    expected = foreign(root, tmp_path / "a", layers_to_transform=[1, 3], rank_pattern={"down_proj": 7})
    for to in ("vllm", "merged", "trl"):
        aletheia.export(tmp_path / "a", to)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "a-merged")
    torch.testing.assert_close(logits_of(merged), expected, **EXACT)
    for folder in ("a-vllm", "a-trl/adapter"):
        model = PeftModel.from_pretrained(base_of(root), tmp_path / folder)
        torch.testing.assert_close(logits_of(model), expected, **EXACT)


def test_the_chat_template_of_the_adapter_goes_with_it(adapted, tmp_path):
    pytest.importorskip("gguf")
    root, _ = adapted("llama", **BY_ROLE)
    foreign(root, tmp_path / "a")
    template = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    make_tokenizer(template).save_pretrained(tmp_path / "a")
    vllm, gguf, merged, trl = (aletheia.export(tmp_path / "a", to) for to in ("vllm", "gguf", "merged", "trl"))
    assert f"--chat-template {vllm.path / 'chat_template.jinja'}" in vllm.command
    assert f"--chat-template-file {gguf.path / 'chat_template.jinja'}" in gguf.command
    for folder in (merged.path, trl.path / "adapter"):
        assert AutoTokenizer.from_pretrained(folder).chat_template == template
    assert (
        f"AutoTokenizer.from_pretrained({json.dumps(str(trl.path / 'adapter'))})"
        in (trl.path / "train_trl.py").read_text()
    )


def test_base_overrides_what_the_adapter_names(adapted, tmp_path):
    root, _ = adapted("llama", **BY_ROLE)
    expected = foreign(root, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for named in ("somewhere/else", None):
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": named}))
        with pytest.raises((ModelError, AdapterError)):
            aletheia.export(tmp_path / "a", "merged", tmp_path / "out")
        done = aletheia.export(tmp_path / "a", "merged", tmp_path / f"out-{named is None}", base=str(root / "base"))
        torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(done.path)), expected, **EXACT)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ({"r": 513}, "rank 513"),
    ],
)
def test_what_vllm_cannot_take_is_refused_by_name(settings, named, adapted, tmp_path):
    root, _ = adapted("mistral", **BY_ROLE)
    foreign(root, tmp_path / "a", **settings)
    with pytest.raises(AdapterError, match=rf"{named}.*`to` merged"):
        aletheia.export(tmp_path / "a", "vllm", tmp_path / "out")


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"use_rslora": True, "rank_pattern": {"q_proj": 9}},
    ],
)
def test_what_others_cannot_take_is_merged(settings, adapted, tmp_path):
    root, _ = adapted("mistral", **BY_ROLE)
    expected = foreign(root, tmp_path / "a", **settings)
    done = aletheia.export(tmp_path / "a", "merged")
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(done.path)), expected, **EXACT)


def test_pickled_weights_are_read_only_where_allowed(adapted, tmp_path):
    root, _ = adapted("llama", **BY_ROLE)
    expected = foreign(root, tmp_path / "a")
    torch.save(load_file(tmp_path / "a" / "adapter_model.safetensors"), tmp_path / "a" / "adapter_model.bin")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="allow_pickle"):
        aletheia.export(tmp_path / "a", "vllm", tmp_path / "out")
    done = aletheia.export(tmp_path / "a", "vllm", tmp_path / "out", allow_pickle=True)
    torch.testing.assert_close(logits_of(PeftModel.from_pretrained(base_of(root), done.path)), expected, **EXACT)


# what axolotl 0.19, llamafactory 0.9.5 and unsloth 2026.10.9 accept, seen with their own classes and signatures
AXOLOTL = {
    *("base_model", "adapter", "load_in_4bit", "load_in_8bit", "lora_model_dir", "datasets", "sequence_len"),
    *("micro_batch_size", "gradient_accumulation_steps", "num_epochs", "learning_rate", "optimizer"),
    *("lr_scheduler", "seed", "output_dir"),
}
LLAMA_FACTORY = {
    *("model_name_or_path", "adapter_name_or_path", "stage", "do_train", "finetuning_type", "dataset_dir"),
    *("dataset", "cutoff_len", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs"),
    *("learning_rate", "lr_scheduler_type", "seed", "output_dir", "quantization_method", "quantization_bit"),
}
UNSLOTH = {"max_seq_length", "load_in_4bit", "load_in_8bit"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_folder, data_file):
    """A run folder on question-answer rows."""
    out = tmp_path_factory.mktemp("runs") / "run"
    data = {"data": str(data_file), "max_length": 64}
    settings = {"steps": 3, "batch_size": 2, "evaluations": 1, "learning_rate": 0.01, "cache": "off"}
    told = {"model": str(model_folder), "dtype": "float32"}
    return aletheia.fine_tune(told, data, out, BY_ROLE, settings, say=lambda line: None)


def keywords(script, function):
    """The names that a script calls a function with."""
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == function:
            return {keyword.arg for keyword in node.keywords}
    raise AssertionError(function)


def test_axolotl_takes_the_settings(trained, tmp_path, data_file):
    done = aletheia.export(trained.path, "axolotl", tmp_path / "out")
    settings = yaml.safe_load((done.path / "axolotl.yaml").read_text())
    assert settings.keys() <= AXOLOTL
    assert settings["datasets"][0]["path"] == str(data_file)
    assert settings["datasets"][0]["type"]["field_instruction"] == "question"
    assert (settings["micro_batch_size"], settings["learning_rate"]) == (2, 0.01)
    schemas = pytest.importorskip("axolotl.utils.schemas.config")
    schemas.AxolotlInputConfig(**settings)


def test_llama_factory_takes_the_settings(trained, tmp_path, data_file, monkeypatch):
    done = aletheia.export(trained.path, "llama-factory", tmp_path / "out")
    settings = yaml.safe_load((done.path / "llama_factory.yaml").read_text())
    assert settings.keys() <= LLAMA_FACTORY
    info = json.loads((done.path / "dataset_info.json").read_text())
    assert list(info) == settings["dataset"].split(",")
    assert info["rows1"]["file_name"] == str(data_file)
    assert info["rows1"]["columns"] == {"prompt": "question", "response": "answer"}
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")
    hparams = pytest.importorskip("llamafactory.hparams")
    classes = ("ModelArguments", "DataArguments", "TrainingArguments", "FinetuningArguments", "GeneratingArguments")
    parser = HfArgumentParser([getattr(hparams, name) for name in classes])
    model, *_ = parser.parse_dict(settings, allow_extra_keys=False)
    assert model.adapter_name_or_path == [str(done.path / "adapter")]


def test_the_unsloth_script_names_what_there_is(trained, tmp_path):
    trl = pytest.importorskip("trl")
    script = aletheia.export(trained.path, "unsloth", tmp_path / "out").path / "train_unsloth.py"
    assert keywords(script, "FastLanguageModel.from_pretrained") <= UNSLOTH
    assert keywords(script, "SFTConfig") <= inspect.signature(trl.SFTConfig).parameters.keys()


def test_the_trl_script_trains_on_with_every_rank(trained, tmp_path, model_folder):
    pytest.importorskip("trl")
    out = aletheia.export(trained.path, "trl", tmp_path / "out").path
    script = out / "train_trl.py"
    script.write_text(script.read_text().replace("seed=", 'max_steps=2, use_cpu=True, report_to="none", seed='))
    runpy.run_path(str(script))
    before, after = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), folder)
        for folder in (out / "adapter", out / "trained")
    )
    planned = {adapter.name: (adapter.rank, adapter.alpha) for adapter in trained.plan.adapters}
    assert adapted_modules(before) == adapted_modules(after) == planned
    assert (logits_of(before) - logits_of(after)).abs().max() > 1e-4


@pytest.mark.parametrize("to", FROM_A_PLAN)
def test_a_plan_begins_as_it_would_here(to, adapted, tmp_path):
    root, _ = adapted("qwen3_moe" if to == "trl" else "llama", **BY_ROLE)
    plan = aletheia.Plan.read(root / "plan.json")
    done = aletheia.export(root / "plan.json", to, tmp_path / "out")
    model = PeftModel.from_pretrained(base_of(root), done.path / "adapter", is_trainable=True)
    assert adapted_modules(model) == {adapter.name: (adapter.rank, adapter.alpha) for adapter in plan.adapters}
    torch.testing.assert_close(logits_of(model), logits_of(base_of(root)), **EXACT)
    for name, value in model.named_parameters():
        if ".lora_" in name:
            assert (value == 0).all() == (".lora_B." in name)
    assert any("train.jsonl" in note for note in done.notes)


def test_a_plan_has_no_weights_to_serve(adapted, tmp_path):
    root, _ = adapted("llama", **BY_ROLE)
    for to in ("merged", "vllm", "gguf", "ollama", "mlx"):
        with pytest.raises(ArtifactError, match="no weights"):
            aletheia.export(root / "plan.json", to, tmp_path / "out")


def test_a_run_of_which_a_file_was_changed_is_not_exported(trained, tmp_path):
    shutil.copytree(trained.path, tmp_path / "run")
    with (tmp_path / "run" / "adapter_model.safetensors").open("ab") as file:
        file.write(b" ")
    with pytest.raises(ArtifactError, match="expected the file that the run wrote"):
        aletheia.export(tmp_path / "run", "vllm", tmp_path / "out")


def test_nothing_is_overwritten_but_an_earlier_export(trained, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("kept")
    for overwrite in (False, True):
        with pytest.raises(ArtifactError, match="other files"):
            aletheia.export(trained.path, "vllm", tmp_path / "mine", overwrite=overwrite)
    assert (tmp_path / "mine" / "file").read_text() == "kept"
    aletheia.export(trained.path, "vllm", tmp_path / "out")
    with pytest.raises(ArtifactError, match="earlier export"):
        aletheia.export(trained.path, "mlx", tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    done = aletheia.export(trained.path, "mlx", tmp_path / "out", overwrite=True)
    assert {file.name for file in done.path.iterdir()} == {*done.files, RECORD_FILE}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


@pytest.mark.parametrize("correct", [False, True])
def test_a_quantized_base_is_merged_at_the_values_that_were_learned_on(correct, run, model_folder, data_file, tmp_path):
    pytest.importorskip("bitsandbytes")
    asked = ("train", model_folder, "--data", data_file, "--steps", 3, "--quantize", "nf4", "--learning-rate", 0.01)
    code, _, err = run(*asked, "--dtype", "float32", "--out", "q", *(("--correct-quantization",) if correct else ()))
    assert code == 0, err
    base = aletheia.load(str(model_folder), "float32", "cpu", quantize="nf4").model
    expected = logits_of(PeftModel.from_pretrained(base, tmp_path / "q"))
    done = aletheia.export(tmp_path / "q", "merged", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(done.path, dtype=torch.float32)
    assert not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(logits_of(model), expected, **EXACT)
    for to in ("vllm", "trl"):
        if correct:
            with pytest.raises(AdapterError, match="corrects its nf4 base"):
                aletheia.export(tmp_path / "q", to)
        else:
            aletheia.export(tmp_path / "q", to)
    if not correct:
        assert (
            'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"'
            in (tmp_path / "q-trl" / "train_trl.py").read_text()
        )


def test_the_command_line_prints_what_to_run(trained, run, tmp_path):
    code, out, err = run("export", trained.path, "--to", "vllm", "--out", tmp_path / "a b")
    assert code == 0, err
    assert out.startswith("vllm serve ")
    assert f"'tuned={tmp_path / 'a b'}'" in out
    code, out, _ = run("export", trained.path, "--to", "mlx", "--out", tmp_path / "m", "--json")
    told = json.loads(out)
    assert (code, told["to"], told["export"]) == (0, "mlx", str(tmp_path / "m"))
    assert "adapters.safetensors" in told["files"]


def test_what_cannot_be_exported_is_named(run, model_folder, data_file):
    for source, found in (
        (model_folder, "holds no adapter"),
        (data_file, "is not a plan"),
        ("nowhere", "does not exist"),
    ):
        code, _, err = run("export", source, "--to", "trl")
        assert (code, f"{source} {found}; expected a run folder" in err) == (2, True)


def test_what_is_no_target_is_named(trained, run):
    with pytest.raises(SettingsError, match="expected one of merged, vllm"):
        aletheia.export(trained.path, "onnx")
    code, _, err = run("export", trained.path, "--to", "onnx")
    assert (code, "--to is 'onnx'" in err) == (2, True)


def as_float32(source, out):
    """A GGUF file with every weight in float32, so that llama.cpp rounds nothing that we do not."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def distance(one, other):
    """Total variation of next-token probabilities, the largest of all positions."""
    return 0.5 * (one - other).abs().sum(-1).max().item()


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    """SmolLM2 from its GGUF file with an adapter of several ranks: file, adapter folder, ids, probabilities."""
    file = Path(os.environ.get("ALETHEIA_GGUF") or demo_checkpoint())
    base = aletheia.load(str(file), "float32", "cpu")
    ids = base.tokenizer("The capital of France is Paris, and its river is", return_tensors="pt").input_ids
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    with torch.no_grad():
        before = base.model(ids).logits[0].softmax(-1)
    plan = aletheia.plan(aletheia.probe(base.model, [batch]), ranks="by-role", policy="last", percent=50)
    model = aletheia.adapt(base.model, plan)
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=drawn) * 0.03)
        after = model.eval()(ids).logits[0].softmax(-1)
    folder = tmp_path_factory.mktemp("smol") / "adapter"
    model.save_pretrained(folder)
    return file, folder, ids, before, after


@pytest.mark.slow
def test_llama_cpp_says_the_same_with_the_adapter(smol, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    file, folder, ids, before, after = smol
    adapter = aletheia.export(folder, "gguf", tmp_path / "out").path / "adapter.gguf"

    def said(model, lora=None):
        llama = llama_cpp.Llama(
            str(model), lora_path=lora and str(lora), n_ctx=64, logits_all=True, verbose=False, type_k=0, type_v=0
        )
        llama.eval(ids[0].tolist())
        return torch.tensor(llama.scores[: ids.shape[1]]).softmax(-1)

    plain = as_float32(file, tmp_path / "plain.gguf")
    effect = distance(before, after)
    found = {
        "effect": effect,
        "float32 base": distance(said(plain), before),
        "float32 adapted": distance(said(plain, adapter), after),
        "quantized base": distance(said(file), before),
        "quantized adapted": distance(said(file, adapter), after),
    }
    print(found)
    assert effect > 0.05
    assert found["float32 adapted"] < 0.002
    assert found["quantized adapted"] < max(2 * found["quantized base"], 0.01)


@pytest.mark.slow
def test_a_gguf_base_is_merged_into_a_plain_model_folder(smol, tmp_path):
    _, folder, ids, _, after = smol
    done = aletheia.export(folder, "merged", tmp_path / "out", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(done.path)
    assert not hasattr(model.config, "quantization_config")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[0].softmax(-1), after, **EXACT)
    tokenizer = AutoTokenizer.from_pretrained(done.path)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).count("Hi") == 1
    for to in ("trl", "mlx"):
        with pytest.raises(ModelError, match="no GGUF files"):
            aletheia.export(folder, to, tmp_path / to)
