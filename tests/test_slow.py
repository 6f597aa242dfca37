"""The real SmolLM2-135M: parity with the reference, the demo, and the main job on GSM8K (make test-slow)."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from aletheia_lora.probe import gradient_probe
from peft import PeftModel
from scipy.stats import spearmanr

import aletheia
from aletheia.anatomy.demo import demo_checkpoint
from aletheia.data.batches import collate
from aletheia.prefix.boundary import frozen_prefix
from aletheia.prefix.cache import MemoryCache, collate_with_prefix
from aletheia.prefix.fill import fill
from aletheia.prefix.stored import stored_prefix
from aletheia.probing.logits import labelled_logits
from aletheia.runs.schema import Run

pytestmark = pytest.mark.slow
GSM8K = Path(os.environ.get("ALETHEIA_DATA", "../shared/data")) / "gsm8k"
needs_gsm8k = pytest.mark.skipif(not GSM8K.is_dir(), reason=f"no GSM8K in {GSM8K}; set ALETHEIA_DATA")


@pytest.fixture(scope="module")
def base():
    return aletheia.load(str(demo_checkpoint()), "float32")


def aletheia_command(*arguments: object) -> None:
    subprocess.run([str(Path(sys.executable).parent / "aletheia"), *map(str, arguments)], check=True)


@needs_gsm8k
def test_layer_scores_equal_the_reference(base):
    """Five GSM8K sequences, float32, labels are the inputs: 30 scores to 1e-4 relative."""
    data = aletheia.load_data(str(GSM8K / "train.jsonl"), base.tokenizer)
    rows = [torch.tensor(example.input_ids) for example in data.examples[:5]]
    dataset = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    batches = [
        {"input_ids": row[None], "attention_mask": torch.ones_like(row[None]), "labels": row[None].clone()}
        for row in rows
    ]
    reference = gradient_probe(base.model, dataset, 30, 5)
    assert aletheia.probe(base.model, batches).layers == pytest.approx([reference[i] for i in range(30)], rel=1e-4)


def with_adapters(model, plan):
    """The adapted model in training mode, B drawn at random so that A gets gradients, too."""
    adapted = aletheia.adapt(model, plan, seed=1).train()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.01 * torch.randn(parameter.shape))
    return adapted


@contextmanager
def exact_loss(model):
    """The causal loss of float64 logits: torch's float32 log-softmax over 49,152 is off by 5e-6 with AVX-512."""

    def loss(logits, labels, vocab_size, shift_labels=None, **_):
        targets = torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:] if shift_labels is None else shift_labels
        return torch.nn.functional.cross_entropy(logits.double().view(-1, vocab_size), targets.reshape(-1))

    base = model.get_base_model()
    base.loss_function = loss
    try:
        yield
    finally:
        del base._loss_function


def loss_and_gradient(model, batch):
    """Both in float64; the adapters' gradients in one vector."""
    loss = model(**batch, use_cache=False).loss
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, parameters)
    return loss.detach().double(), torch.cat([gradient.flatten().double() for gradient in gradients])


def relative_errors(found, expected):
    return [((one - other).norm() / other.norm()).item() for one, other in zip(found, expected, strict=True)]


@needs_gsm8k
@pytest.mark.parametrize("boundary", [0, 15])
def test_fast_steps_equal_plain_ones(base, boundary):
    """SmolLM2, float32, loss and adapter gradients of one batch: each path to 1e-6 of the plain step.

    The plain step, the prefix, the cache and the labelled logits take an exact loss; the fast loss is part of all else.
    A cache filled in batches of other shapes, and the fast adapters, sum in another order. So does the plain step if
    the batch is padded further; they may differ from it by as much, and be no farther from float64.
    """
    data = aletheia.load_data(str(GSM8K / "train.jsonl"), base.tokenizer).subset(range(6))
    plan = aletheia.plan(aletheia.probe(base.model, data, batches=1), policy="last", percent=100 - boundary / 30 * 100)
    assert plan.boundary == boundary
    rows, pad = data.examples[:2], data.pad_token_id
    batch = collate(rows, pad)
    longer = {name: value[:2] for name, value in collate([*rows, max(data.examples, key=len)], pad).items()}
    assert longer["input_ids"].shape[1] > batch["input_ids"].shape[1]
    model = with_adapters(base.model, plan)
    batches = {"alone": batch}
    if boundary:
        for kind, filled_with in (("cache", rows), ("cache filled one by one", data.examples)):
            cache = MemoryCache()
            fill(model, boundary, filled_with, cache, 2 if kind == "cache" else 1, show_progress=False)
            batches[kind] = collate_with_prefix(rows, pad, cache)
    with exact_loss(model):
        plain = loss_and_gradient(model, batch)
        errors = {"plain, padded": relative_errors(loss_and_gradient(model, longer), plain)}
        for name, context in (("prefix", frozen_prefix), ("logits", labelled_logits)):
            with context(model):
                errors[name] = relative_errors(loss_and_gradient(model, batch), plain)
    fast = {}
    for kind, given in batches.items():
        with aletheia.fast_steps(model, boundary if kind != "alone" else None):
            fast[kind] = loss_and_gradient(model, given)
        errors[f"everything, {kind}"] = relative_errors(fast[kind], plain)
        if kind != "alone":
            with exact_loss(model), stored_prefix(model, boundary):
                errors[kind] = relative_errors(loss_and_gradient(model, given), plain)
    model.double()
    with exact_loss(model):
        truth = loss_and_gradient(model, batch)
    model.float()
    model.unload()
    for name, (loss, gradient) in errors.items():
        print(f"boundary {boundary}, {name}: loss {loss:.1e}, gradient {gradient:.1e}")
    noise, plain_error = errors["plain, padded"][1], relative_errors(plain, truth)[1]
    for name, (loss, gradient) in errors.items():
        reordered = name == "plain, padded" or name.startswith("everything") or name.endswith("one by one")
        assert loss < 1e-6, name
        assert gradient < (2 * noise if reordered else 1e-6), name
    for kind, found in fast.items():
        error = relative_errors(found, truth)[1]
        print(f"boundary {boundary}, against float64: plain {plain_error:.1e}, everything, {kind} {error:.1e}")
        assert error < 1.2 * plain_error, kind


