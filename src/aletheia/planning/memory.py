"""The memory model: what training the layers from a boundary up takes, the prefix being stored."""

from collections.abc import Collection, Mapping

from aletheia.anatomy.schema import Anatomy
from aletheia.errors import PlanError
from aletheia.probing.scores import Scores, WeightBytes

PROCESS_BYTES = 1_000_000_000  # Python, torch, transformers, PEFT, the tokenizer, the rows
ADAPTER_BYTES = 20  # per parameter: value, gradient, both moments of AdamW and the average, in float32
LOGIT_COPIES = 3  # logits, their gradient, and the float32 copy of a half-precision model's


def known_weights(scores: Scores) -> WeightBytes:
    """The weight sizes that a probe noted.

    Raises:
        PlanError: an earlier release wrote the scores.
    """
    if scores.weight_bytes is None:
        raise PlanError("the scores tell no weight sizes; expected those of this release's probe; probe again")
    return scores.weight_bytes


def training_bytes(
    anatomy: Anatomy,
    weights: WeightBytes,
    layers: Collection[int],
    ranks: Mapping[str, int],
    tokens: int,
    labelled_share: float = 1.0,
) -> int:
    """Peak memory of the process while it trains ``layers`` from a filled cache, estimated from above.

    The weights from the boundary up and the head; a second copy of every adapted stack of experts, into which PEFT
    folds the adapter and which backward needs, and the gradient of the largest; adapters with gradients and AdamW;
    activations, counted as twice the inputs and outputs of every matrix from the boundary up in float32, which covers
    norms, attention that keeps no square matrix or a small one, and backward's own needs; the logits at labelled
    positions; and the process itself.

    Args:
        anatomy: of the whole model.
        weights: bytes of its parts as loaded.
        layers: the adapted layers.
        ranks: rank by full module name.
        tokens: of the largest batch, padding included.
        labelled_share: of the tokens, at most.
    """
    boundary = min(layers)
    suffix = [module for module in anatomy.modules if module.layer >= boundary]
    adapted = [module for module in suffix if module.layer in layers and module.name in ranks]
    parameters = sum(module.lora_parameters(ranks[module.name]) for module in adapted)
    per_parameter = [size / count for size, count in zip(weights.layers, anatomy.layer_parameters, strict=True)]
    stacks = [module.parameters * per_parameter[module.layer] for module in adapted if module.fused]
    folded = sum(stacks) + max(stacks, default=0)
    widths = sum(module.features_per_token for module in suffix)
    logits = LOGIT_COPIES * tokens * labelled_share * anatomy.vocab_size
    held = sum(weights.layers[boundary:]) + weights.outside + (0 if boundary else weights.embedding)
    return int(PROCESS_BYTES + held + folded + ADAPTER_BYTES * parameters + 4 * (2 * tokens * widths + logits))


def lowest_boundary(
    anatomy: Anatomy,
    weights: WeightBytes,
    ranks: Mapping[str, int],
    tokens: int,
    labelled_share: float,
    max_memory: int,
) -> int | None:
    """The lowest boundary from which every layer can be trained within ``max_memory``, None if not even the last."""
    for boundary in range(anatomy.layer_count):
        layers = range(boundary, anatomy.layer_count)
        if training_bytes(anatomy, weights, layers, ranks, tokens, labelled_share) <= max_memory:
            return boundary
    return None
