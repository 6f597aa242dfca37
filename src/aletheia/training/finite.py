"""Values that are not finite end a run before they are applied or saved, and are named: step, layer, module."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from aletheia.anatomy.read import find_layers
from aletheia.errors import TrainingError
from aletheia.probing.preflight import broken_output, told_place
from aletheia.training.processes import Launch


class Finite(TrainerCallback):
    """Looks at the loss and the gradients before each optimizer step, and at the adapters' weights after it.

    One number per step is waited for; where it is not finite, a forward pass finds the place. Under float16 the loss
    scaler skips steps whose gradients overflow, so these are not looked at.
    """

    def __init__(self, trainer: Trainer) -> None:
        """Add it to the callbacks before all that evaluate or save."""
        self._trainer = trainer
        self._loss: torch.Tensor | None = None  # of the step so far; a NaN or an infinity stays one in the sum
        self._batches: list[Mapping[str, Any]] = []  # of the step so far

    def after_backward(self, loss: torch.Tensor, batch: Mapping[str, Any]) -> None:
        """Look at a batch, and before the optimizer step at all of its gradients.

        Raises:
            TrainingError: something is not finite; nothing was applied.
        """
        self._loss = loss.detach().float() if self._loss is None else self._loss + loss.detach().float()
        self._batches.append(batch)
        if not self._trainer.accelerator.sync_gradients:
            return
        total, self._loss = self._loss, None
        gradients = {} if self._trainer.args.fp16 else dict(_gradients(self._model))
        if _all_finite([total, *gradients.values()]):
            self._batches.clear()
            return
        step = self._trainer.state.global_step + 1
        if not math.isfinite(total.item()):
            self._fail(f"the loss is {total.item()}", step, self._batches)
        broken = [name for name, value in gradients.items() if not torch.isfinite(value).all()]
        # backward goes down, so the last one is nearest to where it began
        place = f" in {self._place(broken[-1])}" if broken else ""
        self._fail(f"the gradient{place} is not finite", step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Look at the weights, before anything is evaluated or saved.

        Raises:
            TrainingError: one is not finite.
        """
        own = {name: value for name, value in self._model.named_parameters() if value.requires_grad}
        if not _all_finite(_local(own.values())):
            self._fail("a weight is not finite", state.global_step)

    def held_out(self, loss: float, batches: Iterable[Mapping[str, Any]]) -> None:
        """Look at a held-out loss; ``batches`` are those it was taken on.

        Raises:
            TrainingError: it is not finite.
        """
        if not math.isfinite(loss):
            self._fail(f"the held-out loss is {loss}", self._trainer.state.global_step, batches)

    @property
    def _model(self) -> nn.Module:
        model = self._trainer.model
        assert model is not None
        return model

    def _place(self, name: str) -> str:
        return told_place(name, find_layers(self._model)[0])

    def _fail(self, what: str, step: int, batches: Iterable[Mapping[str, Any]] = ()) -> NoReturn:
        """Say what is not finite, and where that came from: a weight, else the output of a module in ``batches``."""
        model = self._model
        weight = next((name for name, value in model.named_parameters() if not _is_finite(value)), None)
        if weight is not None:
            what = f"{what}: the weight of {self._place(weight)} is not finite"
        elif Launch.here().processes == 1:  # others would wait for this one
            outputs = (broken_output(model, dict(batch)) for batch in batches)
            what += next((f": {output} is not finite" for output in outputs if output), "")
        dtype = str(getattr(model, "dtype", "")).removeprefix("torch.")
        remedy = "try a lower `learning_rate`" if step else "check the weights of the model and of the adapter"
        raise TrainingError(
            f"{what}, at step {step}, computed in {dtype}; it was not saved; {remedy} or `dtype` float32"
        )


def _gradients(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            yield name, parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad


def _local(values: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [value.to_local() if isinstance(value, DTensor) else value for value in values]


def _all_finite(values: list[torch.Tensor]) -> bool:
    """Whether all values are finite; waits for the device once."""
    filled = [value.detach() for value in values if value.numel()]
    norms = torch._foreach_norm(filled, float("inf"))  # keeps a NaN, and overflows for no finite value
    return bool(torch.isfinite(torch.stack([norm.float() for norm in norms])).all())


def _is_finite(value: torch.Tensor) -> bool:
    if not value.is_floating_point() or value.device.type == "meta":
        return True
    own = value.to_local() if isinstance(value, DTensor) else value
    return bool(torch.isfinite(own).all())
