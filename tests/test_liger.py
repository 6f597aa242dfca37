"""Liger's kernels against the models' own computations, and where they are taken."""

import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from interpreted import complete_interpreter, interpreted
from test_packed import trained
from test_prefix import adapted, difference, gradients
from tiny import make_config, make_model
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.phi3.modeling_phi3 import Phi3MLP

import aletheia
from aletheia.data.batches import collate
from aletheia.errors import TrainingError
from aletheia.execution import backend
from aletheia.execution.backend import entered, layer_ways, step_ways
from aletheia.execution.cuda import liger
from aletheia.execution.cuda import norms as cuda_norms
from aletheia.execution.cuda.liger import liger_gates
from aletheia.execution.cuda.norms import liger_norms
from aletheia.execution.cuda.rotary import liger_rotary
from aletheia.prefix.boundary import frozen_prefix
from aletheia.reporting.comparison import repeat_command
from aletheia.training.attach import prefix_computed_as

CONTEXTS = (liger_norms, liger_gates, liger_rotary)
NAMES = {"norms by Liger", "gates by Liger", "rotary positions by Liger"}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture
def kernels(monkeypatch):
    complete_interpreter(monkeypatch)
    monkeypatch.setattr(cuda_norms, "TRIAL_ROWS", (8, 10))  # the interpreter takes a second for many rows


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm(kind=modeling_llama.LlamaRMSNorm, size=96, dtype=torch.float32):
    module = kind(size, 1e-5)
    module.weight.data.copy_(random(size, seed=5))
    return module.to(dtype).requires_grad_(False)


def mlp(kind=modeling_llama.LlamaMLP, family="llama", dtype=torch.float32):
    torch.manual_seed(0)
    return kind(make_config(family)).to(dtype).requires_grad_(False)


def with_gradients(function, *inputs):
    """What a function returns, and the gradients of what came in."""
    given = [x.detach().clone().requires_grad_() for x in inputs]
    returned = function(*given)
    values = returned if isinstance(returned, tuple) else (returned,)
    grads = [random(*value.shape, seed=9).to(value.dtype) for value in values]
    return [*values, *torch.autograd.grad(values, given, grads)]


def error(found, exact):
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True))


def check(plain, ours, *inputs, exact):
    """Float32 agrees to 1e-5, and nothing is further from the formula than the model's own way is."""
    expected = with_gradients(exact, *(x.double() for x in inputs))
    found, own = with_gradients(ours, *inputs), with_gradients(plain, *inputs)
    assert [x.dtype for x in found] == [x.dtype for x in own]
    if inputs[0].dtype == torch.float32:
        assert error(found, [x.double() for x in own]) < 1e-5
    assert 0 < error(found, expected) < 1.5 * error(own, expected)


# --- the kernels


@interpreted
@DTYPES
@pytest.mark.parametrize("kind", [modeling_llama.LlamaRMSNorm, Gemma3RMSNorm])
def test_norms_equal_the_models(kind, dtype, kernels):
    module = norm(kind, dtype=dtype)

    def formula(x):
        weight = module.weight.double() + (kind is Gemma3RMSNorm)
        return weight * x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()

    rows = (random(3, 96, 5) * torch.arange(1, 6)).transpose(1, 2).to(dtype)  # of other sizes, not contiguous
    own = module.forward
    with liger_norms(module) as covered:
        check(own, module, rows, exact=formula)
    assert covered == 1


@interpreted
@DTYPES
def test_many_short_rows_take_another_kernel(dtype, kernels, monkeypatch):
    """Of queries and keys; the trial sees both."""
    import liger_kernel.ops.rms_norm as kernels_of_norms

    module, launched = norm(size=8, dtype=dtype), []
    monkeypatch.setattr(cuda_norms, "TRIAL_ROWS", (8, 2**15))
    for name in ("_rms_norm_forward_kernel", "_block_rms_norm_forward_kernel"):
        plain = getattr(kernels_of_norms, name)
        counted = type("Counted", (), {"__getitem__": lambda _, grid, n=name, p=plain: launched.append(n) or p[grid]})()
        monkeypatch.setattr(kernels_of_norms, name, counted)
    with liger_norms(module) as covered:
        assert covered == 1
    assert launched == ["_rms_norm_forward_kernel", "_block_rms_norm_forward_kernel"]


