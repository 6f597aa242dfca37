"""What a run would do and take, as a dry run finds it: plain data. No torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from aletheia.data.preview import ShownRow
from aletheia.planning.cost import LayerCosts
from aletheia.planning.plan import Plan


@dataclass(frozen=True)
class DryRun:
    """A run that did not take place: its plan, its size, and what it is predicted to take on this machine.

    Attributes:
        model: name of the base model, or the adapter folder to train further.
        out: the run folder, in which nothing was written.
        plan: the plan that the run would follow.
        row: the first row, as the model sees it.
        rows: rows to learn from.
        held_out_rows: rows to measure the loss on.
        tokens: tokens of the rows to learn from, in one pass.
        steps: planned optimizer steps; a run may stop earlier.
        rows_per_step: rows that a step learns from.
        passes: passes over the rows.
        evaluations: how often training measures the held-out loss; 0 where Trainer's settings decide that.
        resumed_step: the step at which the interrupted run in ``out`` would resume; 0 for a new run.
        seconds: predicted time by phase; ``load`` and ``probe`` are measured. Empty where it is not known.
        why_no_seconds: why there is no time, in a few words.
        device: the device it runs on.
        memory_bytes: predicted peak memory, an upper estimate.
        usable_memory_bytes: memory that the run may take.
        recompute: what the backward pass computes again to save memory.
        disk_bytes: predicted size by what is written: ``adapter``, ``checkpoints``, ``cache``.
        cache: where the output of the frozen layers is kept: memory, disk or off.
        free_disk_bytes: free disk space at ``out``.
        files: the files that the run folder would hold in the end.
        notes: what you should know before the run, one line each.
        measured_seconds: how long the dry run itself took.
    """

    model: str
    out: str
    plan: Plan
    row: ShownRow
    rows: int
    held_out_rows: int
    tokens: int
    steps: int
    rows_per_step: int
    passes: float
    evaluations: int
    resumed_step: int
    seconds: Mapping[str, float]
    why_no_seconds: str
    device: str
    memory_bytes: int
    usable_memory_bytes: int
    recompute: str
    disk_bytes: Mapping[str, int]
    cache: str
    free_disk_bytes: int
    files: tuple[str, ...]
    notes: tuple[str, ...]
    measured_seconds: float

    @property
    def total_seconds(self) -> float:
        """Predicted time of the whole run; 0 where it is not known."""
        return sum(self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        """All fields, and ``total_seconds``, as JSON types."""
        return asdict(self) | {"plan": self.plan.model_dump(mode="json"), "total_seconds": self.total_seconds}


def training_seconds(plan: Plan, costs: LayerCosts, steps: int, passes: float, is_cached: bool) -> float:
    """Seconds that ``steps`` batches of ``plan`` take, from ``costs``: the seconds of the parts of one batch.

    While the early layers learn, nothing is cached. After that the frozen layers run once per row with a cache, or with
    every batch without one.
    """
    early = plan.early_steps(steps)
    every = sorted({*plan.layers, *plan.early_layers})
    rest = passes * (steps - early) / steps
    later = costs.mean_step(plan.layers, rest) if is_cached else costs.step(plan.layers)
    return early * costs.step(every) + (steps - early) * later
