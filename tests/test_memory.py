"""What training is predicted to take, against steps that ran: over fake tensors, and with data on a processor."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Mamba2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from fake_steps import Kind, peak_of

from aletheia.anatomy import device_memory
from aletheia.anatomy.read import read_anatomy
from aletheia.job.room import Room
from aletheia.planning.activations import Step, evaluation_bytes, step_bytes, training_step_bytes

MOST = 1.3  # times what was measured
SIZES = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6}
SIZES |= {"num_attention_heads": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHARED = {"num_key_value_heads": 2}  # keys and values
LLAMA = LlamaConfig(**SIZES, **SHARED)
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 384, "head_dim": 64}
MAMBA = {"mamba_n_heads": 16, "mamba_d_head": 64, "mamba_d_ssm": 1024, "mamba_d_state": 64, "mamba_n_groups": 1}
BESIDE = FalconH1Config(**SIZES, **SHARED, **MAMBA, head_dim=64, mamba_chunk_size=256)
ALONE = {"num_heads": 16, "head_dim": 64, "state_size": 64, "n_groups": 1, "chunk_size": 256}
ALONE = Mamba2Config(vocab_size=8192, hidden_size=512, num_hidden_layers=6, **ALONE)
GPT2 = GPT2Config(vocab_size=8192, n_embd=512, n_layer=6, n_head=8, attn_pdrop=0.0)
DELTA = {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 64, "linear_value_head_dim": 64}
DELTA = Qwen3NextConfig(**SIZES, **SHARED, **EXPERTS, **DELTA, shared_expert_intermediate_size=384)
BF16, FP32 = torch.bfloat16, torch.float32
SHORT = Kind(LLAMA, BF16, 4, 1, 64, recompute="full")  # far shorter than held-out rows
KINDS = {
    "every layer": Kind(LLAMA, BF16, 0, 4, 512),
    "float32": Kind(LLAMA, FP32, 0, 4, 512),
    "float32, selective": Kind(LLAMA, FP32, 2, 2, 1024, recompute="selective"),
    "upper half, cached": Kind(LLAMA, BF16, 3, 4, 512, cached=True),
    "upper half, cached, selective": Kind(LLAMA, BF16, 3, 4, 512, cached=True, recompute="selective"),
    "full": Kind(LLAMA, BF16, 0, 4, 512, recompute="full"),
    "one long row": Kind(LLAMA, BF16, 0, 1, 2048),
    "NF4": Kind(LLAMA, BF16, 0, 4, 512, nf4=True),
    "NF4, selective": Kind(LLAMA, BF16, 0, 4, 512, nf4=True, recompute="selective"),
    "tied, biases": Kind(Qwen2Config(**SIZES, **SHARED, tie_word_embeddings=True), BF16, 0, 16, 128),
    "norms of heads": Kind(Qwen3Config(**SIZES, **SHARED, head_dim=64), BF16, 2, 4, 512),
    "fused projections": Kind(Phi3Config(**SIZES, **SHARED), BF16, 0, 4, 512),
    "attention beside the MLP": Kind(GPTNeoXConfig(**SIZES), BF16, 3, 4, 512, recompute="full"),
    "Conv1D": Kind(GPT2, BF16, 0, 4, 512),
    "experts": Kind(Qwen3MoeConfig(**SIZES, **SHARED, **EXPERTS), BF16, 3, 4, 512),
    "experts, full": Kind(Qwen3MoeConfig(**SIZES, **SHARED, **EXPERTS), BF16, 3, 4, 512, recompute="full"),
    "state space": Kind(ALONE, BF16, 0, 2, 256),
    "state space, rows below a chunk": Kind(ALONE, BF16, 0, 4, 128),
    "state space, rows above a chunk": Kind(ALONE, BF16, 0, 2, 300),
    "state space beside attention, rows below a chunk": Kind(BESIDE, BF16, 3, 4, 128),
    "delta rule, rows below a chunk": Kind(DELTA, BF16, 0, 8, 48),
    "state space, full": Kind(ALONE, BF16, 0, 2, 256, recompute="full"),
    "state space beside attention": Kind(BESIDE, BF16, 3, 2, 512),
    "delta rule": Kind(DELTA, BF16, 0, 2, 256),
    "a held-out row that is far longer": replace(SHORT, held_out=(1, 2048)),
    "many labels in it": replace(SHORT, held_out=(1, 2048), labelled_share=1.0),
    "in float32": replace(SHORT, dtype=FP32, held_out=(1, 2048)),
    "from the cache": replace(SHORT, cached=True, held_out=(4, 512)),
    "in NF4": replace(SHORT, nf4=True, held_out=(1, 2048)),
    "through Conv1D": replace(SHORT, config=GPT2, held_out=(1, 1024)),
    "through a state space": replace(SHORT, config=ALONE, held_out=(1, 512)),
}
HELD_OUT = {name: kind for name, kind in KINDS.items() if kind.held_out}


@pytest.mark.parametrize("name", KINDS)
def test_memory_is_predicted_from_above_and_closely(name):
    found = peak_of(KINDS[name])
    assert 1.0 <= found.ratio <= MOST, f"{found.measured / 1e6:.0f} MB, predicted {found.predicted / 1e6:.0f} MB"
    assert found.weights < found.measured


@pytest.mark.parametrize("recompute", ["off", "selective", "full"])
def test_a_step_with_data_takes_what_fake_tensors_say(recompute):
    config = LlamaConfig(**SIZES | {"num_hidden_layers": 2}, **SHARED)
    kind = Kind(config, FP32, 0, 2, 128, recompute=recompute)
    fake, real = peak_of(kind), peak_of(kind, real=True)
    assert fake.measured == pytest.approx(real.measured, rel=0.02)
    assert 1.0 <= real.predicted / real.measured <= MOST


@pytest.mark.parametrize("name", HELD_OUT)
def test_evaluation_takes_more_than_such_steps(name):
    """So the cases above measure it."""
    kind = HELD_OUT[name]
    found, alone = peak_of(kind), peak_of(replace(kind, held_out=None))
    assert found.measured > alone.predicted


def test_evaluation_with_data_takes_what_fake_tensors_say():
    """But for the loss's rows in float32, of which a processor has fewer at a time."""
    config = LlamaConfig(**SIZES | {"num_hidden_layers": 2}, **SHARED)
    kind = Kind(config, FP32, 0, 1, 16, held_out=(1, 512))
    fake, real = peak_of(kind), peak_of(kind, real=True)
    assert real.measured < fake.measured < 1.1 * real.measured
    assert 1.0 <= real.predicted / real.measured <= MOST


