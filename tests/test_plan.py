"""Policies, ranks, costs, the frontier and the Plan file: pure functions, property-tested."""

import itertools
import json
import math
import random
import re
import subprocess
import sys
from typing import get_args

import pytest
from aletheia_lora.selection import select_layers as reference_select_layers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import edited, resealed

from aletheia.anatomy.schema import Anatomy, ModelIdentity, Module
from aletheia.errors import ArtifactError, PlanError, SettingsError
from aletheia.planning.cost import LayerCosts, layer_costs
from aletheia.planning.frontier import best_within, frontier
from aletheia.planning.make import plan, plan_frontier
from aletheia.planning.plan import Plan, PlanSettings, RankMode
from aletheia.planning.policies import Candidates, layer_share, select_layers
from aletheia.planning.ranks import ranks_by_score
from aletheia.planning.targets import BALANCED_SHARE, SPEED_SHARE, WORTHWHILE, Policy
from aletheia.probing.scores import ProbeSettings, Scores
from aletheia.probing.timings import LayerTiming, Timings

SHAPES = (("attn.q", "attention", 64, 64), ("attn.o", "attention", 64, 64), ("mlp.up", "mlp", 64, 160))
POLICIES, RANK_MODES = get_args(Policy), get_args(RankMode)


def make_scores(layer_scores, shares=None) -> Scores:
    """Scores of an invented model with three modules per layer."""
    modules = tuple(
        Module(name=f"model.layers.{layer}.{name}", layer=layer, role=role, in_features=i, out_features=o)
        for layer in range(len(layer_scores))
        for name, role, i, o in SHAPES
    )
    shares = shares or [1 / len(SHAPES)] * len(modules)
    anatomy = Anatomy(
        model_type="invented", layer_count=len(layer_scores), layer_path="model.layers", hidden_size=64,
        vocab_size=500, attention_width=64, parameters=1, embedding_parameters=32_000,
        layer_parameters=(1,) * len(layer_scores), modules=modules,
    )  # fmt: skip
    probe = ProbeSettings(
        score="gradient-norm", batches=5, batch_size=1, seed=0, dtype="float32", device="cpu", tokens=500,
        labelled_tokens=200, mean_loss=1.5, seconds=2.0,
    )  # fmt: skip
    return Scores(
        model=ModelIdentity(name="invented", fingerprint="ab" * 32),
        data=None,
        probe=probe,
        packages={},
        layers=tuple(layer_scores),
        modules={m.name: layer_scores[m.layer] * share for m, share in zip(modules, shares, strict=True)},
        anatomy=anatomy,
    )


score_lists = st.lists(
    st.floats(0, 1e6, allow_subnormal=False) | st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=40
)


# --- policies


def test_top_percent_chooses_what_the_reference_chooses():
    """200 score vectors, every second one full of ties; the lower index wins a tie, in both."""
    draw = random.Random(0)
    for number in range(200):
        length = draw.randint(1, 80)
        scores = [draw.randint(0, 4) if number % 2 else draw.random() for _ in range(length)]
        percent = 50 if number % 4 < 2 else draw.randint(1, 100)
        made = plan(make_scores([float(score) for score in scores]), policy="top-percent", percent=percent)
        assert list(made.layers) == reference_select_layers(dict(enumerate(scores)), percent)


@given(score_lists, st.floats(0.01, 100), st.integers(0, 99))
def test_controls_take_as_many_layers_as_the_published_policy(scores, percent, seed):
    read = make_scores(scores)
    count = layer_share(len(scores), percent)
    made = {policy: plan(read, policy=policy, percent=percent, seed=seed).layers for policy in POLICIES}
    for policy in ("top-percent", "last", "first", "random", "bottom"):
        assert len(made[policy]) == count
    assert made["uniform"] == tuple(range(len(scores)))
    assert made["first"] == tuple(range(count))
    assert made["last"] == tuple(range(len(scores) - count, len(scores)))
    captured = {policy: math.fsum(scores[layer] for layer in layers) for policy, layers in made.items()}
    assert captured["bottom"] <= captured["random"] <= captured["top-percent"]


