"""The cost model: what one training step takes, in operations (analytic) or in seconds (calibrated).

For boundary ``k = min S`` a step costs ``sum_l F_l + sum_{l >= k} B_l + sum_{l in S} A_l + head``: all layers run
forward, backward crosses only the suffix, and only adapted layers pay for their adapters. From a filled prefix cache,
layers below ``k`` do not run forward either.
"""

from collections.abc import Collection
from dataclasses import dataclass

from aletheia.anatomy.schema import Anatomy
from aletheia.probing.timings import Timings


@dataclass(frozen=True)
class LayerCosts:
    """Cost of the parts of a step, all in one unit: FLOPs per token, or seconds per batch.

    ``forward[l]``, ``backward[l]`` (activations only) and ``adapter[l]`` are per layer. ``head`` is the LM head and
    loss at labelled tokens; a measured one includes all else that does not depend on the plan. ``baseline`` is a step
    of uniform LoRA in plain PEFT and Trainer: logits everywhere; a measured one has random batches and PEFT's adapters.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    adapter: tuple[float, ...]
    head: float
    baseline: float

    def step(self, layers: Collection[int]) -> float:
        """Cost of one step that adapts ``layers``, which must not be empty, without a cache."""
        return sum(self.forward[: min(layers)]) + self.cached_step(layers)

    def cached_step(self, layers: Collection[int]) -> float:
        """Cost of one step from a filled prefix cache."""
        boundary = min(layers)
        crossed = sum(self.forward[boundary:]) + sum(self.backward[boundary:])
        return crossed + sum(self.adapter[layer] for layer in layers) + self.head

    def mean_step(self, layers: Collection[int], epochs: float = 1.0) -> float:
        """Mean cost of a step over a run of ``epochs`` passes: the prefix runs once per row, then is cached."""
        return self.cached_step(layers) + sum(self.forward[: min(layers)]) / max(epochs, 1.0)


def run_time(
    costs: LayerCosts, every: Collection[int], layers: Collection[int], early_share: float, epochs: float
) -> float:
    """Mean cost of a step of a run, relative to a step of the baseline.

    In the first ``early_share`` of ``epochs`` passes, all layers of ``every`` learn. After that only ``layers`` learn,
    and the layers below them run once per row.
    """
    early = early_share * costs.step(every)
    return (early + (1 - early_share) * costs.mean_step(layers, epochs * (1 - early_share))) / costs.baseline


def layer_costs(
    anatomy: Anatomy, ranks: dict[str, int], baseline_rank: int, sequence_length: float, labelled_share: float = 1.0
) -> LayerCosts:
    """FLOPs per token of each part, for sequences of ``sequence_length`` tokens.

    ``ranks`` holds the rank that an adapter would have, by full module name, for each module that may be adapted.
    ``baseline_rank`` is that of uniform LoRA, which leaves routers alone.

    A matrix product costs 2 FLOPs per weight and token; its activation-backward costs the same again. The two attention
    products cost ``4 x T x width`` forward and twice that backward. LoRA adds three products of ``2 r (in + out)``:
    forward, backward to the input, and the gradients of A and B. Only the experts that a token passes through count.
    Norms, activations, the optimizer and memory traffic do not.
    """
    attention = 4.0 * sequence_length * anatomy.attention_width
    forward, backward, adapter = [], [], []
    uniform = 0.0
    for layer in range(anatomy.layer_count):
        modules = anatomy.in_layer(layer)
        weights = float(sum(module.flops_per_token for module in modules))
        forward.append(weights + attention)
        backward.append(weights + 2 * attention)
        adapted = [module for module in modules if module.name in ranks]
        adapter.append(float(sum(3 * module.lora_flops_per_token(ranks[module.name]) for module in adapted)))
        plain = [module for module in modules if module.is_target]
        uniform += sum(3 * module.lora_flops_per_token(baseline_rank) for module in plain)
    head = 2.0 * anatomy.head_flops_per_token
    baseline = sum(forward) + sum(backward) + uniform + head
    return LayerCosts(tuple(forward), tuple(backward), tuple(adapter), head * labelled_share, baseline)


def measured_costs(anatomy: Anatomy, ranks: dict[str, int], baseline_rank: int, timings: Timings) -> LayerCosts:
    """Seconds of each part of a step, from a calibration; arguments as in :func:`layer_costs`."""
    adapter, baseline = [], timings.baseline
    for layer, timing in enumerate(timings.layers):
        modules = anatomy.in_layer(layer)
        adapted = [module for module in modules if module.name in ranks]
        timed = [module for module in modules if module.is_target]
        parameters = sum(module.lora_parameters(ranks[module.name]) for module in adapted)
        # the part of an adapter's cost that does not depend on rank was measured on all modules at once
        share = min(1.0, sum(m.lora_parameters(1) for m in adapted) / max(1, sum(m.lora_parameters(1) for m in timed)))
        adapter.append(timing.adapter_fixed * share + timing.adapter_per_parameter * parameters)
        more = sum(m.lora_parameters(baseline_rank) - m.lora_parameters(timings.baseline_rank) for m in timed)
        baseline += timing.adapter_per_parameter * more * timings.random_padding
    return LayerCosts(
        forward=tuple(timing.forward for timing in timings.layers),
        backward=tuple(timing.backward for timing in timings.layers),
        adapter=tuple(adapter),
        head=timings.head,
        baseline=baseline,
    )
