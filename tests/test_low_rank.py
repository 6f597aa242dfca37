"""Modules that share their input are computed together: as plain PEFT computes them, in fewer operations."""

import copy
from collections import Counter

import pytest
import torch
from families import OTHERS
from peft import LoraConfig, get_peft_model
from tiny import FAMILIES, MORE_FAMILIES, make_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from aletheia.adapters.adapt import lora_config
from aletheia.anatomy.read import read_anatomy
from aletheia.execution import shared_input
from aletheia.execution.fast import adapters_as_operators, bfloat16_autocast, fast_adapters

DIFFERENT = {"rank_pattern": {"k_proj": 3, "up_proj": 7}, "alpha_pattern": {"v_proj": 3, "gate_proj": 20}}


def adapted(family="llama", layers=2, targets="all-linear", **settings):
    """A tiny model with LoRA of random values on ``targets``."""
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, init_lora_weights=False, **settings)
    return get_peft_model(make_model(family, layers), config).train()


@pytest.fixture
def model():
    return adapted()


@pytest.fixture
def attention(model):
    return model.base_model.model.model.layers[1].self_attn


@pytest.fixture
def together(model):
    """Compute products of the model's groups together, within the test."""
    with fast_adapters(model):
        yield


def batch(rows=3, tokens=17):
    ids = torch.randint(3, 250, (rows, tokens), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def step(model):
    """Logits, and the gradient of every parameter that has one."""
    model.zero_grad()
    output = model(**batch())
    output.loss.backward()
    return output.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def error(found, exact):
    """Relative errors of the logits and of all gradients together."""
    (logits, grads), (logits_0, grads_0) = found, exact
    assert grads.keys() == grads_0.keys()
    vector, vector_0 = (torch.cat([grad.double().flatten() for grad in every.values()]) for every in (grads, grads_0))
    pairs = (logits.double(), logits_0.double()), (vector, vector_0)
    return max(((own - its).norm() / its.norm()).item() for own, its in pairs)


def x_of(module, **settings):
    return torch.randn(2, 5, module.in_features, generator=torch.Generator().manual_seed(2), **settings)


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def is_waiting():
    waiting = shared_input._waiting
    return bool(waiting.outputs) or waiting.x is not None or waiting.group is not None


def is_grouped(module):
    return bool(shared_input.others(module))


@pytest.fixture
def computed(monkeypatch):
    """How many modules were computed together, call by call."""
    counts, products = [], shared_input.products
    monkeypatch.setattr(shared_input, "products", lambda x, *rest: counts.append(len(rest[0])) or products(x, *rest))
    return counts


# --- exactness


@pytest.mark.parametrize("settings", [{}, DIFFERENT, {"targets": ["q_proj", "v_proj", "down_proj"]}])
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # without and with biases
def test_groups_equal_plain_peft(family, settings, computed):
    model = adapted(family, **settings)
    plain = step(model)
    with fast_adapters(model):
        found = [step(model)]
        with adapters_as_operators():
            found.append(step(model))
    exact = step(model.double())
    assert all(error(own, exact) < 4 * error(plain, exact) < 1e-5 for own in found)  # a few roundings each
    with fast_adapters(model):
        assert error(step(model), exact) < 1e-14
    assert computed == 3 * 2 * ([2, 1] if "targets" in settings else [3, 1, 2, 1])


@pytest.mark.parametrize("settings", [{}, DIFFERENT])
def test_beside_bfloat16_groups_are_as_exact_as_autocast(settings):
    model = adapted(**settings)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().double()
    exact = step(model)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.float() if "lora_" in name else parameter.data.bfloat16()
    with bfloat16_autocast(model):
        plain = error(step(model), exact)
    with fast_adapters(model):
        found = step(model)
    assert 0 < error(found, exact) < 1.2 * plain
    assert {grad.dtype for grad in found[1].values()} == {torch.float32}


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES, *OTHERS])
def test_groups_share_their_input_in_every_family(family):
    model = make_model(family)
    weights = read_anatomy(model).adaptable()
    model = get_peft_model(model, lora_config(weights, model, rank=4, alpha=8))
    with fast_adapters(model):
        for _ in range(2):
            model(input_ids=batch()["input_ids"])
            assert not is_waiting()
        assert all(group.shares for group in shared_input._groups.values())
    assert not shared_input._groups


def test_gradients_add_up_and_can_be_clipped(model):
    def two_steps():
        model.zero_grad()
        for _ in range(2):
            model(**batch()).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        return torch.zeros(1), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain = two_steps()[1]
    with fast_adapters(model):
        found = two_steps()[1]
    for name, grad in plain.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-9)