def test_ties_go_to_the_lower_layer():
    costs = LayerCosts((1.0,) * 4, (1.0,) * 4, (0.1,) * 4, 1.0, 9.4)
    candidates = Candidates([1, 1, 1, 1], costs, range(4))
    assert select_layers(PlanSettings(policy="top-percent"), candidates) == (0, 1)
    assert select_layers(PlanSettings(policy="bottom"), candidates) == (0, 1)


def test_random_differs_by_seed_and_repeats():
    read = make_scores([1.0] * 20)
    draws = {plan(read, policy="random", seed=seed).layers for seed in range(10)}
    assert len(draws) > 5
    assert plan(read, policy="random", seed=3).layers == plan(read, policy="random", seed=3).layers


@given(score_lists, st.floats(0.01, 100))
def test_depth_aware_is_as_fast_as_last_and_captures_at_least_as_much(scores, percent):
    read = make_scores(scores)
    ours, last = plan(read, policy="depth-aware", percent=percent), plan(read, policy="last", percent=percent)
    assert ours.predicted.relative_step_time <= last.predicted.relative_step_time * (1 + 1e-9)
    assert ours.predicted.captured_importance >= last.predicted.captured_importance - 1e-9


def test_depth_aware_trades_weak_suffix_layers_for_a_strong_deeper_one():
    costs = LayerCosts((1.0,) * 8, (1.0,) * 8, (0.5,) * 8, 1.0, 21.0)
    candidates = Candidates([0, 0, 0, 50, 9, 9, 1, 1], costs, range(8))
    assert select_layers(PlanSettings(policy="last"), candidates) == (4, 5, 6, 7)
    assert select_layers(PlanSettings(policy="depth-aware"), candidates) == (
        3,
        4,
    )  # one layer deeper, two adapters fewer


# --- costs and frontier


def test_costs_are_those_of_the_formula():
    read = make_scores([1.0, 1.0])
    ranks = {module.name: 8 for module in read.anatomy.modules}
    costs = layer_costs(read.anatomy, ranks, baseline_rank=16, sequence_length=100, labelled_share=0.4)
    weights = 2 * (64 * 64 + 64 * 64 + 64 * 160)
    attention = 4 * 100 * 64
    adapters = 6 * 8 * (128 + 128 + 224)
    head = 2 * 2 * 64 * 500
    assert costs.forward == (weights + attention,) * 2
    assert costs.backward == (weights + 2 * attention,) * 2
    assert costs.adapter == (adapters,) * 2
    above = 2 * weights + 3 * attention + adapters + 0.4 * head
    assert costs.cached_step([1]) == above
    assert costs.step([1]) == above + weights + attention
    assert costs.mean_step([1], epochs=4) == pytest.approx(above + (weights + attention) / 4)
    assert costs.baseline == 4 * weights + 6 * attention + 2 * 2 * adapters + head  # twice the rank


def timed(read: Scores, **changes) -> Scores:
    """The same scores with invented timings: 2 s forward, 3 s backward, adapters 1 s and 1 ms per 1,000 parameters."""
    layer = LayerTiming(forward=2.0, backward=3.0, adapter_fixed=1.0, adapter_per_parameter=1e-6)
    fields = {
        "device": "cpu", "dtype": "float32", "threads": 2, "batch_size": 4, "tokens": 800.0, "random_padding": 1.25,
        "layers": (layer,) * read.anatomy.layer_count, "head": 5.5, "baseline": 100.0,
        "baseline_rank": 16, "seconds": 9.0,
    }  # fmt: skip
    return Scores.model_validate(read.model_dump() | {"timings": Timings(**fields | changes)})


def test_measured_costs_are_seconds():
    read = timed(make_scores([1.0] * 4))
    made = plan(read, policy="last", percent=50)
    adapters = 2 * (1.0 + 1e-6 * 16 * (128 + 128 + 224))
    assert made.predicted.baseline_step_seconds == 100.0
    assert made.predicted.relative_cached_step_time == pytest.approx((2 * 5 + adapters + 5.5) / 100)
    assert made.predicted.relative_step_time == pytest.approx((4 * 2 + 2 * 3 + adapters + 5.5) / 100)
    assert made.predicted.cached_speedup > made.predicted.speedup
    higher = plan(read, policy="last", percent=50, rank=32).predicted.baseline_step_seconds
    assert higher == pytest.approx(100 + 1.25 * 4 * 1e-6 * 16 * (128 + 128 + 224))
    with pytest.raises(ValueError, match="1 timed layers for 2 layers"):
        timed(make_scores([1.0, 1.0]), layers=read.timings.layers[:1])


