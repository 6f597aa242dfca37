"""Policies, ranks, costs, the frontier and the Plan file: pure functions, property-tested."""

import itertools
import json
import math
import random
import subprocess
import sys
from typing import get_args

import pytest
from aletheia_lora.selection import select_layers as reference_select_layers
from hypothesis import given, settings
from hypothesis import strategies as st

from aletheia.anatomy.schema import Anatomy, ModelIdentity, Module
from aletheia.errors import ArtifactError, PlanError
from aletheia.planning.cost import LayerCosts, layer_costs
from aletheia.planning.frontier import best_within, frontier
from aletheia.planning.make import plan, plan_frontier
from aletheia.planning.plan import Plan, Policy, RankMode
from aletheia.planning.policies import layer_share, select_layers
from aletheia.planning.ranks import ranks_by_score
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
        made = plan(make_scores([float(score) for score in scores]), "top-percent", percent)
        assert list(made.layers) == reference_select_layers(dict(enumerate(scores)), percent)


@given(score_lists, st.floats(0.01, 100), st.integers(0, 99))
def test_controls_take_as_many_layers_as_the_published_policy(scores, percent, seed):
    read = make_scores(scores)
    count = layer_share(len(scores), percent)
    made = {policy: plan(read, policy, percent, seed=seed).layers for policy in POLICIES}
    for policy in ("top-percent", "last", "first", "random", "bottom"):
        assert len(made[policy]) == count
    assert made["uniform"] == tuple(range(len(scores)))
    assert made["first"] == tuple(range(count))
    assert made["last"] == tuple(range(len(scores) - count, len(scores)))
    captured = {policy: math.fsum(scores[layer] for layer in layers) for policy, layers in made.items()}
    assert captured["bottom"] <= captured["random"] <= captured["top-percent"]


def test_ties_go_to_the_lower_layer():
    costs = LayerCosts((1.0,) * 4, (1.0,) * 4, (0.1,) * 4, 1.0, 9.4)
    assert select_layers("top-percent", [1, 1, 1, 1], 50, 0, costs) == (0, 1)
    assert select_layers("bottom", [1, 1, 1, 1], 50, 0, costs) == (0, 1)


def test_random_differs_by_seed_and_repeats():
    read = make_scores([1.0] * 20)
    draws = {plan(read, "random", seed=seed).layers for seed in range(10)}
    assert len(draws) > 5
    assert plan(read, "random", seed=3).layers == plan(read, "random", seed=3).layers


@given(score_lists, st.floats(0.01, 100))
def test_depth_aware_is_as_fast_as_last_and_captures_at_least_as_much(scores, percent):
    read = make_scores(scores)
    ours, last = plan(read, "depth-aware", percent), plan(read, "last", percent)
    assert ours.predicted.relative_step_time <= last.predicted.relative_step_time * (1 + 1e-9)
    assert ours.predicted.captured_importance >= last.predicted.captured_importance - 1e-9


def test_depth_aware_trades_weak_suffix_layers_for_a_strong_deeper_one():
    costs = LayerCosts((1.0,) * 8, (1.0,) * 8, (0.5,) * 8, 1.0, 21.0)
    scores = [0, 0, 0, 50, 9, 9, 1, 1]
    assert select_layers("last", scores, 50, 0, costs) == (4, 5, 6, 7)
    assert select_layers("depth-aware", scores, 50, 0, costs) == (3, 4)  # one layer deeper, two adapters fewer


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
    made = plan(read, "last", 50)
    adapters = 2 * (1.0 + 1e-6 * 16 * (128 + 128 + 224))
    assert made.predicted.baseline_step_seconds == 100.0
    assert made.predicted.relative_cached_step_time == pytest.approx((2 * 5 + adapters + 5.5) / 100)
    assert made.predicted.relative_step_time == pytest.approx((4 * 2 + 2 * 3 + adapters + 5.5) / 100)
    assert made.predicted.cached_speedup > made.predicted.speedup
    higher = plan(read, "last", 50, rank=32).predicted.baseline_step_seconds
    assert higher == pytest.approx(100 + 1.25 * 4 * 1e-6 * 16 * (128 + 128 + 224))
    with pytest.raises(ValueError, match="1 timed layers for 2 layers"):
        timed(make_scores([1.0, 1.0]), layers=read.timings.layers[:1])


@pytest.mark.parametrize("is_timed", [False, True])
def test_a_speedup_is_a_floor_and_gets_the_most_importance(is_timed):
    read = make_scores([float(7 - abs(layer - 5)) for layer in range(12)])
    read = timed(read) if is_timed else read
    for epochs in (1, 3):
        points = plan_frontier(read, epochs=epochs)
        for target in (points[0].speedup, 1.7, points[-1].speedup):
            made = plan(read, speedup=target, epochs=epochs)
            mean = (
                made.predicted.relative_step_time + (epochs - 1) * made.predicted.relative_cached_step_time
            ) / epochs
            assert 1 / mean >= target * (1 - 1e-6)
            fitting = [point for point in points if point.speedup >= target * (1 - 1e-9)]
            assert made.predicted.captured_importance == max(point.captured_importance for point in fitting)
    assert plan(read, quality_first=True).layers == plan(read, speedup=1.30).layers
    later = plan(read, speedup=2.0, epochs=4).predicted.captured_importance
    assert later >= plan(read, speedup=2.0).predicted.captured_importance  # the cache buys depth


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"speedup": 1e6}, r"--speedup is 1e\+06; the fastest choice of layers is predicted at .*x"),
        ({"speedup": -1.0}, "--speedup is -1; expected a positive number"),
        ({"epochs": 0}, "--epochs is 0; expected a positive number"),
        ({"speedup": 2.0, "quality_first": True}, "both given"),
        ({"speedup": 2.0, "policy": "last"}, "go with '--policy depth-aware', not with last"),
    ],
)
def test_speedups_that_cannot_be(settings, expected):
    with pytest.raises(PlanError, match=expected):
        plan(make_scores([1.0] * 4), **settings)


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
    whole = {point.layers: point.relative_run_time for point in plan_frontier(read)}
    for point in plan_frontier(read, freeze_after=0.25, epochs=1 / 0.75):  # one pass is left then
        assert point.relative_run_time == pytest.approx(0.25 * whole[tuple(range(12))] + 0.75 * whole[point.layers])


