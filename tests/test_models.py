"""Models as people have them: what LoRA cannot adapt is named, what cannot be trained is refused before the probe."""

import json

import pytest
import torch
from conftest import count_rows
from families import BARE, OFTEN, RARELY, SIZES, TOWER, config_of
from peft import PeftModel
from tiny import FAMILIES, MORE_FAMILIES, as_flags, make_config, make_model, make_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig

import aletheia
from aletheia.adapters.adapt import adapted_modules
from aletheia.anatomy.checkpoint import Checkpoint
from aletheia.anatomy.faults import explained
from aletheia.anatomy.load import inspect, load
from aletheia.anatomy.read import read_anatomy
from aletheia.data.batches import collate
from aletheia.errors import ModelError, PlanError
from aletheia.probing.passes import check_passes

LEFT_OUT = {  # by family, the names of what LoRA leaves as it is and a word of the reason
    "mamba": {"mixer.out_proj": "PEFT refuses", "mixer.x_proj": "past an adapter", "mixer.dt_proj": "past an adapter"},
    "falcon_mamba": {
        **{"mixer.out_proj": "PEFT refuses", "mixer.x_proj": "past an adapter", "mixer.dt_proj": "past an adapter"}
    },
    "mamba2": {"mixer.out_proj": "PEFT refuses"},
    "falcon_h1": {"mamba.out_proj": "PEFT refuses"},
    "nemotron_h": {"mixer.out_proj": "PEFT refuses"},
    "jamba": {"mamba.dt_proj": "past an adapter"},
    "bamba": {"mamba.out_proj": "past an adapter"},
    "granitemoehybrid": {"mamba.out_proj": "past an adapter"},
    "zamba": {
        f"{place}mamba.{name}": "3-D"
        for place in ("", "mamba_decoder.")
        for name in ("x_proj_weight", "dt_proj_weight", "A_log")
    },
    "zamba2": {"mamba.out_proj": "past an adapter", "mamba_decoder.mamba.out_proj": "past an adapter"},
    "recurrent_gemma": {
        "temporal_block.rg_lru.input_gate_weight": "3-D",
        "temporal_block.rg_lru.recurrent_gate_weight": "3-D",
    },
}
REFUSED = {
    "t5": ({"vocab_size": 259, "d_model": 32, "num_layers": 2, "num_heads": 4}, "encoder-decoder model (t5)"),
    "bart": ({"vocab_size": 259, "d_model": 32, "encoder_layers": 1}, "encoder-decoder model (bart)"),
    "whisper": ({"vocab_size": 259, "d_model": 32}, "encoder-decoder model (whisper)"),
    "bert": ({**SIZES}, "is an encoder (bert)"),
    "roberta": ({**SIZES}, "is an encoder (roberta)"),
    "modernbert": ({**SIZES, "global_attn_every_n_layers": 2}, "(modernbert) is not a causal"),
    "vit": ({**TOWER}, "(vit) is not a causal"),
    "clip": ({}, "(clip) is not a causal"),
    "wav2vec2": ({}, "(wav2vec2) is not a causal"),
    "gemma3_text": ({**SIZES, "use_bidirectional_attention": True}, "bidirectional attention"),
    "diffusion_gemma": ({}, "is a diffusion model (diffusion_gemma)"),
}


def fused(anatomy):
    return {weights.name: weights.reason for weights in anatomy.left_out}


# --- what LoRA leaves as it is


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES, *OFTEN, *RARELY])
def test_what_is_not_adapted_is_named_from_the_config_alone(family, tmp_path):
    make_config(family).save_pretrained(tmp_path)
    anatomy = inspect(str(tmp_path))
    expected = LEFT_OUT.get(family, {})
    assert fused(anatomy).keys() == expected.keys()
    for name, word in expected.items():
        assert word in fused(anatomy)[name]
        assert any(name.rsplit(".", 1)[-1] in note for note in anatomy.notes) or "more" in anatomy.notes[0]
    refused = {module.name for module in anatomy.modules if module.refused}
    assert not refused & {module.name for module in anatomy.adaptable(routers=True)}
    assert len(anatomy.modules) > len(refused)


