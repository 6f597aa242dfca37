"""A job after planning and before training."""

from dataclasses import dataclass
from typing import Any

from aletheia.data.examples import Examples
from aletheia.job.adapter import Start
from aletheia.job.source import Source
from aletheia.planning.plan import Plan
from aletheia.probing.scores import Scores
from aletheia.runs.manifest import TrainingCheckpoint


@dataclass(frozen=True)
class Ready:
    """What a run starts from once everything is loaded and planned.

    ``adapted`` is set if an adapter is trained further, ``scores`` if the plan was made from them here. ``found`` is
    the checkpoint that an interrupted run resumes from.
    """

    base: Source
    data: Examples
    held_out: Examples
    plan: Plan
    scores: Scores | None
    start: Start | None
    adapted: Any
    found: TrainingCheckpoint | None
