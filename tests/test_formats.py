"""Formats: 4- and 8-bit bases by bitsandbytes, and float16 where a model leaves its range."""

import math

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from test_streamed import same
from tiny import make_model, make_tokenizer

import aletheia
from aletheia.adapters import correction
from aletheia.adapters.adapt import adapted_modules
from aletheia.adapters.correction import Correction
from aletheia.anatomy.checkpoint import Checkpoint
from aletheia.anatomy.settings import LoadSettings
from aletheia.data.batches import collate
from aletheia.data.rows import load_rows
from aletheia.data.settings import DataSettings
from aletheia.errors import ModelError
from aletheia.execution.fast import adapters_in_bfloat16, bfloat16_autocast, fast_adapters
from aletheia.execution.loss import fast_loss
from aletheia.job.source import load_for
from aletheia.prefix.fill_streamed import fill_streamed, streamed_cache
from aletheia.probing.passes import check_passes
from aletheia.probing.preflight import preflight
from aletheia.probing.streamed import probe_streamed
from aletheia.reporting.comparison import repeat_command
from aletheia.runs.schema import Run
from aletheia.training.train import Prepared


@pytest.fixture
def folder(tmp_path):
    """A function from a model to the folder it is saved in."""

    def save(model, name="base"):
        model.save_pretrained(tmp_path / name, max_shard_size="40KB")
        make_tokenizer().save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_quantized_base_is_probed_and_trained(family, kind, folder, examples, tmp_path):
    name = folder(make_model(family))
    plain = aletheia.probe(aletheia.load(name, "float32").model, examples, batches=3)
    base = aletheia.load(name, "float32", quantize=kind)
    scores = aletheia.probe(base.model, examples, batches=3)
    assert scores.model.is_same_model(plain.model)  # so a plan made from either fits both
    assert scores.model.weights is None
    assert scores.anatomy == plain.anatomy.model_copy(update={"kept": scores.anatomy.kept})
    assert scores.anatomy.kept.plain_products  # PEFT computes the adapters of quantized weights
    assert scores.layers == pytest.approx(plain.layers, rel=0.3)
    plan = aletheia.plan(plain, policy="last", percent=50, rank=4)
    adapted = aletheia.adapt(base.model, plan)
    run = aletheia.train(
        adapted, examples.subset(range(8)), plan, tmp_path / "run", examples.subset(range(8, 10)), steps=3,
        learning_rate=0.01, cache="auto" if kind == "int8" else "memory", free_prefix=False, show_progress=False,
    )  # fmt: skip
    assert run.metrics.settings.cache == ("off" if kind == "int8" else "memory")
    if kind == "int8":  # 8-bit layers compute otherwise while they train
        assert "give other results in training" in run.metrics.cache_reason
    assert run.metrics.settings.quantization == kind
    assert f"--quantize {kind}" in repeat_command(run)
    batch = collate(examples.examples[:2], 0)
    with torch.no_grad():
        trained = adapted.eval()(**batch).logits
        again = PeftModel.from_pretrained(
            aletheia.load(name, "float32", quantize=kind).model, tmp_path / "run"
        ).eval()(**batch).logits  # fmt: skip
    torch.testing.assert_close(again, trained, atol=1e-5, rtol=1e-5)


def test_adapters_of_a_4_bit_base_multiply_in_bfloat16(folder, examples):
    """As under Trainer's ``bf16=True``; PEFT's own forward alone would multiply them in float32."""
    base = aletheia.load(folder(make_model("llama")), "bfloat16", quantize="nf4").model
    model = aletheia.adapt(
        base, aletheia.plan(aletheia.probe(base, examples, batches=2), policy="last", percent=50, rank=4)
    )
    batch, dtypes = collate(examples.examples[:2], 0), set()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            torch.nn.init.normal_(module.lora_B["default"].weight)
            module.lora_B["default"].register_forward_hook(lambda module, given, made: dtypes.add(made.dtype))
    with bfloat16_autocast(model), fast_loss(model):
        expected = model(**batch).loss
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad()
    dtypes.clear()
    with adapters_in_bfloat16(model), fast_adapters(model) as covered, fast_loss(model):
        loss = model(**batch).loss
    loss.backward()
    assert covered == 0
    assert dtypes == {torch.bfloat16}
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    for parameter, gradient in zip([p for p in model.parameters() if p.requires_grad], gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0.05, atol=0.02 * gradient.abs().max().item())


def gap(model, plain, batch):
    """How far the logits of the rows' tokens are from those of the model before it was quantized."""
    with torch.no_grad():
        return (model(**batch).logits - plain(**batch).logits)[batch["attention_mask"].bool()].norm().item()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_moe"])
