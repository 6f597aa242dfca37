"""Packed batches: rows one after another, each with the loss and the gradients that it has alone."""

from dataclasses import replace

import pytest
import torch
from families import config_of
from test_prefix import adapted, difference, gradients
from tiny import make_model
from transformers import AutoModelForCausalLM

import aletheia
from aletheia.anatomy.access import text_config
from aletheia.data.batches import PackSize, collate, collate_packed, labelled_tokens
from aletheia.data.examples import NO_LOSS, Example
from aletheia.errors import DataError, SettingsError
from aletheia.execution import packed
from aletheia.execution.attention import WAYS
from aletheia.execution.backend import entered, step_ways
from aletheia.execution.packed import attention_by_row, why_not_packed
from aletheia.prefix.boundary import frozen_prefix
from aletheia.prefix.cache import MemoryCache
from aletheia.prefix.source import PrefixSource
from aletheia.prefix.spans import find_spans
from aletheia.prefix.stored import stored_prefix
from aletheia.reporting.comparison import repeat_command

PACKED = ("llama", "qwen2", "qwen3_moe", "gpt2", "gpt_neox", "phi3", "olmo2", "deepseek_v3", "granite")
WINDOWED = ("gemma3", "gemma3_text", "olmo3", "cohere2")  # layers that see a part of a row, shorter than ROWS[2]
REFUSED = {
    "stablelm": "attend to each other",  # does not hand on where rows begin
    "falcon": "attend to each other",
    "nemotron": "attend to each other",
    "gemma2": "not `sdpa`",
    "qwen3_next": "linear_attention",
    "jamba": "linear_attention",
    "recurrent_gemma": "linear_attention",
    "lfm2": "conv",
}


def row(length, seed):
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 250, (length,), generator=draw).tolist()
    return Example(tokens, [NO_LOSS] * 3 + tokens[3:], f"row {seed}")


ROWS = [row(9, 1), row(14, 2), row(70, 3), row(5, 4)]


def of_family(family):
    try:
        return make_model(family)
    except KeyError:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config_of(family)).eval()


def test_a_packed_batch_holds_every_token_once_and_says_where_rows_begin():
    batch = collate_packed(ROWS)
    assert batch["input_ids"].tolist() == [[token for example in ROWS for token in example.input_ids]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 9, 23, 93, 98]
    assert batch["position_ids"][0, [0, 8, 9, 22, 23, 92, 93]].tolist() == [0, 8, 0, 13, 0, 69, 0]
    assert batch["max_length_q"] == 128
    everywhere = [Example(example.input_ids, example.input_ids, "labelled from its first token") for example in ROWS]
    labels = collate_packed(everywhere)["labels"][0]
    assert labels[[0, 9, 23, 93]].tolist() == [NO_LOSS] * 4  # nothing predicts a first token
    assert (labels != NO_LOSS).sum() == 98 - 4
    spans = find_spans({name: value for name, value in batch.items() if name != "labels"})
    assert [(span.start, len(span.row)) for span in spans] == [(0, 9), (9, 14), (23, 70), (93, 5)]


@pytest.mark.parametrize("family", PACKED + WINDOWED)
def test_loss_and_gradients_are_those_of_padded_rows(family):
    model = adapted(family)
    if family in WINDOWED:
        assert 0 < text_config(model).sliding_window < 70
    assert why_not_packed(model, ROWS, 0) is None
    expected = gradients(model, collate(ROWS, 0))
    with attention_by_row(model):
        assert difference(gradients(model, collate_packed(ROWS)), expected) < 2e-5
        assert difference(gradients(model, collate(ROWS, 0)), expected) < 2e-5  # padded batches stay possible


