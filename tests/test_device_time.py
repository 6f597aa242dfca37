"""The least time of a step on a device, counted without one."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from device_time import Card, DeviceTime, time_of
from fake_steps import Kind

SHAPE = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6}
LLAMA = LlamaConfig(**SHAPE, num_attention_heads=8, num_key_value_heads=2, pad_token_id=0, eos_token_id=2)
ENDLESS = float("inf")


def seconds(job, **card):
    """Of ``job`` on a card on which only what is given takes time."""
    limits = {"flops_per_second": ENDLESS, "bytes_per_second": ENDLESS, "least_kernel_seconds": 0.0}
    with DeviceTime(Card(**limits | card), rows=1) as counted:
        job()
    return sum(spent.seconds for spent in counted.spent.values())


@pytest.mark.parametrize(("boundary", "cached"), [(0, False), (3, False), (3, True)])
def test_a_step_takes_the_products_with_weights_and_little_else(boundary, cached):
    kind = Kind(LLAMA, torch.bfloat16, boundary, 1, 512, cached=cached, rank=1)
    counted, work = time_of(kind, 512, Card(1.0, ENDLESS, 0.0))  # rows of one token: attention is next to nothing
    # the lowest layer that learns has no gradient of its input, which saves products with the weights of q, k and v
    assert 0.97 <= sum(spent.seconds for spent in counted.spent.values()) / work <= 1.03


def test_bytes_of_inputs_and_outputs_count_once():
    left, right = torch.zeros(64, 32), torch.zeros(64, 32)
    assert seconds(lambda: left + right, bytes_per_second=1.0) == 3 * 64 * 32 * 4
    assert seconds(lambda: left.add_(right), bytes_per_second=1.0) == 3 * 64 * 32 * 4


def test_products_in_place_are_as_long_as_others():
    total, left, right = torch.zeros(8, 4), torch.zeros(8, 16), torch.zeros(16, 4)
    assert seconds(lambda: left @ right, flops_per_second=1.0) == 2 * 8 * 16 * 4
    assert seconds(lambda: total.addmm_(left, right), flops_per_second=1.0) == 2 * 8 * 16 * 4


def test_views_and_allocations_are_no_kernels():
    tensor = torch.zeros(64, 32)
    assert seconds(lambda: (tensor.t(), tensor[3], torch.empty(5)), least_kernel_seconds=1.0) == 0
    assert seconds(lambda: tensor * 2, least_kernel_seconds=1.0) == 1
