"""Adapters start along the gradient: what A spans, what stays as it was."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from test_prefix import BOUNDARY, adapted, stored
from tiny import make_model

from aletheia.adapters.initial import align_with_gradient
from aletheia.anatomy.read import adaptable_modules
from aletheia.data.batches import collate
from aletheia.training.fast_steps import fast_steps


def fresh(family="llama", rank=4):
    """LoRA as it starts, on every matrix."""
    model = make_model(family)
    names = [name for name in adaptable_modules(model) if "gate" not in name.split(".")]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=8, target_modules=names))


def adapters(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def gradients(model, batches):
    """The gradient [O, I] of every adapted weight, summed over batches; GPT-2 keeps its weights as [I, O]."""
    modules = adapters(model)
    weights = [module.base_layer.weight.requires_grad_(True) for module in modules.values()]
    found = [torch.zeros_like(weight) for weight in weights]
    for batch in batches:
        loss = model(**batch, use_cache=False).loss
        for total, grad in zip(found, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
            total += 0 if grad is None else grad
    for weight in weights:
        weight.requires_grad_(False)
    turned = [type(module.base_layer).__name__ == "Conv1D" for module in modules.values()]
    return [grad.T if flip else grad for grad, flip in zip(found, turned, strict=True)]


def captured(model, grads, rank=4):
    """Share of ||G||_F^2 that the rows of A reach, of what R rows could reach at best; per adapter."""
    shares = []
    for module, grad in zip(adapters(model).values(), grads, strict=True):
        basis = torch.linalg.qr(module.lora_A["default"].weight.detach().T)[0]
        best = (torch.linalg.svdvals(grad)[:rank] ** 2).sum()
        shares.append(((grad @ basis) ** 2).sum() / best if best > 0 else torch.tensor(1.0))
    return torch.stack(shares)


@pytest.fixture(scope="module")
def batches(examples):
    rows = examples.examples
    return [collate(rows[start : start + 4], 0) for start in (0, 4)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_a_reaches_most_of_the_gradient_and_the_model_stays(family, batches):
    model = fresh(family).train()
    before = model(**batches[0]).logits
    grads = gradients(model, batches)
    at_random = captured(model, grads).mean()
    state = torch.get_rng_state()
    assert align_with_gradient(model, batches) > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert captured(model, grads).mean() > max(0.6, 2 * at_random)
    assert torch.equal(model(**batches[0]).logits, before)
    for module in adapters(model).values():
        assert not module.lora_B["default"].weight.any()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_rows_are_orthogonal_and_as_long_as_random_ones(batches):
    model = fresh(rank=4)
    names = adapters(model)
    lengths = torch.cat([module.lora_A["default"].weight.norm(dim=1) for module in names.values()])
    assert lengths.mean().item() == pytest.approx(3**-0.5, rel=0.05)
    align_with_gradient(model, batches)
    for module in names.values():
        rows = module.lora_A["default"].weight
        torch.testing.assert_close(rows @ rows.T, torch.eye(4) / 3, atol=1e-5, rtol=0)


def test_an_adapter_without_a_gradient_keeps_its_start(batches):
    model = fresh("qwen3_moe")
    before = {name: module.lora_A["default"].weight.clone() for name, module in adapters(model).items()}
    assert align_with_gradient(model, []) == 0
    for name, module in adapters(model).items():
        assert torch.equal(module.lora_A["default"].weight, before[name])
        assert not module.lora_B["default"].weight.any()


def test_a_rank_above_the_width_is_filled_with_random_rows(batches):
    model = fresh(rank=48)  # of a width of 32
    assert align_with_gradient(model, batches) > 0
    for module in adapters(model).values():
        assert module.lora_A["default"].weight.any(dim=1).all()


def test_the_start_is_the_same_through_the_fast_paths(examples):
    rows = examples.examples[:4]
    found = {}
    for kind in ("plain", "fast"):
        model = adapted().train()  # nothing below the boundary
        batch = stored(model, rows) if kind == "fast" else collate(rows, 0)
        with fast_steps(model, BOUNDARY) if kind == "fast" else nullcontext():
            align_with_gradient(model, [batch])
        found[kind] = [module.lora_A["default"].weight.detach() for module in adapters(model).values()]
    for fast_RI, plain_RI in zip(found["fast"], found["plain"], strict=True):
        cosines = torch.linalg.svdvals(3 * fast_RI @ plain_RI.T)
        assert cosines.min() > 0.999