def test_a_weight_that_is_left_out_counts_in_the_costs_and_in_the_probe_alone(examples):
    model = make_model("mamba2")
    scores = aletheia.probe(model, examples, batches=1)
    left = [module for module in scores.anatomy.modules if module.refused]
    assert len(left) == 4
    assert all(scores.modules[module.name] > 0 for module in left)
    plan = aletheia.plan(scores, policy="uniform")
    assert {adapter.name for adapter in plan.adapters} == {m.name for m in scores.anatomy.modules if not m.refused}


def test_an_edited_plan_that_adapts_what_lora_cannot_is_refused(examples):
    model = make_model("mamba2")
    plan = aletheia.plan(aletheia.probe(model, examples, batches=1), policy="last", rank=2)
    module = next(module for module in read_anatomy(model).modules if module.refused and module.layer == 3)
    own = {"name": module.name, "layer": 3, "parameters": module.lora_parameters(2), "rank": 2}
    edited = plan.model_copy(update={"adapters": (*plan.adapters, plan.adapters[-1].model_copy(update=own))})
    with pytest.raises(PlanError, match=r"out_proj, which LoRA cannot adapt here .*PEFT refuses"):
        aletheia.adapt(model, edited)


def test_the_model_is_left_as_it_is_by_the_trial():
    model = make_model("mixtral")
    flags = [parameter.requires_grad for parameter in model.parameters()]
    kinds = [type(module) for module in model.modules()]
    read_anatomy(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [type(module) for module in model.modules()] == kinds


def test_a_module_of_several_layers_is_not_adapted_and_a_shared_weight_is_noted(examples):
    model = make_model("llama")
    layers = model.model.layers
    layers[3].mlp.up_proj = layers[0].mlp.up_proj  # one module, below any boundary and above
    layers[3].mlp.gate_proj.weight = layers[1].mlp.gate_proj.weight  # one weight in two modules
    anatomy = read_anatomy(model)
    assert fused(anatomy) == {"mlp.up_proj": "one module of layers 0, 3"}
    assert [(weight.name, weight.layers) for weight in anatomy.shared] == [("mlp.gate_proj", (1, 3))]
    assert "layers 1, 3 share the weights of mlp.gate_proj" in anatomy.notes[1]
    plan = aletheia.plan(aletheia.probe(model, examples, batches=1), policy="uniform", rank=2)
    assert {name for name in adapted_modules(aletheia.adapt(model, plan)) if "up_proj" in name} == {
        f"model.layers.{layer}.mlp.up_proj" for layer in (1, 2)
    }


# --- vision-language models


def test_the_language_model_of_a_wrapper_is_adapted_and_the_adapter_fits_the_whole(tmp_path, examples):
    folder = str(tmp_path / "wrapper")
    make_model("mistral3").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    model = load(folder, "float32").model
    anatomy = read_anatomy(model)
    assert anatomy.layer_path == "model.language_model.layers"  # the tower has more layers
    assert not any("vision" in module.name for module in anatomy.modules)
    plan = aletheia.plan(aletheia.probe(model, examples, batches=1), policy="last", percent=50, rank=2)
    adapted = aletheia.adapt(model, plan)
    data, held_out = examples.subset(range(8)), examples.subset(range(8, 10))
    aletheia.train(adapted, data, plan, tmp_path / "run", held_out, steps=2, learning_rate=0.01, show_progress=False)
    batch = collate(examples.examples[:2], 0)
    with torch.no_grad():
        whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        again = PeftModel.from_pretrained(whole, tmp_path / "run").eval()(**batch).logits
        torch.testing.assert_close(again, adapted.eval()(**batch).logits, atol=1e-5, rtol=1e-5)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in card
    assert "AutoModelForCausalLM" not in card


# --- what cannot be trained


@pytest.mark.parametrize("kind", REFUSED)
def test_another_kind_of_model_is_refused_from_its_config(kind, tmp_path):
    settings, words = REFUSED[kind]
    AutoConfig.for_model(kind, **settings).save_pretrained(tmp_path)
    for look in (inspect, load):
        with pytest.raises(ModelError) as caught:
            look(str(tmp_path))
        assert words in str(caught.value)
        assert "expected a decoder" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "words"), [("paligemma", "see later tokens"), ("mllama", "layers that read only the image")]
)
def test_a_wrapper_that_cannot_work_is_refused_by_name(family, words, tmp_path, run, data_file):
    config_of(family).save_pretrained(tmp_path / "m")
    for command in (("inspect",), ("probe", "--data", data_file, "--out", "s.json")):
        code, _, err = run(command[0], tmp_path / "m", *command[1:])
        assert code == 2
        assert f"is a vision-language model ({family})" in err
        assert words in err
        assert "Traceback" not in err