@interpreted
@DTYPES
@pytest.mark.parametrize(("kind", "family"), [(modeling_llama.LlamaMLP, "llama"), (Phi3MLP, "phi3")])
def test_gates_equal_the_models(kind, family, dtype, kernels):
    module = mlp(kind, family, dtype)
    x = random(2, 7, 32, dtype=dtype)
    own, exact = module.forward, mlp(kind, family, dtype).double()
    with liger_gates(module) as covered:
        check(own, module, x, exact=exact)
    assert covered == 1


def by_module(cos, sin, query, key):
    return modeling_llama.apply_rotary_pos_emb(query, key, cos, sin)


@interpreted
@DTYPES
def test_rotary_positions_equal_the_models(dtype, kernels):
    model = make_model("llama", 1).to(dtype)
    plain = modeling_llama.apply_rotary_pos_emb
    query, key = random(2, 7, 4, 8, dtype=dtype).transpose(1, 2), random(2, 7, 2, 8, dtype=dtype).transpose(1, 2)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2], [5, 6, 7, 8, 9, 10, 11]])  # of packed rows, and of later ones
    before = query.clone(), key.clone()
    for of_rows in (positions, positions[:1]):
        cos, sin = model.model.rotary_emb(query, of_rows)
        exact = partial(plain, cos=cos.double(), sin=sin.double())
        with liger_rotary(model) as covered:
            check(partial(plain, cos=cos, sin=sin), partial(by_module, cos, sin), query, key, exact=exact)
        assert covered == 1
    assert torch.equal(query, before[0])
    assert torch.equal(key, before[1])


# --- models

EXPECTED = {  # of two layers: norms, gates, modeling files with rotary positions
    "llama": (5, 2, 1),
    "qwen2": (5, 2, 1),
    "qwen3": (9, 2, 1),  # norms of queries and keys, too
    "gemma2": (9, 0, 1),  # 1 + w; gelu
    "gemma3": (26, 0, 0),
    "gemma3_text": (13, 0, 0),  # the same, and angles for each type of layer
    "phi3": (5, 2, 1),  # gate and up in one projection
    "mixtral": (5, 0, 1),  # fused experts
    "olmo2": (9, 2, 0),  # in bfloat16 rounded after w, with float32 angles
    "gpt2": (0, 0, 0),
    "cohere": (0, 2, 0),  # LayerNorm; pairs instead of halves
}


@interpreted
@pytest.mark.parametrize("family", EXPECTED)
def test_it_covers_what_returns_the_same(family, kernels):
    model = make_model(family, 2).bfloat16().requires_grad_(False)
    state = torch.get_rng_state()
    with liger_norms(model) as norms, liger_gates(model) as gates, liger_rotary(model) as files:
        assert (norms, gates, files) == EXPECTED[family]
    assert torch.equal(torch.get_rng_state(), state)


@interpreted
@pytest.mark.parametrize("recompute", ["off", "selective", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "gemma3_text", "phi3", "mixtral"])
def test_steps_learn_the_same(family, recompute, kernels, examples):
    if recompute != "off" and family not in ("llama", "phi3"):
        pytest.skip("recomputation is tried with both kinds of MLP")
    model, batch = adapted(family, boundary=1, layers=2), collate(examples[:2], 0)
    exact = gradients(model, batch)
    assert difference(by_liger(model, batch, recompute), exact) < 1e-5
    model = model.bfloat16()
    with frozen_prefix(model), entered(model, step_ways(model, recompute=recompute)):
        plain = gradients(model, batch)
    assert difference(by_liger(model, batch, recompute), exact) < 1.5 * difference(plain, exact)


def by_liger(model, batch, recompute="off"):
    ways = step_ways(model, recompute=recompute)
    ways.pop("norms in fewer passes")
    ways = {way.__name__: way for way in CONTEXTS} | ways
    with frozen_prefix(model), entered(model, ways):
        return gradients(model, batch)


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and liger.has_liger()), reason="needs a GPU and liger-kernel")
@pytest.mark.parametrize("family", EXPECTED)
def test_on_a_gpu_steps_learn_the_same(family, examples):
    model, batch = adapted(family, boundary=1, layers=2).cuda(), collate(examples[:2], 0)
    batch = {name: value.cuda() for name, value in batch.items()}

    def learned(**choice):
        with frozen_prefix(model), entered(model, step_ways(model, **choice)):
            return gradients(model, batch)

    exact = learned(liger=False)
    assert difference(learned(), exact) < 1e-5
    model = model.bfloat16()
    with liger_norms(model) as norms, liger_gates(model) as gates, liger_rotary(model) as files:
        assert (norms, gates, files) == EXPECTED[family]
    plain = difference(learned(liger=False), exact)
    for recompute in ("off", "selective", "full"):
        assert difference(learned(recompute=recompute), exact) < 1.5 * plain


