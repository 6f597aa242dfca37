"""Whether training fits is decided by all the memory there is, not by what happens to be free."""

import json
from dataclasses import replace

import pytest
import torch

import aletheia
from aletheia.anatomy import device_memory
from aletheia.data.examples import NO_LOSS, Example
from aletheia.data.order import training_batches
from aletheia.job import fine_tune as fine_tune_module
from aletheia.job import room as room_module
from aletheia.job import source as source_module
from aletheia.job.room import Room, largest_step, room_for
from aletheia.job.settings import JobSettings
from aletheia.planning.memory import PROCESS_BYTES
from aletheia.training.settings import TrainSettings

CPU = torch.device("cpu")


def step_of(examples, **settings):
    return largest_step(examples, TrainSettings(batch_size=4, **settings), torch.bfloat16, CPU, resident=True)


def test_the_largest_padded_batch_is_of_the_longest_rows(examples):
    longest = max(map(len, examples.examples))
    step = step_of(examples, epochs=2)
    assert (step.tokens, step.row_tokens, step.dtype) == (4 * longest, longest, "bfloat16")


def test_the_largest_packed_batch_is_the_largest_of_the_run(examples):
    lengths = [len(row) for row in examples.examples]
    expected = {}
    for order in ("grouped", "balanced", "random"):
        batches = training_batches(lengths, 4, 2 * len(lengths) // 4, 3, order)
        expected[order] = max(sum(lengths[row] for row in batch) for batch in batches)
    assert expected["balanced"] < expected["random"] < expected["grouped"]
    for order, grouped in (("balanced", None), ("random", False), ("grouped", True)):
        step = step_of(examples, epochs=2, packing="on", seed=3, group_by_length=grouped)
        assert step.tokens == expected[order]


def long_row(tokens):
    return Example([1] * tokens, [NO_LOSS] * (tokens // 4) + [1] * (tokens - tokens // 4), "a long row")


@pytest.mark.parametrize("packing", ["off", "on"])
def test_the_largest_held_out_batch_is_that_of_a_training_batch_or_the_longest_row(packing, examples):
    """Not so many times as many tokens as the longest rows have."""
    data, training = examples.subset(range(30)), TrainSettings(batch_size=4, packing=packing)
    longest = max(map(len, data.examples))
    alike = replace(data, examples=[long_row(longest)] * 9)
    step = largest_step(data, training, torch.bfloat16, CPU, resident=True, held_out=alike)
    found = step.held_out
    assert found.row_tokens == longest
    assert 0.7 * step.tokens < found.tokens <= step.tokens
    assert found.labelled_share == pytest.approx(0.75, abs=0.02)
    longer = replace(data, examples=[long_row(3000), *alike.examples])
    found = largest_step(data, training, torch.bfloat16, CPU, resident=True, held_out=longer).held_out
    assert (found.tokens, found.row_tokens, found.labelled_share) == (3000, 3000, 0.75)


def test_a_held_out_row_too_long_for_memory_is_told(monkeypatch, data_file, model_folder, tmp_path):
    """A longer row is predicted to take more; training, which fits, computes nothing again for its sake."""
    long_file = tmp_path / "long.jsonl"
    long_file.write_text(json.dumps({"question": "say red", "answer": "red " * 1500}) + "\n")
    data = {"data": str(data_file), "eval_data": str(long_file), "max_length": 2048}
    plain, _ = predicted(monkeypatch, model_folder, data | {"eval_data": str(data_file)}, tmp_path)
    taken, notes = predicted(monkeypatch, model_folder, data, tmp_path)
    assert not notes
    assert taken.memory_bytes - PROCESS_BYTES > 2 * (plain.memory_bytes - PROCESS_BYTES)
    between = (plain.memory_bytes + taken.memory_bytes) // 2
    again, notes = predicted(monkeypatch, model_folder, data, tmp_path, between)
    assert (again.memory_bytes, again.recompute) == (taken.memory_bytes, "off")
    assert len(notes) == 1
    assert "evaluating held-out rows of up to 2,048 tokens" in notes[0]
    assert "set a lower `max_length`" in notes[0]


def predicted(monkeypatch, model_folder, data, out, usable=10**12):
    monkeypatch.setattr(room_module, "usable_memory_bytes", lambda device: usable)
    monkeypatch.setattr(room_module, "free_memory_bytes", lambda device: 10**12)
    found = aletheia.dry_run(
        str(model_folder), data, out / "run", {"policy": "last"}, {"steps": 2}, say=lambda line: None
    )
    return found, [note for note in found.notes if "predicted to take" in note]


def test_what_is_free_decides_nothing_and_is_told(monkeypatch):
    monkeypatch.setattr(room_module, "total_memory_bytes", lambda device: 100 * 10**9)
    monkeypatch.setattr(room_module, "usable_memory_bytes", lambda device: 80 * 10**9)
    monkeypatch.setattr(room_module, "own_memory_bytes", lambda device: 10**9)
    found = []
    for free in (10**9, 90 * 10**9):
        monkeypatch.setattr(room_module, "free_memory_bytes", lambda device, free=free: free)
        room = Room(CPU, None)
        found.append((room.usable_bytes, room.why_no_early_layers(70 * 10**9, False)))
        assert ("2.0 GB are free now" in (room.warning(70 * 10**9) or "")) == (free == 10**9)
    assert found == [(80 * 10**9, None)] * 2
    reason = Room(CPU, None).why_no_early_layers(81 * 10**9, False)
    assert reason is not None
    assert "to take 81.0 GB, more than 80.0 GB (80% of 100.0 GB in total)" in reason
    assert "more than `max_memory` of 6.0 GB" in Room(CPU, 6 * 10**9).why_no_early_layers(7 * 10**9, False)


def test_the_same_command_decides_the_same_whatever_else_runs(monkeypatch, data_file, model_folder, tmp_path):
    """A plan of a long run: its layers and phases, and what is said."""
    monkeypatch.setattr(room_module, "own_memory_bytes", lambda device: 0)
    plans, told = [], []
    for number, free in enumerate((10**12, 10**6)):
        for module in (device_memory, room_module):
            monkeypatch.setattr(module, "free_memory_bytes", lambda device=None, free=free: free)
        training = {"epochs": 3, "batch_size": 4, "cache": "off"}
        out, lines = tmp_path / str(number), []
        plans.append(
            aletheia.fine_tune(str(model_folder), str(data_file), out, training=training, say=lines.append).plan
        )
        told.append([line for line in lines if "free now" in line])
    assert plans[0].layers == plans[1].layers
    assert plans[0].early_layers == plans[1].early_layers
    assert [len(lines) for lines in told] == [0, 1]


@pytest.mark.parametrize(("plan", "unlike"), [({}, ""), ({"target": "quality"}, ", unlike `target` quality says")])
def test_layers_that_do_not_fit_do_not_learn_and_the_figures_are_told(
    plan, unlike, monkeypatch, data_file, model_folder, tmp_path
):
    monkeypatch.setattr(room_module, "usable_memory_bytes", lambda device: 10**6)
    lines: list[str] = []
    training = {"epochs": 3, "batch_size": 4, "cache": "off", "steps": None}
    run = aletheia.fine_tune(
        str(model_folder), str(data_file), tmp_path / "run", plan=plan, training=training, say=lines.append
    )
    assert not run.plan.early_layers
    told = next(line for line in lines if "do not learn" in line)
    assert f"do not learn{unlike}: training every layer is predicted to take 1.2 GB, more than 0.0 GB" in told


@pytest.mark.parametrize("limit", [{}, {"max_memory": "8GB"}])
def test_a_prefix_that_is_to_leave_memory_does_not_learn_first(limit, data_file, model_folder, tmp_path):
    lines: list[str] = []
    training = {"epochs": 3, "batch_size": 4, "free_prefix": True}
    model = {"model": str(model_folder), **limit}
    run = aletheia.fine_tune(model, str(data_file), tmp_path / "run", training=training, say=lines.append)
    assert not run.plan.early_layers
    assert f"note: layers below {run.plan.boundary} do not learn: `free_prefix` drops them from memory" in lines
    assert run.metrics.cache_reason == "filled before the first step"


def test_a_model_that_turns_out_too_large_is_streamed_whatever_the_target(
    monkeypatch, data_file, model_folder, tmp_path
):
    monkeypatch.setattr(source_module, "RESIDENT_SHARE", 0.0)
    lines: list[str] = []
    training = {"steps": 2, "batch_size": 2, "evaluations": 1}
    run = aletheia.fine_tune(
        str(model_folder), str(data_file), tmp_path / "run", {"target": "balanced"}, training, say=lines.append
    )
    assert not run.plan.early_layers
    assert any("do not learn, unlike `target` balanced says" in line for line in lines)


def test_a_streamed_cache_is_filled_with_no_more_tokens_at_once_than_training_has(
    monkeypatch, data_file, model_folder, tmp_path
):
    """Held-out rows that are longer than those of training come in smaller batches."""
    monkeypatch.setattr(source_module, "RESIDENT_SHARE", 0.0)
    own, sizes = fine_tune_module.fill_streamed, []

    def watched(*given):
        sizes.append(given[4])
        return own(*given)

    monkeypatch.setattr(fine_tune_module, "fill_streamed", watched)
    long_file = tmp_path / "long.jsonl"
    long_file.write_text(json.dumps({"question": "say red", "answer": "red " * 14}) + "\n")
    for number, held_out in enumerate((data_file, long_file)):
        data = {"data": str(data_file), "eval_data": str(held_out)}
        training = {"steps": 1, "batch_size": 4, "evaluations": 1}
        aletheia.fine_tune(str(model_folder), data, tmp_path / str(number), training=training, say=lambda line: None)
    assert sizes[0] == 4
    assert 1 <= sizes[1] < 4


TAKES = {"off": 9 * 10**9, "selective": 8 * 10**9, "full": 10**9}


@pytest.mark.parametrize(
    ("asked", "usable", "taken"),
    [
        ({}, 10 * 10**9, "off"),
        ({}, 8 * 10**9, "selective"),
        ({}, 7 * 10**9, "full"),
        ({}, 10**8, "off"),  # nothing helps
        ({"gradient_checkpointing": "off"}, 7 * 10**9, "off"),
        ({"compile_layers": True}, 8 * 10**9, "full"),  # compiled layers hide their products
    ],
)
def test_backward_computes_again_what_would_not_fit(
    asked, usable, taken, monkeypatch, data_file, model_folder, tmp_path
):
    """Lower layers go on to learn at first; what was asked for is done."""
    monkeypatch.setattr(torch, "compile", lambda forward, **given: forward)
    monkeypatch.setattr(room_module, "usable_memory_bytes", lambda device: usable)
    monkeypatch.setattr(fine_tune_module, "bytes_by", lambda base, plan: lambda step: TAKES[step.recompute])
    monkeypatch.setattr(fine_tune_module, "every_layer_bytes", lambda scores, settings, step: TAKES[step.recompute])
    lines: list[str] = []
    training = {"steps": 2, "batch_size": 4, "cache": "off", "evaluations": 1} | asked
    run = aletheia.fine_tune(
        str(model_folder), str(data_file), tmp_path / "run", {"target": "speed"}, training, say=lines.append
    )
    assert run.metrics.settings.gradient_checkpointing == taken
    assert bool(run.plan.early_layers) == (TAKES[taken] <= usable)
    notes = [line for line in lines if "is used and takes" in line]
    assert [f"`gradient_checkpointing` {taken} is used" in line for line in notes] == [True] * (taken != "off")


def test_a_limit_that_was_given_bounds_the_layers_instead(data_file, model_folder, tmp_path):
    base = aletheia.load(str(model_folder))
    data = aletheia.load_data(str(data_file), base.tokenizer)
    held_out = data.subset(range(4))
    for limit, kinds in ((None, ("off", "selective", "full")), ("6GB", ("off",))):
        settings = JobSettings.of({"model": str(model_folder), "max_memory": limit}, str(data_file), None, None)
        assert room_for(base, data, held_out, settings)[0].kinds == kinds
