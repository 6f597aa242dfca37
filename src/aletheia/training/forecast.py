"""What is known about the steps of a run in advance: the tokens of each, and its predicted time. No torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from aletheia.planning.plan import Plan, layer_ranges


@dataclass(frozen=True)
class Outlook:
    """Tokens of each step, without padding, and its predicted time relative to a step of the baseline.

    After ``early_steps`` steps, layers freeze; ``freezes`` says which.
    """

    tokens: Sequence[int]
    times: Sequence[float]
    early_steps: int = 0
    freezes: str = ""

    @property
    def times_so_far(self) -> list[float]:
        """The time of all steps before each step, starting with 0."""
        return list(accumulate(self.times, initial=0.0))


def outlook(plan: Plan, tokens: Iterable[int], steps_per_epoch: int, reads_cache: bool, is_filled: bool) -> Outlook:
    """The outlook of a run that follows ``plan``.

    Args:
        plan: what learns, and when it freezes.
        tokens: tokens of each step.
        steps_per_epoch: steps of one pass, after which the states of a frozen prefix are stored.
        reads_cache: whether stored states are used.
        is_filled: whether all of them are stored before the first step.
    """
    counted = list(tokens)
    early, predicted = plan.early_steps(len(counted)), plan.predicted
    stored_from = early + (0 if is_filled else steps_per_epoch)
    step, stored = predicted.relative_step_time, predicted.relative_cached_step_time
    stored = stored if stored and reads_cache else step
    times = [
        (predicted.relative_early_step_time or step) if at < early else stored if at >= stored_from else step
        for at in range(len(counted))
    ]
    freezes = f"layers {layer_ranges(plan.early_layers)} are frozen from here on; {layer_ranges(plan.layers)} learn"
    return Outlook(counted, times, early, freezes if early else "")