@interpreted
def test_everything_is_put_back(kernels):
    model = make_model("llama", 2).requires_grad_(False)
    kinds, plain = [type(module) for module in model.modules()], modeling_llama.apply_rotary_pos_emb
    with pytest.raises(IndexError), entered(model, {context.__name__: context for context in CONTEXTS}):
        model(torch.tensor([[10**6]]))
    assert [type(module) for module in model.modules()] == kinds
    assert modeling_llama.apply_rotary_pos_emb is plain
    with liger_norms(model):
        assert [type(module) for module in model.modules()] != kinds
    first, second = liger_rotary(model), liger_rotary(make_model("llama", 1))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert modeling_llama.apply_rotary_pos_emb is not plain
    second.__exit__(None, None, None)
    assert modeling_llama.apply_rotary_pos_emb is plain


@interpreted
def test_elsewhere_modules_keep_their_way(kernels):
    with liger_norms(norm().requires_grad_(True)) as covered:
        assert covered == 0
    hooked = norm()
    hooked.forward = hooked.forward  # as accelerate's hooks do
    with liger_norms(hooked) as covered:
        assert covered == 0
    other = mlp()
    other.act_fn = torch.nn.GELU()
    with liger_gates(other) as covered:
        assert covered == 0


@interpreted
def test_what_projections_returned_is_kept_where_it_is_watched(kernels):
    module, seen = mlp(), []
    x = random(3, 32).requires_grad_()
    with liger_gates(module):
        with pytest.raises(TrainingError, match="differentiated twice"):
            (loss := module(x).sum()).backward(retain_graph=True) or loss.backward()
        module.gate_proj.register_forward_hook(lambda *args: seen.append((args[2], args[2].detach().clone())))
        loss = module(x).sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert torch.equal(*seen[0])


def test_without_kernels_models_keep_their_way(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", None)
    model = make_model("llama", 2).requires_grad_(False)
    with liger_norms(model) as norms, liger_gates(model) as gates, liger_rotary(model) as files:
        assert (norms, gates, files) == (0, 0, 0)


# --- where they are taken


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(backend, "_is_cuda", lambda parameter: True)
    monkeypatch.setattr(backend, "has_liger", lambda: True)


def test_a_gpu_takes_them(on_gpu):
    model = make_model("llama", 1)
    assert layer_ways(model).keys() >= NAMES
    assert step_ways(model).keys() >= NAMES
    assert not step_ways(model, liger=False).keys() & NAMES
    assert not step_ways(model, compiled=True).keys() & NAMES


@pytest.mark.parametrize("lacks", ["_is_cuda", "has_liger"])
def test_only_a_gpu_where_they_are_installed_takes_them(lacks, on_gpu, monkeypatch):
    monkeypatch.setattr(backend, lacks, lambda *_: False)
    assert not step_ways(make_model("llama", 1)).keys() & NAMES


@pytest.mark.parametrize(
    ("settings", "taken"), [({}, True), ({"liger": False}, False), ({"compile_layers": True}, False)]
)
def test_a_stored_prefix_is_known_by_them(settings, taken, on_gpu):
    trainer = SimpleNamespace(accelerator=SimpleNamespace(mixed_precision="no"), model=make_model("llama", 1))
    assert ("Liger" in prefix_computed_as(trainer, aletheia.AttachSettings(**settings))) is taken


def test_a_run_hands_the_choice_on(tmp_path, examples, monkeypatch):
    asked = []
    plain = backend.layer_ways
    monkeypatch.setattr(backend, "layer_ways", lambda *args: asked.append(args) or plain(*args))
    scores = aletheia.probe(make_model("llama"), examples, batches=2)
    run = trained(aletheia.plan(scores, policy="last"), examples, tmp_path / "run", liger=False)
    assert "--no-liger" in " ".join(repeat_command(run))
    assert run.metrics.settings.liger is False
    assert asked
    assert {args[2] for args in asked} == {False}
