"""The choice of how a step is computed on a device, by name. Nothing else makes this choice."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Literal

import torch
from torch import nn

from aletheia.execution.cpu.attention import fast_attention
from aletheia.execution.cpu.norms import fast_norms
from aletheia.execution.cuda.graphs import graphed_layers
from aletheia.execution.cuda.liger import has_liger, liger_gates
from aletheia.execution.cuda.loss import kernel_loss
from aletheia.execution.cuda.norms import liger_norms, torch_norms
from aletheia.execution.cuda.rotary import liger_rotary
from aletheia.execution.cuda.trial import has_triton
from aletheia.execution.fast import adapters_in_bfloat16, fast_adapters
from aletheia.execution.loss import fast_loss
from aletheia.execution.packed import attention_by_row, has_kernel
from aletheia.execution.recompute import Recompute, recomputation
from aletheia.probing.logits import labelled_logits, labelled_states

# what a loop reads of the outputs: the loss alone, sums over positions by a fused head, or the logits of all positions
Reads = Literal["loss", "sums", "logits"]
Way = Callable[[nn.Module], AbstractContextManager[object]]


def layer_ways(model: nn.Module, compiled: bool = False, liger: bool = True) -> dict[str, Way]:
    """The ways, by name, to compute layers at less cost with the same results up to rounding.

    They apply both to training steps and to the computation of a stored prefix.

    Args:
        model: the model, adapted or not.
        compiled: whether layers that learn will be compiled, which fuses what Liger's kernels fuse.
        liger: whether to use Liger's kernels on a GPU where they are installed.
    """
    parameter = next(model.parameters())
    ways: dict[str, Way] = {"low-rank products in place": fast_adapters}
    if parameter.device.type == "cpu" and parameter.dtype == torch.bfloat16:
        ways["attention by matrix products"] = fast_attention
    if parameter.device.type == "cpu":
        ways["norms in fewer passes"] = fast_norms
    if not _is_cuda(parameter) or compiled:
        return ways
    if liger and has_liger():
        return ways | {
            "norms by Liger": liger_norms,
            "gates by Liger": liger_gates,
            "rotary positions by Liger": liger_rotary,
        }
    return ways | {"norms by torch's kernel": torch_norms}


def _is_cuda(parameter: torch.Tensor) -> bool:
    return parameter.device.type == "cuda"


def step_ways(
    model: nn.Module,
    reads: Reads = "loss",
    recompute: Recompute = "off",
    packed: bool = False,
    compiled: bool = False,
    liger: bool = True,
    graphed: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Way]:
    """The ways, by name, to compute a whole training step at less cost.

    Args:
        model: the adapted model.
        reads: what the training loop reads of the outputs.
        recompute: what is computed again in backward.
        packed: whether batches hold rows one after another, without padding.
        compiled: whether layers that learn will be compiled.
        liger: whether to use Liger's kernels on a GPU where they are installed.
        graphed: the tokens of packed batches whose layers are replayed as CUDA graphs; None: no layers are.
        say: called with a line when layers are recorded, or cannot be.
    """
    ways: dict[str, Way] = {"adapters in the dtype of the base": adapters_in_bfloat16}
    if reads == "loss":
        ways["logits at labelled positions"] = labelled_logits
    elif reads == "sums" and next(model.parameters()).device.type == "cpu":  # on other devices the loop does this
        ways["hidden states at labelled positions"] = labelled_states
    ways |= layer_ways(model, compiled, liger)
    if reads == "loss":
        if _is_cuda(next(model.parameters())) and has_triton():
            ways["loss by two kernels"] = kernel_loss
        else:
            ways["loss in the buffer of its logits"] = fast_loss
    if packed:
        ways["rows packed without padding"] = attention_by_row
    if recompute != "off":
        ways[f"{recompute} recomputation"] = partial(recomputation, kind=recompute)
    if compiled:
        ways["compiled layers"] = _compiled_layers
    if graphed is not None:
        ways["layers as CUDA graphs"] = partial(graphed_layers, shape=(1, graphed), say=say)
    return ways


def is_behind(device: torch.device) -> bool:
    """Whether ``device`` runs asynchronously, so that a step should not read its own results."""
    return device.type == "cuda"


def compile_seconds() -> float:
    """Seconds that this process has spent compiling layers so far."""
    loaded = sys.modules.get("aletheia.execution.compiled")
    return loaded.compile_seconds() if loaded else 0.0


def _compiled_layers(model: nn.Module) -> AbstractContextManager[object]:
    from aletheia.execution.compiled import compiled_layers  # the compiler takes a second to load

    return compiled_layers(model)


def packing_pays(model: nn.Module) -> bool:
    """Whether rows are packed by default: they are where one attention kernel handles all of them."""
    return has_kernel(model)


@contextmanager
def entered(model: nn.Module, ways: dict[str, Way]) -> Iterator[None]:
    """Compute ``model`` in these ways, within this context."""
    with ExitStack() as stack:
        for way in ways.values():
            stack.enter_context(way(model))
        yield


@contextmanager
def fast_layers(model: nn.Module, liger: bool = True) -> Iterator[None]:
    """Compute adapters, attention and norms of ``model`` in the ways of :func:`layer_ways`, within this context."""
    with entered(model, layer_ways(model, liger=liger)):
        yield
