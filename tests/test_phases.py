"""Early layers: they learn at first, freeze as they are, and the boundary rises above them."""

import pytest
import torch
from peft import PeftModel
from test_attach import STEPS as TRAINER_STEPS
from test_attach import FreezeByHand, make_trainer, weights
from tiny import make_model
from transformers import Trainer, TrainerCallback

import aletheia
from aletheia.anatomy.read import find_layers
from aletheia.data.batches import collate
from aletheia.data.order import training_batches
from aletheia.errors import ArtifactError, CacheError, PlanError, SettingsError, TrainingError
from aletheia.planning.plan import Plan
from aletheia.prefix.cache import DiskCache
from aletheia.training.loop import training_arguments
from aletheia.training.settings import TrainSettings
from aletheia.training.train import Prepared

PAD, STEPS, RATE = 0, 12, 1e-2


@pytest.fixture(scope="module")
def scores(examples):
    return aletheia.probe(make_model("llama"), examples, batches=2)


@pytest.fixture(scope="module")
def plan(scores):
    """Layers 2 and 3 to the end, 0 and 1 for the first quarter of the steps."""
    return aletheia.plan(scores, policy="last", rank=4, freeze_after=0.25)


def trained(plan, examples, out, prepared=None, **settings):
    adapted = aletheia.adapt(make_model("llama"), plan)
    data, held_out = examples.subset(range(20)), examples.subset(range(20, 26))
    settings = {"steps": STEPS, "learning_rate": RATE, "evaluations": 2, "averaging": "off"} | settings
    return adapted, aletheia.train(
        adapted, data, plan, out, held_out, prepared=prepared, show_progress=False, **settings
    )


@pytest.fixture(scope="module")
def by_hand(plan, examples, tmp_path_factory):
    """Weights after the same steps of plain PEFT and Trainer, frozen by a callback."""
    model = aletheia.adapt(make_model("llama"), plan)
    data = examples.subset(range(20))
    batches = training_batches([len(row) for row in data.examples], 4, STEPS, 0)
    schedule = [collate([data[row] for row in batch], PAD) for batch in batches]
    arguments = training_arguments(
        TrainSettings(batch_size=1), str(tmp_path_factory.mktemp("plain")), max_steps=STEPS, learning_rate=RATE,
        train_sampling_strategy="sequential", save_strategy="no", eval_strategy="no", use_cpu=True,
    )  # fmt: skip
    Trainer(model, arguments, lambda found: found[0], schedule, callbacks=[FreezeByHand(plan)]).train()
    return weights(model)


@pytest.mark.parametrize("settings", [{"cache": "memory"}, {"cache": "disk"}, {"cache": "off"}])
def test_it_is_what_freezing_by_hand_gives(settings, plan, examples, by_hand, tmp_path):
    model, run = trained(plan, examples, tmp_path / "run", cache_dir=tmp_path / "cache", **settings)
    found = weights(model)
    assert found.keys() == by_hand.keys()
    for name, value in by_hand.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    assert run.metrics.early_steps == 3
    assert run.metrics.boundary == 2
    assert run.metrics.settings.cache == settings.get("cache", "memory")
    assert (run.metrics.cache_bytes > 0) == (settings.get("cache") != "off")
    assert not list((tmp_path / "cache").glob("*"))  # of use to no other run


def test_early_layers_stop_where_they_are(plan, examples, tmp_path):
    """They are the same at the end as when the boundary rose, and not where they began."""
    trainer = make_trainer(examples, plan, tmp_path)
    aletheia.attach(trainer, plan)
    halted = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == plan.early_steps(TRAINER_STEPS):
                halted.update(weights(model))

    trainer.add_callback(Look())
    trainer.train()
    moved = weights(trainer.model)
    early = [name for name in moved if ".layers.0." in name or ".layers.1." in name]
    assert early
    for name, value in halted.items():
        assert torch.equal(moved[name], value) == (name in early)
        assert "lora_B" not in name or value.any()


def test_no_backward_below_the_boundary_after_the_freeze(plan, examples, tmp_path):
    model = aletheia.adapt(make_model("llama"), plan)
    _, layers = find_layers(model)
    visits = []
    for index, layer in enumerate(layers):
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda grad, index=index: visits.append(index))
    data, held_out = examples.subset(range(20)), examples.subset(range(20, 26))
    aletheia.train(model, data, plan, tmp_path, held_out, steps=STEPS, learning_rate=RATE, show_progress=False)
    per_step = {index: visits.count(index) for index in range(4)}
    assert per_step[0] == per_step[1] == 3 * 14  # seven modules with A and B, three steps
    assert per_step[2] == per_step[3] == STEPS * 14


def test_the_saved_adapter_has_all_layers(plan, examples, tmp_path):
    model, _ = trained(plan, examples, tmp_path)
    batch = collate(examples.examples[:2], PAD)
    again = PeftModel.from_pretrained(make_model("llama"), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model.eval()(**batch).logits, atol=1e-5, rtol=1e-5)
    assert any(value.any() for name, value in weights(again).items() if ".layers.0." in name and "lora_B" in name)