# --- operations


class Counted(TorchDispatchMode):
    """Operations that launch a kernel on a device, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function).split(".")[1]] += 1
        return function(*args, **(kwargs or {}))

    def of(self, *names):
        return sum(self.counts[name] for name in names)


PRODUCTS = ("mm", "addmm", "addmm_", "bmm")
COPIES = ("_to_copy", "copy_", "clone", "cat")


@pytest.mark.parametrize(("dtype", "copies", "copies_back"), [(torch.bfloat16, 8, 8), (torch.float32, 2, 4)])
def test_a_layer_takes_few_operations(dtype, copies, copies_back):
    """Groups of 3, 1, 2 and 1 modules; the copies of a group convert its As and Bs, and then their gradients."""
    layer = adapted(layers=1).base_model.model.model.layers[0]
    for name, parameter in layer.named_parameters():
        parameter.data = parameter.data if "lora_" in name else parameter.data.to(dtype)
    attention, mlp = layer.self_attn, layer.mlp
    x = x_of(attention.q_proj, dtype=dtype, requires_grad=True)
    wide = x_of(mlp.down_proj, dtype=dtype, requires_grad=True)
    with fast_adapters(layer), Counted() as forward:
        groups = [(attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)]
        outputs = [module(x) for group in groups for module in group] + [attention.o_proj(x), mlp.down_proj(wide)]
    with Counted() as backward:
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    assert forward.of(*PRODUCTS) == 4 + 2 * 7  # one with As a group; one with W and one with B a module
    assert forward.of(*COPIES) == copies
    assert (
        backward.of(*PRODUCTS) == 3 * 7 + 2 * 4
    )  # with W and B, and B's own, a module; with As and their own, a group
    assert backward.of(*COPIES) == copies_back
    assert backward.of("new_empty_strided", "mul", "mul_") == 0
    assert backward.of("add") == 2  # x is an input of three groups


# --- where modules do not share, or something changes between their calls


def test_another_tensor_gets_its_own_product(attention, together, computed):
    x, other = x_of(attention.q_proj), x_of(attention.q_proj) + 1
    attention.q_proj(x)
    found = attention.k_proj(other)
    assert not is_waiting()
    assert not is_grouped(attention.q_proj)
    attention.q_proj(x)
    assert computed == [3, 1, 1]
    assert_close(found, plain(attention.k_proj, other))


def plain(module, x):
    """The output by PEFT's own forward."""
    name = module.active_adapters[0]
    low_rank = module.lora_B[name](module.lora_A[name](x)) * module.scaling[name]
    return module.base_layer(x) + low_rank


def test_an_output_that_nobody_asks_for_is_let_go(model, attention, together):
    attention.q_proj(x_of(attention.q_proj))
    assert is_waiting()
    model(**batch())
    assert not is_waiting()
    assert not is_grouped(attention.v_proj)
    assert is_grouped(model.base_model.model.model.layers[0].self_attn.v_proj)


def test_nothing_waits_outside_the_context(model, attention):
    with fast_adapters(model):
        attention.q_proj(x_of(attention.q_proj))
    assert not is_waiting()
    assert not is_grouped(attention.q_proj)


CHANGES = {
    "x": lambda module, x: x.mul_(2),
    "A": lambda module, x: twice(module.lora_A["default"]),
    "B": lambda module, x: twice(module.lora_B["default"]),
    "scale": lambda module, x: module.set_scale("default", 5),
    "another weight": lambda module, x: setattr(module.lora_B["default"], "weight", another(module)),
}


def twice(linear):
    with torch.no_grad():
        linear.weight.mul_(2)


def another(module):
    return torch.nn.Parameter(module.lora_B["default"].weight.detach() + 1)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_calls_counts(change, attention, together):
    x = x_of(attention.q_proj)
    attention.q_proj(x)
    CHANGES[change](attention.k_proj, x)
    assert_close(attention.k_proj(x), plain(attention.k_proj, x))


def test_adapters_are_switched_off_or_merged_between_two_calls(attention, together):
    x = x_of(attention.q_proj)
    attention.q_proj(x)
    attention.k_proj.enable_adapters(False)
    assert torch.equal(attention.k_proj(x), attention.k_proj.base_layer(x))
    attention.v_proj.merge()
    assert torch.equal(attention.v_proj(x), attention.v_proj.base_layer(x))


