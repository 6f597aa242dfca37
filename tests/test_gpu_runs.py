"""On a GPU: whole runs, going on after a stop, the memory they take, the probe and the command."""

import json
import signal
from dataclasses import replace

import pytest
import torch
from on_device import DTYPES, WIDE, base
from test_packed import row
from tiny import make_model

import aletheia
from aletheia.anatomy.device_memory import own_memory_bytes
from aletheia.anatomy.read import find_layers
from aletheia.data.batches import collate
from aletheia.errors import Interrupted
from aletheia.execution.cuda.trial import has_triton
from aletheia.execution.peak_memory import peak_memory_bytes, reset_peak_memory
from aletheia.planning.activations import Step
from aletheia.planning.memory import GPU_BYTES, PROCESS_BYTES, training_bytes
from aletheia.training.interrupts import SaveInTime

pytestmark = pytest.mark.gpu

RANK = 16
# of losses, relative, after the same steps: kernels of a GPU add up in another order each time, and a run that goes on
# computes stored states in batches of other shapes
AGAIN = {("cuda", torch.float32): 1e-4, ("cuda", torch.bfloat16): 1e-2}


class Stopped(SaveInTime):
    """SIGTERM in the eighth step, two after a checkpoint."""

    def on_step_begin(self, args, state, control, **kwargs):
        super().on_step_begin(args, state, control, **kwargs)
        if state.global_step == 7:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("dtype", "packing", "graphs"),
    [
        (torch.float32, "off", False),
        (torch.bfloat16, "off", False),
        (torch.bfloat16, "auto", False),
        (torch.bfloat16, "auto", True),
    ],
    ids=["float32", "bfloat16", "bfloat16-packed", "bfloat16-graphs"],
)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    dtype, packing, graphs, device, examples, tmp_path, monkeypatch
):
    graphs = graphs and device.type == "cuda"
    data, held_out = examples.subset(range(24)), examples.subset(range(24, 34))
    scores = aletheia.probe(base(dtype, device), examples, batches=2)
    plan = aletheia.plan(scores, policy="last", rank=RANK, freeze_after=0.25)

    def trained(out):
        settings = {"steps": 16, "save_steps": 3, "learning_rate": 3e-3, "evaluations": 4, "early_stop": False}
        settings |= {"packing": packing, "cache": "memory", "cuda_graphs": graphs, "show_progress": False}
        adapted = aletheia.adapt(base(dtype, device), plan)
        return aletheia.train(adapted, data, plan, tmp_path / out, held_out, **settings).metrics

    whole = trained("whole")
    with monkeypatch.context() as patched:
        patched.setattr("aletheia.training.train.SaveInTime", Stopped)
        with pytest.raises(Interrupted, match="after step 8 of 16"):
            trained("stopped")
    again = trained("stopped")
    same = AGAIN.get((device.type, dtype), 0)  # on a processor, every digit
    assert again.held_out_loss_after == pytest.approx(whole.held_out_loss_after, rel=same, abs=0)
    assert [point.loss for point in again.train_curve] == pytest.approx(
        [point.loss for point in whole.train_curve], rel=same, abs=0
    )
    assert whole.held_out_loss_after < 0.9 * whole.held_out_loss_before
    assert whole.settings.cache == again.settings.cache == "memory"
    packs = device.type == "cuda" and packing == "auto"
    assert whole.settings.packing == again.settings.packing == packs
    assert ("rows packed without padding" in again.steps_computed_by) == packs
    assert ("layers as CUDA graphs" in again.steps_computed_by) == graphs


