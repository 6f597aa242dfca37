"""All the ways to compute a step at less cost with the same results up to rounding, in one context."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from peft import PeftModel

from aletheia.execution.backend import entered, step_ways
from aletheia.execution.recompute import Recompute
from aletheia.prefix.boundary import frozen_prefix
from aletheia.prefix.stored import stored_prefix


@contextmanager
def fast_steps(
    model: PeftModel,
    stored_from: int | None = None,
    free: bool = False,
    recompute: Recompute = "off",
    packed: bool = False,
    liger: bool = True,
) -> Iterator[None]:
    """Compute steps at less cost, with the same loss and gradients; for your own training loop, too.

    In float32, results are equal up to the order of sums. With a bfloat16 base, float32 adapters are multiplied in
    bfloat16, as under autocast. On a CPU, attention rounds its scores to bfloat16, as ``eager`` attention does.

    The ``logits`` of the output are those of labelled positions only. A loss that needs a gradient overwrites them with
    their gradient, and can be differentiated once.

    Args:
        model: the adapted model.
        stored_from: the boundary, if every batch will bring its stored prefix; otherwise None.
        free: see :func:`aletheia.prefix.stored.stored_prefix`.
        recompute: what is computed again in backward, see :func:`aletheia.execution.recompute.recomputation`.
        packed: whether batches may come from :func:`aletheia.data.batches.collate_packed`.
        liger: whether to use Liger's kernels on a GPU where they are installed.

    Raises:
        AdapterError: no layer is trainable, or something below the boundary is.
        TrainingError: ``recompute`` is not possible for the model.
    """
    with ExitStack() as stack:
        if stored_from is not None:  # first, so that nothing else refers to the layers that it frees
            stack.enter_context(stored_prefix(model, stored_from, free))
        stack.enter_context(frozen_prefix(model))
        stack.enter_context(entered(model, step_ways(model, recompute=recompute, packed=packed, liger=liger)))
        yield
