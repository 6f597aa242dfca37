"""The calibration times the steps of the run, measures every part, and leaves the model alone."""

import itertools
import random
from functools import partial

import numpy as np
import pytest
import torch
from tape import REPLAYS, TapeRecorder, attend_in_one
from test_compiled import graphs  # noqa: F401, a fixture
from test_waiting import as_on_a_gpu
from tiny import make_model

import aletheia
from aletheia.anatomy.fingerprint import identify
from aletheia.anatomy.read import read_anatomy
from aletheia.errors import SettingsError, TrainingError
from aletheia.execution import backend, packed
from aletheia.execution.cuda.graphs import graphed_layers
from aletheia.planning.cost import layer_costs, measured_costs
from aletheia.prefix import source
from aletheia.probing.timings import Timings
from aletheia.training import packing, timed
from aletheia.training.averaging import WeightAverage
from aletheia.training.calibrate import _average_batch, _parts
from aletheia.training.loop import RowTrainer
from aletheia.training.processes import Launch
from aletheia.training.settings import TrainSettings
from aletheia.training.timed import COMPILED_WARM_UP, Step

KINDS = 6  # of steps, in each round


@pytest.fixture
def brief(monkeypatch):
    """Every kind of step is timed once after its warm-up."""
    monkeypatch.setattr(timed, "MOST_REPEATS", 1)


@pytest.fixture
def marks(brief, monkeypatch):
    """For each measurement: what a function that the test sets returns at the beginning and at the end of each step."""
    seen, own = {}, timed._Watch.mark
    now = [lambda: None]

    def mark(watch):
        own(watch)
        seen.setdefault(id(watch), (watch, []))[1].append(now[0]())

    monkeypatch.setattr(timed._Watch, "mark", mark)
    return now, lambda: [found for _, found in seen.values()]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "bloom", "qwen3_moe"])
def test_every_part_is_measured_and_the_model_is_left_as_it_was(family, examples, brief, monkeypatch):
    seconds = itertools.cycle((12.0, 2.5, 4.0, 3.5, 5.0, 0.8))  # every kind of step runs; its time is not the machine's
    monkeypatch.setattr(timed._Watch, "seconds", property(lambda watch: next(seconds)))
    model = make_model(family).train()
    before, config = identify(model), model.config.to_dict()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    timings = aletheia.calibrate(model, examples, batch_size=4, rounds=1)
    assert all(module.training for module in model.modules())
    assert identify(model) == before
    assert model.config.to_dict() == config
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("forward" in module.__dict__ or module._forward_pre_hooks for module in model.modules())
    assert len(timings.layers) == 4
    assert all(layer.forward > 0 for layer in timings.layers)
    assert all(layer.backward > 0 for layer in timings.layers)
    assert timings.head > 0
    assert timings.baseline > sum(layer.forward for layer in timings.layers)
    assert timings.batch_size == 4
    assert "low-rank products in place" in timings.computed_by
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state[1:]


@pytest.fixture
def prefixes(monkeypatch):
    """The batches whose stored states are computed."""
    found, own = [], source.prefix_output
    monkeypatch.setattr(
        source, "prefix_output", lambda model, boundary, batch: found.append(batch) or own(model, boundary, batch)
    )
    return found


@pytest.mark.parametrize("packs", ["on", "off"])
@pytest.mark.parametrize("behind", [True, False])
def test_the_prefix_is_timed_as_the_first_epoch_computes_it(packs, behind, examples, prefixes, brief, monkeypatch):
    """On a GPU in one pass over the batch as it is, packed or padded; on a CPU row by row."""
    if behind:
        as_on_a_gpu(monkeypatch)
    timings = aletheia.calibrate(make_model("llama"), examples, batch_size=4, packing=packs, rounds=1)
    shapes = {(tuple(batch["input_ids"].shape), "cu_seq_lens_q" in batch) for batch in prefixes}
    if not behind:
        assert {(shape[0], is_packed) for shape, is_packed in shapes} == {(1, False)}
        assert len(prefixes) == 5 * 4  # rows: of four kinds of step from stored states, and of the first epoch alone
        return
    (((rows, length), is_packed),) = shapes
    assert is_packed == (packs == "on")
    assert rows * length == pytest.approx(timings.tokens, rel=0.25)
    assert (rows == 1) == is_packed


