"""The prefix cache: exact, resumable, checked, shared, and refused where it does not fit."""

import gc
import os
import random
import shutil
import signal
import time
import weakref

import forked
import psutil
import pytest
import torch
from test_prefix import BOUNDARY, adapted
from test_tuning import trained
from tiny import make_model

import aletheia
from aletheia.adapters.adapt import adapt
from aletheia.anatomy.device_memory import free_memory_bytes
from aletheia.anatomy.read import find_layers
from aletheia.data.batches import collate
from aletheia.errors import CacheError, SettingsError, TrainingError
from aletheia.planning.make import plan as make_plan
from aletheia.prefix import choose
from aletheia.prefix.cache import CacheInfo, DiskCache, MemoryCache, SpillingCache, check_space
from aletheia.prefix.cache_folders import stored_caches
from aletheia.prefix.choose import CachePlace, open_cache, prefix_key
from aletheia.prefix.fill import fill
from aletheia.prefix.source import PrefixSource
from aletheia.probing.resident import probe
from aletheia.training import attach as attach_module
from aletheia.training import loop
from aletheia.training.held_out import loss_over
from aletheia.training.train import train


@pytest.fixture(scope="module")
def scores(examples):
    return {"llama": probe(make_model("llama"), examples, batches=2)}


@pytest.fixture
def rows(examples):
    return examples.examples


def disk(folder, key="k" * 64):
    return DiskCache(folder, CacheInfo(model="tiny", key=key, boundary=BOUNDARY, dtype="float32", width=32))


def filled(cache, model, rows, batch_size=4):
    return fill(model, BOUNDARY, rows, cache, batch_size, show_progress=False)


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
    assert "an earlier run stored states in" in run.metrics.cache_reason
    assert run.metrics.cache_bytes == 0  # it stored none


def test_only_rows_that_come_back_are_stored(examples, scores, tmp_path):
    """Of a run of one epoch these are the held-out rows; of a longer one, all that it has seen before the last one."""
    held_out = {tuple(row.input_ids) for row in examples.examples[40:60]}
    seen = {tuple(row.input_ids) for row in examples.examples[:40]} | held_out
    for steps, expected in ((2, held_out), (5, held_out), (6, seen)):
        _, run = trained(examples, scores, tmp_path / f"run{steps}", steps=steps, batch_size=8, evaluations=2)
        assert run.metrics.settings.cache == "memory"
        assert run.metrics.cache_bytes == sum(map(len, expected)) * 32 * 4


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
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # torch may refuse the old switch then
    try:
        assert prefix_key(model, BOUNDARY) not in {key, *others.values()}
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
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
    process = forked.processes().Process(target=_build_until_killed, args=(tmp_path, rows))
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
    with pytest.raises(CacheError, match=r"its entry in .* is damaged; run again"):
        cache.get(first)
    with pytest.raises(CacheError, match="expected a cache that was filled"):
        MemoryCache().get(rows[0])


def test_two_writers_may_share_a_cache(tmp_path, rows):
    one, other, model = disk(tmp_path), disk(tmp_path), adapted()
    filled(one, model, rows[:20])
    filled(other, model, rows[10:])
    assert not disk(tmp_path).missing(rows)


def test_a_full_disk_is_not_begun_to_be_filled(tmp_path, rows, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 10_000))
    with pytest.raises(CacheError, match=r"needs 5.00 GB in .*there, but 0.00 GB are free.*choose another `cache_dir`"):
        check_space(tmp_path / "not" / "there", 5 * 10**9)
    assert not choose._disk_pays(tmp_path, token_bytes=128, forward_seconds=1e9)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_ends_the_storing_alone(tmp_path, rows):
    """What is stored already is read on, the rest is computed."""
    cache, model, obstacles = disk(tmp_path), adapted(), []
    filled(cache, model, rows[:4])
    cache._shard = "full"
    (cache.folder / "full.bin").symlink_to("/dev/full")
    with pytest.raises(CacheError, match=r"cannot write to the cache .*: No space left on device; free some space"):
        filled(cache, model, rows)
    source = PrefixSource(model, BOUNDARY, lambda dtype: cache, on_obstacle=obstacles.append)
    batch = collate(rows[2:6], 0)
    found = [source(batch), source(batch)]
    assert len(obstacles) == 1
    assert obstacles[0].startswith("no more states are stored: cannot write to the cache")
    whole = PrefixSource(model, BOUNDARY, lambda dtype: MemoryCache())(batch)
    assert all(torch.equal(states, whole) for states in found)


