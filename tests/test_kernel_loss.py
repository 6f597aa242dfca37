"""The loss by kernels of ours against torch's own, and where it is taken."""

import os
import sys

import pytest
import torch
from interpreted import complete_interpreter, interpreted
from test_prefix import adapted, difference, gradients
from tiny import make_model

from aletheia.data.batches import collate
from aletheia.errors import TrainingError
from aletheia.execution import backend
from aletheia.execution.backend import entered, step_ways
from aletheia.execution.cuda.loss import kernel_loss
from aletheia.execution.cuda.trial import has_triton
from aletheia.execution.loss import fast_causal_loss, fast_loss, in_buffer

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
KERNELS, BUFFER = "loss by two kernels", "loss in the buffer of its logits"
IGNORED = 5  # a token as good as any other


@pytest.fixture
def summed(monkeypatch):
    complete_interpreter(monkeypatch)
    from aletheia.execution.cuda import cross_entropy

    monkeypatch.setattr(cross_entropy, "BLOCK", 128)  # so that a row has several blocks, the last one not full
    return cross_entropy.summed


def logits_of(dtype, rows=12, vocab_size=300):
    """Of every size, far from zero, and some that cannot be."""
    x = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(0))
    x *= torch.logspace(-2, 2, rows)[:, None]
    x[1] -= 1e4
    x[2, :200] = -torch.inf
    return x.to(dtype)


def learned(loss, x, targets):
    """A loss, and the gradient of a fifth of it."""
    leaf = x.clone().requires_grad_()
    value = loss(leaf * 1, targets, IGNORED)
    (value / 5).backward()
    return value.detach().double(), leaf.grad.double()


def plain(x, targets, ignored):
    x = x if x.dtype == torch.float64 else x.float()
    return torch.nn.functional.cross_entropy(x, targets, ignore_index=ignored, reduction="sum")


@interpreted
@DTYPES
def test_values_and_gradients_are_those_of_torch(dtype, summed):
    x = logits_of(dtype)
    targets = torch.tensor([0, 299, 250, 128, IGNORED, 127, 77, 201, IGNORED, 3, 255, 256])
    exact, own, found = (learned(*how, targets) for how in ((plain, x.double()), (plain, x), (summed, x)))
    torch.testing.assert_close(found[0], exact[0], rtol=1e-6, atol=0)
    assert found[1].isfinite().all()
    assert not found[1][targets == IGNORED].any()
    assert difference_of(found, exact) < max(1.1 * difference_of(own, exact), 1e-6)


def difference_of(found, exact):
    return ((found[1] - exact[1]).norm() / exact[1].norm()).item()


@interpreted
def test_logits_keep_their_values_until_backward(summed):
    leaf = logits_of(torch.float32).requires_grad_()
    logits, targets = leaf * 1, torch.arange(12)
    loss = summed(logits, targets, IGNORED)
    assert torch.equal(logits, leaf)
    kept = logits.exp().sum()  # keeps its result, but the product before it keeps the logits
    loss.backward(retain_graph=True)
    assert torch.equal(logits, leaf.grad)
    with pytest.raises(TrainingError, match="differentiated twice"):
        loss.backward()
    kept.backward()
    squared = leaf * 1
    both = squared.square().sum() + summed(squared, targets, IGNORED)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        both.backward()


@interpreted
def test_a_target_outside_the_vocabulary_is_seen(summed):
    assert summed(torch.zeros(2, 300), torch.tensor([1, 300]), IGNORED).isnan()
    with torch.no_grad():
        assert summed(torch.zeros(2, 300), torch.tensor([1, 299]), IGNORED).item() == pytest.approx(2 * 5.7037825)


@interpreted
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("items", [None, torch.tensor(7)])
def test_steps_learn_the_same(family, items, summed, examples):
    model, batch = adapted(family, boundary=1, layers=2), collate(examples[:2], 0) | {"num_items_in_batch": items}
    exact = gradients(model, batch)
    ways = step_ways(model)
    del ways[BUFFER]
    ways[KERNELS] = kernel_loss
    with entered(model, ways):
        assert difference(gradients(model, batch), exact) < 1e-5
    with kernel_loss(model) as applies, torch.no_grad():
        assert applies
        found = model(**batch).loss
    torch.testing.assert_close(found, model(**batch).loss)


