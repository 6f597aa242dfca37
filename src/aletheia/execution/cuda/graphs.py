"""Decoder layers as CUDA graphs: the kernels of a layer are recorded once, then launched together.

A step of a small batch is bound by launching kernels one by one. A replay launches all kernels of a layer's forward, or
of its backward, at the cost of one. A graph works on fixed memory, so it serves batches of one shape. All other calls
run as before.

Shapes: B rows and T tokens of the recorded batch, D model width.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from aletheia.adapters.acting import acting, adapted_in
from aletheia.anatomy.access import computed_in, lowest_that_learns
from aletheia.anatomy.read import find_layers
from aletheia.data.sources import one_line
from aletheia.errors import TrainingError
from aletheia.execution.cuda.recorded import (
    CudaRecorder,
    Recorded,
    Recorder,
    Replayed,
    Static,
    compare,
    fill,
    tensor_of,
)

Say = Callable[[str], None]
PLAIN = (bool, int, float, str, type(None), torch.dtype)  # types of arguments that are compared by value


@contextmanager
def graphed_layers(
    model: nn.Module,
    shape: tuple[int, int],
    say: Say = lambda line: None,
    recorder: Callable[[torch.device], Recorder] = CudaRecorder,
) -> Iterator[None]:
    """Replay decoder layers of ``model`` for batches of ``shape`` [B, T], within this context.

    Layers that learn are recorded with their backward, in training mode; frozen layers below them without it. The first
    batch of the shape runs as usual and shows how the layers are called. Before the second one, all are recorded, and a
    replay is compared with the layers' own results. Where that fails, and in every call that is not like the recorded
    one, layers run as usual.

    Hidden states that the caller keeps are overwritten by the next replay, once their graph is gone.

    Args:
        model: the adapted model. What is trainable must not change within this context.
        shape: rows and tokens of the batches that are replayed.
        say: called with a line when layers are recorded, or cannot be.
        recorder: makes the recorder for a device.
    """
    _, layers = find_layers(model)
    boundary = lowest_that_learns(layers)  # None: all are frozen
    failed: list[str] = []
    with ExitStack() as stack:
        above = () if boundary is None else layers[boundary:]
        for part, learns in ((layers[:boundary], False), (above, True)):
            chain = [_Layer(layer) for layer in part if any(True for _ in layer.parameters())]  # others were freed
            stack.enter_context(_Chain(chain, learns, shape, (say, recorder, failed)).entered())
        yield


class _Layer:
    """A decoder layer, its own forward, and what a replay depends on besides the arguments of the call."""

    def __init__(self, layer: nn.Module) -> None:
        self.module, self.forward = layer, layer.forward
        self.own = layer.__dict__.get("forward")
        self.trainable = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        self._tensors = [*layer.parameters(), *layer.buffers()]
        self._adapters = adapted_in(layer)
        self.has_hooks = any(
            part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
            for part in layer.modules()
            if part is not layer
        )

    def state(self) -> tuple[Any, ...]:
        """Where its tensors are, which adapters it uses, and how autocast is set."""
        device = self._tensors[0].device.type
        return (
            self.module.training,
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
            *map(torch.Tensor.data_ptr, self._tensors),  # of every call: as C functions, without a loop in Python
            *map(acting, self._adapters),
        )


@dataclass
class _Call:
    """The arguments of a layer's call; two calls with equal ``like`` differ only in the values of tensors."""

    leaves: list[Any]
    like: tuple[Any, ...]
    spec: TreeSpec | None = None  # how they are nested, of a call that is to be recorded

    @classmethod
    def of(cls, layer: _Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "_Call":
        leaves: list[Any] = []  # the hidden states are the first one, by position or by name
        return cls(leaves, (_like(args, leaves), _like(kwargs, leaves), layer.state()))


def _like(value: Any, leaves: list[Any]) -> Any:
    """What ``value`` shares with those it is like; appends its leaves, in the order of ``tree_flatten``."""
    if type(value) in (tuple, list):
        return type(value), [_like(part, leaves) for part in value]
    if type(value) is dict:
        return [(name, _like(part, leaves)) for name, part in value.items()]
    leaves.append(value)
    return _kind(value)


def _is_other(leaf: Any) -> bool:
    """Whether a replay cannot take this argument: it learns, or is an object whose state may change."""
    return leaf.requires_grad if isinstance(leaf, torch.Tensor) else not isinstance(leaf, PLAIN)


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad
    return leaf if isinstance(leaf, PLAIN) else object()  # never equal to another


class _Chain:
    """Consecutive layers, each of which gets the output of the one before."""

    def __init__(
        self,
        layers: Sequence[_Layer],
        learns: bool,
        shape: tuple[int, int],
        shared: tuple[Say, Callable[[torch.device], Recorder], list[str]],
    ) -> None:
        self._layers, self._learns, self._shape = layers, learns, shape
        self._say, self._recorder, self._failed = shared  # what failed to be recorded, of any chain
        self._seen: list[_Call] = []
        self._passed: torch.Tensor | None = None  # the last output that was seen
        self._recorded: list[Recorded] = []
        self._is_off = False
        self._is_free = True  # no earlier forward waits for its backward, as far as the first layer saw

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Put replays in the place of the layers' forwards."""
        for index, layer in enumerate(self._layers):
            layer.module.forward = partial(self._call, index)
        try:
            yield
        finally:
            for layer in self._layers:
                if layer.own is None:
                    del layer.module.forward
                else:
                    layer.module.forward = layer.own
            self._recorded.clear()

    def _call(self, index: int, /, *args: Any, **kwargs: Any) -> Any:
        """The result of layer ``index``: replayed, if the call is like the recorded one."""
        layer = self._layers[index]
        hidden = args[0] if args else kwargs.get("hidden_states")
        if self._is_off or self._failed or not self._is_step(layer.module, hidden):
            return layer.forward(*args, **kwargs)
        call = _Call.of(layer, args, kwargs)
        if index == 0 and len(self._seen) == len(self._layers) and self._seen[0].like == call.like:
            self._try_to_record(call)
        if not self._recorded:
            return self._watched(index, call, args, kwargs)
        if index == 0:
            self._is_free = all(recorded.waiting() is None for recorded in self._recorded)
        recorded = self._recorded[index]
        if recorded.like != call.like or not self._is_free:
            return layer.forward(*args, **kwargs)
        for place, static in recorded.others:
            static.fill(call.leaves[place])
        if self._learns:
            return recorded.rebuild(Replayed.apply(recorded, call.leaves[0], *recorded.parameters))
        fill(recorded.hidden, call.leaves[0])
        recorded.forward()
        return recorded.rebuild(recorded.output.clone() if index == len(self._layers) - 1 else recorded.output)

    def _is_step(self, layer: nn.Module, hidden: Any) -> bool:
        """Whether a call belongs to a training step of the shape."""
        if not (isinstance(hidden, torch.Tensor) and tuple(hidden.shape[:2]) == self._shape and layer.training):
            return False
        if not self._learns:
            return not hidden.requires_grad
        return torch.is_grad_enabled() and not getattr(layer, "gradient_checkpointing", False)

    def _watched(self, index: int, call: _Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer's own result; notes how it was called, for recording."""
        result = self._layers[index].forward(*args, **kwargs)
        if not (self._is_off or self._failed):
            try:
                call.spec = tree_flatten((args, kwargs))[1]
                self._note(index, call, tensor_of(result)[0])
            except TrainingError as error:
                self._give_up(str(error))
        return result

    def _note(self, index: int, call: _Call, output_BTD: torch.Tensor) -> None:
        if index == 0:
            self._seen = []
        hidden = call.leaves[0]
        follows = index == 0 or (self._passed is not None and hidden.data_ptr() == self._passed.data_ptr())
        if index != len(self._seen) or not follows:
            raise TrainingError("layers do not follow each other directly")
        if any(_is_other(leaf) for leaf in call.leaves[1:]):
            raise TrainingError("layers get more than hidden states and constants")
        if self._layers[index].has_hooks:
            raise TrainingError("there are hooks inside the layers")
        self._passed, call.leaves[0] = output_BTD, None
        self._seen.append(call)

    def _give_up(self, reason: str) -> None:
        self._is_off, self._passed, self._seen = True, None, []
        self._say(f"graphs off for {self._name}: {reason}")

    @property
    def _name(self) -> str:
        return f"{len(self._layers)} layers that learn" if self._learns else f"{len(self._layers)} frozen layers"

    # --- recording

    def _try_to_record(self, call: _Call) -> None:
        started = time.perf_counter()
        seen, self._seen, self._passed = self._seen, [], None
        try:
            with nullcontext() if self._learns else torch.no_grad(), _uncached_autocast(call.leaves[0].device):
                self._recorded = self._record(seen, call.leaves[0])
        except Exception as error:  # kernels of any library may not allow it
            self._failed.append(one_line(error))
            self._give_up(self._failed[-1])
        else:
            seconds = time.perf_counter() - started
            self._say(f"graphs {self._name} recorded for {math.prod(self._shape):,} tokens in {seconds:.1f} s")

    def _record(self, seen: list[_Call], sample_BTD: torch.Tensor) -> list[Recorded]:
        """Record all layers, and compare a replay with their own results on ``sample_BTD``, the first one's input."""
        recorder = self._recorder(sample_BTD.device)
        first = sample_BTD.detach().clone().requires_grad_(sample_BTD.requires_grad)
        statics = {id(leaf): Static(leaf) for call in seen for leaf in call.leaves if isinstance(leaf, torch.Tensor)}
        # none where the input is zero, as a filler's stored states are: norms would multiply it by a thousand a layer
        above_BTD = torch.randn_like(first) * first.detach().any(-1, keepdim=True)

        def run(index: int, hidden_BTD: torch.Tensor) -> Any:
            others = [statics[id(leaf)].tensor if id(leaf) in statics else leaf for leaf in seen[index].leaves[1:]]
            spec = seen[index].spec
            assert spec is not None
            args, kwargs = tree_unflatten([hidden_BTD, *others], spec)
            return self._layers[index].forward(*args, **kwargs)

        def plain() -> list[torch.Tensor | None]:
            hidden_BTD = first
            for index in range(len(seen)):
                hidden_BTD, _ = tensor_of(run(index, hidden_BTD))
            return [hidden_BTD.detach(), *self._grads(self._layers, first, hidden_BTD, above_BTD)]

        expected = recorder.warm_up(plain)
        found: list[Recorded] = []
        outputs: list[torch.Tensor] = []
        for index, (call, layer) in enumerate(zip(seen, self._layers, strict=True)):
            hidden_BTD = outputs[-1].detach().requires_grad_(self._learns) if outputs else first
            result, replay = recorder.record(partial(run, index, hidden_BTD))
            output_BTD, rebuild = tensor_of(result)
            outputs.append(output_BTD)
            others = [(place, statics[id(leaf)]) for place, leaf in enumerate(call.leaves) if id(leaf) in statics]
            found.append(Recorded(call.like, hidden_BTD, others, output_BTD.detach(), rebuild, layer.trainable, replay))
        above: torch.Tensor | None = above_BTD
        for index in reversed(range(len(seen)) if self._learns else ()):
            of_layer = found[index]
            grads = partial(self._grads, self._layers[index : index + 1], of_layer.hidden, outputs.pop(), above)
            of_layer.grads, of_layer.backward = recorder.record(grads)
            of_layer.grad_output, above = above, of_layer.grads[0]
        compare(found, expected, computed_in(found[-1].output))
        return found

    def _grads(
        self,
        layers: Sequence[_Layer],
        hidden_BTD: torch.Tensor,
        output_BTD: torch.Tensor,
        above_BTD: torch.Tensor | None,
    ) -> list[torch.Tensor | None]:
        """The gradients of an input and of the parameters of consecutive layers, from the one of their output."""
        if not self._learns:
            return []
        learning = [parameter for layer in layers for parameter in layer.trainable]
        wanted = [*([hidden_BTD] if hidden_BTD.requires_grad else []), *learning]
        grads = torch.autograd.grad(output_BTD, wanted, above_BTD, allow_unused=True)
        return list(grads) if hidden_BTD.requires_grad else [None, *grads]


def _uncached_autocast(device: torch.device) -> torch.autocast:
    """Autocast as it is set, without its cache: a replay must convert the weights of its own step."""
    dtype = torch.get_autocast_dtype(device.type)
    return torch.autocast(device.type, dtype, torch.is_autocast_enabled(device.type), cache_enabled=False)
