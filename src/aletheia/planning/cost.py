"""The analytic cost model: floating-point operations of one training step, per token and decoder layer.

For boundary ``k = min S`` a step costs ``sum_l F_l + sum_{l >= k} B_l + sum_{l in S} A_l + head``: every layer runs
forward, only the suffix is crossed by backward, only adapted layers pay for their adapters. Only matrix products
are counted; norms, activations, the optimizer and memory traffic are not.
"""

from collections.abc import Collection
from dataclasses import dataclass

from aletheia.anatomy.schema import Anatomy


@dataclass(frozen=True)
class LayerCosts:
    """FLOPs per token: ``forward[l]``, ``backward[l]`` (activations only), ``adapter[l]``, and ``head``."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    adapter: tuple[float, ...]
    head: float

    def step(self, layers: Collection[int]) -> float:
        """Cost of one step that adapts ``layers``, which must not be empty."""
        boundary = min(layers)
        return (
            sum(self.forward) + sum(self.backward[boundary:]) + sum(self.adapter[layer] for layer in layers) + self.head
        )

    @property
    def uniform(self) -> float:
        """Cost of one step that adapts every layer."""
        return self.step(range(len(self.forward)))


def layer_costs(anatomy: Anatomy, ranks: dict[str, int], sequence_length: float) -> LayerCosts:
    """Costs of each layer for sequences of ``sequence_length`` tokens.

    ``ranks`` holds the rank an adapter on a module would have, by full module name. A matrix product costs
    2 FLOPs per weight and token; its activation-backward the same again. The two attention products cost
    ``4 x T x width`` forward and twice that backward. LoRA adds three products of ``2 r (in + out)``: forward,
    backward to the input, and the gradients of A and B.
    """
    attention = 4.0 * sequence_length * anatomy.attention_width
    forward, backward, adapter = [], [], []
    for layer in range(anatomy.layer_count):
        modules = anatomy.in_layer(layer)
        weights = float(sum(module.flops_per_token for module in modules))
        forward.append(weights + attention)
        backward.append(weights + 2 * attention)
        adapter.append(float(sum(6 * module.lora_parameters(ranks[module.name]) for module in modules)))
    return LayerCosts(tuple(forward), tuple(backward), tuple(adapter), 2.0 * anatomy.head_flops_per_token)
