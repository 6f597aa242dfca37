"""The prefix cache: exact, resumable, checked, shared, and refused where it does not fit."""

import gc
import multiprocessing
import os
import random
import shutil
import signal
import time
import weakref

import psutil
import pytest
import torch
from test_prefix import BOUNDARY, adapted
from test_tuning import trained
from tiny import make_model

from aletheia.anatomy.load import free_memory_bytes
from aletheia.anatomy.read import find_layers
from aletheia.data.order import training_batches
from aletheia.errors import CacheError, TrainingError
from aletheia.planning.make import plan as make_plan
from aletheia.prefix import fill as fill_module
from aletheia.prefix.cache import CacheInfo, DiskCache, MemoryCache, check_space
from aletheia.prefix.fill import fill, open_cache, prefix_key
from aletheia.probing.resident import probe
from aletheia.training import train as train_module
from aletheia.training.held_out import held_out_loss
from aletheia.training.train import check_settings


@pytest.fixture(scope="module")
def scores(examples):
    return {"llama": probe(make_model("llama"), examples, batches=2)}


@pytest.fixture
def rows(examples):
    return examples.examples


def disk(folder, key="k" * 64):
    return DiskCache(folder, CacheInfo(model="tiny", key=key, boundary=BOUNDARY, dtype="float32", width=32))


def filled(cache, model, rows, batch_size=4):
    return fill(model, BOUNDARY, rows, cache, batch_size, 0, show_progress=False)


def curve(run):
    return torch.tensor([point.loss for point in run.metrics.train_curve], dtype=torch.float64)


# --- one result, whatever the cache


def test_training_is_the_same_with_and_without_a_cache(examples, scores, tmp_path):
    runs = {
        kind: trained(examples, scores, tmp_path / kind, steps=20, cache=kind, cache_dir=tmp_path / "cache")[1]
        for kind in ("off", "memory", "disk")
    }
    for kind, run in runs.items():
        assert run.metrics.settings.cache == kind
        assert ((curve(run) - curve(runs["off"])).abs() / curve(runs["off"])).max() < 1e-5
        after = run.metrics.held_out_loss_after
        assert after == pytest.approx(runs["off"].metrics.held_out_loss_after, rel=1e-5)
    assert torch.equal(curve(runs["memory"]), curve(runs["disk"]))
    assert runs["memory"].metrics.cache_bytes == runs["disk"].metrics.cache_bytes > 0


def test_bfloat16_entries_come_back_as_they_went(tmp_path, rows):
    info = CacheInfo(model="tiny", key="b" * 64, boundary=1, dtype="bfloat16", width=32)
    cache = DiskCache(tmp_path, info)
    hidden = torch.randn(len(rows[0]), 32).bfloat16()
    cache.put(rows[0], hidden)
    assert torch.equal(DiskCache(tmp_path, info).get(rows[0]), hidden)


def test_a_second_run_with_another_seed_computes_nothing(examples, scores, tmp_path, monkeypatch):
    settings = {"cache": "disk", "cache_dir": tmp_path / "cache", "epochs": 2, "steps": None, "batch_size": 8}
    trained(examples, scores, tmp_path / "one", **settings)
    monkeypatch.setattr(DiskCache, "put", lambda *_: pytest.fail("a row was computed again"))
    _, run = trained(examples, scores, tmp_path / "two", seed=7, **settings)
    assert run.metrics.settings.cache == "disk"
    _, run = trained(examples, scores, tmp_path / "three", seed=8, **settings | {"cache": "auto"})
    assert "all rows are in" in run.metrics.cache_reason


def test_only_rows_that_the_run_reads_are_stored(examples, scores, tmp_path):
    trained(examples, scores, tmp_path / "run", steps=2, batch_size=3, cache="disk", cache_dir=tmp_path / "c")
    lines = next((tmp_path / "c").glob("*/*.idx")).read_text().splitlines()
    held_out = {tuple(row.input_ids) for row in examples.examples[40:60]}
    assert len(held_out) < len(lines) <= len(held_out) + 6


def test_equal_rows_share_an_entry(rows):
    cache = MemoryCache()
    assert filled(cache, adapted(), [rows[0], rows[1], rows[0]]) == 2


# --- what the key covers


def test_the_key_covers_weights_boundary_dtype_and_configuration():
    model = adapted()
    key = prefix_key(model, BOUNDARY)
    assert prefix_key(adapted(), BOUNDARY) == key
    others = {"boundary": prefix_key(model, 1), "dtype": prefix_key(adapted().bfloat16(), BOUNDARY)}
    changed = adapted()
    find_layers(changed)[1][1].mlp.down_proj.weight.data[3, 5] += 1e-6
    others["weight"] = prefix_key(changed, BOUNDARY)
    changed = adapted()
    changed.config.rms_norm_eps = 1e-3
    others["configuration"] = prefix_key(changed, BOUNDARY)
    torch.set_float32_matmul_precision("medium")
    others["precision"] = prefix_key(model, BOUNDARY)
    torch.set_float32_matmul_precision("highest")
    assert len({key, *others.values()}) == 6
    above = adapted()
    find_layers(above)[1][3].mlp.down_proj.base_layer.weight.data += 1
    find_layers(above)[1][2].mlp.down_proj.lora_A["default"].weight.data += 1
    assert prefix_key(above, BOUNDARY) == key


