"""Where adapters start: A along the input directions in which the weight's gradient is largest, B at zero.

On a quantized base B may start where it takes back what quantization did. Shapes: N tokens, I inputs, O outputs,
R rank; G [O, I] is the loss gradient of a weight, summed over batches.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from aletheia.anatomy.read import find_layers
from aletheia.data.batches import on_device_of

Init = Literal["gradient", "random"]
ROWS = 32  # of the training data, from its first batches on
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
    factors = [
        (module.lora_A[name].weight, module.lora_B[name].weight, getattr(module, "num_experts", 1))
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


@torch.no_grad()
def undo_quantization(
    model: nn.Module, layers: Iterable[tuple[int, nn.Module]], batches: Iterable[dict[str, torch.Tensor]]
) -> int:
    """Start every B where its adapter takes back what quantization changed, as far as the rows of A reach; A stays.

    With E = W - Q(W) and the inputs X of a weight over the batches, B minimises ``||(E - s B A) X||``: with
    ``M = A X Xt`` [R, I] it is ``E Mt (M At)^-1 / s``. Corrections in the metric of the inputs are those of QERA
    [arXiv:2410.06040], which chooses A for them; here A is given, and inputs vary most where it points.

    Args:
        model: the adapted model on its quantized base.
        layers: index and weights of decoder layers as they were before, one at a time; those without adapters may lack.
        batches: what the inputs are taken from, as ``model`` takes them; one forward pass each.

    Returns:
        How many adapters were set.
    """
    _, own_layers = find_layers(model)
    adapters = {
        (index, name): module
        for index, layer in enumerate(own_layers)
        for name, module in layer.named_modules()
        if isinstance(module, LoraLayer) and _is_4bit(module.get_base_layer())
    }
    moments_RI = _moments(model, list(adapters.values()), batches)
    done = 0
    for index, layer in layers:
        for name, linear in layer.named_modules():
            module = adapters.get((index, name))
            if module is None or module not in moments_RI:
                continue
            active, base = module.active_adapters[0], module.get_base_layer()
            a_RI, b_OR, m_RI = module.lora_A[active].weight.float(), module.lora_B[active].weight, moments_RI[module]
            error_OI = linear.weight.float() - dequantize_module_weight(base).float()
            inverse_RR = torch.linalg.pinv(m_RI @ a_RI.T, rtol=1e-6, hermitian=True)
            b_OR.copy_(error_OI @ m_RI.T @ inverse_RR / module.scaling[active])
            done += 1
    return done


def _is_4bit(base: nn.Module) -> bool:
    """Quantized by bitsandbytes to 4 bits; 8 bits leave next to nothing to take back."""
    return hasattr(getattr(base, "weight", None), "quant_state")


def _moments(
    model: nn.Module, modules: list[LoraLayer], batches: Iterable[dict[str, torch.Tensor]]
) -> dict[LoraLayer, torch.Tensor]:
    """``A X Xt`` [R, I] of each adapter, in float32, over the tokens that are not padding."""
    found: dict[LoraLayer, torch.Tensor] = {}
    masks: list[torch.Tensor] = []

    def see(module: LoraLayer, args: tuple) -> None:
        x_NI = args[0].flatten(0, -2).float()
        if len(x_NI) == len(masks[0]):  # an expert sees tokens of its own
            x_NI = x_NI[masks[0]]
        a_RI = module.lora_A[module.active_adapters[0]].weight.float()
        found[module] = found.get(module, 0) + (x_NI @ a_RI.T).T @ x_NI

    handles = [module.register_forward_pre_hook(see) for module in modules]
    try:
        for batch in batches:
            inputs = on_device_of(model, batch)
            masks[:] = [inputs["attention_mask"].flatten().bool()]
            model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found
