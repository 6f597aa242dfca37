"""Memory and time on paper: the memory model that bounds a plan, and the estimate of a whole job."""

import pytest
from test_reporting import shown
from tiny import make_model

import aletheia
from aletheia.errors import PlanError
from aletheia.planning.activations import Step
from aletheia.planning.estimate import Job, Machine, estimate, estimate_plan
from aletheia.planning.make import every_layer_bytes
from aletheia.planning.memory import ADAPTER_BYTES, PROCESS_BYTES, lowest_boundary, training_bytes
from aletheia.planning.plan import PlanSettings
from aletheia.planning.targets import SPEED_SHARE
from aletheia.reporting.estimate import estimate_view


@pytest.fixture(scope="module")
def scores(examples):
    return aletheia.probe(make_model("llama", layers=8), examples, batches=2)


def step(share=0.5, tokens=1000):
    return Step(tokens, tokens, share, "float32")


def needed(scores, boundary, share=0.5):
    ranks = {module.name: 16 for module in scores.anatomy.adaptable()}
    layers = range(boundary, scores.anatomy.layer_count)
    return training_bytes(scores.anatomy, scores.weight_bytes, layers, ranks, step(share))


def test_weights_are_counted_as_they_lie_in_memory(scores):
    model = make_model("llama", layers=8)
    inside = sum(value.nbytes for value in model.model.layers.parameters())
    assert sum(scores.weight_bytes.layers) == inside
    assert scores.weight_bytes.outside == sum(value.nbytes for value in model.parameters()) - inside  # tied head


def test_memory_falls_as_the_boundary_rises(scores):
    found = [needed(scores, boundary) for boundary in range(8)]
    assert found == sorted(found, reverse=True)
    assert found[-1] > PROCESS_BYTES
    layer = scores.weight_bytes.layers[0]
    assert found[0] - found[1] > layer  # its adapters and activations, too


def test_a_plan_keeps_to_max_memory(scores):
    ranks = {module.name: 16 for module in scores.anatomy.adaptable()}
    for boundary in (0, 3, 7):
        cap = needed(scores, boundary)
        share = scores.probe.labelled_tokens / scores.probe.tokens
        lowest = lowest_boundary(scores.anatomy, scores.weight_bytes, ranks, step(share), cap)
        made = aletheia.plan(scores, percent=100, max_memory=cap, batch_tokens=1000, labelled_share=share)
        assert made.boundary == lowest
        assert made.settings.freeze_after == (SPEED_SHARE if lowest == 0 else 0)
        settings = PlanSettings(percent=100)
        assert (every_layer_bytes(scores, settings, step(share)) <= cap) == (lowest == 0)
    cap = needed(scores, 3)
    lowest = aletheia.plan(scores, percent=100, max_memory=cap, batch_tokens=1000).boundary
    assert (
        0 < lowest == min(point.boundary for point in aletheia.plan_frontier(scores, max_memory=cap, batch_tokens=1000))
    )
    with pytest.raises(PlanError, match="the last layer alone takes"):
        aletheia.plan(scores, max_memory=PROCESS_BYTES)
    with pytest.raises(PlanError, match=r"`policy` uniform adapts layer 0, but only layers from \d up fit"):
        aletheia.plan(scores, policy="uniform", max_memory=needed(scores, 5), batch_tokens=1000)
    with pytest.raises(PlanError, match="does not fit in `max_memory`"):
        aletheia.plan(scores, max_memory=needed(scores, 5), batch_tokens=1000, freeze_after=0.25)
    unweighed = scores.model_copy(update={"weight_bytes": None})
    with pytest.raises(PlanError, match="hold no weight sizes"):
        aletheia.plan(unweighed, max_memory=10**9)
    assert every_layer_bytes(unweighed, PlanSettings(), step()) is None