# --- killed, damaged, full


def _build_until_killed(folder, rows):
    torch.set_num_threads(1)
    cache, model = disk(folder), adapted()
    for row in rows:
        filled(cache, model, [row])
        time.sleep(0.01)


def test_a_killed_build_goes_on_where_it_stopped(tmp_path, rows):
    process = multiprocessing.get_context("spawn").Process(target=_build_until_killed, args=(tmp_path, rows))
    process.start()
    while not list(tmp_path.glob("*/*.idx")) or len(next(tmp_path.glob("*/*.idx")).read_text().splitlines()) < 5:
        assert process.is_alive()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    cache, model = disk(tmp_path), adapted()
    left = len(cache.missing(rows))
    distinct = len({tuple(row.input_ids) for row in rows})
    assert 0 < left <= distinct - 5
    assert filled(cache, model, rows) == left
    memory = MemoryCache()
    filled(memory, model, rows)
    for row in rows:
        torch.testing.assert_close(cache.get(row), memory.get(row), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_damage_is_found_and_repaired(tmp_path, rows, seed):
    """Random bytes changed, files cut short, index lines torn: never a wrong value, and a fill makes it whole."""
    model, draw = adapted(), random.Random(seed)
    filled(disk(tmp_path), model, rows)
    data, index = next(tmp_path.glob("*/*.bin")), next(tmp_path.glob("*/*.idx"))
    raw = bytearray(data.read_bytes())
    match seed % 3:
        case 0:
            for _ in range(5):
                raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
            data.write_bytes(raw)
        case 1:
            data.write_bytes(raw[: draw.randrange(len(raw))])
        case 2:
            text = index.read_text()
            index.write_text(text[: draw.randrange(len(text))])
    cache = disk(tmp_path)
    lost = cache.missing(rows)
    assert lost
    fresh = MemoryCache()
    filled(fresh, model, rows)
    filled(cache, model, rows)
    for found in (cache, disk(tmp_path)):
        assert not found.missing(rows)  # and the repair is there to stay
        for row in rows:
            torch.testing.assert_close(found.get(row), fresh.get(row), rtol=1e-5, atol=1e-6)


def test_damage_during_a_run_is_one_clear_line(tmp_path, rows):
    cache = disk(tmp_path)
    filled(cache, adapted(), rows)
    assert not cache.missing(rows)
    with next(tmp_path.glob("*/*.bin")).open("r+b") as stream:
        stream.write(b"damage!")
    first = max(rows, key=len)  # the longest is stored first
    with pytest.raises(CacheError, match=r"its entry in .* was damaged; run again"):
        cache.get(first)
    with pytest.raises(CacheError, match="expected the cache to be filled"):
        MemoryCache().get(rows[0])


def test_two_writers_may_share_a_cache(tmp_path, rows):
    one, other, model = disk(tmp_path), disk(tmp_path), adapted()
    filled(one, model, rows[:20])
    filled(other, model, rows[10:])
    assert not disk(tmp_path).missing(rows)


def test_a_full_disk_is_refused_before_anything_is_built(tmp_path, rows, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 10_000))
    with pytest.raises(CacheError, match=r"the prefix cache needs .* GB are free .* choose another --cache-dir"):
        open_cache(adapted(), BOUNDARY, rows, 10**6, 4, 0, "disk", tmp_path)
    with pytest.raises(CacheError, match=r"needs 5.00 GB in .*there, 0.00 GB are free"):
        check_space(tmp_path / "not" / "there", 5 * 10**9)


def test_a_cache_that_cannot_be_exact_is_refused_or_left_out(rows, tmp_path):
    with pytest.raises(CacheError, match=r"--cache memory is not possible: layer 0 is adapted"):
        open_cache(adapted(boundary=0), 0, rows, 10**6, 4, 0, "memory")
    cache, decision = open_cache(adapted(boundary=0), 0, rows, 10**6, 4, 0, "auto")
    assert (cache, decision.kind) == (None, "off")
    with pytest.raises(TrainingError, match="expected one of auto, memory, disk, off"):
        check_settings(cache="ram")
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="cannot use the cache folder"):
        disk(tmp_path / "file")


def test_a_value_that_is_not_finite_is_refused(rows):
    model = adapted()
    find_layers(model)[1][0].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(CacheError, match="not finite; try --dtype float32"):
        filled(MemoryCache(), model, rows)