def test_frozen_layers_drop_nothing_out_so_that_their_cache_is_exact(scores, examples, tmp_path):
    """Layers above go on with their dropout, drawn alike with and without a cache."""
    plan = aletheia.plan(scores, policy="last", rank=4, freeze_after=0.25, dropout=0.2)
    curves, dropouts = {}, []
    for cache in ("memory", "off"):
        model, run = trained(plan, examples, tmp_path / cache, cache=cache)
        assert run.metrics.settings.cache == cache
        curves[cache] = [point.loss for point in run.metrics.train_curve]
        dropouts += [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert curves["memory"] == pytest.approx(curves["off"], rel=1e-6)
    assert dropouts == [0.2] * 2 * 4 * 7  # back in every layer
    without = trained(aletheia.plan(scores, policy="last", rank=4, freeze_after=0.25), examples, tmp_path / "none")[1]
    assert [point.loss for point in without.metrics.train_curve][:4] != curves["off"][:4]


def test_a_plan_with_early_layers(scores, plan, tmp_path):
    assert plan.layers == (2, 3)
    assert plan.early_layers == (0, 1)
    assert plan.boundary == 2
    assert {adapter.layer for adapter in plan.adapters} == {0, 1, 2, 3}
    assert plan.early_steps(100) == 25
    assert aletheia.plan(scores, policy="last", rank=4).early_steps(100) == 0
    assert Plan.read(plan.write(tmp_path / "plan.json")) == plan
    assert plan.predicted.relative_early_step_time > plan.predicted.relative_step_time


def test_a_speedup_counts_the_early_steps(scores):
    for share in (0.0, 0.25):
        made = aletheia.plan(scores, speedup=1.3, freeze_after=share, epochs=3)
        early = (made.predicted.relative_early_step_time or 0) * share
        later = made.predicted.relative_cached_step_time
        prefix = made.predicted.relative_step_time - later
        assert early + (1 - share) * later + prefix / 3 <= 1 / 1.3 + 1e-9
    with pytest.raises(PlanError, match="after 90% of the steps with every layer"):
        aletheia.plan(scores, speedup=2, freeze_after=0.9)
    with pytest.raises(SettingsError, match="`freeze_after` is 1; expected less than 1"):
        aletheia.plan(scores, freeze_after=1)


def test_what_cannot_be_is_refused(plan, examples, tmp_path):
    with pytest.raises(TrainingError, match="layers 0-1 at first, but they are not in memory"):
        trained(plan, examples, tmp_path / "run", Prepared(prefix=object()))
    with pytest.raises(TrainingError, match="layers 0-1 at first, but they are not in memory"):
        trained(plan, examples, tmp_path / "run", free_prefix=True)
    text = plan.to_json().replace('"early_layers": [\n  0,\n  1\n ]', '"early_layers": [0]')
    text = "".join(line for line in text.splitlines(keepends=True) if '"sha256"' not in line)  # as edited by hand
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ArtifactError, match="without 'early_layers'"):
        Plan.read(tmp_path / "plan.json")


def test_a_cache_that_fails_after_the_turn_ends_no_run_and_leaves_the_disk(plan, examples, tmp_path, monkeypatch):
    """What was trained is kept, and so is the room that saving it needs."""
    put, stored = DiskCache.put, []

    def full(cache, row, hidden_TD):
        if len(stored) == 3:
            raise CacheError("the disk is full")
        stored.append(row)
        put(cache, row, hidden_TD)

    expected = [point.loss for point in trained(plan, examples, tmp_path / "off", cache="off")[1].metrics.train_curve]
    monkeypatch.setattr(DiskCache, "put", full)
    _, run = trained(plan, examples, tmp_path / "run", cache="disk", cache_dir=tmp_path / "cache")
    assert len(stored) == 3
    assert "no more states are stored: the disk is full" in run.metrics.cache_reason
    assert not any(path.is_file() for path in (tmp_path / "cache").rglob("*"))
    assert run.metrics.early_steps == 3
    assert [point.loss for point in run.metrics.train_curve] == pytest.approx(expected, rel=1e-5)


def test_caches_of_runs_side_by_side_are_their_own(plan, examples, tmp_path):
    """Two runs with one seed store the same states; the one that ends first deletes none of the other's."""
    settings = aletheia.AttachSettings(cache="disk", cache_dir=tmp_path / "cache")
    inner, outer = (make_trainer(examples, plan, tmp_path / name, max_steps=13) for name in ("inner", "outer"))
    aletheia.attach(inner, plan, settings)
    attachment = aletheia.attach(outer, plan, settings)
    before, after = {}, {}

    def folders():
        return {path.name: (path / "cache.json").exists() for path in (tmp_path / "cache").glob("*")}

    class Another(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 9:  # the second epoch is under way
                before.update(folders())
                inner.train()
                after.update(folders())

    outer.add_callback(Another())
    outer.train()
    assert len(before) == 1
    assert next(iter(before)).startswith("run-")
    assert after == before
    assert attachment.decision.kind == "disk", attachment.decision.reason
    assert not folders()
    for name, value in weights(inner.model).items():
        assert torch.equal(weights(outer.model)[name], value), name


def test_a_run_too_short_for_it(plan, examples, tmp_path):
    """One step: the early layers never learn, and nothing breaks."""
    model, run = trained(plan, examples, tmp_path, steps=1)
    assert run.metrics.early_steps == 0
    assert not any(value.any() for name, value in weights(model).items() if ".layers.0." in name and "lora_B" in name)