def test_a_graph_is_asked_for_between_two_calls(attention, together):
    x = x_of(attention.q_proj)
    with torch.no_grad():
        attention.q_proj(x)
    attention.k_proj(x).sum().backward()
    assert attention.k_proj.lora_B["default"].weight.grad is not None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_equals_training(mode, model):
    expected = model(**batch()).logits
    with fast_adapters(model), mode():
        assert_close(model(**batch()).logits, expected)
        assert not is_waiting()


def test_a_watched_member_keeps_its_forward(attention, together, computed):
    seen = []
    attention.k_proj.base_layer.register_forward_hook(lambda module, args, output: seen.append(module))
    x = x_of(attention.q_proj)
    found = [module(x) for module in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert computed == [2]
    assert len(seen) == 1
    assert_close(found[1], plain(attention.k_proj, x))


def test_a_member_of_another_dtype_is_computed_apart(computed):
    model = adapted(layers=1)
    for name, parameter in model.named_parameters():
        wide = "lora_" in name and "k_proj" not in name
        parameter.data = parameter.data if wide else parameter.data.bfloat16()
    with bfloat16_autocast(model):
        plain = step(model)
    with fast_adapters(model):
        logits, grads = step(model)
    assert computed == [2, 1, 1, 1, 2, 1]  # queries and values; keys; values again, as their group turned out wrong
    assert error((logits, grads), plain) < 0.05
    assert all(grad.dtype == (torch.bfloat16 if "k_proj" in name else torch.float32) for name, grad in grads.items())


def test_the_compiler_sees_one_graph(model, together, computed):
    layer = model.base_model.model.model.layers[0].mlp
    x = x_of(layer.gate_proj)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert_close(compiled(x), layer(x))
    assert computed == [2, 1]  # of the call without the compiler


def test_outputs_that_nothing_depends_on_give_no_gradients(attention, together):
    x = x_of(attention.q_proj, requires_grad=True)
    q, _, v = (module(x) for module in (attention.q_proj, attention.k_proj, attention.v_proj))
    (q.square().sum() + v.square().sum()).backward()
    found = [x.grad, *(p.grad for p in attention.parameters())]
    assert all(p.grad is None for p in attention.k_proj.parameters())
    attention.zero_grad()
    x.grad = None
    (plain(attention.q_proj, x).square().sum() + plain(attention.v_proj, x).square().sum()).backward()
    for own, expected in zip(found, [x.grad, *(p.grad for p in attention.parameters())], strict=True):
        assert (own is None) == (expected is None)
        if own is not None:
            assert_close(own, expected)


def test_frozen_adapters_get_no_gradient(attention, together):
    attention.k_proj.requires_grad_(False)
    for module in (attention.q_proj, attention.v_proj):
        module.lora_A.requires_grad_(False)
    x = x_of(attention.q_proj)
    sum(module(x).sum() for module in (attention.q_proj, attention.k_proj, attention.v_proj)).backward()
    learned = {name for name, p in attention.named_parameters() if p.grad is not None}
    assert learned == {f"{name}.lora_B.default.weight" for name in ("q_proj", "v_proj")}


def test_it_can_be_differentiated_once(attention, together):
    x = x_of(attention.q_proj, requires_grad=True)
    [grad] = torch.autograd.grad(attention.q_proj(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_copy_made_inside_is_a_model_of_its_own(model, together, computed):
    expected = model(**batch()).logits
    computed.clear()
    copied = copy.deepcopy(model)
    assert set(computed) <= {1}
    assert_close(copied(**batch()).logits, expected)
    assert computed == [1] * 14


def test_contexts_may_be_nested(model, attention, together):
    with fast_adapters(model):
        assert is_grouped(attention.q_proj)
    assert is_grouped(attention.q_proj)


# --- recomputation


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_are_recomputed_together(model, reentrant, computed):
    plain = step(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with fast_adapters(model):
        assert error(step(model), plain) < 1e-5
    assert computed == 2 * 2 * [3, 1, 2, 1]


def test_a_wrong_group_is_recomputed_as_it_was_computed(attention, together):
    """Backward must save as many tensors as forward did, so the group stays one where layers are recomputed."""
    x, other = x_of(attention.q_proj, requires_grad=True), x_of(attention.q_proj, requires_grad=True)

    def crossed(x, other):
        return attention.q_proj(x).square().sum() + attention.k_proj(other * 2).square().sum()

    checkpoint(crossed, x, other, use_reentrant=False).backward()
    found = [x.grad, other.grad]
    assert is_grouped(attention.q_proj)
    expected = torch.autograd.grad(
        plain(attention.q_proj, x).square().sum() + plain(attention.k_proj, other * 2).square().sum(), (x, other)
    )
    for own, its in zip(found, expected, strict=True):
        assert_close(own, its)
