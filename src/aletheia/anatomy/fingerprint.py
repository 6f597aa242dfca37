"""Fingerprints that tell one base model from another in milliseconds."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from aletheia.anatomy.read import find_layers, is_matrix, matrices_of, read_anatomy, stacks_of
from aletheia.anatomy.schema import Anatomy, ModelIdentity

EMBEDDING_SAMPLES = 1024
MATRIX_SAMPLES = 64
SMALLEST = 2.0**-10
_NO_INFLUENCE = ("_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype", "architectures")


def configuration(model: nn.Module) -> dict[str, Any]:
    """The parts of a model's config that hidden states may depend on, and how attention is computed."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NO_INFLUENCE}
    return {"config": config, "attention": getattr(model.config, "_attn_implementation", None)}


def identify(model: nn.Module, anatomy: Anatomy | None = None) -> ModelIdentity:
    """Name and fingerprints of a loaded base model, without adapters.

    ``fingerprint`` hashes the names and shapes of all modules, 1,024 evenly spaced values of the embedding, and all
    norm weights and biases of the layers. QLoRA leaves these unquantized, so a model and its 4-bit form share it.
    ``weights`` hashes 64 evenly spaced values of every matrix and every stack of experts, so merging an adapter changes
    it. It is None if any matrix is quantized.

    Values are hashed in bfloat16, small ones as zero, so a checkpoint has the same fingerprints in every dtype. One
    exception: an fp32 checkpoint loaded in fp16 is rounded twice and may differ.

    Raises:
        ModelError: the model cannot be taken apart.
    """
    _, layers = find_layers(model)
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    embedding = sample_embedding(model.get_input_embeddings().weight)
    return identity(name, anatomy or read_anatomy(model), embedding, [sample_layer(layer) for layer in layers])


@dataclass(frozen=True)
class LayerSample:
    """The values of one layer that fingerprints use: its vectors, and samples of its matrices and stacks of experts.

    ``matrices`` is None if any is quantized.
    """

    vectors: bytes
    matrices: bytes | None
    stacks: bytes


def identity(name: str, anatomy: Anatomy, embedding: bytes, samples: Sequence[LayerSample]) -> ModelIdentity:
    """The identity of a model from its samples, layer by layer; see :func:`identify`."""
    structure = hashlib.sha256()
    for module in anatomy.modules:
        structure.update(f"{module.name} {module.in_features} {module.out_features}\n".encode())
    structure.update(embedding)
    for sample in samples:
        structure.update(sample.vectors)
    matrices = [sample.matrices for sample in samples if sample.matrices is not None]
    weights = None
    if len(matrices) == len(samples):
        weights = hashlib.sha256(b"".join([*matrices, *(sample.stacks for sample in samples)])).hexdigest()
    return ModelIdentity(name=name, fingerprint=structure.hexdigest(), weights=weights)


def sample_embedding(weight: torch.Tensor) -> bytes:
    """1,024 evenly spaced values of an embedding [V, D], as bytes of bfloat16."""
    return _sampled(weight, EMBEDDING_SAMPLES)


def sample_layer(layer: nn.Module) -> LayerSample:
    """The values of one layer that identify its model."""
    vectors = [
        _canonical_bytes(parameter.detach())
        for owner in layer.modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if parameter.dim() == 1 and not (is_matrix(owner) and name == "weight")
    ]
    matrices = [module.weight for module in matrices_of(layer).values()]
    is_plain = all(weight.is_floating_point() for weight in matrices)
    stacks = [getattr(owner, name) for owner, name in stacks_of(layer).values()]
    return LayerSample(
        b"".join(vectors),
        b"".join(_sampled(weight, MATRIX_SAMPLES) for weight in matrices) if is_plain else None,
        b"".join(_sampled(stack, MATRIX_SAMPLES) for stack in stacks),
    )


def _sampled(weight: torch.Tensor, count: int) -> bytes:
    """``count`` evenly spaced values of a weight."""
    values = weight.detach().reshape(-1)
    spaced = torch.linspace(0, values.numel() - 1, count, dtype=torch.float64).long()
    return _canonical_bytes(values[spaced.to(values.device)])


def _canonical_bytes(values: torch.Tensor) -> bytes:
    rounded = values.float().cpu().to(torch.bfloat16)
    rounded = torch.where(rounded.abs() < SMALLEST, torch.zeros_like(rounded), rounded)
    return rounded.view(torch.int16).numpy().tobytes()