# --- auto


def decide(monkeypatch, rows, uses, folder, forward=1.0, memory=10**12, speed=1e9):
    monkeypatch.setattr(fill_module, "_forward_seconds_per_token", lambda *_: forward)
    monkeypatch.setattr(fill_module, "_copy_bytes_per_second", lambda: 1e10)
    monkeypatch.setattr(fill_module, "_disk_bytes_per_second", lambda root: (speed, speed))
    monkeypatch.setattr(fill_module, "free_memory_bytes", lambda: memory)
    return open_cache(adapted(), BOUNDARY, rows, uses, 4, 0, "auto", folder)[1]


def test_auto_weighs_what_it_measures(monkeypatch, rows, tmp_path):
    tokens = sum(map(len, rows))
    assert decide(monkeypatch, rows, 3 * tokens, tmp_path).kind == "memory"
    once = decide(monkeypatch, rows, tokens, tmp_path, forward=1e-9)
    assert once.kind == "off"
    assert "run each time" in once.reason
    small = decide(monkeypatch, rows, 3 * tokens, tmp_path, memory=1000)
    assert small.kind == "disk"
    assert "too much for memory" in small.reason
    assert decide(monkeypatch, rows, 3 * tokens, tmp_path, memory=1000, speed=1.0).kind == "off"


def test_auto_measures_something(rows):
    assert fill_module._forward_seconds_per_token(adapted(), BOUNDARY, rows[:4], 0) > 0
    assert fill_module._copy_bytes_per_second() > 1e7


def test_free_memory_is_what_the_machine_has():
    assert 10**8 < free_memory_bytes() <= psutil.virtual_memory().total


def test_the_disk_is_measured(tmp_path):
    write, read = fill_module._disk_bytes_per_second(tmp_path)
    assert write > 0
    assert read > 0
    assert not list(tmp_path.iterdir())


# --- memory


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # a head tied to the embedding, and one that is not
def test_the_prefix_leaves_memory_while_training(family, examples, tmp_path, monkeypatch):
    model = make_model(family)
    layers, embedding = find_layers(model)[1], model.get_input_embeddings()
    gone = [weakref.ref(layer) for layer in layers[:2]] + ([] if family == "llama" else [weakref.ref(embedding.weight)])
    stays = weakref.ref(layers[2])
    del layers, embedding
    alive = []

    def look(*args, **kwargs):
        gc.collect()
        alive.append([ref() is not None for ref in (*gone, stays)])
        return held_out_loss(*args, **kwargs)

    monkeypatch.setattr(train_module, "held_out_loss", look)
    scores = {"llama": probe(model, examples, batches=2)}
    adapted_model, run = trained(examples, scores, tmp_path / "run", model, cache="memory", free_prefix=True)
    assert alive == [[False] * len(gone) + [True]] * 5  # before, during and after
    with pytest.raises(TrainingError, match="were freed for training; load the model again"):
        adapted_model(input_ids=torch.zeros((1, 2), dtype=torch.int64))
    monkeypatch.undo()
    kept, again = trained(examples, scores, tmp_path / "kept", make_model(family), cache="memory")
    assert again.metrics.held_out_loss_after == run.metrics.held_out_loss_after
    assert len(list(find_layers(kept)[1][0].parameters())) > 0


# --- order


@pytest.mark.parametrize("grouped", [True, False])
def test_an_epoch_holds_every_row_once(grouped):
    draw = random.Random(0)
    lengths = [draw.randint(1, 100) for _ in range(1003)]
    batches = training_batches(lengths, 8, 260, seed=1, group_by_length=grouped)
    assert len(batches) == 260
    epoch = batches[:126]
    assert sorted(row for batch in epoch for row in batch) == list(range(1003))
    assert sorted(map(len, epoch)) == [3] + [8] * 125
    assert epoch != batches[126:252]
    assert batches[:100] == training_batches(lengths, 8, 100, seed=1, group_by_length=grouped)
    assert batches != training_batches(lengths, 8, 260, seed=2, group_by_length=grouped)
    padded = sum(max(lengths[row] for row in batch) * len(batch) for batch in epoch) / sum(lengths)
    assert (padded < 1.1) == grouped


def test_plans_of_uniform_lora_train_without_a_cache(examples, scores, tmp_path):
    settings = {"steps": 2, "show_progress": False, "learning_rate": 1e-3}
    model = make_model("llama")
    plan = make_plan(scores["llama"], "uniform")
    from aletheia.adapters.adapt import adapt
    from aletheia.training.train import train

    run = train(adapt(model, plan), examples, plan, tmp_path / "run", examples.subset(range(5)), **settings)
    assert run.metrics.settings.cache == "off"
    assert "layer 0 is adapted" in run.metrics.cache_reason
