"""The order of rows: every row once in an epoch, in batches of similar rows, of equal size, or at random."""

import random
from collections import Counter
from dataclasses import replace
from itertools import combinations, islice

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_model
from torch.utils.data import DataLoader

import aletheia
from aletheia.data.examples import Example, Examples
from aletheia.data.order import batches_within, epoch_order, training_batches
from aletheia.reporting.comparison import repeat_command
from aletheia.runs.schema import UsedSettings
from aletheia.training import train as train_module
from aletheia.training.loop import (
    RowTrainer,
    batch_tokens,
    collator_of,
    fixed_size,
    planned_steps,
    rows_of_steps,
    rows_per_step,
)
from aletheia.training.settings import TrainSettings

ORDERS = ("grouped", "balanced", "random")
LENGTHS = [min(600, int(random.Random(seed).lognormvariate(5, 0.7))) for seed in range(1003)]  # skewed


def sizes(batches, lengths=LENGTHS):
    return [sum(lengths[row] for row in batch) for batch in batches]


@given(st.lists(st.integers(1, 500), max_size=60), st.integers(1, 1500), st.none() | st.integers(1, 9))
def test_batches_within_a_number_of_tokens(lengths, most, padded_rows):
    """Few batches, the longest row first: packed ones are fuller than half, padded ones full but for the last rows."""
    batches = batches_within(lengths, most, padded_rows)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    own = [[lengths[row] for row in batch] for batch in batches]
    taken = [sum(rows) if padded_rows is None else len(rows) * max(rows) for rows in own]
    assert all(tokens <= most or len(rows) == 1 for tokens, rows in zip(taken, own, strict=True))
    assert all(rows[0] == max(rows) for rows in own)
    if padded_rows is None:
        assert all(one + other > most for one, other in combinations(taken, 2))
    else:
        assert all(len(rows) == max(1, min(padded_rows, most // rows[0])) for rows in own[:-1])


@pytest.mark.parametrize("order", ORDERS)
def test_an_epoch_holds_every_row_once(order):
    batches = training_batches(LENGTHS, 8, 260, 1, order)
    assert len(batches) == 260
    epoch = batches[:126]
    assert sorted(row for batch in epoch for row in batch) == list(range(1003))
    assert list(map(len, epoch)) == [8] * 125 + [3]
    assert epoch != batches[126:252]
    assert batches[:100] == training_batches(LENGTHS, 8, 100, 1, order)
    assert batches != training_batches(LENGTHS, 8, 260, 2, order)
    padded = sum(max(LENGTHS[row] for row in batch) * len(batch) for batch in epoch) / sum(LENGTHS)
    assert (padded < 1.2) == (order == "grouped")


@pytest.mark.parametrize("rows", [1, 3, 8, 9])
@pytest.mark.parametrize("order", ORDERS)
def test_a_few_rows_have_an_order_too(order, rows):
    batches = training_batches(LENGTHS[:rows], 8, 2, 0, order)
    assert sorted(row for row in batches[0] + (batches[1] if rows > 8 else [])) == list(range(rows))


@pytest.mark.parametrize(("size", "rows"), [(4, 1003), (8, 1003), (8, 1001), (16, 999), (8, 100)])
def test_balanced_batches_have_nearly_the_same_number_of_tokens(size, rows):
    lengths = LENGTHS[:rows]
    mean = size * sum(lengths) / rows
    for seed in range(3):
        steps = -(-rows // size)
        balanced, at_random = (training_batches(lengths, size, steps, seed, order) for order in ("balanced", "random"))
        above, above_at_random = (max(sizes(batches, lengths)) / mean - 1 for batches in (balanced, at_random))
        assert above < 0.1
        assert above < above_at_random / 4
        *whole, rest = sizes(balanced, lengths)  # incomplete, and not larger than the others
        assert len(balanced[-1]) == rows % size
        assert rest < max(whole)
        assert min(whole) > 0.8 * mean


def test_long_and_short_batches_do_not_alternate_with_the_lengths_of_rows():
    """Long rows are anywhere in a batch, and batches with the longest rows anywhere in an epoch."""
    places, batches = Counter(), Counter()
    for number, batch in enumerate(training_batches(LENGTHS, 4, 250, 0, "balanced")):
        places[max(range(4), key=lambda place: LENGTHS[batch[place]])] += 1
        batches[number // 125] += max(LENGTHS[row] for row in batch) > 400
    assert min(places.values()) > 40
    assert min(batches.values()) > 0.3 * sum(batches.values())


def test_the_same_rows_do_not_meet_in_every_epoch():
    lengths = LENGTHS[:200]
    epochs = (training_batches(lengths, 4, 50, seed, "balanced") for seed in (0, 1))
    one, two = ({pair for batch in epoch for pair in combinations(sorted(batch), 2)} for epoch in epochs)
    assert len(one & two) < 0.15 * len(one)


@pytest.mark.parametrize("order", ORDERS)
def test_a_step_of_several_batches_is_cut_from_the_epoch_in_order(order):
    """Trainer cuts the epoch into batches; the batches of a step follow each other."""
    steps = training_batches(LENGTHS, 4, 84, 0, order, batches_per_step=6)
    assert list(map(len, steps)) == ([24] * 41 + [19]) * 2
    epoch = epoch_order(LENGTHS, 4, 0, 0, order, batches_per_step=6)
    assert [row for step in steps[:42] for row in step] == epoch
    batches = [epoch[at : at + 4] for at in range(0, len(epoch), 4)]
    spread = max(sizes(batches)) / min(sizes(batches[:-1]))
    assert (spread < 2) == (order == "balanced")
    padded = sum(max(LENGTHS[row] for row in step) * len(step) for step in steps[:42]) / sum(LENGTHS)
    assert (padded < 1.3) == (order == "grouped")


def test_how_settings_choose_an_order():
    assert TrainSettings(packing="off").order == "grouped"
    assert TrainSettings(packing="on").order == "balanced"
    for packing in ("on", "off"):
        assert TrainSettings(packing=packing, group_by_length=True).order == "grouped"
        assert TrainSettings(packing=packing, group_by_length=False).order == "random"


@pytest.mark.parametrize(
    ("recorded", "order"),
    [
        ({"group_by_length": True}, "grouped"),
        ({"group_by_length": False}, "random"),
        ({"order": "balanced"}, "balanced"),
    ],
)
def test_a_record_of_an_earlier_release_says_it_in_other_words(recorded, order):
    others = {"batch_size": 4, "learning_rate": 1e-4, "max_length": 64, "dtype": "float32", "device": "cpu", "seed": 0}
    assert UsedSettings.model_validate(others | recorded).order == order


def seen_by(rank, data, settings, processes):
    """Rows of the batches that a process sees in a run, as accelerate gives them out."""
    lengths = [len(row) for row in data.examples]
    per_step = settings.gradient_accumulation_steps * processes
    left = planned_steps(len(data), settings, processes) * settings.gradient_accumulation_steps
    epoch = 0
    while left > 0:
        rows = epoch_order(lengths, settings.batch_size, settings.seed, epoch, settings.order, per_step)
        loader = DataLoader(range(len(data)), settings.batch_size, sampler=rows, collate_fn=list)
        own = prepare_data_loader(loader, torch.device("cpu"), num_processes=processes, process_index=rank)
        found = list(islice(own, left))
        yield from found
        left -= -(-len(found) // settings.gradient_accumulation_steps) * settings.gradient_accumulation_steps
        epoch += 1


@pytest.mark.parametrize("order", [None, True, False])
@pytest.mark.parametrize("length", [{"epochs": 2}, {"epochs": 2.4}, {"steps": 3}])
@pytest.mark.parametrize(("accumulated", "processes"), [(1, 1), (2, 1), (1, 2), (2, 3)])
def test_the_tokens_of_batches_are_those_that_processes_see(accumulated, processes, length, order, examples):
    data = examples.subset(range(45))
    settings = TrainSettings(
        packing="on", group_by_length=order, gradient_accumulation_steps=accumulated, batch_size=4, **length
    )
    found = [
        sum(len(data[row]) for row in batch)
        for rank in range(processes)
        for batch in seen_by(rank, data, settings, processes)
    ]
    assert sorted(batch_tokens(data, settings, processes)) == sorted(found)
    size = fixed_size(data, settings, processes)
    assert size.tokens % 64 == 0
    assert size.rows == 4
    assert sum(tokens <= size.tokens for tokens in found) >= 0.95 * len(found)


def test_a_very_long_row_does_not_set_the_size_of_all_batches(examples):
    rows = (*(Example([1] * 20, [1] * 20, "row") for _ in range(159)), Example([1] * 900, [1] * 900, "long"))
    settings = TrainSettings(packing="on", batch_size=4, cuda_graphs=True, epochs=1)
    size = fixed_size(replace(examples, examples=rows), settings)
    assert size.tokens == 128
    make = collator_of(settings, 0, size)
    assert make(rows[:4])["input_ids"].shape == (1, 128)
    assert make(rows[-4:])["input_ids"].shape == (1, 960)


def test_the_rows_of_steps_are_those_of_consecutive_batches(examples):
    settings = TrainSettings(packing="on", batch_size=2, gradient_accumulation_steps=2, epochs=2)
    steps = rows_of_steps(examples, settings, 3, processes=2)
    own = [list(islice(seen_by(rank, examples, settings, 2), 6)) for rank in range(2)]
    for number, rows in enumerate(steps):
        assert len(rows) == rows_per_step(settings, 2)
        batches = [own[rank][2 * number + micro] for micro in range(2) for rank in range(2)]
        assert rows == [examples[row] for batch in batches for row in batch]


# --- batches of a fixed size, in a run


@pytest.fixture(scope="module")
def plan(examples):
    """Layers 2 and 3 to the end, 0 and 1 for the first quarter of the steps."""
    return aletheia.plan(aletheia.probe(make_model("llama"), examples, batches=2), policy="last", freeze_after=0.25)


def trained(plan, examples: Examples, out, **settings):
    """A run, and the shapes of the batches that it trains on."""
    shapes = []

    class Watched(RowTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            shapes.append((inputs["input_ids"].shape[1], len(inputs["cu_seq_lens_q"]), inputs["max_length_q"]))
            return super().training_step(model, inputs, num_items_in_batch)

    settings = {"epochs": 3, "learning_rate": 1e-2, "evaluations": 3, "early_stop": False, "packing": "on"} | settings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "RowTrainer", Watched)
        patch.setattr(train_module, "recorded_tokens", lambda *given: None)  # a CPU has no graphs
        model = aletheia.adapt(make_model("llama"), plan)
        held_out = examples.subset(range(22, 28))
        run = aletheia.train(model, examples.subset(range(22)), plan, out, held_out, show_progress=False, **settings)
    return run, shapes


@pytest.mark.parametrize("grouped", [None, True, False])
def test_a_run_takes_its_batches_from_that_order(grouped, plan, examples, tmp_path):
    given = {"gradient_accumulation_steps": 2, "epochs": 2, "group_by_length": grouped}
    _, shapes = trained(plan, examples, tmp_path / "run", **given)
    steps = rows_of_steps(examples.subset(range(22)), TrainSettings(packing="on", batch_size=4, **given), 6)
    batches = [rows[at : at + 4] for rows in steps for at in range(0, len(rows), 4)]
    assert [tokens for tokens, *_ in shapes] == [sum(map(len, batch)) for batch in batches]


@pytest.mark.parametrize("settings", [{"cache": "memory"}, {"cache": "off"}, {"cache": "memory", "free_prefix": True}])
def test_batches_of_a_fixed_size_change_nothing_but_their_shape(settings, plan, examples, tmp_path):
    """The last batch of each epoch is incomplete."""
    if "free_prefix" in settings:  # then no layer learns at first
        plan = aletheia.plan(aletheia.probe(make_model("llama"), examples, batches=2), policy="last", freeze_after=0)
    plain, shapes = trained(plan, examples, tmp_path / "plain", **settings)
    fixed, fixed_shapes = trained(plan, examples, tmp_path / "fixed", **settings, cuda_graphs=True)
    assert len(set(shapes)) > 2
    assert set(fixed_shapes) == {(fixed_shapes[0][0], 4 + 2, fixed_shapes[0][0])}
    assert max(shape[0] for shape in shapes) <= fixed_shapes[0][0]
    before, after = plain.metrics, fixed.metrics
    assert after.settings.order == "balanced"
    assert not {"--group-by-length", "--no-group-by-length"} & set(repeat_command(fixed))
    assert after.settings.cache == settings["cache"]
    assert [point.loss for point in after.train_curve] == pytest.approx(
        [point.loss for point in before.train_curve], rel=1e-5
    )
    assert after.held_out_loss_after == pytest.approx(before.held_out_loss_after, rel=1e-5)
    assert (after.tokens, after.labelled_tokens) == (before.tokens, before.labelled_tokens)
    assert after.cache_bytes == before.cache_bytes  # no filler is stored
