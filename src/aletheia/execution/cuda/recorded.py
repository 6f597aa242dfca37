"""What one decoder layer needs to be replayed: its graphs, and the memory on which they work.

Shapes: B rows and T tokens of the recorded batch, D model width.
"""

import gc
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from aletheia.errors import TrainingError

Replay = Callable[[], None]
Rebuild = Callable[[torch.Tensor], Any]
# relative tolerances; attention's backward adds up in another order each time, which every layer below amplifies
SAME = {torch.float32: 1e-4, torch.float64: 1e-8, torch.float16: 0.05, torch.bfloat16: 0.1}
_ABANDONED: list[torch.cuda.CUDAGraph] = []  # torch may still refer to them


class Recorder(Protocol):
    """Records the work of functions on fixed memory."""

    def warm_up(self, run: Callable[[], Any]) -> Any:
        """Call ``run`` without recording, so that nothing is compiled or allocated for the first time later."""

    def record(self, run: Callable[[], Any]) -> tuple[Any, Replay]:
        """What ``run`` returns, and a function that does the same work again on the same memory."""


class CudaRecorder:
    """Records what functions launch, in one memory pool for all graphs.

    Memory that one graph has left is used by later ones. So they must be replayed in the order of their recording.
    """

    def __init__(self, device: torch.device) -> None:
        """Prepare for graphs on ``device``."""
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], Any]) -> Any:
        """Call ``run`` on the stream of the recordings, then give all unused memory back for them."""
        returned = self._on_stream(run)
        torch.cuda.synchronize(self._device)
        gc.collect()
        torch.cuda.empty_cache()
        return returned

    def record(self, run: Callable[[], Any]) -> tuple[Any, Replay]:
        """What ``run`` returns, still without values, and a function that launches its kernels."""
        graph = torch.cuda.CUDAGraph()

        def recorded() -> Any:
            try:
                # other threads may copy batches meanwhile
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                returned = run()
                graph.capture_end()
            except BaseException:
                self._abandon(graph)
                raise
            return returned

        return self._on_stream(recorded), graph.replay

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a recording that failed.

        Where that fails, too, torch tells neither its allocator nor its random generator that the recording is over.
        The memory would never be given back, and every later draw of random numbers would fail.
        """
        with suppress(RuntimeError):
            graph.capture_end()
            return  # its memory goes with it
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        for end in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
            with suppress(RuntimeError):
                end(index, self._pool)
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())  # a state that is not being recorded
        _ABANDONED.append(graph)

    def _on_stream(self, run: Callable[[], Any]) -> Any:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            returned = run()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return returned


class Static:
    """A tensor that graphs read, and the last one that was copied into it."""

    def __init__(self, sample: torch.Tensor) -> None:
        """Take memory like that of ``sample``, with its values."""
        self.tensor = sample.clone()
        self._last: Callable[[], object] = lambda: None
        self._version = 0

    def fill(self, given: torch.Tensor) -> None:
        """Copy ``given``, unless that is done: all layers of a forward get the same positions."""
        if self._last() is not given or self._version != given._version:
            self.tensor.copy_(given)
            self._last, self._version = weakref.ref(given), given._version


@dataclass
class Recorded:
    """A layer's graphs and the memory they work on."""

    like: tuple[Any, ...]
    hidden: torch.Tensor
    others: list[tuple[int, Static]]  # other tensors of a call, by their place among its leaves
    output: torch.Tensor
    rebuild: Rebuild
    parameters: list[nn.Parameter]
    forward: Replay
    backward: Replay = lambda: None
    grad_output: torch.Tensor | None = None
    grads: list[torch.Tensor | None] = field(default_factory=list)  # of the hidden states, then of each parameter
    waiting: Callable[[], object] = lambda: None  # alive while a forward waits for its backward


class _Waiting:
    """Lives as long as the autograd graph of a forward."""


class Replayed(torch.autograd.Function):
    """A layer's forward and backward by replay."""

    @staticmethod
    def forward(ctx: Any, recorded: Recorded, hidden_BTD: torch.Tensor, *_: nn.Parameter) -> torch.Tensor:
        """Replay the forward; the parameters are given so that they get gradients."""
        fill(recorded.hidden, hidden_BTD)
        recorded.forward()
        ctx.recorded, ctx.waiting = recorded, _Waiting()
        recorded.waiting = weakref.ref(ctx.waiting)
        return recorded.output.detach()

    @staticmethod
    def backward(ctx: Any, grad_BTD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Replay the backward.

        Raises:
            TrainingError: for the second time after one forward.
        """
        recorded: Recorded = ctx.recorded
        if ctx.waiting is None:
            raise TrainingError(
                "a loss of recorded layers was differentiated twice, but their memory serves one backward pass; "
                "expected one; set `cuda_graphs` off"
            )
        ctx.waiting = None
        for parameter, grad in zip(recorded.parameters, recorded.grads[1:], strict=True):
            if grad is not None and parameter.grad is not None and parameter.grad.data_ptr() == grad.data_ptr():
                parameter.grad = parameter.grad.clone()  # the sum so far lies in the memory that is written now
        assert recorded.grad_output is not None
        fill(recorded.grad_output, grad_BTD)
        recorded.backward()
        return None, *(None if grad is None else grad.detach() for grad in recorded.grads)


def fill(static: torch.Tensor, given: torch.Tensor) -> None:
    """Copy ``given`` into ``static``, unless it is the same memory, as between consecutive layers."""
    if given.data_ptr() != static.data_ptr():
        static.copy_(given)


def tensor_of(result: Any) -> tuple[torch.Tensor, Rebuild]:
    """The hidden states in a layer's result, and a function that makes such a result of others."""
    if isinstance(result, torch.Tensor):
        return result, lambda tensor: tensor
    if isinstance(result, tuple) and isinstance(result[0], torch.Tensor) and all(value is None for value in result[1:]):
        rest = result[1:]
        return result[0], lambda tensor: (tensor, *rest)
    raise TrainingError("layers return more than hidden states")


def compare(recorded: list[Recorded], expected: list[torch.Tensor | None], dtype: torch.dtype) -> None:
    """Replay every layer once, and compare the last output, and the gradients of the first input and of all parameters.

    ``dtype`` is the one that layers compute in; gradients of adapters in float32 are rounded to it, too.

    Raises:
        TrainingError: they differ by more than rounding.
    """
    for layer in recorded:
        layer.forward()
    for layer in reversed(recorded):
        layer.backward()
    grads = [*recorded[0].grads[:1], *(grad for layer in recorded for grad in layer.grads[1:])]
    for found, wanted in zip([recorded[-1].output, *grads], expected, strict=True):
        if (found is None) != (wanted is None):
            raise TrainingError("a replay gives other gradients than the layers")
        if found is not None and wanted is not None:
            difference, size = (found - wanted).float().norm(), wanted.float().norm()
            if not bool(difference <= SAME[dtype] * size):
                raise TrainingError("a replay differs from the layers' own results")