@interpreted
def test_kernels_that_differ_are_left_out(summed, monkeypatch, examples):
    from aletheia.execution.cuda import cross_entropy

    monkeypatch.setattr(cross_entropy, "summed", lambda *args: 1.001 * in_buffer(*args))
    model, batch = adapted(boundary=1, layers=2), collate(examples[:2], 0)
    exact = gradients(model, batch)
    with kernel_loss(model) as applies:
        assert not applies
        assert difference(gradients(model, batch), exact) < 1e-5


@interpreted
def test_logits_that_lie_apart_take_the_buffer(summed):
    x = logits_of(torch.float32)
    logits = torch.empty(300, 12).T.copy_(x).requires_grad_()
    found = fast_causal_loss(logits, None, 300, shift_labels=torch.arange(12))
    torch.testing.assert_close(found, plain(x, torch.arange(12), -100) / 12)


@pytest.mark.skipif(
    not has_triton() or os.environ.get("TRITON_INTERPRET") == "1", reason="needs triton, without TRITON_INTERPRET"
)
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("logits", ["*bf16", "*fp32"])
def test_they_compile_for_a_gpu(architecture, logits):
    """The interpreter accepts what the compiler does not."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from aletheia.execution.cuda import cross_entropy

    types = {"logits": logits, "targets": "*i64", "kept": "*fp32", "grad": "*fp32", "BLOCK": "constexpr"}
    for kernel in (cross_entropy._losses, cross_entropy._to_gradients):
        signature = {name: types.get(name, "i32") for name in kernel.arg_names}
        block = {(kernel.arg_names.index("BLOCK"),): cross_entropy.BLOCK}
        source = ASTSource(fn=kernel, signature=signature, constexprs=block)
        how = {"num_warps": cross_entropy.WARPS}
        assert triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=how).asm["cubin"]


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and has_triton()), reason="needs a GPU and triton")
@DTYPES
@pytest.mark.parametrize("vocab_size", [259, 128_256, 151_665])
def test_on_a_gpu_values_and_gradients_are_those_of_torch(dtype, vocab_size):
    from aletheia.execution.cuda.cross_entropy import summed

    x = logits_of(dtype, rows=300, vocab_size=vocab_size).cuda()
    targets = torch.arange(300, device="cuda") % 7 + 200
    targets[::5] = IGNORED
    exact, own, found = (learned(*how, targets) for how in ((plain, x.double()), (plain, x), (summed, x)))
    torch.testing.assert_close(found[0], exact[0], rtol=1e-6, atol=0)
    assert difference_of(found, exact) < max(1.1 * difference_of(own, exact), 1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and has_triton()), reason="needs a GPU and triton")
def test_on_a_gpu_it_does_not_wait(examples):
    model, batch = adapted(boundary=1, layers=2).cuda(), collate(examples[:2], 0)
    batch = {name: value.cuda() for name, value in batch.items()}
    with kernel_loss(model) as applies:
        assert applies
        outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
        torch.cuda.set_sync_debug_mode("error")
        try:
            model.base_model.model.loss_function(outputs.logits, batch["labels"], 259).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


# --- where it is taken


@pytest.mark.parametrize("found", [True, False])
def test_a_gpu_takes_them_where_triton_is(found, monkeypatch):
    model = make_model("llama", 1)
    assert BUFFER in step_ways(model)
    monkeypatch.setattr(backend, "has_triton", lambda: found)
    assert KERNELS not in step_ways(model)
    monkeypatch.setattr(backend, "_is_cuda", lambda parameter: True)
    for how in ({}, {"liger": False}, {"compiled": True}):
        assert (KERNELS in step_ways(model, **how), BUFFER in step_ways(model, **how)) == (found, not found)
    assert not step_ways(model, reads="sums").keys() & {KERNELS, BUFFER}


def test_without_triton_the_buffer_is_taken(monkeypatch, examples):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "aletheia.execution.cuda.cross_entropy", raising=False)
    model, batch = adapted(boundary=1, layers=2), collate(examples[:2], 0)
    exact = gradients(model, batch)
    with kernel_loss(model) as applies:
        assert not applies
        assert difference(gradients(model, batch), exact) < 1e-5
    with fast_loss(model) as applies:
        assert applies
