"""An average of the adapters' weights over the steps of a run: what its held-out losses and the kept adapter are of."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

ETA = 3  # the larger, the less the first steps count
AVERAGE_FILE = "average.safetensors"


class WeightAverage(TrainerCallback):
    """Polynomial-decay averages of all weights that learn, in float32, by the names of the parameters.

    After optimizer step n of a run, counted from 1, each moves towards its parameter by (ETA + 1) / (n + ETA), at most
    by all of the way (Shamir and Zhang 2013 [arXiv:1212.1824], sec. 4). So it needs no state besides the number of
    steps, which a checkpoint of Trainer has. Training itself goes on from the weights; :meth:`leave` gives the
    parameters the averages. Every process holds the same ones.
    """

    def __init__(self, model: nn.Module) -> None:
        """Begin at the weights as they are. Add it to the callbacks after what freezes layers."""
        self._parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self._averages = {name: value.detach().float().clone() for name, value in self._parameters.items()}
        self._learning = list(self._parameters)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after ``step`` optimizer steps of the run, from 1."""
        weights = [self._parameters[name].detach().float() for name in self._learning]
        averages = [self._averages[name] for name in self._learning]
        torch._foreach_lerp_(averages, weights, min(1.0, (ETA + 1) / (step + ETA)))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the parameters the values of their averages for a while; they stay the same objects."""
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
        """Go on from the averages of a checkpoint, bit for bit."""
        kept = load_file(folder / AVERAGE_FILE)
        for name, average in self._averages.items():
            average.copy_(kept[name])

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A run that goes on may have frozen layers already."""
        self._settle()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Take in the weights; the step is not counted yet."""
        self.update(state.global_step + 1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Layers may have been frozen; an evaluation may follow."""
        self._settle()

    def leave(self, best: str | None) -> None:
        """Training is over: the parameters take the averages, those of the checkpoint ``best`` where there is one."""
        if best is not None:
            self.load(Path(best))
        self._apply(self._parameters)

    @torch.no_grad()
    def _apply(self, names: Iterable[str]) -> None:
        for name in names:
            self._parameters[name].copy_(self._averages[name])

    @torch.no_grad()
    def _settle(self) -> None:
        """What has frozen takes its average, and has one value from then on, since what it computes is stored once."""
        frozen = [name for name in self._learning if not self._parameters[name].requires_grad]
        self._apply(frozen)
        for name in frozen:  # in the parameter's dtype
            self._averages[name].copy_(self._parameters[name])
        self._learning = [name for name in self._learning if name not in set(frozen)]
