"""Gradient checkpointing of the suffix: backward computes a whole layer again, or all but its matrix products."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, create_selective_checkpoint_contexts

from aletheia.anatomy.access import base_of
from aletheia.errors import TrainingError
from aletheia.execution.cpu.attention import repeated_weights
from aletheia.execution.fast import adapters_as_operators

Recompute = Literal["off", "selective", "full"]
_aten = torch.ops.aten
KEPT = {  # the expensive operators: products with weights, and attention kernels that keep no square matrix
    _aten.mm.default,
    _aten.addmm.default,
    _aten._grouped_mm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aletheia.attention.default,
    torch.ops.aletheia.low_rank_products.default,
}
KEPT_BY_NAME = {  # operators that not every installation has
    *("bitsandbytes::gemm_4bit", "bitsandbytes::int8_mixed_scaled_mm", "bitsandbytes::int8_scaled_mm"),
    "torch_attn::_varlen_attn",
}


def _keep_products(ctx: SelectiveCheckpointContext, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_product = operator in KEPT or operator.name() in KEPT_BY_NAME
    return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE


def recomputations(model: torch.nn.Module, compiled: bool = False) -> tuple[Recompute, ...]:
    """The kinds of recomputation that ``model`` supports, least first; compiled layers hide their products."""
    if not base_of(model).supports_gradient_checkpointing:
        return ("off",)
    return ("off", "full") if compiled else ("off", "selective", "full")


@contextmanager
def recomputation(model: torch.nn.Module, kind: Recompute) -> Iterator[None]:
    """Keep fewer activations between forward and backward; gradients stay the same. Backward must run inside.

    ``full`` keeps the input of each layer and runs the layer again in backward. ``selective`` also keeps the matrix
    products, and repeats only cheap operations: norms, activations, rotary positions [after Korthikanti et al. 2022,
    arXiv:2205.05198]. They repeat attention, whose kernels then kept T x T matrices; those used here keep none.

    Args:
        model: the adapted model.
        kind: what backward computes again; ``off`` does nothing.

    Raises:
        TrainingError: the model's family has no gradient checkpointing.
    """
    if kind == "off":
        yield
        return
    base = base_of(model)
    if not base.supports_gradient_checkpointing:
        raise TrainingError(f"{type(base).__name__} has no gradient checkpointing; set `gradient_checkpointing` off")
    settings: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    base.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    try:
        with ExitStack() as stack:
            if kind == "selective":
                stack.enter_context(repeated_weights())
                stack.enter_context(adapters_as_operators())
            yield
    finally:
        base.activation_checkpointing_disable()
