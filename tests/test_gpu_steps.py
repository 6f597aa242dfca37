"""On a GPU: a step in every cheaper way is plain PEFT's step, in float32 and in bfloat16."""

from functools import partial

import pytest
import torch
from on_device import DTYPES, WIDE, standard, step, wide
from tape import TapeRecorder
from test_packed import ROWS, row
from test_prefix import BOUNDARY, adapters_on, difference, stored
from tiny import make_model, make_tokenizer

import aletheia
from aletheia.anatomy.read import find_layers
from aletheia.data.batches import PackSize, collate, collate_packed
from aletheia.execution import packed
from aletheia.execution.backend import compile_seconds, entered, step_ways
from aletheia.execution.cuda.graphs import graphed_layers
from aletheia.execution.cuda.recorded import CudaRecorder
from aletheia.execution.cuda.trial import has_triton
from aletheia.prefix.boundary import frozen_prefix
from aletheia.prefix.cache import MemoryCache
from aletheia.prefix.source import PrefixSource
from aletheia.prefix.stored import stored_prefix
from aletheia.training.fast_steps import fast_steps

pytestmark = pytest.mark.gpu

LOSS = "loss by two kernels" if torch.cuda.is_available() and has_triton() else "loss in the buffer of its logits"
WAYS = (
    *("adapters in the dtype of the base", "logits at labelled positions", "low-rank products in place"),
    *(LOSS, "selective recomputation", "full recomputation"),
)
APART = {"rows packed without padding", "compiled layers", "layers as CUDA graphs"}  # have tests of their own
OF_PROCESSORS = {"attention by matrix products", "norms in fewer passes"}
NEEDS = {"selective recomputation": ("low-rank products in place",)}  # PEFT adds to a product that is to be kept
PADDED = collate(ROWS, 0)
in_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def full_precision():
    """Products of float32 in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


class Spy:
    """How often each layer attends, and which of them a backward pass reaches."""

    def __init__(self, model):
        layers = find_layers(model)[1]
        self.calls, self.backward = [0] * len(layers), set()
        for index, layer in enumerate(layers):
            layer.self_attn.register_forward_pre_hook(partial(self._count, index))
            layer.register_forward_hook(partial(self._watch, index))

    def _count(self, index, attention, args):
        self.calls[index] += 1

    def _watch(self, index, layer, args, output):
        if output.requires_grad and output.grad_fn is not None:
            output.register_hook(lambda gradient: self.backward.add(index))


def all_ways(model):
    both = (step_ways(model, recompute=kind, packed=True, compiled=True, graphed=98) for kind in ("selective", "full"))
    return {name: way for ways in both for name, way in ways.items()}


def test_every_way_of_a_step_is_tested_here(device):
    assert set(all_ways(wide(torch.bfloat16, device))) - OF_PROCESSORS == {*WAYS, *APART}


@in_each_dtype
@pytest.mark.parametrize("way", WAYS)
def test_each_way_by_itself_is_plain_peft(way, dtype, device):
    model = wide(dtype, device)
    expected, limit = standard(model, PADDED)
    every = all_ways(model)
    with entered(model, {name: every[name] for name in (*NEEDS.get(way, ()), way)}):
        assert difference(step(model, PADDED), expected) < limit


@in_each_dtype
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "gpt_neox", "qwen3_moe"])
def test_fast_steps_are_plain_peft(family, dtype, device):
    model = wide(dtype, device, family)
    expected, limit = standard(model, PADDED)
    with fast_steps(model):
        assert difference(step(model, PADDED), expected) < limit
    with_prefix = stored(model, ROWS)
    with fast_steps(model, BOUNDARY):
        assert difference(step(model, with_prefix), expected) < limit


@in_each_dtype
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen2"])
def test_packed_rows_are_padded_ones(family, dtype, device, monkeypatch):
    """Heads share keys in all; layers of gemma3_text see 16 tokens, and a row has 70."""
    model, calls, kernel = wide(dtype, device, family), [], packed._in_one_kernel
    monkeypatch.setattr(packed, "_in_one_kernel", lambda *given, **named: calls.append(1) or kernel(*given, **named))
    expected, limit = standard(model, PADDED)
    assert packed.why_not_packed(model, ROWS, 0) is None
    calls.clear()
    with packed.attention_by_row(model):
        assert difference(step(model, collate_packed(ROWS)), expected) < limit
    assert len(calls) == (4 if device.type == "cuda" and dtype == torch.bfloat16 else 0)
    assert packed.has_kernel(model) == bool(calls)


@in_each_dtype
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "with the others"])
def test_compiled_layers_are_plain_peft(alone, dtype, device):
    """By the real compiler, which makes kernels; packed where attention by rows is one of them."""
    from torch._inductor import metrics

    torch.compiler.reset()
    metrics.reset()
    model, before = wide(dtype, device), compile_seconds()
    packs = not alone and packed.has_kernel(model)
    make = collate_packed if packs else lambda rows: collate(rows, 0)
    ways = step_ways(model, packed=packs, compiled=True)
    ways = {name: way for name, way in ways.items() if name == "compiled layers" or not alone}
    for rows in (ROWS, [row(33, 5), row(12, 6), row(40, 7)], ROWS):
        expected, limit = standard(model, collate(rows, 0))
        with frozen_prefix(model), entered(model, ways):
            assert difference(step(model, make(rows)), expected) < limit
    assert metrics.generated_kernel_count > 0
    assert compile_seconds() > before


@in_each_dtype
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen2"])
@pytest.mark.parametrize("compiled", [False, True], ids=["as they are", "compiled"])
def test_recorded_layers_are_plain_peft(compiled, family, dtype, device):
    """By graphs, on a GPU: batches of one size, packed where attention by rows is one kernel."""
    model, lines = wide(dtype, device, family), []
    batches = [ROWS, ROWS[::-1], [row(70, 5), row(12, 6), row(3, 7), row(14, 8)]]  # padded, of one size, too
    wanted = [standard(model, collate(rows, 0)) for rows in batches]
    packs, is_cuda = packed.has_kernel(model), device.type == "cuda"
    make, shape = partial(collate, pad_token_id=0), (4, 70)
    if packs:
        make, shape = partial(collate_packed, size=PackSize(128, 4)), (1, 128)
    ways = step_ways(model, packed=packs, compiled=compiled and is_cuda)
    graphs = graphed_layers(model, shape, lines.append, CudaRecorder if is_cuda else TapeRecorder)
    with frozen_prefix(model), entered(model, ways), graphs:
        for rows, (expected, limit) in 2 * list(zip(batches, wanted, strict=True)):
            assert difference(step(model, make(rows)), expected) < limit
    assert [line.split(" for ")[0] for line in lines] == [
        "graphs 2 frozen layers recorded",
        "graphs 2 layers that learn recorded",
    ]


LONG = [row(300, 1), row(180, 2), row(420, 3)]


def test_long_rows_are_recorded(device):
    """From 128 tokens on, a GPU's attention adds up gradients in another order each time."""
    model, lines = wide(torch.bfloat16, device, layers=6), []
    expected, limit = standard(model, collate(LONG, 0))
    packs, is_cuda = packed.has_kernel(model), device.type == "cuda"
    batch, shape = collate(LONG, 0), (3, 420)
    if packs:
        batch, shape = collate_packed(LONG, PackSize(960, 4)), (1, 960)
    graphs = graphed_layers(model, shape, lines.append, CudaRecorder if is_cuda else TapeRecorder)
    with frozen_prefix(model), entered(model, step_ways(model, packed=packs)), graphs:
        for _ in range(4):
            assert difference(step(model, batch), expected) < limit
    assert [line.split(" for ")[0] for line in lines] == [
        "graphs 2 frozen layers recorded",
        "graphs 4 layers that learn recorded",
    ]