@pytest.mark.parametrize("is_timed", [False, True])
def test_a_speedup_is_a_floor_and_gets_the_most_importance(is_timed):
    read = make_scores([float(7 - abs(layer - 5)) for layer in range(12)])
    read = timed(read) if is_timed else read
    for epochs in (1, 3):
        points = plan_frontier(read, epochs=epochs, freeze_after=0)
        for target in (points[0].speedup, 1.7, points[-1].speedup):
            made = plan(read, speedup=target, epochs=epochs, freeze_after=0)
            mean = (
                made.predicted.relative_step_time + (epochs - 1) * made.predicted.relative_cached_step_time
            ) / epochs
            assert 1 / mean >= target * (1 - 1e-6)
            fitting = [point for point in points if point.speedup >= target * (1 - 1e-9)]
            assert made.predicted.captured_importance == max(point.captured_importance for point in fitting)
    later = plan(read, speedup=2.0, epochs=4, freeze_after=0).predicted.captured_importance
    assert later >= plan(read, speedup=2.0, freeze_after=0).predicted.captured_importance  # the cache buys depth


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"speedup": 1e6, "freeze_after": 0},
            r"`speedup` is 1e\+06, but the fastest choice of layers is predicted at .*x",
        ),
        ({"speedup": -1.0}, "`speedup` is -1; expected more than 0"),
        ({"epochs": 0}, "`epochs` is 0; expected more than 0"),
        ({"speedup": 2.0, "target": "speed"}, "`target` and `speedup` are both given; expected one of them"),
        ({"policy": "last", "target": "quality"}, "`target` and `policy` are both given; expected one of them"),
        ({"freeze_after": 0, "target": "balanced"}, "`target` and `freeze_after` are both given"),
        ({"speedup": 2.0, "policy": "last"}, "`speedup` is given and `policy` is last; expected `policy` depth-aware"),
    ],
)
def test_speedups_that_cannot_be(settings, expected):
    with pytest.raises((PlanError, SettingsError), match=expected) as caught:
        plan(make_scores([1.0] * 4), **settings)
    assert "\n" not in str(caught.value)


@given(
    st.lists(st.integers(0, 9).map(float), min_size=1, max_size=7),
    st.floats(0.1, 3),
    st.floats(0.01, 2),
    st.sampled_from([1.0, 3.0]),
)
@settings(max_examples=60)
def test_the_frontier_is_exact(scores, backward, adapter, epochs):
    """Against every subset of the layers: nothing on the frontier is beaten, nothing better is missed."""
    count = len(scores)
    costs = LayerCosts((1.0,) * count, (backward,) * count, (adapter,) * count, 0.5, 3.0)
    points = frontier(scores, costs, epochs)
    subsets = [layers for size in range(1, count + 1) for layers in itertools.combinations(range(count), size)]
    for layers in subsets:
        importance = sum(scores[layer] for layer in layers) / (sum(scores) or 1)
        best = best_within(points, costs.mean_step(layers, epochs) / costs.baseline)
        assert best is not None
        assert sum(scores[layer] for layer in best.layers) / (sum(scores) or 1) >= importance - 1e-9
    times = [point.relative_run_time for point in points]
    assert times == sorted(times)
    for point in points:
        assert point.relative_step_time == pytest.approx(costs.step(point.layers) / costs.baseline)
        assert point.relative_cached_step_time == pytest.approx(costs.cached_step(point.layers) / costs.baseline)


def test_the_frontier_keeps_to_early_steps():
    read = make_scores([float(7 - abs(layer - 5)) for layer in range(12)])
    whole = {point.layers: point.relative_run_time for point in plan_frontier(read, freeze_after=0)}
    for point in plan_frontier(read, freeze_after=0.25, epochs=1 / 0.75):  # one pass is left then
        assert point.relative_run_time == pytest.approx(0.25 * whole[tuple(range(12))] + 0.75 * whole[point.layers])


