"""Models that a GPU's own kernels take, in the dtype they are trained in, and what a step of theirs has to come to."""

import copy

import torch
from test_prefix import adapters_on, difference, gradients
from tiny import make_model

from aletheia.anatomy.access import text_config
from aletheia.data.batches import on_device_of
from aletheia.execution.fast import bfloat16_autocast

WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 1024}
DTYPES = (torch.float32, torch.bfloat16)
SAME_IN_FLOAT32 = 1e-5
AS_NEAR_AS_PLAIN = 1.5  # times how far plain PEFT in bfloat16 is from the exact numbers


def base(dtype, device, family="llama", layers=4, **shape):
    """A random model of ``dtype``: four heads of 64, of which two have keys of their own."""
    wide = {name: value for name, value in WIDE.items() if family != "gpt_neox" or name != "head_dim"}
    model = make_model(family, layers, **wide | shape)
    for parameter in model.parameters():  # buffers stay in float32, as where a model is loaded
        parameter.data = parameter.data.to(device, dtype)
    text_config(model).dtype = dtype
    return model.to(device)


def wide(dtype, device, family="llama", **shape):
    """The same with adapters in float32 on the upper half of its layers."""
    return adapters_on(base(dtype, device, family, **shape)).to(device)


def step(model, batch):
    """Loss and gradients of a batch that may lie elsewhere."""
    return gradients(model, on_device_of(model, batch))


def standard(model, batch, exact=None):
    """What a step has to come to, and how far from it (relative, of loss and gradient vector) it may be.

    In float32 that is plain PEFT's step. In bfloat16 it is a step of the same weights in float32, those of ``exact``
    where they are packed, and the distance is measured by how far plain PEFT under autocast is from it.
    """
    if text_config(model).dtype == torch.float32:
        return step(model, batch), SAME_IN_FLOAT32
    expected = step(exact or copy.deepcopy(model).float(), batch)
    with bfloat16_autocast(model):
        plain = difference(step(model, batch), expected)
    assert plain > 0
    return expected, AS_NEAR_AS_PLAIN * plain