def test_graphs_keep_their_memory_during_evaluation():
    kind = HELD_OUT["a held-out row that is far longer"]
    anatomy, ranks = read_anatomy(AutoModelForCausalLM.from_config(LLAMA)), {}
    step = kind.step
    steps, evaluation = (
        training_step_bytes(anatomy, [4, 5], ranks, step),
        evaluation_bytes(anatomy, ranks, step.held_out),
    )
    assert step_bytes(anatomy, [4, 5], ranks, step) == evaluation > steps
    assert step_bytes(anatomy, [4, 5], ranks, replace(step, keeps=True)) == steps + evaluation


def test_what_is_free_decides_nothing(monkeypatch):
    cpu = torch.device("cpu")
    found = set()
    for free in (10**6, 10**12):
        monkeypatch.setattr("aletheia.job.room.free_memory_bytes", lambda device, free=free: free)
        monkeypatch.setattr("aletheia.job.room.own_memory_bytes", lambda device: 0)
        room = Room(cpu, None)
        every = room.usable_bytes
        assert room.why_no_early_layers(every, is_streamed=False) is None
        found.add((room.usable_bytes, room.why_no_early_layers(every + 10**9, is_streamed=False)))
        warning = room.warning(every)
        assert ("are free now" in warning) if free < every else warning is None
        assert "smaller batches" in room.warning(every + 10**9)
    ((_, why),) = found
    total = device_memory.total_memory_bytes(cpu)
    assert f"(80% of {total / 1e9:.1f} GB" in why
    assert "`max_memory` of 6.0 GB" in Room(cpu, 6 * 10**9).why_no_early_layers(7 * 10**9, is_streamed=False)


def test_a_control_group_limits_memory(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    own = tmp_path / "batch" / "job"
    own.mkdir(parents=True)
    for folder, limit, used in ((own, "max", 10), (own.parent, "3000000", 1_000_000)):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text(str(used))
        (folder / "memory.stat").write_text("anon 1\ninactive_file 500000\n")
    groups = tmp_path / "groups"
    groups.write_text("0::/batch/job\n")
    monkeypatch.setattr(device_memory, "GROUPS", tmp_path)
    monkeypatch.setattr(device_memory, "OWN_GROUP", groups)
    assert device_memory.total_memory_bytes(cpu) == 3_000_000
    assert device_memory.free_memory_bytes(cpu) == 2_500_000
    assert device_memory.usable_memory_bytes(cpu) == 2_400_000
    monkeypatch.setattr(device_memory, "OWN_GROUP", tmp_path / "none")
    assert device_memory.total_memory_bytes(cpu) > 10**8


def test_a_batch_of_one_row_has_no_mask():
    assert not Step(512, 512).is_padded
    assert Step(1024, 512).is_padded