def test_packed_steps_are_timed_where_rows_are_packed(examples, brief, monkeypatch):
    """By default where one kernel attends to all rows."""
    monkeypatch.setattr(packing, "packing_pays", lambda model: True)
    batches, own = [], RowTrainer.training_step
    monkeypatch.setattr(RowTrainer, "training_step", lambda *given: batches.append(given[2]) or own(*given))
    timings = aletheia.calibrate(make_model("llama"), examples, batch_size=4, rounds=1)
    assert "rows packed without padding" in timings.computed_by
    assert len(batches) == 2 * 4  # a step and its warm-up of each kind of ours; the baseline is transformers' own
    lengths = batches[0]["cu_seq_lens_q"].diff()
    assert len(lengths) == 4
    assert {tuple(batch["input_ids"].shape) for batch in batches} == {(1, int(lengths.sum()))}
    assert timings.tokens == pytest.approx(examples.tokens / len(examples) * 4, rel=0.1)


class Broken(TapeRecorder):
    """Cannot record."""

    def record(self, run):
        raise RuntimeError("no memory for it")


@pytest.mark.parametrize("recorder", [TapeRecorder, Broken])
def test_recorded_steps_are_timed_once_they_are_recorded(recorder, examples, marks, monkeypatch):
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(packing, "is_behind", lambda device: True)
    monkeypatch.setattr(packed, "_one_by_one", attend_in_one)
    monkeypatch.setattr(backend, "graphed_layers", partial(graphed_layers, recorder=recorder))
    recorded, own = [0], recorder.warm_up
    monkeypatch.setattr(
        recorder, "warm_up", lambda self, run: recorded.__setitem__(0, recorded[0] + 1) or own(self, run)
    )
    now, found = marks
    now[0] = lambda: (recorded[0], REPLAYS[0])
    lines = []
    settings = {"batch_size": 4, "packing": "on", "cuda_graphs": True}
    timings = aletheia.calibrate(make_model("llama"), examples, rounds=1, show_progress=lines.append, **settings)
    assert len(found()) == KINDS
    for number, (first, *_, start, end) in enumerate(found()):
        assert start[0] - first[0] == (number > 0)  # recorded before, but for the baseline
        assert end[0] == start[0]  # and not meanwhile
        assert (end[1] > start[1]) == (number > 0 and recorder is TapeRecorder)
    said = {line.split(" for ")[0] for line in lines if line.startswith("graphs")}
    if recorder is Broken:
        assert "layers as CUDA graphs" not in timings.computed_by
        assert said >= {"graphs off"}
    else:
        assert "layers as CUDA graphs" in timings.computed_by
        assert "graphs 2 frozen layers recorded" in said
    assert timings.tokens % 64 == 0  # filled up


def test_compiled_steps_are_timed_once_they_are_compiled(graphs, examples, marks):  # noqa: F811
    now, found = marks
    now[0] = lambda: len(graphs)
    timings = aletheia.calibrate(make_model("llama", 2), examples, batch_size=4, compile_layers=True, rounds=1)
    assert "compiled layers" in timings.computed_by
    assert graphs
    assert [start for *_, start, end in found() if end != start] == []
    assert [len(compiled) for compiled in found()] == [COMPILED_WARM_UP + 2] * KINDS


@pytest.mark.parametrize("kind", ["off", "selective", "full"])
def test_what_is_computed_again_is_timed(kind, examples, brief):
    timings = aletheia.calibrate(
        make_model("llama"), examples, batch_size=4, gradient_checkpointing=kind, rounds=1, show_progress=False
    )
    again = [name for name in timings.computed_by if "recomputation" in name]
    assert again == ([] if kind == "off" else [f"{kind} recomputation"])


@pytest.mark.parametrize(("epochs", "averages"), [(3, True), (1, False)])
def test_weights_are_averaged_where_the_run_would(epochs, averages, examples, brief, monkeypatch):
    updates = []
    monkeypatch.setattr(WeightAverage, "update", lambda average, step: updates.append(step))
    aletheia.calibrate(make_model("llama"), examples, batch_size=4, epochs=epochs, rounds=1)
    assert bool(updates) == averages


