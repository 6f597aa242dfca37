"""What is known of the steps of a run before they are taken: the tokens of each, and how long it takes. No torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from aletheia.planning.plan import Plan, layer_ranges


@dataclass(frozen=True)
class Outlook:
    """Tokens of each step, without padding, and the time of each as the plan predicts it, in a unit of its own.

    After ``early_steps`` of them layers freeze, as ``freezes`` says in words.
    """

    tokens: Sequence[int]
    times: Sequence[float]
    early_steps: int = 0
    freezes: str = ""

    @property
    def times_so_far(self) -> list[float]:
        """The time of all steps up to each, 0 at first."""
        return list(accumulate(self.times, initial=0.0))


def outlook(plan: Plan, tokens: Iterable[int], steps_per_epoch: int, reads_cache: bool, is_filled: bool) -> Outlook:
    """The outlook of a run that follows ``plan``.

    Args:
        plan: what learns, and when it freezes.
        tokens: of each step.
        steps_per_epoch: after so many steps behind a frozen prefix its states are stored, if ``reads_cache``.
        reads_cache: whether stored states are read.
        is_filled: whether they are all there before the first step.
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
    freezes = f"layers {layer_ranges(plan.early_layers)} are frozen from here on, {layer_ranges(plan.layers)} learn"
    return Outlook(counted, times, early, freezes if early else "")
