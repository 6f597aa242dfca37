"""Checks that end a run before a value that is not finite is applied or saved, and name its step, layer and module."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from aletheia.anatomy.read import find_layers
from aletheia.errors import TrainingError
from aletheia.execution.later import Later
from aletheia.probing.preflight import broken_output, describe_place
from aletheia.training.processes import Launch
from aletheia.training.walks import learning


class Finite(TrainerCallback):
    """Checks the loss and the gradients before each optimizer step, and the adapters' weights after it.

    The check waits for one number per step. If that is not finite, a forward pass finds the place. In float16 the loss
    scaler skips steps whose gradients overflow, so gradients are not checked.

    Where the trainer must not wait (``looks_back``), the optimizer itself skips a step with a gradient that is not
    finite. The outcome is read one step later, or before anything is evaluated or saved.
    """

    def __init__(self, trainer: Trainer, looks_back: bool = False) -> None:
        """Add this to the callbacks before any that evaluate or save; ``looks_back`` needs torch's fused optimizer."""
        self._trainer, self._looks_back = trainer, looks_back
        self._unread: _Unread | None = None
        self._loss: torch.Tensor | None = None  # sum of the step so far; it keeps a NaN or an infinity
        self._batches: list[Mapping[str, Any]] = []  # batches of the step so far

    def after_backward(self, loss: torch.Tensor, batch: Mapping[str, Any]) -> Later | None:
        """Check a batch and, before the optimizer step, all gradients.

        Where the trainer must not wait, returns the loss of a complete step, on its way from the device.

        Raises:
            TrainingError: something is not finite. Nothing has been applied.
        """
        self._loss = loss.detach().float() if self._loss is None else self._loss + loss.detach().float()
        self._batches.append(batch)
        if not self._trainer.accelerator.sync_gradients:
            return None
        total, self._loss = self._loss, None
        batches, self._batches = self._batches, []
        gradients = [] if self._trainer.args.fp16 else [value.grad for value in learning(self._trainer)]
        are_finite = _all_finite([total, *_local(value for value in gradients if value is not None)])
        step = self._trainer.state.global_step + 1
        if self._looks_back:
            self._read()
            is_left_out = (~are_finite).float()
            self._optimizer.found_inf = is_left_out  # read by torch's fused optimizers, meant for the loss scaler
            self._unread = _Unread(step, Later(is_left_out), Later(total), batches)
            return self._unread.loss
        if not are_finite:
            self._explain(total.item(), step, batches)
        return None

    @property
    def _optimizer(self) -> Any:
        return getattr(self._trainer.optimizer, "optimizer", self._trainer.optimizer)  # accelerate's wraps it

    def _read(self) -> None:
        """Check the outcome of the previous step."""
        unread, self._unread = self._unread, None
        if unread is None or not unread.is_left_out.read():
            return
        loss = unread.loss.read()
        if math.isfinite(loss):  # its gradients are gone; no weight has changed since, so they can be recomputed
            self._model.zero_grad()
            for batch in unread.batches:
                self._model(**batch).loss.backward()
        self._explain(loss, unread.step, unread.batches)

    def _explain(self, loss: float, step: int, batches: Iterable[Mapping[str, Any]]) -> NoReturn:
        """Raise the error that says why a step was not applied."""
        if not math.isfinite(loss):
            self._fail(f"the loss is {loss}", step, batches)
        gradients = dict(_gradients(self._model))
        broken = [name for name, value in gradients.items() if not torch.isfinite(value).all()]
        # backward runs from the top down, so the last one is nearest to the source
        place = f" in {self._place(broken[-1])}" if broken else ""
        self._fail(f"the gradient{place} is not finite", step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Check the weights before anything is evaluated or saved.

        Raises:
            TrainingError: a weight is not finite.
        """
        if not self._looks_back or state.global_step == state.max_steps:
            self.settle()

    def settle(self) -> None:
        """Check everything that is still unchecked; call this before anything is evaluated or saved.

        Raises:
            TrainingError: something is not finite.
        """
        self._read()
        own = [value for value in learning(self._trainer) if value.requires_grad]
        if not _all_finite(_local(own)):
            self._fail("a weight is not finite", self._trainer.state.global_step)

    def held_out(self, loss: float, batches: Iterable[Mapping[str, Any]]) -> None:
        """Check a held-out loss that was measured on ``batches``.

        Raises:
            TrainingError: the loss is not finite.
        """
        if not math.isfinite(loss):
            self._fail(f"the held-out loss is {loss}", self._trainer.state.global_step, batches)

    @property
    def _model(self) -> nn.Module:
        model = self._trainer.model
        assert model is not None
        return model

    def _place(self, name: str) -> str:
        return describe_place(name, find_layers(self._model)[0])

    def _fail(self, what: str, step: int, batches: Iterable[Mapping[str, Any]] = ()) -> NoReturn:
        """Raise an error that names what is not finite, and its source: a weight, else a module's output."""
        model = self._model
        weight = next((name for name, value in model.named_parameters() if not _is_finite(value)), None)
        if weight is not None:
            what = f"{what}: the weight of {self._place(weight)} is not finite"
        elif Launch.here().processes == 1:  # other processes would wait for this one
            outputs = (broken_output(model, dict(batch)) for batch in batches)
            what += next((f": {output} is not finite" for output in outputs if output), "")
        dtype = str(getattr(model, "dtype", "")).removeprefix("torch.")
        remedy = "try a lower `learning_rate`" if step else "check the weights of the model and of the adapter"
        raise TrainingError(
            f"{what}, at step {step}, computed in {dtype}; this step was not saved; {remedy}, or set `dtype` float32"
        )


def _gradients(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            yield name, parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad


def _local(values: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [value.to_local() if isinstance(value, DTensor) else value for value in values]


@dataclass(frozen=True)
class _Unread:
    """A step whose outcome is still on the device."""

    step: int
    is_left_out: Later
    loss: Later
    batches: list[Mapping[str, Any]]


def _all_finite(values: list[torch.Tensor]) -> torch.Tensor:
    """Whether all values are finite, on their device."""
    filled = [value.detach() for value in values if value.numel()]
    norms = torch._foreach_norm(filled, float("inf"))  # keeps a NaN, and overflows for no finite value
    return torch.isfinite(torch.stack([norm.float() for norm in norms])).all()


def _is_finite(value: torch.Tensor) -> bool:
    if not value.is_floating_point() or value.device.type == "meta":
        return True
    own = value.to_local() if isinstance(value, DTensor) else value
    return bool(torch.isfinite(own).all())