def test_the_plan_lies_on_the_frontier_and_uniform_is_its_end():
    read = make_scores([float(7 - abs(layer - 5)) for layer in range(12)])
    points = plan_frontier(read)
    assert plan(read).layers in [point.layers for point in points]
    assert points[-1].layers == tuple(range(12))
    assert points[-1].relative_step_time == points[-1].relative_cached_step_time < 1.0  # logits at labels alone
    assert best_within(points, 0.0) is None


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


def test_ranks_by_score_are_proportional():
    read = make_scores([2.0, 3.0, 7.0], [1 / 3] * 9)
    modules = read.anatomy.modules
    ranks = ranks_by_score(modules, read.modules, sum(module.lora_parameters(16) for module in modules))
    assert [ranks[f"model.layers.{layer}.attn.q"] for layer in range(3)] == [8, 12, 28]


def test_by_role_gives_the_published_ranks_and_alpha_keeps_its_ratio():
    read = make_scores([1.0, 2.0])
    for made, expected in (
        (plan(read, "uniform", ranks="by-role"), {"attention": 16, "mlp": 64}),
        (plan(read, "uniform", attention_rank=8), {"attention": 8, "mlp": 64}),
        (plan(read, "uniform", rank=4, mlp_rank=12), {"attention": 4, "mlp": 12}),
    ):
        assert {adapter.role: adapter.rank for adapter in made.adapters} == expected
        assert {adapter.alpha / adapter.rank for adapter in made.adapters} == {2.0}
    assert {a.alpha / a.rank for a in plan(read, "uniform", ranks="by-score", alpha=8).adapters} == {0.5}


def test_predictions_are_relative_to_uniform_at_the_same_rank():
    read = make_scores([3.0, 1.0, 1.0, 1.0])
    uniform = plan(read, "uniform").predicted.relative_step_time
    assert uniform < 1.0  # logits at labels alone
    assert plan(read, "uniform", ranks="by-role").predicted.relative_step_time > uniform
    assert plan(read, "first", 25).predicted.captured_importance == 0.5
    assert plan(read, "last", 25).predicted.speedup > plan(read, "last", 75).predicted.speedup > 1.0


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
        **by_role,
    )


def test_a_thousand_random_plans_survive_writing_and_reading(tmp_path):
    draw = random.Random(7)
    for _ in range(1000):
        made = random_plan(draw)
        assert Plan.read(made.write(tmp_path / "plan.json")) == made


def test_a_plan_for_another_model_is_refused_with_both_named():
    made = plan(make_scores([1.0, 2.0]))
    made.check_model(made.model)
    with pytest.raises(PlanError, match=r"made for invented \(abababababab\), this model is other \(cdcdcdcdcdcd\)"):
        made.check_model(ModelIdentity(name="other", fingerprint="cd" * 32))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"version": 2}, "version 2; this release reads version 1"),
        ({"format": "aletheia-scores"}, "no aletheia-plan file"),
        ({"polcy": "last"}, "polcy"),
        ({"layers": [0]}, "'layers' must be the sorted layers"),
        ({"adapters": []}, "at least one adapter"),
    ],
)
def test_a_plan_that_was_tampered_with_is_refused(tmp_path, change, expected):
    path = plan(make_scores([1.0, 2.0, 3.0])).write(tmp_path / "plan.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ArtifactError, match=expected) as caught:
        Plan.read(path)
    assert str(path) in str(caught.value)


def test_a_rank_of_zero_or_a_doubled_module_in_the_file_is_refused(tmp_path):
    path = plan(make_scores([1.0])).write(tmp_path / "plan.json")
    found = json.loads(path.read_text())
    found["adapters"][0]["rank"] = 0
    path.write_text(json.dumps(found))
    with pytest.raises(ArtifactError, match=r"adapters\.0\.rank"):
        Plan.read(path)
    found["adapters"] = [found["adapters"][1]] * 2
    path.write_text(json.dumps(found))
    with pytest.raises(ArtifactError, match="planned twice"):
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
    path.write_text(json.dumps(found))
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
    with pytest.raises(ArtifactError, match="is no aletheia-plan file"):
        made.write(tmp_path / "notes.json")
    assert (tmp_path / "notes.json").read_text() == '{"mine": 1}'
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"percent": 0}, "--percent is 0"),
        ({"percent": 101}, "--percent is 101"),
        ({"percent": float("nan")}, "--percent is nan"),
        ({"rank": 0}, "--rank is 0"),
        ({"attention_rank": 0}, "--attention-rank is 0"),
        ({"mlp_rank": -1}, "--mlp-rank is -1"),
        ({"alpha": 0}, "--alpha is 0"),
        ({"policy": "best"}, "unknown policy 'best'"),
        ({"ranks": "random"}, "unknown rank mode 'random'"),
        ({"ranks": "by-score", "rank": 3}, "at least 4"),
        ({"ranks": "by-score", "mlp_rank": 8}, "not with by-score"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, expected):
    with pytest.raises(PlanError, match=expected):
        plan(make_scores([1.0, 2.0]), **arguments)


def test_planning_loads_no_torch():
    code = "import sys, aletheia.planning.make, aletheia.runs.schema; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
