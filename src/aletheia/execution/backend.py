"""Which way a step is computed on the device at hand."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from aletheia.execution.cpu.attention import lean_attention
from aletheia.execution.cpu.norms import lean_norms
from aletheia.execution.lean import lean_adapters


@contextmanager
def lean_layers(model: nn.Module) -> Iterator[None]:
    """Adapters, attention and norms in their cheaper forms, in steps as in the prefix that is computed for them."""
    with lean_adapters(model), lean_attention(model), lean_norms(model):
        yield