@needs_gsm8k
@pytest.mark.parametrize("boundary", [0, 15])
def test_twenty_fast_steps_equal_twenty_plain_ones(base, boundary):
    """SmolLM2, float32: the losses of 20 steps of AdamW to 1e-5, from prefixes stored in other batches."""
    data = aletheia.load_data(str(GSM8K / "train.jsonl"), base.tokenizer).subset(range(40))
    plan = aletheia.plan(aletheia.probe(base.model, data, batches=1), policy="last", percent=100 - boundary / 30 * 100)
    cache = MemoryCache()
    curves = {}
    for kind in ("plain", "fast"):
        model = with_adapters(base.model, plan)
        make = partial(collate, pad_token_id=data.pad_token_id)
        if boundary and kind == "fast":
            fill(model, boundary, data.examples, cache, 3, show_progress=False)
            make = partial(collate_with_prefix, pad_token_id=data.pad_token_id, cache=cache)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        losses = []
        with aletheia.fast_steps(model, boundary or None) if kind == "fast" else exact_loss(model):
            for step in range(20):
                loss = model(**make(data.examples[2 * step : 2 * step + 2]), use_cache=False).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        curves[kind] = torch.tensor(losses, dtype=torch.float64)
        model.unload()
    relative = (curves["fast"] - curves["plain"]).abs() / curves["plain"]
    print(f"boundary {boundary}: 20 steps {relative.max():.1e}")
    assert relative.max() < 1e-5


@needs_gsm8k
def test_the_main_job_learns_gsm8k(tmp_path):
    """Defaults only, 150 steps of batch 4: the held-out loss on 96 rows of the test set falls below 0.80."""
    run_folder = tmp_path / "run"
    aletheia_command(
        "train", demo_checkpoint(), "--data", GSM8K / "train.jsonl", "--eval-data", GSM8K / "test.jsonl",
        "--out", run_folder, "--steps", 150, "--batch-size", 4,
    )  # fmt: skip
    metrics = Run.read(run_folder).metrics
    assert metrics.held_out_rows == 96
    assert metrics.held_out_loss_before == pytest.approx(1.43, abs=0.03)
    assert metrics.held_out_loss_after < 0.80
    fresh = aletheia.load(str(demo_checkpoint()), "float32")
    merged = PeftModel.from_pretrained(fresh.model, run_folder).merge_and_unload()
    prompt = fresh.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Tom has 3 apples and buys 4 more. How many apples has he?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    inputs = fresh.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    answer = merged.generate(**inputs, max_new_tokens=120, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "####" in fresh.tokenizer.decode(answer)  # the form of a GSM8K answer, which the base model does not use


def test_the_demo_learns_and_leaves_its_page(tmp_path):
    aletheia_command("demo", "--out", tmp_path / "demo", "--steps", 8)
    uniform, plan = (Run.read(tmp_path / "demo" / arm) for arm in ("uniform", "plan"))
    for run in (uniform, plan):
        assert run.metrics.held_out_loss_after < run.metrics.held_out_loss_before
    assert plan.metrics.trainable_parameters < uniform.metrics.trainable_parameters
    assert plan.metrics.labelled_tokens == uniform.metrics.labelled_tokens  # the same batches
    assert "<svg" in (tmp_path / "demo" / "report.html").read_text()
    assert json.loads((tmp_path / "demo" / "scores.json").read_text())["format"] == "aletheia-scores"


@needs_gsm8k
def test_nf4_keeps_the_order_of_the_scores(base, tmp_path):
    """Of modules with the published five rows; of layers, many of which score alike, with twenty."""
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    data = aletheia.load_data(str(GSM8K / "train.jsonl"), base.tokenizer)
    quantized = aletheia.load(str(tmp_path), "float32", quantize="nf4").model
    one, other = aletheia.probe(base.model, data), aletheia.probe(quantized, data)
    assert other.model.is_same_model(one.model)
    assert spearmanr(list(one.modules.values()), list(other.modules.values())).statistic >= 0.95
    one, other = aletheia.probe(base.model, data, 20), aletheia.probe(quantized, data, 20)
    assert spearmanr(one.layers, other.layers).statistic >= 0.95