def test_the_plan_lies_on_the_frontier_and_uniform_is_its_end():
    read = make_scores([float(7 - abs(layer - 5)) for layer in range(12)])
    points = plan_frontier(read)
    assert plan(read).layers in [point.layers for point in points]
    assert points[-1].layers == tuple(range(12))
    assert points[-1].relative_step_time == points[-1].relative_cached_step_time < 1.0  # logits at labels alone
    assert best_within(points, 0.0) is None


# --- target modules and defaults


@given(
    score_lists,
    st.sampled_from(POLICIES),
    st.floats(0.01, 100),
    st.sets(st.sampled_from(["q", "o", "up"]), min_size=1),
    st.sampled_from([None, 0.0, 0.5]),
)
def test_target_modules_choose_modules_and_never_layers(scores, policy, percent, leaves, freeze_after):
    """In a model whose layers are alike: the layers are those of all modules, the adapters those that are named."""
    read = make_scores(scores)
    about = {"policy": policy, "percent": percent, "freeze_after": freeze_after}
    whole, made = plan(read, **about), plan(read, target_modules=sorted(leaves), **about)
    wanted = [adapter for adapter in whole.adapters if adapter.name.rpartition(".")[2] in leaves]
    if policy != "depth-aware":
        assert made.layers == whole.layers
        assert made.adapters == tuple(wanted)
    assert {adapter.name.rpartition(".")[2] for adapter in made.adapters} == leaves
    assert {adapter.layer for adapter in made.adapters} == {*made.layers, *made.early_layers}
    assert made.trainable_parameters <= whole.trainable_parameters or policy == "depth-aware"
    assert plan(read, target_modules=", ".join(sorted(leaves)), **about) == made
    if leaves == {"q", "o", "up"}:
        assert (made.layers, made.adapters) == (whole.layers, whole.adapters)


@given(st.lists(st.booleans(), min_size=2, max_size=20).filter(any), st.sampled_from(POLICIES), st.floats(0.01, 100))
def test_layers_without_a_target_module_are_never_chosen(has_up, policy, percent):
    read = make_scores([1.0] * len(has_up))
    modules = tuple(
        module for module in read.anatomy.modules if has_up[module.layer] or not module.name.endswith("mlp.up")
    )
    anatomy = read.anatomy.model_copy(update={"modules": modules})
    read = read.model_copy(update={"anatomy": anatomy})
    made = plan(read, policy=policy, percent=percent, target_modules="up")
    having = {layer for layer, has in enumerate(has_up) if has}
    assert {*made.layers, *made.early_layers} <= having
    assert len(made.layers) == len(having) if policy == "uniform" else made.layers
    if policy not in ("uniform", "depth-aware"):
        assert len(made.layers) == layer_share(len(having), percent)


def test_target_modules_leave_the_measured_baseline_alone():
    """The baseline stays LoRA on every module; what adapters take by themselves is shared out by their size."""
    read = timed(make_scores([1.0] * 4))
    whole = plan(read, policy="last", rank=32).predicted
    part = plan(read, policy="last", rank=32, target_modules="q").predicted
    assert part.baseline_step_seconds == whole.baseline_step_seconds
    saved = whole.relative_cached_step_time - part.relative_cached_step_time
    others = (128 + 224) / (128 + 128 + 224)
    assert saved * whole.baseline_step_seconds == pytest.approx(2 * (others * 1.0 + 1e-6 * 32 * (128 + 224)))


def test_defaults_are_the_same_however_a_plan_is_asked_for():
    read = make_scores([1.0, 2.0, 3.0, 4.0])
    made = plan(read, epochs=3)
    assert made == plan(read, PlanSettings(epochs=3)) == plan(read, target="balanced", epochs=3, percent=None, rank=16)
    assert made.settings.alpha == 32
    assert made.settings == made.settings.resolved()  # nothing is left to fill in
    again = plan(read, made.settings)
    assert again == made.model_copy(update={"reason": ""})
    assert plan(read, policy="depth-aware").settings.freeze_after == SPEED_SHARE
    assert {plan(read, policy=policy).settings.freeze_after for policy in POLICIES if policy != "depth-aware"} == {0}


