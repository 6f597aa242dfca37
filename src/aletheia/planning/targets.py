"""The targets that a plan can aim for: three points between the lowest loss and the shortest run.

Losses were measured on SmolLM2-135M, see docs/results/defaults. No torch.
"""

from dataclasses import dataclass
from typing import Literal

Policy = Literal["depth-aware", "top-percent", "last", "first", "random", "bottom", "uniform"]
Target = Literal["quality", "balanced", "speed"]
TARGETS: tuple[Target, ...] = ("quality", "balanced", "speed")
DEFAULT_TARGET: Target = "balanced"
BALANCED_SHARE = 0.5  # share of the steps in which every layer learns
SPEED_SHARE = 0.25
WORTHWHILE = 0.15  # share of a run's time that freezing must save to be worth a higher loss
# rise in held-out loss over training every layer to the end at the same learning rate. Both runs make three passes,
# with averaged weights, and count at their best; means of three tasks with three seeds each
MEASURED: dict[Target, str] = {"quality": "0", "balanced": "+0.1 %", "speed": "+0.7 %"}


@dataclass(frozen=True)
class Choice:
    """What a target means for a run: how layers are chosen, how long the others learn, and the reason in words."""

    policy: Policy
    freeze_after: float
    reason: str = ""


def choice_of(target: Target, saving: float) -> Choice:
    """What ``target`` means for a run, where ``saving`` is the share of its time that freezing halfway would save."""
    if target == "quality":
        return Choice("uniform", 0.0, "The lowest loss first: every layer learns to the end.")
    share = SPEED_SHARE if target == "speed" else BALANCED_SHARE
    if target == "balanced" and saving < WORTHWHILE:
        return Choice(
            "uniform",
            0.0,
            f"Balanced: every layer learns to the end. Freezing the lower ones after {100 * share:.0f} % of the steps "
            f"would save {max(100 * saving, 0):.0f} % of the time. Below {100 * WORTHWHILE:.0f} %, that is not worth "
            "a higher loss.",
        )
    first = "Speed first" if target == "speed" else "Balanced"
    return Choice(
        "depth-aware",
        share,
        f"{first}: every layer learns for {100 * share:.0f} % of the steps, then only those with the highest score "
        f"for their time. On SmolLM2-135M, that raised the held-out loss by {MEASURED[target].lstrip('+')}.",
    )
