"""Norms by torch's own kernel against the models', and where it is taken. Off a GPU it is a formula of torch's."""

import pytest
import torch
from test_liger import EXPECTED
from test_prefix import adapted, difference, gradients
from tiny import make_model
from torch import nn

from aletheia.data.batches import collate
from aletheia.execution import backend
from aletheia.execution.backend import layer_ways, step_ways
from aletheia.execution.cuda.norms import torch_norms
from aletheia.prefix.boundary import frozen_prefix

NAME = "norms by torch's kernel"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture
def calls(monkeypatch):
    """The dtypes that torch's function is called with."""
    found, own = [], nn.functional.rms_norm
    monkeypatch.setattr(nn.functional, "rms_norm", lambda x, *args: found.append(x.dtype) or own(x, *args))
    return found


def with_norms(family, **shape):
    """A model whose norms have weights that are not all alike."""
    model = adapted(family, boundary=1, layers=2, **shape)
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data += torch.rand(weight.shape, generator=generator)
    return model


@DTYPES
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2"])
def test_steps_learn_the_same(family, dtype, calls, examples):
    model, batch = with_norms(family).to(dtype), collate(examples[:2], 0)
    plain, exact = gradients(model, batch), gradients(with_norms(family), batch)
    limit = 1e-5 if dtype == torch.float32 else 1.2 * difference(plain, exact)
    with torch_norms(model) as covered:
        assert covered == EXPECTED[family][0]
        calls.clear()
        found = gradients(model, batch)
    assert difference(found, exact) < limit
    assert len(calls) == covered
    assert (torch.float32 in calls) == (dtype == torch.float32 or family.startswith("gemma"))


@pytest.mark.parametrize("family", EXPECTED)
def test_it_covers_what_returns_the_same(family):
    model = make_model(family, 2).bfloat16().requires_grad_(False)
    with torch_norms(model) as covered:
        assert covered == EXPECTED[family][0]


def test_autocast_changes_no_dtype(calls, examples):
    """It would make torch's function return float32."""
    model, batch = with_norms("llama").bfloat16(), collate(examples[:2], 0)
    seen = []
    model.base_model.model.model.norm.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        plain = gradients(model, batch)
        with torch_norms(model):
            calls.clear()
            found = gradients(model, batch)
    assert seen == [torch.bfloat16] * 2
    assert calls == [torch.bfloat16] * 5
    assert difference(found, plain) < 0.02


def test_norms_that_learn_keep_their_way():
    model = make_model("llama", 1)
    with torch_norms(model) as covered:
        assert covered == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@DTYPES
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_on_a_gpu_it_is_one_kernel_each_way(family, dtype, examples):
    model, batch = with_norms(family).cuda(), collate(examples[:2], 0)
    batch = {name: value.cuda() for name, value in batch.items()}
    exact = gradients(model, batch)
    model = model.to(dtype)
    limit = 1e-5 if dtype == torch.float32 else 1.2 * difference(gradients(model, batch), exact)
    with frozen_prefix(model), torch_norms(model) as covered:
        assert covered == EXPECTED[family][0]
        with torch.profiler.profile() as profile:
            found = gradients(model, batch)
    assert difference(found, exact) < limit
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::_fused_rms_norm"] == covered
    assert "aten::rsqrt" not in counts


# --- where it is taken


@pytest.mark.parametrize("has_liger", [True, False])
def test_a_gpu_without_liger_takes_it(has_liger, monkeypatch):
    model = make_model("llama", 1)
    assert NAME not in layer_ways(model)
    monkeypatch.setattr(backend, "_is_cuda", lambda parameter: True)
    monkeypatch.setattr(backend, "has_liger", lambda: has_liger)
    assert (NAME in layer_ways(model)) is not has_liger
    assert NAME in step_ways(model, liger=False)
    assert NAME not in step_ways(model, liger=False, compiled=True)
