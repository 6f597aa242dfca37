"""Layers as recorded graphs learn what the layers learn; calls that are not like the recorded one run as ever."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from tape import REPLAYS, TapeRecorder, attend_in_one
from test_packed import row, trained
from test_prefix import adapted, difference, gradients
from test_waiting import as_on_a_gpu
from tiny import make_model

import aletheia
from aletheia.anatomy.read import find_layers
from aletheia.data.batches import PackSize, collate, collate_packed
from aletheia.errors import SettingsError, TrainingError
from aletheia.execution import backend, packed
from aletheia.execution.backend import entered, step_ways
from aletheia.execution.cuda.graphs import graphed_layers
from aletheia.prefix.boundary import frozen_prefix
from aletheia.prefix.stored import PREFIX, prefix_output, stored_prefix
from aletheia.reporting.comparison import repeat_command
from aletheia.training import packing

LENGTHS = ([20, 14, 30], [31, 12, 21], [17, 28, 19], [22, 22, 20])  # as many tokens each, and the longest below 32
BATCHES = [[row(length, 10 * at + length) for length in lengths] for at, lengths in enumerate(LENGTHS)]
SHAPE = (1, 64)


@pytest.fixture(autouse=True)
def one_kernel(monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(packed, "_one_by_one", attend_in_one)


@pytest.fixture
def said():
    return []


@pytest.fixture
def graphed(said):
    return lambda model, shape=SHAPE, recorder=TapeRecorder: graphed_layers(model, shape, said.append, recorder)


def own_calls(model, monkeypatch):
    """How often each layer's own attention runs."""
    counts = [0] * len(find_layers(model)[1])
    for index, layer in enumerate(find_layers(model)[1]):
        attention = next(module for name, module in layer.named_children() if "attn" in name)
        forward = type(attention).forward

        def counted(self, *args, index=index, forward=forward, **kwargs):
            counts[index] += 1
            return forward(self, *args, **kwargs)

        attention.__class__ = type(type(attention).__name__, (type(attention),), {"forward": counted})
    return counts


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "phi3"])
def test_steps_with_an_optimizer_are_the_same(family, graphed, said, monkeypatch):
    runs = []
    for uses in (False, True):
        model = adapted(family)
        calls = own_calls(model, monkeypatch)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        steps = []
        with frozen_prefix(model), entered(model, step_ways(model, packed=True)):
            for rows in 2 * BATCHES if not uses else ():
                steps.append(gradients(model, collate_packed(rows)))
                optimizer.step()
            if uses:
                with graphed(model):
                    for rows in 2 * BATCHES:
                        steps.append(gradients(model, collate_packed(rows)))
                        optimizer.step()
        runs.append(steps)
    assert calls == [3] * 4  # seen, compared, recorded; then never again
    assert [line.split(" in ")[0] for line in said] == [
        "graphs 2 frozen layers recorded for 64 tokens",
        "graphs 2 layers that learn recorded for 64 tokens",
    ]
    for plain, ours in zip(*runs, strict=True):
        assert difference(ours, plain) < 1e-4


def test_from_stored_states(graphed, said):
    model = adapted()
    with entered(model, step_ways(model, packed=True)):
        batches = [collate_packed(rows) for rows in BATCHES]
        with frozen_prefix(model):
            expected = [gradients(model, batch) for batch in batches]
            for batch in batches:
                batch[PREFIX] = prefix_output(model, 2, batch)
        with stored_prefix(model, 2), frozen_prefix(model), graphed(model):
            found = [gradients(model, batch) for batch in 2 * batches]
    assert [line for line in said if "frozen" in line] == []
    assert "2 layers that learn recorded" in said[0]
    for ours, plain in zip(found, 2 * expected, strict=True):
        assert difference(ours, plain) < 1e-5


def test_a_filler_without_states_does_not_drown_what_is_compared(graphed, said):
    """A norm multiplies gradients at states of zero by 1 over the root of its epsilon, until nothing is finite."""
    model = adapted(layers=16, rms_norm_eps=1e-12)
    batch = collate_packed(BATCHES[0], PackSize(96, 3))
    with frozen_prefix(model), entered(model, step_ways(model, packed=True)):
        batch[PREFIX] = prefix_output(model, 2, batch)
        batch[PREFIX][:, sum(LENGTHS[0]) :] = 0
        with stored_prefix(model, 2), graphed(model, shape=(1, 96)):
            for _ in range(3):
                gradients(model, batch)
    assert said[0].startswith("graphs 14 layers that learn recorded")