@pytest.mark.parametrize("recompute", ["off", "selective", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_everything_else_that_makes_steps_cheap(dtype, recompute):
    model = adapted().to(dtype)
    expected = gradients(model.float(), collate(ROWS, 0))
    model.to(dtype)
    with frozen_prefix(model), entered(model, step_ways(model, recompute=recompute, packed=True)):
        found = gradients(model, collate_packed(ROWS))
    with frozen_prefix(model), entered(model, step_ways(model, recompute=recompute)):
        padded = gradients(model, collate(ROWS, 0))
    if dtype == torch.float32:
        assert difference(found, expected) < 1e-5
    else:  # as far from float32 as padded batches are
        found, padded = ((loss, grad.float()) for loss, grad in (found, padded))
        assert difference(found, expected) < 1.5 * difference(padded, expected)


# --- batches of a fixed size

SIZES = [PackSize(128, 4), PackSize(99, 4), PackSize(98, 4), PackSize(192, 6)]  # filler of 30, 1, 0 and 94 tokens


@pytest.mark.parametrize("rows", [ROWS, ROWS[:2], ROWS[3:]])
def test_a_batch_of_a_fixed_size_has_the_same_shapes_whatever_its_rows(rows):
    tokens = sum(map(len, rows))
    batch = collate_packed(rows, PackSize(128, 4), pad_token_id=7)
    assert batch["input_ids"][0, tokens:].tolist() == [7] * (128 - tokens)
    assert batch["cu_seq_lens_q"].tolist()[len(rows) :] == [tokens] + [128] * (5 - len(rows))
    assert batch["max_length_q"] == batch["max_length_k"] == 128
    for name in ("input_ids", "position_ids", "labels"):
        assert torch.equal(batch[name][:, :tokens], collate_packed(rows)[name])
        assert batch[name].shape == (1, 128)
    assert labelled_tokens(batch["labels"]) == labelled_tokens(collate_packed(rows)["labels"])


@pytest.mark.parametrize("size", [PackSize(97, 4), PackSize(128, 3)])
def test_rows_that_do_not_fit_are_refused(size):
    with pytest.raises(DataError, match=f"found a batch of 4 rows and 98 tokens, expected at most {size.rows} rows"):
        collate_packed(ROWS, size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [4, 3, 1])
def test_a_filler_is_not_a_row(size, count):
    """Not even a filler of one token, nor one after a row of one token."""
    rows = [*ROWS[: count - 1], Example([5], [NO_LOSS], "one token")] if count == 3 else ROWS[:count]
    batch = collate_packed(rows, size)
    spans = find_spans({name: value for name, value in batch.items() if name != "labels"})
    assert [span.row.input_ids for span in spans] == [example.input_ids for example in rows]
    assert [span.start for span in spans] == collate_packed(rows)["cu_seq_lens_q"][:-1].tolist()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2", "deepseek_v3", "gemma3_text"])
def test_a_filler_changes_neither_loss_nor_gradients(family, size):
    model = adapted(family)
    with attention_by_row(model):
        for rows in (ROWS, ROWS[:3]):
            expected = gradients(model, collate_packed(rows))
            assert difference(gradients(model, collate_packed(rows, size)), expected) < 1e-5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("recompute", ["off", "selective", "full"])
def test_nor_with_everything_else_and_stored_states(recompute, size):
    model, cache = adapted(), MemoryCache()
    source = PrefixSource(model, 2, lambda dtype: cache, on_obstacle=pytest.fail)
    ways = step_ways(model, recompute=recompute, packed=True)
    with frozen_prefix(model), entered(model, ways):
        expected = gradients(model, collate_packed(ROWS))
        assert difference(gradients(model, collate_packed(ROWS, size)), expected) < 1e-5
    with stored_prefix(model, 2, source=source), frozen_prefix(model), entered(model, ways):
        for _ in range(2):  # stores, then reads
            assert difference(gradients(model, collate_packed(ROWS, size)), expected) < 1e-5
        stored = source(collate_packed(ROWS, size))
    assert cache.size_bytes == 98 * 32 * 4  # of the rows alone
    assert stored.shape == (1, size.tokens, 32)
    assert not stored[0, 98:].any()


def test_rows_that_see_each_other_differ():
    """What the trial looks for: without attention by rows, a packed batch is one long row."""
    model = adapted()
    expected = gradients(model, collate(ROWS, 0))
    assert difference(gradients(model, collate_packed(ROWS)), expected) > 1e-3


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_packed_says_why(family):
    assert REFUSED[family] in why_not_packed(of_family(family), ROWS, 0)


def test_a_router_loss_forbids_it():
    model = make_model("qwen3_moe")
    model.config.output_router_logits = True
    assert "router loss" in why_not_packed(model, ROWS, 0)


def test_an_attention_without_a_gradient_is_refused(monkeypatch):
    """A kernel may compute a batch and fail in backward."""
    plain = packed._one_by_one

    def without_gradient(*given, **named):
        output = plain(*given, **named)
        if output.requires_grad:
            output.register_hook(lambda gradient: 1 / 0)
        return output

    monkeypatch.setattr(packed, "_one_by_one", without_gradient)
    model = adapted()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    assert "ZeroDivisionError" in why_not_packed(model, ROWS, 0)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nothing_is_left_behind():
    model = make_model("llama")
    with pytest.raises(ZeroDivisionError), attention_by_row(model), attention_by_row(model):
        raise ZeroDivisionError
    assert not any(hasattr(module, WAYS) for module in model.modules())


@pytest.fixture(scope="module")
def plan(examples):
    """Layers 2 and 3 to the end, 0 and 1 for the first quarter of the steps."""
    return aletheia.plan(aletheia.probe(make_model("llama"), examples, batches=2), policy="last", freeze_after=0.25)


def trained(plan, examples, out, say=False, **settings):
    settings = {"steps": 12, "learning_rate": 1e-2, "evaluations": 3, "early_stop": False} | settings
    model = aletheia.adapt(make_model("llama"), plan)
    data, held_out = examples.subset(range(20)), examples.subset(range(20, 26))
    return aletheia.train(model, data, plan, out, held_out, show_progress=say, **settings)


@pytest.mark.parametrize("cache", ["memory", "off"])
def test_a_packed_run_is_a_padded_one(cache, plan, examples, tmp_path):
    plain = trained(plan, examples, tmp_path / "padded", packing="off", cache=cache, group_by_length=False)
    run = trained(plan, examples, tmp_path / "packed", packing="on", cache=cache, group_by_length=False)
    padded, packed = plain.metrics, run.metrics
    assert [point.loss for point in packed.train_curve] == pytest.approx([point.loss for point in padded.train_curve])
    assert packed.held_out_loss_after == pytest.approx(padded.held_out_loss_after, rel=1e-4)
    assert packed.tokens == padded.tokens
    assert packed.settings.cache == cache
    assert "rows packed without padding" in packed.steps_computed_by
    assert (padded.settings.order, packed.settings.order) == ("random", "random")
    assert "rows packed without padding" not in padded.steps_computed_by
    assert "--packing on" in " ".join(repeat_command(run))
    assert "--packing" not in " ".join(repeat_command(plain))
    assert "--no-group-by-length" in repeat_command(plain)
    assert "--no-group-by-length" in repeat_command(run)


@pytest.mark.parametrize("packing", ["on", "off"])
def test_held_out_batches_take_no_more_than_training_batches(packing, plan, examples, tmp_path):
    """Held-out rows are as long as the longest training rows, and one is longer. The loss is that of single rows."""
    data = replace(examples, examples=[row(8 + 3 * (at % 12), at) for at in range(48)])
    held_out = replace(examples, examples=[row(200, 1), *(row(41, seed) for seed in range(8)), row(9, 2)])
    model = aletheia.adapt(make_model("llama"), plan)
    taken = {True: [], False: []}
    model.register_forward_pre_hook(
        lambda module, args, kwargs: taken[module.training].append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    settings = {"epochs": 1, "packing": packing, "cache": "off", "evaluations": 1, "early_stop": False}
    run = aletheia.train(
        model, data, plan, tmp_path / "run", held_out, show_progress=False, keep="last", rescale=False, **settings
    )
    most = max(taken[True]) if packing == "on" else 4 * 41
    assert 82 < most < 4 * 41 or packing == "off"  # two rows of 41 fit into a packed batch, and the shortest one
    expected = [200, 82 + 9, 82, 82, 82] if packing == "on" else [200, 4 * 41, 4 * 41, 9]
    assert taken[False] == 2 * expected  # before and after training
    assert aletheia.held_out_loss(model, held_out, 1) == pytest.approx(run.metrics.held_out_loss_after, rel=1e-5)


def test_a_processor_pads_by_default_and_groups_rows(plan, examples, tmp_path):
    metrics = trained(plan, examples, tmp_path / "run").metrics
    assert not metrics.settings.packing
    assert metrics.settings.order == "grouped"


def test_asked_for_where_it_cannot_be(examples, tmp_path):
    scores = aletheia.probe(make_model("falcon"), examples, batches=1)
    plan = aletheia.plan(scores, policy="last")
    model = aletheia.adapt(make_model("falcon"), plan)
    with pytest.raises(SettingsError, match="`packing` is on, but rows that are packed together attend to each other"):
        aletheia.train(model, examples, plan, tmp_path / "run", examples, packing="on", show_progress=False)
    assert not (tmp_path / "run").exists()