def test_a_corrected_base_is_nearer_to_what_it_was(family, folder, examples, tmp_path):
    name = folder(make_model(family))
    plain, base = aletheia.load(name, "float32").model, aletheia.load(name, "float32", quantize="nf4").model
    plan = aletheia.plan(aletheia.probe(plain, examples, batches=2), policy="uniform", rank=8)
    batch = collate(examples.examples[:8], 0)
    adapted = aletheia.adapt(base, plan).eval()
    before = gap(adapted, plain, batch)
    correct = Correction()
    with correct:
        correct.measure(adapted, Checkpoint(name, "float32").read_layers(range(4)), batch)
        quantized = [
            m for m in adapted.modules() if isinstance(m, LoraLayer) and correction._is_4bit(m.get_base_layer())
        ]
        assert len(correct) == len(quantized) > 0
        assert not correct._changes  # weights in float32, which nothing needs any more
        corrected = gap(adapted, plain, batch)
    assert gap(adapted, plain, batch) == pytest.approx(before)
    assert corrected < 0.8 * before
    correct.fold(adapted, plan)
    assert gap(adapted, plain, batch) == pytest.approx(corrected, rel=1e-4)
    assert {quantized[0].r["default"], quantized[0].lora_alpha["default"]} == {16, 32}
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(aletheia.load(name, "float32", quantize="nf4").model, tmp_path / "adapter")
    assert gap(again.eval(), plain, batch) == pytest.approx(corrected, rel=1e-4)


def test_no_correction_of_that_rank_is_better():
    torch.manual_seed(0)
    error, x = torch.randn(12, 10), torch.randn(200, 10) @ torch.randn(10, 10)
    a, b = correction._factors(error, x, 3)

    def left(change):
        return ((error - change) @ x.T).norm().item()

    best = left(b @ a)
    assert best < left(0 * error)
    assert best == pytest.approx(torch.linalg.svdvals(error @ x.T)[3:].norm().item())
    u, s, v = torch.linalg.svd(error, full_matrices=False)
    assert best < left(u[:, :3] * s[:3] @ v[:3])  # the best for the weights, not for what comes out of them
    a, b = correction._factors(error, x[:2], 3)  # fewer tokens than directions
    assert (a.shape, b.shape) == ((3, 10), (12, 3))
    assert (error - b @ a) @ x[:2].T == pytest.approx(torch.zeros(12, 2), abs=1e-4)


def test_training_corrects_an_nf4_base_and_says_so(run, folder, data_file, tmp_path):
    name = folder(make_model("llama"))
    asked = ("train", name, "--data", data_file, "--steps", 4, "--quantize", "nf4", "--learning-rate", 0.01)
    for label, switch in (("corrected", ("--correct-quantization",)), ("plain", ())):
        code, _, err = run(*asked, "--out", label, *switch)
        assert code == 0, err
    corrected, plain = Run.read(tmp_path / "corrected"), Run.read(tmp_path / "plain")
    assert corrected.metrics.settings.quantization_corrected
    assert not plain.metrics.settings.quantization_corrected
    assert corrected.metrics.seconds.correction > 0 == plain.metrics.seconds.correction
    assert "Correcting the quantization" in (tmp_path / "corrected" / "report.html").read_text()
    assert "Correcting the quantization" not in (tmp_path / "plain" / "report.html").read_text()
    assert corrected.metrics.held_out_loss_before == plain.metrics.held_out_loss_before
    assert corrected.metrics.trainable_parameters == plain.metrics.trainable_parameters
    assert "--correct-quantization" in repeat_command(corrected)
    assert "--correct-quantization" not in repeat_command(plain)
    assert "frozen correction" in (tmp_path / "corrected" / "README.md").read_text()
    weights = [load_file(tmp_path / label / "adapter_model.safetensors") for label in ("corrected", "plain")]
    for key, value in weights[1].items():
        assert weights[0][key].numel() == 2 * value.numel()
    base = aletheia.load(name, "float32", quantize="nf4").model
    adapted = aletheia.load_adapter(base, tmp_path / "corrected")  # twice the rank of its plan
    assert set(adapted_modules(adapted).values()) == {(32, 64.0)}


def test_a_correction_is_refused_where_there_is_nothing_to_correct(run, data_file):
    for quantize in ((), ("--quantize", "int8")):
        code, _, err = run("train", "base", "--data", data_file, "--correct-quantization", *quantize, "--out", "run")
        assert code == 2
        assert "expected nf4" in err
    code, _, err = run(
        "train", "base.gguf", "--data", data_file, "--correct-quantization", "--quantize", "nf4", "--out", "run"
    )
    assert code == 2
    assert "is a GGUF file, which transformers cannot quantize again; expected a model folder" in err


def test_4_bit_layers_keep_their_gradient_after_an_evaluation(folder, examples, monkeypatch):
    import bitsandbytes

    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)  # as on newer processors
    name = folder(aletheia.load(folder(make_model("llama")), "float32", quantize="nf4").model, "quantized")
    for model in (aletheia.load(name, "float32").model, Checkpoint(name, "float32").suffix(0)):
        layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
        hidden = torch.randn(1, 3, layers[0].in_features)
        with torch.no_grad():
            layers[0].eval()(hidden)
        assert not getattr(layers[0].weight.quant_state, "packing_format_for_cpu", False)
        assert layers[0](hidden.requires_grad_()).requires_grad


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_checkpoint_is_streamed(kind, folder, examples):
    quantized = aletheia.load(folder(make_model("llama")), "float32", quantize=kind).model
    name = folder(quantized, "quantized")
    resident = aletheia.probe(aletheia.load(name, "float32").model, examples, batches=2)
    found = probe_streamed(Checkpoint(name, "float32"), examples, 2, show_progress=False)
    same(found, resident)


