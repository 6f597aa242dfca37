"""Three points between the lowest loss and the shortest run, by name: what a plan is made for.

Losses were measured on SmolLM2-135M, see docs/results/defaults. No torch.
"""

from dataclasses import dataclass
from typing import Literal

Policy = Literal["depth-aware", "top-percent", "last", "first", "random", "bottom", "uniform"]
Target = Literal["quality", "balanced", "speed"]
TARGETS: tuple[Target, ...] = ("quality", "balanced", "speed")
DEFAULT_TARGET: Target = "balanced"
BALANCED_SHARE = 0.5  # of the steps in which every layer learns
SPEED_SHARE = 0.25
WORTHWHILE = 0.15  # of a run's time: what freezing must save to be worth its loss
# held-out loss against every layer to the end at the same rate, both averaged and at their best, over three passes:
# means of three tasks, three seeds each
MEASURED: dict[Target, str] = {"quality": "0", "balanced": "+0.1 %", "speed": "+0.7 %"}


@dataclass(frozen=True)
class Choice:
    """What a target comes to: how layers are chosen, how long the others learn, and why, in words."""

    policy: Policy
    freeze_after: float
    reason: str = ""


def choice_of(target: Target, saving: float) -> Choice:
    """What ``target`` comes to for a run of which freezing at ``BALANCED_SHARE`` would save so much of the time."""
    if target == "quality":
        return Choice("uniform", 0.0, "The lowest loss first: every layer learns to the end.")
    share = SPEED_SHARE if target == "speed" else BALANCED_SHARE
    if target == "balanced" and saving < WORTHWHILE:
        return Choice(
            "uniform",
            0.0,
            f"Loss against time: every layer learns to the end. To freeze the lower ones after {100 * share:.0f} % of "
            f"the steps would save {max(100 * saving, 0):.0f} % of the time, less than the {100 * WORTHWHILE:.0f} % "
            "that would be worth a higher loss.",
        )
    first = "Speed first" if target == "speed" else "Loss against time"
    return Choice(
        "depth-aware",
        share,
        f"{first}: every layer learns for {100 * share:.0f} % of the steps, then only those with the most score for "
        f"their time. On SmolLM2-135M that raised the held-out loss by {MEASURED[target].lstrip('+')}.",
    )