def test_a_recording_that_fails_leaves_the_device_as_it_was(device):
    if device.type != "cuda":
        pytest.skip("needs CUDA graphs")
    recorder, large = CudaRecorder(device), []

    def waits():
        large.append(torch.ones(2**28, device=device))  # 1 GiB
        return large[-1].sum().item()

    recorder.warm_up(waits)
    large.clear()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    with pytest.raises(RuntimeError):
        recorder.record(waits)
    large.clear()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(device) < before + 2**28
    assert torch.randn(8, device=device).isfinite().all()
    given = torch.ones(8, device=device)
    doubled, replay = CudaRecorder(device).record(lambda: given * 2)
    replay()
    assert doubled.tolist() == [2.0] * 8


@in_each_dtype
@pytest.mark.parametrize("recompute", ["off", "selective", "full"])
@pytest.mark.parametrize("packs", [False, True], ids=["padded", "packed"])
def test_below_the_boundary_nothing_runs_backward_or_again(packs, recompute, dtype, device):
    model = wide(dtype, device)
    expected, limit = standard(model, PADDED)
    model.enable_input_require_grads()  # as Trainer and TRL do for checkpointing: backward would go down to layer 0
    spy = Spy(model)
    with frozen_prefix(model), entered(model, step_ways(model, recompute=recompute, packed=packs)):
        assert difference(step(model, collate_packed(ROWS) if packs else PADDED), expected) < limit
    assert spy.backward == {2, 3}
    assert spy.calls == ([1, 1, 1, 1] if recompute == "off" else [1, 1, 2, 2])