# --- targets


def test_quality_adapts_every_layer_to_the_end():
    made = plan(make_scores([1.0] * 8), target="quality", epochs=10)
    assert (made.layers, made.early_layers, made.freeze_after) == (tuple(range(8)), (), 0)
    assert made.reason == "The lowest loss first: every layer learns to the end."


def test_speed_freezes_the_lower_layers_early_in_a_short_run_too():
    made = plan(make_scores([1.0] * 8), target="speed")
    assert (made.layers, made.early_layers, made.freeze_after) == ((4, 5, 6, 7), (0, 1, 2, 3), SPEED_SHARE)


@pytest.mark.parametrize(("epochs", "freezes"), [(0.1, False), (1, False), (2, False), (3, True), (10, True)])
def test_the_default_freezes_only_where_rows_come_back_often_enough_to_be_worth_it(epochs, freezes):
    read, about = make_scores([1.0] * 8), {"epochs": epochs, "rank": 1}
    made = plan(read, **about)
    assert bool(made.early_layers) == freezes
    assert made.freeze_after == (BALANCED_SHARE if freezes else 0)
    reason = re.search(r"would save (\d+) % of the time. Below 15 %, that is not worth", made.reason)
    assert (reason is None) == freezes
    quality, speed = (plan(read, target=target, **about) for target in ("quality", "speed"))
    times = [one.predicted.relative_run_time for one in (speed, made, quality)]
    assert times == sorted(times)
    frozen = plan(read, policy="depth-aware", freeze_after=BALANCED_SHARE, **about)
    saved = 1 - frozen.predicted.relative_run_time / quality.predicted.relative_run_time
    assert (saved >= WORTHWHILE) == freezes
    if reason:
        assert int(reason[1]) == round(100 * saved)


def test_the_time_of_a_run_is_that_of_its_steps():
    """Three passes, half of them with every layer: half a pass fills the cache, one reads what is there."""
    made = plan(make_scores([1.0] * 8), policy="depth-aware", freeze_after=0.5, epochs=3).predicted
    rest = (made.relative_step_time + 0.5 * made.relative_cached_step_time) / 1.5
    assert made.relative_run_time == pytest.approx(0.5 * made.relative_early_step_time + 0.5 * rest)
    assert made.run_speedup == 1 / made.relative_run_time


def test_rslora_has_one_alpha_for_every_rank():
    read = make_scores([1.0, 2.0])
    made = plan(read, policy="uniform", attention_rank=8, mlp_rank=32, alpha=12, rslora=True)
    assert {adapter.rank: adapter.alpha for adapter in made.adapters} == {8: 12, 32: 12}
    plain = plan(read, policy="uniform", attention_rank=8, mlp_rank=32, alpha=12)
    assert {adapter.rank: adapter.alpha for adapter in plain.adapters} == {8: 6, 32: 24}


# --- ranks


@given(score_lists, st.data(), st.integers(1, 16).map(lambda k: 4 * k))
def test_ranks_by_score_keep_the_budget_and_the_order(scores, data, rank):
    shares = data.draw(st.lists(st.floats(0, 1), min_size=3 * len(scores), max_size=3 * len(scores)))
    read = make_scores(scores, shares)
    modules = read.anatomy.modules
    budget_params = sum(module.lora_parameters(rank) for module in modules)
    ranks = ranks_by_score(modules, read.modules, budget_params)
    assert sum(module.lora_parameters(ranks[module.name]) for module in modules) <= budget_params
    assert all(4 <= ranks[m.name] <= min(m.in_features, m.out_features) for m in modules)
    assert all(value % 4 == 0 for value in ranks.values())
    for name in ("attn.q", "attn.o", "mlp.up"):  # among modules of one shape, a higher score never ranks lower
        alike = [m.name for m in modules if m.name.endswith(name)]
        for a, b in itertools.pairwise(sorted(alike, key=lambda n: read.modules[n])):
            assert ranks[a] <= ranks[b] or read.modules[a] == read.modules[b]


