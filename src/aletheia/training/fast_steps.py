"""All that makes a step cheaper and changes no result beyond rounding, in one context."""

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
    """Everything that makes a step cheaper and leaves loss and gradients alone, for a training loop of one's own, too.

    Equal up to the order of sums in float32; float32 adapters beside a bfloat16 base are multiplied in bfloat16, as
    under autocast, and a processor rounds attention's scores to bfloat16, as ``eager`` attention does. The output's
    ``logits`` are those of labelled positions only, and hold their gradient after a loss that needs one, which can be
    differentiated once.

    Args:
        model: the adapted model.
        stored_from: the boundary, if every batch will bring its stored prefix.
        free: see :func:`aletheia.prefix.stored.stored_prefix`.
        recompute: what of a step is computed again in backward, see
            :func:`aletheia.execution.recompute.recomputation`.
        packed: whether batches may hold rows one after another, as :func:`aletheia.data.batches.collate_packed` makes
            them.
        liger: whether Liger's kernels may be taken, on a GPU, where they are installed.
    """
    with ExitStack() as stack:
        if stored_from is not None:  # first, so that nothing else holds the layers that it frees
            stack.enter_context(stored_prefix(model, stored_from, free))
        stack.enter_context(frozen_prefix(model))
        stack.enter_context(entered(model, step_ways(model, recompute=recompute, packed=packed, liger=liger)))
        yield
