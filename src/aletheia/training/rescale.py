"""How strong the adapter that is kept should be: held-out rows judge whether less of it is better."""

from collections.abc import Callable

import torch
from torch import nn

from aletheia.progress import Progress, Say

SCALES = (0.8, 0.6, 0.4)  # of what the adapters add, tried one after the other while the loss falls


@torch.no_grad()
def rescale(
    model: nn.Module, loss_of: Callable[[], float], loss: float, show_progress: bool | Say = False
) -> tuple[float, float]:
    """Weaken the adapters, if that lowers the held-out loss: every B is multiplied by one number.

    A rate that is too high for the data moves the weights too far along a direction that is right: in 40 steps of three
    tasks at twice the best rate, 0.6 or 0.8 of the adapter took back most of what the rate had cost on two of them
    (docs/results/defaults). Wortsman et al. 2022 [arXiv:2109.01903] likewise go part of the way from a model to its
    fine-tuned one.

    Args:
        model: with its adapters as they are to be kept.
        loss_of: the held-out loss of ``model`` as it is.
        loss: that loss now.
        show_progress: say on stderr how far it is, or to a function that gets a line now and then.

    Returns:
        The scale that was taken, 1 where no other was better, and its loss.
    """
    factors = [value for name, value in model.named_parameters() if "lora_B" in name]
    full = [value.detach().clone() for value in factors]

    def put(scale: float) -> None:
        for value, whole in zip(factors, full, strict=True):
            value.copy_(whole * scale)

    best = 1.0, loss
    try:
        with Progress("scale", len(SCALES), "strengths of the adapter", show_progress) as progress:
            for scale in SCALES:
                put(scale)
                found = loss_of()
                if not found < best[1]:
                    break
                best = scale, found
                progress.advance()
    finally:
        put(best[0])
    return best
