"""What happens when in a run: a list of phases that follows from plan and length alone. No torch."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from aletheia.planning.plan import Plan


@dataclass(frozen=True)
class Phase:
    """From ``first_step`` on, counted in steps that are done, nothing below layer ``boundary`` learns."""

    first_step: int
    boundary: int


def phases(plan: Plan, steps: int) -> list[Phase]:
    """The phases of a run of ``steps``: early layers learn at first, then the plan's boundary holds to the end.

    Layers that a plan adapts early only are frozen as they are by then, as in FreezeOut [arXiv:1706.04983] and
    AutoFreeze [arXiv:2102.01386].
    """
    early = plan.early_steps(steps)
    lasting = Phase(early, plan.boundary)
    return [Phase(0, min(*plan.early_layers, plan.boundary)), lasting] if early else [lasting]


def phase_at(listed: Sequence[Phase], step: int) -> Phase:
    """The phase in which the step after ``step`` is taken: it follows from the number of steps done, nothing else."""
    return listed[bisect_right([phase.first_step for phase in listed], step) - 1]


def rows_come_back(first_step: int, steps: int, steps_per_epoch: int | None) -> bool:
    """Whether any row of the steps from ``first_step`` on is seen twice; None: the data has no length."""
    return steps_per_epoch is not None and first_step // steps_per_epoch < (steps - 1) // steps_per_epoch


def is_last_epoch(step: int, steps: int, steps_per_epoch: int) -> bool:
    """Whether the step after ``step`` lies in the last epoch of the run."""
    return step // steps_per_epoch == (steps - 1) // steps_per_epoch
