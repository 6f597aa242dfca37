"""Where adapters start: A along the input directions in which the weight's gradient is largest, B at zero.

Shapes: I inputs, O outputs, R rank; G [O, I] is the loss gradient of a weight, summed over batches.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from aletheia.data.batches import on_device_of

Init = Literal["gradient", "random"]
ROWS = 8  # of the training data, from its first batches on; four times as many reach 4 % more of the gradient
HALF_SCALE = 2.0**10  # keeps small gradients of a float16 model from underflow; directions do not depend on it


def align_with_gradient(model: nn.Module, batches: Iterable[dict[str, torch.Tensor]]) -> int:
    """Turn every A towards the leading right singular vectors of its weight's gradient; B stays zero.

    At ``B = 0`` the gradient of B is ``s G At``, so the first steps go only as far as the rows of A reach: random rows
    hold about ``R / I`` of ``||G||_F^2``, its leading singular vectors nearly all, since gradients are of low rank.
    LoRA-GA [arXiv:2407.05000] starts both factors from singular vectors of G and corrects the base weights for it; here
    A alone is set, so the model starts as the base model and the adapter is an ordinary one. G is never formed: with
    ``A = 0`` and B Gaussian the gradient of A is ``s Bt G``, a random sketch of the row space of G
    [Halko et al. 2011, arXiv:0909.4061], of which the right singular vectors are taken. Rows get the length that
    PEFT's random ones have on average, ``1 / sqrt(3)``.

    Args:
        model: the adapted model, whose adapters were not trained yet.
        batches: what the gradient is taken from, as ``model`` takes them; one forward and backward pass each.

    Returns:
        How many adapters were turned, those of an expert counted for itself. Those whose gradient is zero or not
        finite (an expert that saw no token) stay.
    """
    factors: list[tuple[nn.Parameter, nn.Parameter, int]] = [
        (
            module.lora_A[name].get_parameter("weight"),
            module.lora_B[name].get_parameter("weight"),
            getattr(module, "num_experts", 1),
        )
        for module in model.modules()
        if isinstance(module, LoraLayer)
        for name in module.active_adapters
        if name in module.lora_A and module.lora_A[name].weight.requires_grad
    ]
    random_a = [a_RI.detach().clone() for a_RI, _, _ in factors]
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for a_RI, b_OR, _ in factors:
            a_RI.zero_()
            b_OR.copy_(torch.randn(b_OR.shape))
    sketches = _gradients(model, [a_RI for a_RI, _, _ in factors], batches)
    turned = 0
    with torch.no_grad():
        for (a_RI, b_OR, experts), sketch_RI, random_RI in zip(factors, sketches, random_a, strict=True):
            a_RI.copy_(random_RI)
            b_OR.zero_()
            of_expert = zip(a_RI.chunk(experts), sketch_RI.chunk(experts), strict=True)  # PEFT stacks their rows
            for own_a_RI, own_sketch_RI in of_expert:
                if torch.isfinite(own_sketch_RI).all() and own_sketch_RI.any():
                    rows = torch.linalg.svd(own_sketch_RI, full_matrices=False)[2]
                    own_a_RI[: len(rows)] = rows / 3**0.5
                    turned += 1
    return turned


def _gradients(
    model: nn.Module, parameters: list[nn.Parameter], batches: Iterable[dict[str, torch.Tensor]]
) -> list[torch.Tensor]:
    """Summed over the batches, in float32; zero for what no loss depends on."""
    totals = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    scale = HALF_SCALE if next(model.parameters()).dtype == torch.float16 else 1.0
    for batch in batches:
        loss = model(**on_device_of(model, batch), use_cache=False).loss * scale
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for total, gradient in zip(totals, gradients, strict=True):
            if gradient is not None:
                total += gradient
    return totals
