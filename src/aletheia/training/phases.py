"""The phases of a run, which follow from its plan and its number of steps alone. No torch."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from aletheia.planning.plan import Plan


@dataclass(frozen=True)
class Phase:
    """A phase, which starts after ``first_step`` steps; in it, nothing below layer ``boundary`` learns."""

    first_step: int
    boundary: int


def phases(plan: Plan, steps: int) -> list[Phase]:
    """The phases of a run of ``steps``: early layers learn at first; then the plan's boundary holds to the end.

    Early layers freeze with what they have learned, as in FreezeOut [arXiv:1706.04983] and AutoFreeze
    [arXiv:2102.01386].
    """
    early = plan.early_steps(steps)
    lasting = Phase(early, plan.boundary)
    return [Phase(0, min(*plan.early_layers, plan.boundary)), lasting] if early else [lasting]


def phase_at(listed: Sequence[Phase], step: int) -> Phase:
    """The phase of the next step after ``step`` steps are done; it depends on nothing else."""
    return listed[bisect_right([phase.first_step for phase in listed], step) - 1]


def rows_come_back(first_step: int, steps: int, steps_per_epoch: int | None) -> bool:
    """Whether any row from ``first_step`` on is seen twice; ``steps_per_epoch`` is None for data without a length."""
    return steps_per_epoch is not None and first_step // steps_per_epoch < (steps - 1) // steps_per_epoch


def is_last_epoch(step: int, steps: int, steps_per_epoch: int) -> bool:
    """Whether the next step after ``step`` is in the last epoch of the run."""
    return step // steps_per_epoch == (steps - 1) // steps_per_epoch
