"""An average of the adapters' weights over the steps of a run, which is evaluated and kept in their place."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

ETA = 3  # the larger it is, the less the first steps count
AVERAGE_FILE = "average.safetensors"


class WeightAverage(TrainerCallback):
    """Polynomial-decay averages of all trainable weights, in float32, by parameter name.

    After optimizer step n of a run, counted from 1, each average moves towards its parameter by the share
    min(1, (ETA + 1) / (n + ETA)) of the distance (Shamir and Zhang 2013 [arXiv:1212.1824], sec. 4). So it needs only
    the number of steps, which a checkpoint of Trainer holds. Training itself does not use the averages;
    :meth:`leave` copies them into the parameters. Every process holds the same averages.
    """

    def __init__(self, model: nn.Module) -> None:
        """Start from the present weights. Add this to the callbacks after the one that freezes layers."""
        self._parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self._averages = {name: value.detach().float().clone() for name, value in self._parameters.items()}
        self._learning = list(self._parameters)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the averages after optimizer step ``step`` of the run, counted from 1."""
        weights = [self._parameters[name].detach().float() for name in self._learning]
        averages = [self._averages[name] for name in self._learning]
        torch._foreach_lerp_(averages, weights, min(1.0, (ETA + 1) / (step + ETA)))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the parameters the values of their averages within this context; they stay the same objects."""
        own = {name: self._parameters[name].detach().clone() for name in self._learning}
        try:
            self._apply(self._learning)
            yield
        finally:
            with torch.no_grad():
                for name, value in own.items():
                    self._parameters[name].copy_(value)

    def save(self, folder: Path) -> None:
        """Write the averages into a checkpoint.

        Raises:
            OSError, safetensors.SafetensorError: they cannot be written.
        """
        save_file(self._averages, folder / AVERAGE_FILE)

    def load(self, folder: Path) -> None:
        """Load the averages of a checkpoint, bit for bit."""
        kept = load_file(folder / AVERAGE_FILE)
        for name, average in self._averages.items():
            average.copy_(kept[name])

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Settle frozen parameters: a resumed run may have some already."""
        self._settle()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Update the averages; ``global_step`` does not count this step yet."""
        self.update(state.global_step + 1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Settle parameters that have just been frozen; an evaluation may follow."""
        self._settle()

    def leave(self, best: str | None) -> None:
        """Copy the averages into the parameters after training: those of the checkpoint ``best`` if there is one."""
        if best is not None:
            self.load(Path(best))
        self._apply(self._parameters)

    @torch.no_grad()
    def _apply(self, names: Iterable[str]) -> None:
        for name in names:
            self._parameters[name].copy_(self._averages[name])

    @torch.no_grad()
    def _settle(self) -> None:
        """Set frozen parameters to their average, once: the outputs of frozen layers are stored and must not change."""
        frozen = [name for name in self._learning if not self._parameters[name].requires_grad]
        self._apply(frozen)
        for name in frozen:  # in the parameter's dtype
            self._averages[name].copy_(self._parameters[name])
        self._learning = [name for name in self._learning if name not in set(frozen)]