def test_the_smallest_scores_keep_their_order():
    """Numbers that no division leaves above 0."""
    read = make_scores([1.0] * 4)
    modules = [module for module in read.anatomy.modules if module.name.endswith("mlp.up")]
    found = ranks_by_score(modules, {module.name: 5e-324 * (at + 1) for at, module in enumerate(modules)}, 9_000)
    ranks = [found[module.name] for module in modules]
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[-1]


def test_ranks_by_score_are_proportional():
    read = make_scores([2.0, 3.0, 7.0], [1 / 3] * 9)
    modules = read.anatomy.modules
    ranks = ranks_by_score(modules, read.modules, sum(module.lora_parameters(16) for module in modules))
    assert [ranks[f"model.layers.{layer}.attn.q"] for layer in range(3)] == [8, 12, 28]


def test_by_role_gives_the_published_ranks_and_alpha_keeps_its_ratio():
    read = make_scores([1.0, 2.0])
    for made, expected in (
        (plan(read, policy="uniform", ranks="by-role"), {"attention": 16, "mlp": 64}),
        (plan(read, policy="uniform", attention_rank=8), {"attention": 8, "mlp": 64}),
        (plan(read, policy="uniform", rank=4, mlp_rank=12), {"attention": 4, "mlp": 12}),
    ):
        assert {adapter.role: adapter.rank for adapter in made.adapters} == expected
        assert {adapter.alpha / adapter.rank for adapter in made.adapters} == {2.0}
    assert {a.alpha / a.rank for a in plan(read, policy="uniform", ranks="by-score", alpha=8).adapters} == {0.5}


def test_predictions_are_relative_to_uniform_at_the_same_rank():
    read = make_scores([3.0, 1.0, 1.0, 1.0])
    uniform = plan(read, policy="uniform").predicted.relative_step_time
    assert uniform < 1.0  # logits at labels alone
    assert plan(read, policy="uniform", ranks="by-role").predicted.relative_step_time > uniform
    assert plan(read, policy="first", percent=25).predicted.captured_importance == 0.5
    assert (
        plan(read, policy="last", percent=25).predicted.speedup
        > plan(read, policy="last", percent=75).predicted.speedup
        > 1.0
    )


# --- the file


def random_plan(draw: random.Random) -> Plan:
    scores = [draw.choice([0.0, 1.0, draw.random() * 10 ** draw.randint(-6, 6)]) for _ in range(draw.randint(1, 48))]
    mode = draw.choice(RANK_MODES)
    by_role = {"attention_rank": draw.randint(1, 64), "mlp_rank": draw.randint(1, 64)} if mode == "by-role" else {}
    return plan(
        make_scores(scores),
        policy=draw.choice(POLICIES),
        percent=draw.uniform(0.1, 100),
        rank=draw.randint(4, 40),
        ranks=mode,
        alpha=draw.choice([None, 1, 16, draw.uniform(0.5, 64)]),
        seed=draw.randint(0, 999),
        target_modules=draw.choice(["", "q", "q,up"]),
        dropout=draw.choice([0, 0.1]),
        rslora=draw.random() < 0.5,
        freeze_after=draw.choice([None, 0, 0.5]),
        **by_role,
    )


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_plans_survive_writing_and_reading(tmp_path, count):
    draw = random.Random(7)
    for _ in range(count):
        made = random_plan(draw)
        assert Plan.read(made.write(tmp_path / "plan.json")) == made


def test_a_plan_for_another_model_is_refused_with_both_named():
    made = plan(make_scores([1.0, 2.0]))
    made.check_model(made.model)
    with pytest.raises(
        PlanError, match=r"made for invented \(abababababab\), but this model is other \(cdcdcdcdcdcd\)"
    ):
        made.check_model(ModelIdentity(name="other", fingerprint="cd" * 32))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"version": 1}, "version 1; this release reads version 2"),
        ({"format": "aletheia-scores"}, "holds scores; expected a plan file"),
        ({"polcy": "last"}, "polcy"),
        ({"settings": {"rank": 0}}, "`rank` is 0; expected at least 1"),
        ({"layers": [0]}, "'layers' must be the sorted layers"),
        ({"adapters": []}, "at least one adapter"),
    ],
)
def test_a_plan_that_was_tampered_with_is_refused(tmp_path, change, expected):
    path = plan(make_scores([1.0, 2.0, 3.0])).write(tmp_path / "plan.json")
    edited(path, **change)
    with pytest.raises(ArtifactError, match=expected) as caught:
        Plan.read(path)
    assert str(path) in str(caught.value)


