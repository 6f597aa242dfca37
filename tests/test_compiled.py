"""Compiled layers: the loss and gradients of layers that are not, whatever the shape, from one piece of code a kind."""

import pytest
import torch
from tape import attend_in_one
from test_packed import ROWS, row, trained
from test_prefix import BOUNDARY, adapted, difference, gradients
from tiny import make_model

import aletheia
from aletheia.anatomy.read import find_layers
from aletheia.data.batches import collate, collate_packed
from aletheia.errors import SettingsError, TrainingError
from aletheia.execution import packed
from aletheia.execution.backend import compile_seconds, entered, step_ways
from aletheia.execution.compiled import compiled_layers
from aletheia.prefix.boundary import frozen_prefix
from aletheia.reporting.comparison import repeat_command


@pytest.fixture
def graphs(monkeypatch):
    """Layers are traced as ever, and the graphs are run as they are; how many there were."""
    torch.compiler.reset()
    found, compile_as_it_is = [], torch.compile

    def backend(graph, inputs):
        found.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda forward, **given: compile_as_it_is(forward, backend=backend, **given))
    yield found
    torch.compiler.reset()


@pytest.fixture
def one_kernel(monkeypatch):
    """Attention by rows as one function that a graph can hold, as on a GPU."""
    monkeypatch.setattr(packed, "_one_by_one", attend_in_one)


BATCHES = ([ROWS[0], ROWS[1]], ROWS, [row(33, 5), row(12, 6), row(40, 7)], ROWS[1:])


@pytest.mark.parametrize("recompute", ["off", "full"])
@pytest.mark.parametrize("packs", [False, True])
def test_every_layer_learns_what_it_learns_uncompiled(packs, recompute, graphs, one_kernel):
    model = adapted(layers=6)
    make = collate_packed if packs else lambda rows: collate(rows, 0)
    with frozen_prefix(model), entered(model, step_ways(model, packed=packs)):
        expected = [gradients(model, make(rows)) for rows in BATCHES]
    ways = step_ways(model, packed=packs, compiled=True, recompute=recompute)
    with frozen_prefix(model), entered(model, ways):
        for rows, wanted in zip(BATCHES, expected, strict=True):
            assert difference(gradients(model, make(rows)), wanted) < 1e-5
        seen = len(graphs)
        for rows, wanted in zip(BATCHES, expected, strict=True):
            assert difference(gradients(model, make(rows)), wanted) < 1e-5
    assert len(graphs) == seen  # nothing is compiled twice
    assert seen <= 4  # the lowest layer, whose input needs no gradient, and the others; one or two sizes of a batch


def test_another_phase_uses_the_same_code(graphs):
    model = adapted(layers=6)
    batch = collate(ROWS, 0)
    for _ in range(2):
        with frozen_prefix(model), entered(model, step_ways(model, compiled=True)):
            gradients(model, batch)
            seen = len(graphs)
    assert len(graphs) == seen == 2


def test_layers_below_and_a_key_value_cache_run_as_they_are(graphs):
    model = adapted()
    layers = find_layers(model)[1]
    with compiled_layers(model):
        assert ["forward" in layer.__dict__ for layer in layers] == [index >= BOUNDARY for index in range(len(layers))]
        ids = collate(ROWS[:1], 0)["input_ids"]
        found = model.eval().generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert not graphs
    assert not any("forward" in layer.__dict__ for layer in layers)
    assert torch.equal(found, model.generate(input_ids=ids, max_new_tokens=3, do_sample=False))


@pytest.fixture(scope="module")
def plan(examples):
    return aletheia.plan(aletheia.probe(make_model("llama"), examples, batches=2), policy="last", freeze_after=0.25)


def test_a_compiled_run_is_one_that_is_not(plan, examples, tmp_path, graphs):
    plain = trained(plan, examples, tmp_path / "plain")
    before = compile_seconds()
    run = trained(plan, examples, tmp_path / "compiled", compile_layers=True)
    assert run.metrics.held_out_loss_after == pytest.approx(plain.metrics.held_out_loss_after, rel=1e-4)
    assert 0 < run.metrics.compile_seconds == compile_seconds() - before
    assert run.metrics.compile_seconds < run.metrics.seconds.train + run.metrics.seconds.eval
    assert "compiled layers" in run.metrics.steps_computed_by
    assert "--compile-layers" in " ".join(repeat_command(run))
    assert plain.metrics.compile_seconds == 0


def test_it_does_not_go_with_selective_recomputation():
    with pytest.raises(SettingsError, match="`compile_layers` is given with `gradient_checkpointing` selective"):
        aletheia.TrainSettings(compile_layers=True, gradient_checkpointing="selective")


def test_adapted_experts_are_refused():
    model = adapted("qwen3_moe")
    with pytest.raises(TrainingError, match=r"the plan adapts experts.*expected it off"), compiled_layers(model):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_by_the_real_compiler(dtype):
    model = adapted(layers=4).to(dtype)
    with frozen_prefix(model), entered(model, step_ways(model)):
        expected = [gradients(model, collate(rows, 0)) for rows in BATCHES]
    with frozen_prefix(model), entered(model, step_ways(model, compiled=True)):
        for rows, wanted in zip(BATCHES, expected, strict=True):
            loss, grad = gradients(model, collate(rows, 0))
            assert difference((loss, grad.float()), (wanted[0], wanted[1].float())) < (
                1e-5 if dtype == torch.float32 else 0.05
            )