@in_each_dtype
@pytest.mark.parametrize("recompute", ["off", "selective", "full"])
@pytest.mark.parametrize("packs", [False, True], ids=["padded", "packed"])
def test_the_prefix_cache_changes_no_step(packs, recompute, dtype, device):
    model = wide(dtype, device)
    expected, limit = standard(model, PADDED)
    spy = Spy(model)
    source = PrefixSource(model, BOUNDARY, lambda dtype: MemoryCache(), on_obstacle=pytest.fail)
    ways = step_ways(model, recompute=recompute, packed=packs)
    with stored_prefix(model, BOUNDARY, source=source), frozen_prefix(model), entered(model, ways):
        assert difference(step(model, collate_packed(ROWS) if packs else PADDED), expected) < limit
        spy.calls[:] = [0] * 4
        again = ROWS[::-1]  # other batches than the cache was filled in
        assert difference(step(model, collate_packed(again) if packs else collate(again, 0)), expected) < limit
    assert spy.backward == {2, 3}
    assert spy.calls[:BOUNDARY] == [0, 0]


def test_states_of_long_packed_rows_are_stored(device):
    """They are compared with those of the rows alone, which other kernels of a GPU compute."""
    model = wide(torch.bfloat16, device, layers=6)
    expected, limit = standard(model, collate(LONG, 0))
    source = PrefixSource(model, BOUNDARY, lambda dtype: MemoryCache(), on_obstacle=pytest.fail)
    ways = step_ways(model, packed=True)
    with stored_prefix(model, BOUNDARY, source=source), frozen_prefix(model), entered(model, ways):
        for rows in (LONG, LONG[::-1]):
            assert difference(step(model, collate_packed(rows)), expected) < limit


@pytest.fixture
def nf4(device, tmp_path):
    """An adapted model whose base has 4 bits, and the same weights in bfloat16."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    make_model(**WIDE).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    given = str(tmp_path / "base"), "bfloat16", str(device)
    quantized, plain = aletheia.load(*given, quantize="nf4").model, aletheia.load(*given).model
    for name, module in quantized.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            values = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data = values.to(plain.dtype)
    found, exact = adapters_on(quantized), adapters_on(plain)
    exact.load_state_dict({name: value for name, value in found.state_dict().items() if "lora_" in name}, strict=False)
    return found, exact.float()


def test_steps_on_4_bits_are_plain_peft(nf4):
    model, exact = nf4
    expected, limit = standard(model, PADDED, exact)
    with fast_steps(model):
        assert difference(step(model, PADDED), expected) < limit
    with_prefix = stored(model, ROWS)
    for recompute in ("off", "selective", "full"):
        with fast_steps(model, BOUNDARY, recompute=recompute):
            assert difference(step(model, with_prefix), expected) < limit