def test_a_cache_that_cannot_be_exact_is_refused_or_left_out(examples, scores, tmp_path):
    plan = make_plan(scores["llama"], policy="uniform")
    data, held_out = examples.subset(range(20)), examples.subset(range(20, 25))
    for kind in ("memory", "disk"):
        with pytest.raises(
            CacheError, match=f"`cache` is {kind}, which is not possible: layer 0 is adapted.*; expected off or auto"
        ):
            train(
                adapt(make_model(), plan), data, plan, tmp_path / kind, held_out, steps=2, cache=kind,
                cache_dir=tmp_path / "cache", show_progress=False,
            )  # fmt: skip
    for settings in ({}, {"free_prefix": True}):
        out = tmp_path / f"run{len(settings)}"
        model = adapt(make_model(), plan)
        run = train(model, data, plan, out, held_out, steps=2, show_progress=False, **settings)
        assert run.metrics.settings.cache == "off"
        assert "layer 0 is adapted" in run.metrics.cache_reason
    with pytest.raises(SettingsError, match="`cache` is 'ram'; expected one of auto, memory, disk, off"):
        aletheia.TrainSettings(cache="ram")
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"cannot use the cache folder .*; choose another `cache_dir`"):
        disk(tmp_path / "file")


def test_a_value_that_is_not_finite_is_refused(rows):
    model = adapted()
    find_layers(model)[1][0].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(CacheError, match="not finite; expected finite values; set `dtype` float32"):
        filled(MemoryCache(), model, rows)


# --- auto


def states(rows):
    """What is stored of each row: numbers that tell it from others."""
    return [torch.full((len(row), 32), float(number)) for number, row in enumerate(rows)]


def test_what_memory_does_not_hold_goes_where_the_overflow_says(rows, tmp_path):
    given, opened = [next(row for row in rows if len(row) == size) for size in {len(row) for row in rows}][:4], []
    stored, room = states(given), sum(len(row) * 32 * 4 for row in given[:2])

    def on_disk():
        opened.append(disk(tmp_path))
        return opened[-1]

    spilling = SpillingCache(room, on_disk)
    for row, hidden in zip(given[:2], stored, strict=False):
        spilling.put(row, hidden)
    assert (opened, spilling.is_spilled, spilling.size_bytes) == ([], False, room)
    assert spilling.missing(given) == given[2:]
    for row, hidden in zip(given[2:], stored[2:], strict=True):
        spilling.put(row, hidden)
    assert len(opened) == 1
    assert spilling.is_spilled
    assert spilling.size_bytes == sum(hidden.nbytes for hidden in stored)
    assert opened[0].size_bytes == spilling.size_bytes - room
    assert not spilling.missing(given)
    for row, hidden in zip(given, stored, strict=True):
        assert torch.equal(spilling.get(row), hidden)


def test_what_has_no_room_anywhere_is_left_out(rows):
    asked, given = [], list(rows[:2])
    spilling = SpillingCache(0, lambda: asked.append("overflow"))
    for row, hidden in zip(given, states(given), strict=True):
        spilling.put(row, hidden)
    assert asked == ["overflow"]  # once
    assert (spilling.is_spilled, spilling.size_bytes) == (False, 0)
    assert spilling.missing(given) == given
    with pytest.raises(CacheError, match="its hidden states are not stored"):
        spilling.get(rows[0])


def decide(monkeypatch, rows, folder, forward=1.0, memory=10**12, speed=1e9):
    """Where some rows end up, and how the decision is told."""
    monkeypatch.setattr(choose, "disk_bytes_per_second", lambda root: (speed, speed))
    monkeypatch.setattr(choose, "free_memory_bytes", lambda: memory)
    cache, decision = open_cache(adapted(), BOUNDARY, torch.float32, CachePlace(folder=folder), lambda: forward)
    for row, hidden in zip(rows[:8], states(rows[:8]), strict=True):
        cache.put(row, hidden)
    return decision, cache


def test_auto_takes_memory_and_then_the_disk_if_that_is_quicker(monkeypatch, rows, tmp_path):
    decision, cache = decide(monkeypatch, rows, tmp_path)
    assert (decision.kind, decision.reason) == ("memory", "up to 500.0 GB, the rest on disk")
    assert not cache.is_spilled
    assert not list(tmp_path.iterdir())
    total = cache.size_bytes
    decision, cache = decide(monkeypatch, rows, tmp_path / "slow", memory=total, speed=1.0)
    assert not cache.is_spilled
    assert 0 < cache.size_bytes <= total / 2
    assert not decide(monkeypatch, rows, tmp_path / "cheap", memory=total, forward=1e-9)[1].is_spilled
    decision, cache = decide(monkeypatch, rows, tmp_path / "quick", memory=total)
    assert cache.is_spilled
    assert cache.size_bytes == total