def test_what_cannot_be_timed_is_refused(examples, monkeypatch):
    with pytest.raises(SettingsError, match="`settings` and `seed` are both given"):
        aletheia.calibrate(make_model("llama"), examples, TrainSettings(), seed=1)
    with pytest.raises(SettingsError, match="`cuda_graphs` is on, but the model is on cpu"):
        aletheia.calibrate(make_model("llama"), examples, cuda_graphs=True, packing="on")
    monkeypatch.setattr(Launch, "here", lambda: Launch(0, 2))
    with pytest.raises(TrainingError, match="steps are timed in one process, found 2"):
        aletheia.calibrate(make_model("llama"), examples)


def test_timings_of_earlier_releases_name_no_ways():
    part = {"forward": 1.0, "backward": 2.0, "adapter_fixed": 0.1, "adapter_per_parameter": 1e-6}
    known = {"device": "cpu", "dtype": "float32", "threads": 1, "batch_size": 4, "tokens": 40.0, "random_padding": 1.0}
    read = Timings(**known, layers=(part,), head=1.0, baseline=9.0, baseline_rank=16, seconds=1.0)
    assert read.computed_by == ()


def test_seconds_are_shared_out_so_that_steps_come_back():
    """Steps that take what the cost model says, in a model with layers of two shapes, give the parts back."""
    model = make_model("llama", layers=6)
    for layer in model.model.layers[4:]:
        layer.mlp = torch.nn.Sequential(torch.nn.Linear(32, 400), torch.nn.Linear(400, 32))
    anatomy = read_anatomy(model)
    batch = {"input_ids": torch.ones(2, 10), "labels": torch.ones(2, 10, dtype=torch.int64)}
    operations = layer_costs(anatomy, {module.name: 16 for module in anatomy.modules}, 16, 10, 0.9)
    features = [sum(module.lora_parameters(1) for module in anatomy.in_layer(layer)) for layer in range(6)]
    upper = range(3, 6)
    steps = [Step([5], 16), Step(upper, 16), Step([3], 16), Step(upper, 64), Step(upper, 16, "prefix")]
    for step in steps:
        k = min(step.layers)
        seconds = 2e-9 * sum(operations.forward[:k])
        if step.way == "fast":
            seconds = 0.5 + 3e-9 * (sum(operations.forward[k:]) + sum(operations.backward[k:]))
            seconds += sum((1e-6 + 1e-7 * step.rank) * features[layer] for layer in step.layers)
        step.seconds.append(seconds)
    layers, head = _parts(anatomy, steps, batch, tokens=40)  # twice the tokens that were timed
    assert head == pytest.approx(2 * 0.5, rel=1e-5)
    for layer, found in enumerate(layers):
        assert found.forward == pytest.approx(4e-9 * operations.forward[layer], rel=1e-5)
        both = operations.forward[layer] + operations.backward[layer]
        assert found.forward + found.backward == pytest.approx(6e-9 * both, rel=1e-4)
        assert found.adapter_fixed == pytest.approx(2e-6 * features[layer], rel=1e-4)
        assert found.adapter_per_parameter == pytest.approx(2e-7, rel=1e-4)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_smallest_models_are_calibrated_too(layers, examples, brief):
    model = make_model("llama", layers)
    timings = aletheia.calibrate(model, examples, batch_size=4, rounds=1)
    assert len(timings.layers) == layers
    anatomy = read_anatomy(model)
    costs = measured_costs(anatomy, {module.name: 16 for module in anatomy.modules}, 16, timings)
    assert costs.cached_step(range(layers)) > 0  # which part of it is whose cannot be told where there is one layer


def test_batches_are_of_average_size(examples):
    mean = {}
    for name, options in (
        ("grouped", {"packing": "off"}),
        ("random", {"packing": "off", "group_by_length": False}),
        ("packed", {"packing": "on"}),
    ):
        rows, mean[name] = _average_batch(examples, TrainSettings(**options))
        lengths = [len(row) for row in rows.examples]
        assert len(lengths) == 4
        size = sum(lengths) if name == "packed" else 4 * max(lengths)
        assert size == pytest.approx(mean[name], rel=0.05 if name == "packed" else 0.25)
    assert mean["random"] > 1.02 * mean["grouped"]
