"""The memory model: the peak memory of training some layers, on the device of the model."""

from collections.abc import Collection, Mapping

from aletheia.anatomy.schema import Anatomy
from aletheia.errors import PlanError
from aletheia.planning.activations import ITEM_BYTES, Step, step_bytes
from aletheia.probing.scores import Scores, WeightBytes

PROCESS_BYTES = 1_200_000_000  # in main memory: Python, torch, transformers, PEFT, tokenizer, rows, what malloc keeps
GPU_BYTES = 700_000_000  # on a GPU: its context, the libraries' workspaces, fragmentation
ADAPTER_BYTES = 20  # per parameter: value, gradient, both moments of AdamW and the average, in float32
RESIDENT_SHARE = 0.5  # largest share of the memory that weights may take and still be loaded as a whole
QUANTIZED_SHARE = 1.125  # 4-bit weights with their scales: a float32 for every 64 weights, not counted as a parameter
ROW_TOKENS = 1024  # tokens of the longest row, where it is not known


def known_weights(scores: Scores) -> WeightBytes:
    """The weight sizes that a probe recorded.

    Raises:
        PlanError: the scores hold none: an earlier release wrote them.
    """
    if scores.weight_bytes is None:
        raise PlanError(
            "the scores hold no weight sizes: an earlier release wrote them; expected scores of this release; "
            "run 'aletheia probe' again"
        )
    return scores.weight_bytes


def total_bytes(weights: WeightBytes) -> int:
    """Bytes of all weights as loaded."""
    return sum(weights.layers) + weights.outside + weights.embedding


def is_resident(weights: WeightBytes, memory_bytes: float) -> bool:
    """Whether a model is loaded into ``memory_bytes`` as a whole; otherwise its prefix is streamed."""
    return total_bytes(weights) <= RESIDENT_SHARE * memory_bytes


def step_of(scores: Scores, tokens: int, labelled_share: float = 1.0) -> Step:
    """A step with batches of ``tokens``, in the dtype and on the kind of device that the probe ran on."""
    probe = scores.probe
    return Step(tokens, min(tokens, ROW_TOKENS), labelled_share, probe.dtype, on_gpu=probe.device.startswith("cuda"))


def training_bytes(
    anatomy: Anatomy,
    weights: WeightBytes,
    layers: Collection[int],
    ranks: Mapping[str, int],
    step: Step,
) -> int:
    """Upper estimate of the peak bytes while ``layers`` learn, on the GPU or in the process.

    ``own + weights + folded + unpacked + 20 P_adapters + step``:

    - ``own``: the process itself, or the GPU's context.
    - ``weights``: the weights that are in memory.
    - ``folded``: a second copy of every adapted stack of experts, into which PEFT folds the adapter and which backward
      needs, and the gradient of the largest. With recomputation, the copies of one layer at a time.
    - ``unpacked``: one dequantized matrix, where weights are quantized.
    - ``20 P_adapters``: adapters with gradients, AdamW and average.
    - ``step``: :func:`aletheia.planning.activations.step_bytes`, for training or the evaluation of held-out rows.

    Args:
        anatomy: anatomy of the whole model.
        weights: bytes of its parts as loaded.
        layers: the adapted layers.
        ranks: rank by full module name.
        step: the largest step and held-out batch, and how they are computed. Weights below the lowest of ``layers``
            count unless ``step`` says that they are not resident.
    """
    boundary = min(layers)
    adapted = [
        module
        for module in anatomy.modules
        if module.layer >= boundary and module.layer in layers and module.name in ranks
    ]
    parameters = sum(module.lora_parameters(ranks[module.name]) for module in adapted)
    own = GPU_BYTES if step.on_gpu else PROCESS_BYTES
    inside = _layer_bytes(anatomy, weights)
    is_whole = step.resident is not False
    held = sum(inside if is_whole else inside[boundary:]) + weights.outside
    held += 0 if boundary and not is_whole else weights.embedding
    ranks = {module.name: ranks[module.name] for module in adapted}
    extra = _folded_bytes(anatomy, weights, ranks, step) + _unpacked_bytes(anatomy, weights, step)
    return int(own + held + extra + ADAPTER_BYTES * parameters + step_bytes(anatomy, layers, ranks, step))


def lowest_boundary(
    anatomy: Anatomy,
    weights: WeightBytes,
    ranks: Mapping[str, int],
    step: Step,
    max_memory: int,
) -> int | None:
    """The lowest boundary with which training all layers from there up fits in ``max_memory``; None if none does."""
    for boundary in range(anatomy.layer_count):
        layers = range(boundary, anatomy.layer_count)
        if training_bytes(anatomy, weights, layers, ranks, step) <= max_memory:
            return boundary
    return None


def _per_parameter(anatomy: Anatomy, weights: WeightBytes) -> list[float]:
    """Bytes of a parameter, by layer."""
    return [size / max(1, count) for size, count in zip(weights.layers, anatomy.layer_parameters, strict=True)]


def _layer_bytes(anatomy: Anatomy, weights: WeightBytes) -> list[float]:
    """Bytes of each layer, the scales of 4-bit weights included."""
    each = zip(weights.layers, _per_parameter(anatomy, weights), strict=True)
    return [size * (QUANTIZED_SHARE if per_parameter < 1 else 1.0) for size, per_parameter in each]


def _folded_bytes(anatomy: Anatomy, weights: WeightBytes, ranks: Mapping[str, int], step: Step) -> float:
    """Bytes of the copies of adapted stacks of experts, and of the gradient of the largest."""
    per_parameter = _per_parameter(anatomy, weights)
    by_layer: dict[int, list[float]] = {}
    for module in anatomy.modules:
        if module.fused and module.name in ranks:
            by_layer.setdefault(module.layer, []).append(module.parameters * per_parameter[module.layer])
    if not by_layer:
        return 0.0
    sums = [sum(stacks) for stacks in by_layer.values()]
    return (sum(sums) if step.recompute == "off" else max(sums)) + max(map(max, by_layer.values()))


def _unpacked_bytes(anatomy: Anatomy, weights: WeightBytes, step: Step) -> float:
    """Bytes of the largest quantized matrix, dequantized once for forward and once for backward."""
    per_parameter = _per_parameter(anatomy, weights)
    item_bytes = ITEM_BYTES.get(step.dtype, 4)
    packed = [module.parameters for module in anatomy.modules if per_parameter[module.layer] < item_bytes - 0.5]
    return 2.0 * item_bytes * max(packed, default=0)