def test_a_run_beyond_memory_learns_the_same(examples, scores, tmp_path, monkeypatch):
    settings = {"steps": 12, "batch_size": 8, "evaluations": 2, "cache_dir": tmp_path / "cache"}
    _, off = trained(examples, scores, tmp_path / "off", cache="off", **settings)
    monkeypatch.setattr(choose, "free_memory_bytes", lambda: 200_000)
    monkeypatch.setattr(choose, "_disk_pays", lambda *measured: True)
    _, run = trained(examples, scores, tmp_path / "run", **settings)
    assert (run.metrics.settings.cache, run.metrics.cache_reason) == ("disk", "up to 0.0 GB, the rest on disk")
    on_disk = sum(stored.size_bytes for stored in stored_caches(tmp_path / "cache"))
    assert 0 < run.metrics.cache_bytes - 100_000 < on_disk
    assert ((curve(run) - curve(off)).abs() / curve(off)).max() < 1e-5


def test_the_prefix_is_timed():
    assert attach_module._forward_seconds_per_token(adapted(), BOUNDARY) > 0


def test_free_memory_is_what_the_machine_has():
    assert 10**8 < free_memory_bytes() <= psutil.virtual_memory().total


def test_the_disk_is_measured(tmp_path):
    write, read = choose.disk_bytes_per_second(tmp_path)
    assert write > 0
    assert read > 0
    assert not list(tmp_path.iterdir())


# --- deleted only when nobody uses it


def test_a_cache_in_use_is_not_deleted(tmp_path, rows):
    one, other = disk(tmp_path), disk(tmp_path)
    filled(one, adapted(), rows[:3])
    stored = stored_caches(tmp_path)[0]
    one.close()
    with pytest.raises(
        CacheError, match="is in use by a run; expected an unused cache; delete it once the run has ended"
    ):
        stored.delete()
    assert not other.missing(rows[:3])
    other.close()
    stored.delete()
    assert not list(tmp_path.iterdir())


def test_a_finished_run_lets_its_cache_be_deleted(examples, scores, tmp_path):
    settings = {"steps": 2, "batch_size": 8, "cache": "disk", "cache_dir": tmp_path / "cache"}
    trained(examples, scores, tmp_path / "run", **settings)
    (stored,) = stored_caches(tmp_path / "cache")
    stored.delete()
    assert not list((tmp_path / "cache").iterdir())


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
        return loss_over(*args, **kwargs)

    monkeypatch.setattr(loop, "loss_over", look)
    scores = {"llama": probe(model, examples, batches=2)}
    settings = {"steps": 8, "evaluations": 2, "cache": "memory"}
    adapted_model, run = trained(examples, scores, tmp_path / "run", model, free_prefix=True, **settings)
    assert len(alive) > 3  # before, during, after, and at less strength
    assert alive == [[False] * len(gone) + [True]] * len(alive)
    assert run.metrics.seconds.cache > 0
    assert run.metrics.cache_reason == "filled before the first step"
    with pytest.raises(TrainingError, match="were freed for training; expected a whole model; load it again"):
        adapted_model(input_ids=torch.zeros((1, 2), dtype=torch.int64))
    monkeypatch.undo()
    kept, again = trained(examples, scores, tmp_path / "kept", make_model(family), **settings)
    assert again.metrics.held_out_loss_after == run.metrics.held_out_loss_after
    assert len(list(find_layers(kept)[1][0].parameters())) > 0


def test_a_prefix_that_leaves_memory_may_be_kept_on_disk(examples, scores, tmp_path, monkeypatch):
    """One run fills it, the next ones read it, whether they free their prefix or not."""
    settings = {"steps": 8, "batch_size": 8, "evaluations": 2, "cache_dir": tmp_path / "cache"}
    _, first = trained(examples, scores, tmp_path / "first", cache="disk", free_prefix=True, **settings)
    assert first.metrics.settings.cache == "disk"
    (stored,) = stored_caches(tmp_path / "cache")
    assert 0 < first.metrics.cache_bytes < stored.size_bytes
    monkeypatch.setattr(DiskCache, "put", lambda *_: pytest.fail("a row was computed again"))
    for free_prefix in (True, False):
        out = tmp_path / f"{free_prefix}"
        _, run = trained(examples, scores, out, cache="disk", free_prefix=free_prefix, **settings)
        assert torch.equal(curve(run), curve(first))
    stored.delete()  # nobody holds it any more


def test_a_run_of_one_epoch_shares_its_cache_on_disk(examples, scores, tmp_path, monkeypatch):
    """Nothing comes back within the run; a sweep over seeds computes nothing again."""
    settings = {"steps": None, "epochs": 1, "batch_size": 8, "cache_dir": tmp_path / "cache"}
    trained(examples, scores, tmp_path / "one", cache="disk", **settings)
    monkeypatch.setattr(DiskCache, "put", lambda *_: pytest.fail("a row was computed again"))
    _, run = trained(examples, scores, tmp_path / "two", seed=7, **settings)
    assert run.metrics.settings.cache == "disk"


def test_a_cache_leaves_the_disk_room(tmp_path, rows, monkeypatch):
    cache = disk(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 10**9))
    with pytest.raises(CacheError, match="1 GB must stay free"):
        filled(cache, adapted(), rows)
    assert not list(cache.folder.glob("*.bin"))