def test_adapted_experts_are_held_twice(examples):
    model = make_model("mixtral")
    scores = aletheia.probe(model, examples, batches=1)
    modules = [module for module in scores.anatomy.adaptable() if module.layer == 3]
    stacks = {module.name: module for module in modules if module.fused}
    sizes = [model.get_parameter(name).nbytes for name in stacks]
    without, added = (
        training_bytes(scores.anatomy, scores.weight_bytes, [3], {module.name: 4 for module in some}, step(tokens=10))
        for some in ([module for module in modules if not module.fused], modules)
    )
    adapters = ADAPTER_BYTES * sum(module.lora_parameters(4) for module in stacks.values())
    # a layer's norms and router are counted with its experts, in proportion
    assert added - without == pytest.approx(sum(sizes) + max(sizes) + adapters, rel=0.02)


def test_the_estimate_follows_its_formulas(scores):
    job = Job(rows=100, tokens_per_row=64, labelled_share=0.5, epochs=3, batch_size=4)
    weights = sum(scores.weight_bytes.layers) + scores.weight_bytes.outside
    layer = sum(module.parameters for module in scores.anatomy.in_layer(0))
    roomy, tight = Machine("roomy", 2.1 * weights, 1e9, 1e30), Machine("tight", 1.9 * weights, 1e9, 1e3)
    plan = aletheia.plan(scores, policy="last", percent=25, rank=4)
    probe, cache, training = estimate_plan(plan, scores, job, roomy)
    assert (probe.name, cache.name) == ("probe", "cache")
    assert probe.seconds == pytest.approx(5 * 64 * 4 * 8 * layer / 1e9)
    assert cache.seconds == pytest.approx(6400 * 2 * 6 * layer / 1e9)
    assert cache.disk == training.disk == 6400 * 32 * 4
    adapters = plan.trainable_parameters
    head = 4 * 32 * scores.anatomy.vocab_size * 0.5
    assert training.seconds == pytest.approx(3 * 6400 * (4 * 2 * layer + 6 * adapters + head) / 1e9)
    probe, cache, _ = estimate_plan(plan, scores, job, tight)
    assert (probe.name, cache.name) == ("probe, streamed", "cache, streamed")
    assert probe.read == 2 * weights
    assert probe.seconds == pytest.approx(2 * weights / 1e3)  # the disk is the slower part
    assert cache.disk == 2 * 6400 * 32 * 4
    widths = sum(module.in_features + module.out_features for module in scores.anatomy.in_layer(0))
    work = 4 * 3 * 64 * widths
    assert probe.memory == PROCESS_BYTES + 3 * scores.weight_bytes.layers[0] + work


def test_of_experts_those_a_token_meets_are_counted(examples):
    scores = aletheia.probe(make_model("mixtral"), examples, batches=1)
    job, machine = Job(10, 10, 1.0, 1, 1), Machine("any", 1e12, 1e9, 1e30)
    ranks = {module.name: 2 for module in scores.anatomy.adaptable()}
    probe = estimate(scores.anatomy, scores.weight_bytes, [3], ranks, job, machine, 4)[0]
    total = sum(module.parameters for module in scores.anatomy.modules)
    assert probe.seconds < 0.8 * 50 * 4 * total / 1e9


def test_early_layers_are_counted(scores):
    job, machine = Job(100, 64, 0.5, 3, 4), Machine("any", 1e12, 1e9, 1e30)
    plain, early = (
        estimate_plan(aletheia.plan(scores, policy="last", percent=25, freeze_after=share), scores, job, machine)[-1]
        for share in (0.0, 0.25)
    )
    assert early.memory > plain.memory
    assert early.seconds > plain.seconds
    assert early.read == 0.75 * plain.read


def test_what_does_not_fit_is_marked(scores):
    job = Job(100, 64, 0.5, 3, 4)
    machines = [Machine("small", 1e6, 1e9, 1e9), Machine("large", 1e12, 1e9, 1e9)]
    plan = aletheia.plan(scores)
    text = shown(estimate_view([(machine, estimate_plan(plan, scores, job, machine)) for machine in machines], job))
    assert "100 rows of 64 tokens" in text
    small, large = text.split("large")
    assert small.count("(!)") == 4  # three phases and the legend
    assert "(!)" not in large