def test_a_plan_for_less_memory_is_trained_in_it(device, examples, tmp_path):
    """A model of which half the layers fit, in batches of rows of one length, from a cache that is filled first."""
    on_gpu = device.type == "cuda"
    width, length, count = (1024, 512, 16) if on_gpu else (256, 128, 16)
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": 8, "head_dim": width // 8}
    rows = tuple(row(length, seed) for seed in range(2 * count))
    data = replace(examples, examples=rows, max_length=length)
    model = base(torch.bfloat16, device, layers=8, vocab_size=8 * width, **shape)
    scores = aletheia.probe(model, data, batches=1)
    ranks, share = {module.name: RANK for module in scores.anatomy.adaptable()}, rows[0].labelled_tokens / length
    step = Step(count * length, length, share, "bfloat16", on_gpu=on_gpu, resident=True)
    room = training_bytes(scores.anatomy, scores.weight_bytes, range(4, 8), ranks, step)
    plan = aletheia.plan(scores, percent=100, rank=RANK, max_memory=room, step=step)
    assert plan.layers == (4, 5, 6, 7)
    held = 0 if on_gpu else own_memory_bytes(device)  # the process, which a GPU's count does not have in it
    reset_peak_memory(device)
    run = aletheia.train(
        aletheia.adapt(model, plan), data, plan, tmp_path / "run", data.subset(range(count)), steps=3,
        batch_size=count, free_prefix=True, rescale=False, show_progress=False,
    )  # fmt: skip
    assert run.metrics.settings.packing == on_gpu
    assert run.metrics.boundary == 4
    own = GPU_BYTES if on_gpu else 0.8 * PROCESS_BYTES  # of which a part is what malloc keeps, as it does here
    assert peak_memory_bytes(device) - held < room - own


def batches_of(device):
    rows = [row(length, length) for length in (20, 31, 44, 25, 38)]
    return [{name: value.to(device) for name, value in collate([one], 0).items()} for one in rows]


def norms_by_layer(model, batches):
    """The norm of each weight's gradient by plain backpropagation, added up over the weights of a layer."""
    _, layers = find_layers(model)
    found = [0.0] * len(layers)
    for batch in batches:
        model.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        for index, layer in enumerate(layers):
            found[index] += sum(weight.grad.norm().item() for weight in layer.parameters())
    return found


@pytest.mark.parametrize(("dtype", "same"), zip(DTYPES, (1e-4, 0.02), strict=True), ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_probe_finds_the_norms_of_plain_gradients(family, dtype, same, device):
    model, batches = base(dtype, device, family), batches_of(device)
    found = aletheia.probe(model, batches).layers
    assert found == pytest.approx(norms_by_layer(model.float(), batches), rel=same)


def test_the_probe_is_the_published_method(device):
    """By the public package that implements it: labels are the inputs, one row a batch."""
    reference = pytest.importorskip("aletheia_lora.probe")
    model, batches = base(torch.float32, device, layers=6), batches_of(device)
    batches = [batch | {"labels": batch["input_ids"]} for batch in batches]
    found = aletheia.probe(model, batches).layers
    rows = [{name: batch[name][0] for name in ("input_ids", "attention_mask")} for batch in batches]
    expected = reference.gradient_probe(model, rows, 6, probe_batches=len(rows), compute_dtype=torch.float32)
    assert found == pytest.approx([expected[layer] for layer in range(6)], rel=1e-4)


def test_the_command_trains_on_the_device_and_says_how(device, run, tokenizer, data_file, tmp_path):
    make_model(**WIDE).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    code, _, err = run("train", "base", "--data", data_file, "--out", "run", "--epochs", 2)
    assert code == 0, err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    on_gpu = device.type == "cuda"
    used, ways = metrics["settings"], metrics["steps_computed_by"]
    assert used["device"] == device.type
    assert used["packing"] == ("rows packed without padding" in ways) == on_gpu
    assert used["dtype"] == "bfloat16" or not on_gpu
    loss = "loss by two kernels" if on_gpu and has_triton() else "loss in the buffer of its logits"
    assert {"low-rank products in place", "logits at labelled positions", loss} < {*ways}
    assert metrics["held_out_loss_after"] < metrics["held_out_loss_before"]
    assert metrics["peak_memory_bytes"] > 0
    assert (tmp_path / "run" / "report.html").exists()