def test_a_quantized_checkpoint_is_trained_layer_by_layer(folder, examples, tmp_path):
    quantized = aletheia.load(folder(make_model("gpt_neox")), "float32", quantize="nf4").model
    name = folder(quantized, "quantized")
    base = aletheia.load(name, "float32")
    plan = aletheia.plan(aletheia.probe(base.model, examples, batches=2), policy="last", percent=50, rank=4)
    data, held_out = examples.subset(range(8)), examples.subset(range(8, 10))
    common = {"steps": 3, "batch_size": 2, "learning_rate": 0.01, "show_progress": False}
    whole = aletheia.train(
        aletheia.adapt(base.model, plan), data, plan, tmp_path / "whole", held_out, cache="off", **common
    )
    checkpoint = Checkpoint(name, "float32")
    cache = streamed_cache(checkpoint, plan.boundary, tmp_path / "cache")
    fill_streamed(checkpoint, 2, [*data.examples, *held_out.examples], cache, 2, 0, show_progress=False)
    adapted = aletheia.adapt(checkpoint.suffix(2), plan, identity=plan.model)
    assert any(
        type(module).__name__ == "Linear4bit" and "bnb" in type(module).__module__ for module in adapted.modules()
    )
    run = aletheia.train(adapted, data, plan, tmp_path / "run", held_out, prepared=Prepared(cache), **common)
    assert run.metrics.held_out_loss_after == pytest.approx(whole.metrics.held_out_loss_after, rel=1e-5)


def test_quantization_that_cannot_be_had_is_refused(folder):
    with pytest.raises(ModelError, match="expected one of nf4, int8"):
        aletheia.load(folder(make_model()), quantize="int3")
    with pytest.raises(ModelError, match="GGUF"):
        aletheia.load("model.gguf", quantize="nf4")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_model_of_whose_layers_nothing_is_quantized_is_refused(kind, folder):
    with pytest.raises(ModelError, match=f"`quantize` {kind} quantizes no layer of .*: .* FalconLinear; leave"):
        aletheia.load(folder(make_model("falcon")), quantize=kind)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_weights_that_a_layer_reads_itself_are_not_quantized(kind, folder):
    model = aletheia.load(folder(make_model("mamba")), "float32", quantize=kind).model
    mixer = model.backbone.layers[3].mixer
    assert not mixer.in_proj.weight.is_floating_point()
    assert all(module.weight.dtype == torch.float32 for module in (mixer.x_proj, mixer.dt_proj, model.lm_head))


@pytest.mark.parametrize(("family", "left"), [("mixtral", "mlp.experts.gate_up_proj"), ("llama", None)])
def test_what_is_not_quantized_is_noted_once(family, left, folder, data_file):
    model, said = make_model(family), []
    how = LoadSettings(model=folder(model), dtype="float32", quantize="nf4")
    load_for(how, load_rows([str(data_file)]), DataSettings(data=[str(data_file)]), said.append)
    notes = [line for line in said if "not quantized" in line]
    assert len(notes) == (left is not None)
    if left:
        matrices = {name: value.numel() for name, value in model.model.layers.named_parameters() if value.dim() > 1}
        share = sum(size for name, size in matrices.items() if "self_attn" not in name) / sum(matrices.values())
        assert f"{share:.0%} of the layers' weights" in notes[0]
        assert left in notes[0]
        assert "q_proj" not in notes[0]


def test_a_model_that_fails_once_it_is_quantized_is_refused(folder, examples):
    """Its layer gets four dimensions, for which bitsandbytes has no product on a CPU."""
    base = aletheia.load(folder(make_model("deepseek_v3")), "float32", quantize="int8")
    with pytest.raises(ModelError, match=r"does not run in int8: .* choose another `quantize`, or leave it out"):
        check_passes(base.model, examples)


def overflowing():
    """A GPT-NeoX whose attention scores in layer 2 leave float16 before they are scaled."""
    model = make_model("gpt_neox")
    projection = model.gpt_neox.layers[2].attention.query_key_value
    with torch.no_grad():
        by_head = projection.weight.view(4, 3, 8, 32)
        by_head[:, :2] *= 4000  # queries and keys, not values
        projection.bias.view(4, 3, 8)[:, :2] = 200
    return model


def test_preflight_names_the_layer_and_finds_a_way(folder, examples):
    name = folder(overflowing())
    base = aletheia.load(name, "float16", attention="eager")
    passing, changed = preflight(base, examples)
    assert "layer 2 (gpt_neox.layers.2)" in changed
    assert "float16 with eager attention" in changed
    scores = aletheia.probe(passing.model, examples, batches=2)
    assert all(math.isfinite(score) for score in scores.layers)


def test_preflight_leaves_a_sound_model_alone(folder, examples):
    base = aletheia.load(folder(make_model("gpt_neox")), "float16", attention="eager")
    assert preflight(base, examples) == (base, None)