@pytest.mark.parametrize("kind", ["musicgen", "git", "gemma4_text"])
def test_an_unusual_config_is_read_or_refused_in_one_line(kind, tmp_path):
    config = AutoConfig.for_model(kind)
    if kind == "gemma4_text":  # heads of two sizes
        assert inspect_config(config, tmp_path).attention_width > 0
    else:
        with pytest.raises(ModelError, match=r"several language models|encoder-decoder|without a separate"):
            inspect_config(config, tmp_path)


def inspect_config(config, folder):
    config.save_pretrained(folder)
    return inspect(str(folder))


def test_a_diffusion_pipeline_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ModelError, match="is a diffusion pipeline"):
        load(str(tmp_path))


class Keeping(nn.Module):
    """Adds to the hidden states what it saw in the pass before."""

    def __init__(self):
        super().__init__()
        self.seen = None

    def forward(self, hidden_BTD):
        kept, self.seen = self.seen, hidden_BTD.mean(dim=1, keepdim=True)
        return hidden_BTD if kept is None or kept.shape[0] != hidden_BTD.shape[0] else hidden_BTD + kept


def with_norm(model, made):
    """A tiny Llama whose last norm passes through another module."""
    norm = model.model.norm
    model.model.norm = nn.Sequential(norm, made)
    return model


def test_state_kept_from_one_pass_to_the_next_is_refused(examples):
    with pytest.raises(ModelError, match=r"LlamaForCausalLM (is not to be trained|keeps state from one forward pass)"):
        check_passes(with_norm(make_model("llama"), Keeping()), examples)


def test_state_without_a_graph_is_named(examples):
    class Detached(Keeping):
        def forward(self, hidden_BTD):
            output = super().forward(hidden_BTD)
            self.seen = self.seen.detach()
            return output

    with pytest.raises(ModelError, match=r"keeps state from one forward pass to the next \(in model\.norm\.1\.seen\)"):
        check_passes(with_norm(make_model("llama"), Detached()), examples)


def test_layers_that_run_twice_are_refused(examples, tmp_path):
    """Adapters in the upper layers would change what enters the lower ones the second time."""
    model = make_model("llama")
    inner = model.model

    def looped(*args, **kwargs):
        inner_forward(*args, **kwargs)
        return inner_forward(*args, **kwargs)

    inner_forward = inner.forward
    inner.forward = looped
    with pytest.raises(ModelError, match=r"calls model\.layers\.0 after model\.layers\.3; expected .* each layer once"):
        check_passes(model, examples)


def test_positions_that_see_ahead_are_refused(examples):
    class Ahead(nn.Module):
        def forward(self, hidden_BTD):
            return hidden_BTD + hidden_BTD.mean(dim=1, keepdim=True)

    with pytest.raises(ModelError, match="see the tokens after them"):
        check_passes(with_norm(make_model("llama"), Ahead()), examples)


def test_weights_that_change_while_the_model_runs_are_refused(examples):
    config = config_of("rwkv")
    config.rescale_every = 2
    with pytest.raises(ModelError, match=r"writes into rwkv\.blocks\.0\.attention\.output\.weight.*rescale_every to 0"):
        check_passes(AutoModelForCausalLM.from_config(config), examples)