def test_padded_batches_of_one_shape(graphed, said):
    model = adapted(boundary=0)
    batches = [collate([row(length, length) for length in (24, 9, 15 + at)], 0) for at in range(4)]
    expected = [gradients(model, batch) for batch in batches]
    with graphed(model, (3, 24)):
        for batch, plain in zip(2 * batches, 2 * expected, strict=True):
            assert difference(gradients(model, batch), plain) < 1e-5
    assert "4 layers that learn recorded" in said[0]


@pytest.fixture
def recorded(graphed, said):
    """A model whose layers are recorded, and its batches."""
    model = adapted()
    batches = [collate_packed(rows) for rows in BATCHES]
    with frozen_prefix(model), entered(model, step_ways(model, packed=True)), graphed(model):
        for batch in batches[:2]:
            gradients(model, batch)
        assert len(said) == 2
        yield model, batches


def plain_gradients(model, *batches):
    """The sum over batches of gradients without graphs, from the layers' own forwards."""
    own = {layer: layer.__dict__.pop("forward") for layer in find_layers(model)[1]}
    try:
        model.zero_grad()
        losses = []
        for batch in batches:
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            losses.append(loss.item())
        grads = [parameter.grad.flatten().clone() for parameter in model.parameters() if parameter.requires_grad]
        model.zero_grad()
        return sum(losses), torch.cat(grads)
    finally:
        for layer, forward in own.items():
            layer.forward = forward


def grads_of(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.requires_grad])


def test_gradients_add_up_over_batches(recorded):
    model, batches = recorded
    wanted = plain_gradients(model, *batches[:3])
    losses = 0.0
    for batch in batches[:3]:
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        losses += loss.item()
    assert difference((losses, grads_of(model)), wanted) < 1e-5


def test_two_forwards_before_a_backward(recorded):
    model, batches = recorded
    wanted = plain_gradients(model, *batches[:2])
    loss = model(**batches[0], use_cache=False).loss + model(**batches[1], use_cache=False).loss
    loss.backward()
    assert difference((loss.item(), grads_of(model)), wanted) < 1e-5


def test_a_forward_without_backward_is_forgotten(recorded, monkeypatch):
    model, batches = recorded
    calls = own_calls(model, monkeypatch)
    model(**batches[0], use_cache=False)
    wanted = plain_gradients(model, batches[1])
    before = list(calls)
    assert difference(gradients(model, batches[1]), wanted) < 1e-5
    assert calls == before  # a replay


def test_a_second_backward_is_refused(recorded):
    model, batches = recorded
    model.zero_grad()
    output = model(**batches[0], use_cache=False)
    grad = torch.ones_like(output.logits)
    output.logits.backward(grad, retain_graph=True)
    with pytest.raises(TrainingError, match="differentiated twice"):
        output.logits.backward(grad)


def another_shape(model, batches):
    return collate_packed([row(40, 1), row(9, 2)])


def weights_elsewhere(model, batches):
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return batches[2]


def other_strength(model, batches):
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling = {name: 3 * scale for name, scale in module.scaling.items()}
    return batches[2]


@pytest.mark.parametrize("change", [another_shape, weights_elsewhere, other_strength])
def test_whatever_is_not_like_the_recording_runs_as_it_is(change, recorded):
    model, batches = recorded
    batch = change(model, batches)
    wanted = plain_gradients(model, batch)
    assert difference(gradients(model, batch), wanted) < 1e-5


def merged(model, module):
    module.merge()


def switched_off(model, module):
    module.enable_adapters(False)


def with_another_adapter(model, module):
    only_here = r".*layers\.2\.self_attn\.q_proj"
    model.add_adapter("other", LoraConfig(r=4, target_modules=only_here, init_lora_weights=False))
    module.set_adapter(["other"])


def stronger(model, module):
    module.scaling["default"] *= 3


def in_other_memory(model, module):
    module.base_layer.weight.data = module.base_layer.weight.data.clone() * 2


def in_evaluation(model, module):
    find_layers(model)[1][2].eval()


@pytest.mark.parametrize(
    "change", [merged, switched_off, with_another_adapter, stronger, in_other_memory, in_evaluation, "autocast"]
)
def test_a_layer_that_changed_runs_as_it_is(change, recorded, monkeypatch):
    """Whatever it is: the layers below go on as they did."""
    model, batches = recorded
    calls = own_calls(model, monkeypatch)
    module = find_layers(model)[1][2].self_attn.q_proj
    with torch.autocast("cpu", torch.bfloat16) if change == "autocast" else nullcontext():
        if change != "autocast":
            change(model, module)
        found = model(**batches[2], use_cache=False).loss
        replayed = [count == 0 for count in calls]
        own = {layer: layer.__dict__.pop("forward") for layer in find_layers(model)[1]}
        expected = model(**batches[2], use_cache=False).loss
    for layer, forward in own.items():
        layer.forward = forward
    assert replayed == ([False] * 4 if change == "autocast" else [True, True, False, True])
    torch.testing.assert_close(found, expected)