def test_a_rank_of_zero_or_a_doubled_module_in_the_file_is_refused(tmp_path):
    path = plan(make_scores([1.0])).write(tmp_path / "plan.json")
    adapters = json.loads(path.read_text())["adapters"]
    adapters[0]["rank"] = 0
    edited(path, adapters=adapters)
    with pytest.raises(ArtifactError, match=r"adapters\.0\.rank"):
        Plan.read(path)
    plan(make_scores([1.0])).write(tmp_path / "twice.json")
    edited(path := tmp_path / "twice.json", adapters=[adapters[1]] * 2)
    with pytest.raises(ArtifactError, match="names a module twice"):
        Plan.read(path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s["layers"].pop(), "1 layer scores for 2 layers"),
        (lambda s: s["modules"].popitem(), "different names"),
        (lambda s: s["layers"].__setitem__(0, -1.0), "layers.0"),
        (lambda s: s["probe"].__setitem__("batches", 0), "probe.batches"),
    ],
)
def test_scores_that_do_not_fit_together_are_refused(tmp_path, change, expected):
    path = make_scores([1.0, 2.0]).write(tmp_path / "scores.json")
    found = json.loads(path.read_text())
    change(found)
    resealed(path, **found)
    with pytest.raises(ArtifactError, match=expected):
        Scores.read(path)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "9" * 5000, '{"format": "aletheia-plan"', "[1, 2]", "\x00"])
def test_a_damaged_file_is_one_clear_line(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ArtifactError, match=r"plan\.json") as caught:
        Plan.read(path)
    assert "\n" not in str(caught.value)


def test_writing_replaces_a_plan_but_nothing_else(tmp_path):
    made = plan(make_scores([1.0]))
    made.write(made.write(tmp_path / "plan.json"))
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    with pytest.raises(ArtifactError, match="is not an aletheia-plan file"):
        made.write(tmp_path / "notes.json")
    assert (tmp_path / "notes.json").read_text() == '{"mine": 1}'
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"percent": 0}, "`percent` is 0; expected more than 0"),
        ({"percent": 101}, "`percent` is 101; expected at most 100"),
        ({"percent": float("nan")}, "`percent` is nan; expected a finite number"),
        ({"rank": 0}, "`rank` is 0; expected at least 1"),
        ({"attention_rank": 0}, "`attention_rank` is 0"),
        ({"mlp_rank": -1}, "`mlp_rank` is -1"),
        ({"alpha": 0}, "`alpha` is 0"),
        ({"dropout": 1}, "`dropout` is 1; expected less than 1"),
        ({"freeze_after": 1}, "`freeze_after` is 1; expected less than 1"),
        ({"policy": "best"}, "`policy` is 'best'; expected one of depth-aware, .*uniform"),
        ({"ranks": "random"}, "`ranks` is 'random'; expected one of uniform, by-role, by-score"),
        ({"ranks": "by-score", "rank": 3}, "expected a `rank` of at least 4"),
        ({"ranks": "by-score", "mlp_rank": 8}, "`mlp_rank` is given and `ranks` is by-score"),
        ({"polcy": "last"}, "unknown setting `polcy`; expected perhaps `policy`"),
        ({"target_modules": 3}, "`target_modules` is 3; expected a list"),
        ({"target_modules": "q,mlp.up"}, "`target_modules` names mlp.up.*; expected some of o, q, up"),
        ({"settings": PlanSettings(), "rank": 8}, "`settings` and `rank` are both given"),
        ({"settings": "last"}, "`settings` is 'last'; expected PlanSettings"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, expected):
    with pytest.raises((PlanError, SettingsError), match=expected) as caught:
        plan(make_scores([1.0, 2.0]), **arguments)
    assert "\n" not in str(caught.value)


def test_planning_loads_no_torch():
    code = "import sys, aletheia.planning.make, aletheia.runs.schema; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