def test_a_model_that_fails_on_text_alone_is_one_line(examples):
    class Failing(nn.Module):
        def forward(self, hidden_BTD):
            raise ValueError("pixel_values\nare needed")

    with pytest.raises(ModelError, match=r"is not to be trained on text alone: pixel_values are needed \(ValueError\)"):
        check_passes(with_norm(make_model("llama"), Failing()), examples)


def test_a_check_that_gives_no_reason_is_reported_as_such(examples):
    class Checked(nn.Module):
        def forward(self, hidden_BTD):
            raise AssertionError

    with pytest.raises(ModelError, match=r"a check of the library fails, no reason given \(AssertionError\)"):
        check_passes(with_norm(make_model("llama"), Checked()), examples)


@pytest.mark.parametrize("settings", [{"load_in_4bit": True}, {"load_in_8bit": True}])
@pytest.mark.parametrize("read", [load, lambda name: next(Checkpoint(name).read_layers([0], False))])
def test_plain_weights_under_a_config_of_packed_ones_are_refused(settings, read, tmp_path):
    pytest.importorskip("bitsandbytes")
    make_model("llama").save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", **settings}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"quantization_config of .* says packed weights, but .*q_proj is not"):
        read(str(tmp_path / "m"))


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("One thing. Another thing.", "its config or weights do not fit together: One thing (ValueError)"),
        ("word " * 100, "word word ... (ValueError)"),
        ("", "no reason given (ValueError)"),
    ],
)
def test_a_library_gives_the_reason_and_we_say_what_is_wrong(words, shown):
    with pytest.raises(ModelError) as caught, explained("m"):
        raise ValueError(words)
    assert shown in str(caught.value)
    assert len(str(caught.value)) < 350


def test_a_model_named_in_other_bytes_is_one_line(run, data_file, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m\udcff").symlink_to(tmp_path / "m")
    for command in (("inspect",), ("probe", "--data", data_file, "--out", "s.json", "--stream")):
        code, _, err = run(command[0], "m\udcff", *command[1:])
        assert code == 2
        assert "is not UTF-8; rename the folder" in err
        assert err.count("\n") == 1


def test_the_passes_leave_a_model_as_it_is(examples):
    model = make_model("qwen3_moe").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    check_passes(model, examples)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


# --- as commands


COMMANDED = ("falcon_h1", "recurrent_gemma")  # quick
ALL = [name for name in (*OFTEN, *RARELY) if name not in COMMANDED]
COMMAND = ("--steps", 2, "--batch-size", 4, "--dtype", "float32", "--eval-rows", 2, "--evaluations", 1)


@pytest.mark.parametrize(
    "family",
    [*COMMANDED, *(pytest.param(name, marks=pytest.mark.slow) for name in ALL)],
)
def test_train_adapts_what_can_be_adapted_and_says_the_rest_once(family, tmp_path, run):
    make_model(family).save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in count_rows(20)))
    code, _, err = run("train", tmp_path / "m", "--data", "rows.jsonl", "--out", "run", *COMMAND)
    assert code == 0, err
    assert err.count("note: not adapted:") == (family in LEFT_OUT)
    if family in LEFT_OUT:
        assert err.index("note: not adapted:") < err.index("probe  ")


def test_train_on_a_model_that_writes_into_its_weights_is_one_line(tmp_path, run, data_file):
    config = AutoConfig.for_model("rwkv", **BARE, hidden_size=32, attention_hidden_size=32, num_hidden_layers=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    code, _, err = run("train", tmp_path / "m", "--data", data_file, "--out", "run", *COMMAND)
    assert code == 2
    assert "writes into rwkv.blocks.0.attention.output.weight" in err
    assert "Traceback" not in err
    assert "probe  " not in err


def test_a_plain_model_has_nothing_to_note(tmp_path, run):
    LlamaConfig(**SIZES).save_pretrained(tmp_path / "m")
    code, out, _ = run("inspect", tmp_path / "m")
    assert code == 0
    assert "note:" not in out
    assert as_flags("`a_b`") == "--a-b"