def test_evaluation_runs_as_it_is(recorded):
    model, batches = recorded
    model.eval()
    found = model(**batches[2], use_cache=False).logits
    with model.disable_adapter():
        without = model(**batches[2], use_cache=False).logits
    plain_gradients(model, batches[2])
    own = {layer: layer.__dict__.pop("forward") for layer in find_layers(model)[1]}
    torch.testing.assert_close(found, model(**batches[2], use_cache=False).logits)
    with model.disable_adapter():
        torch.testing.assert_close(without, model(**batches[2], use_cache=False).logits)
    for layer, forward in own.items():
        layer.forward = forward


class Broken(TapeRecorder):
    def record(self, run):
        raise RuntimeError("operation not permitted\nwhile it records")


class Wrong(TapeRecorder):
    def record(self, run):
        returned, _ = super().record(run)
        return returned, lambda: [tensor.mul_(2) for tensor in [returned] if isinstance(tensor, torch.Tensor)]


class WrongInside(TapeRecorder):
    """Gradients of the parameters of one layer in the middle are not those of a step; all else is."""

    def record(self, run):
        returned, replay = super().record(run)
        if not isinstance(returned, list):
            return returned, replay
        self.backwards = getattr(self, "backwards", 0) + 1
        is_wrong = self.backwards == 2
        return [returned[0], *(grad.clone().fill_(7) if is_wrong else grad for grad in returned[1:])], replay


@pytest.mark.parametrize(
    ("recorder", "reason"),
    [
        (Broken, "operation not permitted while it records"),
        (Wrong, "a replay differs from the layers' own results"),
        (WrongInside, "a replay differs from the layers' own results"),
    ],
)
def test_without_a_true_recording_layers_run_as_they_are(recorder, reason, graphed, said):
    model = adapted(boundary=0)
    batches = [collate_packed(rows) for rows in BATCHES]
    with entered(model, step_ways(model, packed=True)):
        expected = [gradients(model, batch) for batch in batches]
        with graphed(model, recorder=recorder):
            found = [gradients(model, batch) for batch in batches]
    assert said == [f"graphs off for 4 layers that learn: {reason}"]
    for ours, plain in zip(found, expected, strict=True):
        assert difference(ours, plain) < 1e-6


class Noisy(TapeRecorder):
    """Gradients in float32 of adapters on bfloat16 layers, in another rounding of their sums."""

    def record(self, run):
        returned, replay = super().record(run)

        def noisy():
            replay()
            for grad in returned[1:] if isinstance(returned, list) else ():
                grad.mul_(1 + 2**-7)

        return returned, noisy


@pytest.mark.parametrize(("dtype", "records"), [(torch.bfloat16, True), (torch.float32, False)])
def test_gradients_may_differ_by_the_rounding_of_the_layers(dtype, records, graphed, said):
    """A GPU's attention adds up in another order each time. Adapters are in float32, whatever the layers are in."""
    model = adapted(boundary=0).to(dtype)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.float() if "lora_" in name else parameter.data
    batches = [collate_packed(rows) for rows in BATCHES]
    with entered(model, step_ways(model, packed=True)), graphed(model, recorder=Noisy):
        for batch in batches:
            gradients(model, batch)
    recorded, off = "graphs 4 layers that learn recorded", "graphs off for 4 layers that learn: a replay differs"
    assert said[0].startswith(recorded if records else off)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_under_autocast_are_those_of_the_step(dtype, graphed, said):
    """As in Trainer's mixed precision, whose cache holds converted weights for one forward; float32: it is off."""
    steps = []
    for uses in (False, True):
        model = adapted(boundary=0)
        optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
        losses = []
        with graphed(model, (3, 24)) if uses else nullcontext():
            for at in range(5):
                batch = collate([row(length, length) for length in (24, 9, 15 + at)], 0)
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                    loss = model(**batch, use_cache=False).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        steps.append(losses)
    assert "4 layers that learn recorded" in said[0]
    assert steps[1] == pytest.approx(steps[0], rel=1e-3 if dtype == torch.bfloat16 else 1e-5)


def test_layers_that_return_more_run_as_they_are(graphed, said):
    model = adapted(boundary=0)
    layer = find_layers(model)[1][1]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: (forward(*args, **kwargs), torch.ones(2))
    layer.register_forward_hook(lambda module, args, output: output[0])
    expected = gradients(model, collate(BATCHES[0], 0))
    with graphed(model, (3, 30)):
        assert difference(gradients(model, collate(BATCHES[0], 0)), expected) < 1e-6
    assert "layers return more than hidden states" in said[0]


