"""Stored states of packed rows: those of rows that keep to themselves, however kernels round."""

import pytest
import torch
from test_packed import row
from tiny import make_model

from aletheia.data.batches import collate_packed
from aletheia.execution.packed import attention_by_row
from aletheia.prefix.exact import packs_differ
from aletheia.prefix.spans import Span

ROWS = [row(60, 1), row(90, 2)]
SPANS = [Span(0, 0, ROWS[0]), Span(0, 60, ROWS[1])]
BATCH = collate_packed(ROWS)
TOGETHER = {
    "input_ids": BATCH["input_ids"],
    "position_ids": BATCH["position_ids"],
    "attention_mask": torch.ones(1, 1, 150, 150, dtype=torch.bool).tril(),
}
in_each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def shifted(model, by):
    """``model``, with the states after its first layer further off by a share ``by`` where rows are packed."""

    def shift(module, args, output):
        if output.shape[1] == 150:
            signs = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).sign()
            return (output * (1 + by * signs)).to(output.dtype)
        return output

    model.model.layers[0].register_forward_hook(shift)
    return model


@in_each_dtype
@pytest.mark.parametrize("boundary", [1, 3])
def test_rows_that_attend_to_each_other_have_other_states(boundary, dtype):
    model = make_model("llama").to(dtype)
    assert packs_differ(model, boundary, TOGETHER, SPANS)
    with attention_by_row(model):
        assert not packs_differ(model, boundary, BATCH, SPANS)


@pytest.mark.parametrize(("dtype", "by"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_another_rounding_of_rows_is_no_difference(dtype, by):
    model = shifted(make_model("llama").to(dtype), by)
    with attention_by_row(model):
        assert not packs_differ(model, 3, BATCH, SPANS)


@in_each_dtype
def test_more_than_rounding_is_a_difference(dtype):
    model = shifted(make_model("llama").to(dtype), 0.3)
    with attention_by_row(model):
        assert packs_differ(model, 3, BATCH, SPANS)