def test_hooks_inside_layers_keep_being_called(graphed, said):
    model = adapted(boundary=0)
    seen = []
    find_layers(model)[1][1].mlp.register_forward_hook(lambda *_: seen.append(None))
    with entered(model, step_ways(model, packed=True)), graphed(model):
        for rows in BATCHES:
            gradients(model, collate_packed(rows))
    assert len(seen) == len(BATCHES)
    assert "hooks inside" in said[0]


def test_layers_are_as_before_afterwards(graphed):
    model = adapted()
    with graphed(model):
        assert all("forward" in layer.__dict__ for layer in find_layers(model)[1])
    assert not any("forward" in layer.__dict__ for layer in find_layers(model)[1])


# --- in a run


@pytest.fixture(scope="module")
def plan(examples):
    """Layers 2 and 3 to the end, 0 and 1 for the first quarter of the steps."""
    return aletheia.plan(aletheia.probe(make_model("llama"), examples, batches=2), policy="last", freeze_after=0.25)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As on a GPU, with replays by the tape."""
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(packing, "is_behind", lambda device: True)
    monkeypatch.setattr(backend, "graphed_layers", partial(graphed_layers, recorder=TapeRecorder))


SETTINGS = {"steps": 15, "packing": "on", "evaluations": 3, "cache": "memory"}


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2, "batch_size": 2, "averaging": "on"}])
def test_a_run_with_graphs_is_the_run_without(settings, on_a_gpu, plan, examples, tmp_path):
    wanted = trained(plan, examples, tmp_path / "without", **SETTINGS | settings).metrics
    lines, before = [], REPLAYS[0]
    run = trained(plan, examples, tmp_path / "with", lines.append, cuda_graphs=True, **SETTINGS | settings)
    found = [line.split(" in ")[0] for line in lines if "graphs" in line]
    tokens = found[0].split(" for ")[1]
    assert found == [
        f"graphs 4 layers that learn recorded for {tokens}",
        f"graphs 2 frozen layers recorded for {tokens}",
        f"graphs 2 layers that learn recorded for {tokens}",
    ]
    micro_steps = settings.get("gradient_accumulation_steps", 1)
    every_layer = 2 * 4 * (3 * micro_steps)  # seen in the first of four steps; compared, and replayed in the others
    upper_half = 2 * 2 * (11 * micro_steps)
    assert REPLAYS[0] - before >= every_layer + upper_half
    assert "layers as CUDA graphs" in run.metrics.steps_computed_by
    assert "--cuda-graphs" in repeat_command(run)
    expected = [point.loss for point in wanted.train_curve]
    assert [point.loss for point in run.metrics.train_curve] == pytest.approx(expected, rel=1e-4)
    assert [point.loss for point in run.metrics.held_out_curve] == pytest.approx(
        [point.loss for point in wanted.held_out_curve], rel=1e-4
    )


def test_layers_that_were_freed_are_not_recorded(on_a_gpu, examples, tmp_path):
    plan = aletheia.plan(aletheia.probe(make_model("llama"), examples, batches=2), policy="last", freeze_after=0)
    lines = []
    settings = SETTINGS | {"cuda_graphs": True, "free_prefix": True}
    wanted = trained(plan, examples, tmp_path / "without", **SETTINGS).metrics
    found = trained(plan, examples, tmp_path / "with", lines.append, **settings).metrics
    assert [line.split(" recorded")[0] for line in lines if "graphs" in line] == ["graphs 2 layers that learn"]
    expected = [point.loss for point in wanted.train_curve]
    assert [point.loss for point in found.train_curve] == pytest.approx(expected, rel=1e-4)


def test_a_cpu_has_no_graphs(plan, examples, tmp_path):
    with pytest.raises(SettingsError, match="`cuda_graphs` is on, but the model is on cpu; expected a GPU"):
        trained(plan, examples, tmp_path / "run", packing="on", cuda_graphs=True)


def test_padded_batches_are_not_recorded(on_a_gpu, plan, examples, tmp_path):
    with pytest.raises(SettingsError, match="`cuda_graphs` is on, but batches are padded"):
        trained(plan, examples, tmp_path / "run", cuda_graphs=True)


@pytest.mark.parametrize("given", [{"packing": "off"}, {"gradient_checkpointing": "full"}])
def test_settings_that_exclude_graphs(given):
    with pytest.raises(SettingsError, match=f"`cuda_graphs` is given with `{next(iter(given))}`"):
        aletheia.TrainSettings(cuda_graphs=True, **given)
