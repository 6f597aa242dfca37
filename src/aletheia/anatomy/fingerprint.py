"""Fingerprints that tell one base model from another in milliseconds."""

import hashlib

import torch
from torch import nn

from aletheia.anatomy.read import adaptable_modules, find_layers, fused_parameters, is_matrix, read_anatomy
from aletheia.anatomy.schema import Anatomy, ModelIdentity

EMBEDDING_SAMPLES = 1024
MATRIX_SAMPLES = 64
SMALLEST = 2.0**-10


def identify(model: nn.Module, anatomy: Anatomy | None = None) -> ModelIdentity:
    """Name and fingerprints of a loaded base model, without adapters.

    ``fingerprint`` hashes every module's name and shape, 1,024 evenly spaced values of the embedding and all norm
    weights and biases of the layers: what QLoRA leaves unquantized, so a model and its 4-bit form share it.
    ``weights`` hashes 64 evenly spaced values of every matrix and every stack of experts, and is None if any is
    quantized; it tells a model from one whose adapters were merged. Values are hashed in bfloat16 with small ones as
    zero, so the same checkpoint gives the same fingerprints whatever dtype it is loaded in. (An fp32 checkpoint loaded
    in fp16 is rounded twice and may differ.)

    Raises:
        ModelError: the model cannot be taken apart.
    """
    anatomy = anatomy or read_anatomy(model)
    structure = hashlib.sha256()
    for module in anatomy.modules:
        structure.update(f"{module.name} {module.in_features} {module.out_features}\n".encode())
    structure.update(_sampled(model.get_input_embeddings().weight, EMBEDDING_SAMPLES))
    _, layers = find_layers(model)
    for owner in layers.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.dim() == 1 and not (is_matrix(owner) and name == "weight"):
                structure.update(_canonical_bytes(parameter.detach()))
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    return ModelIdentity(name=name, fingerprint=structure.hexdigest(), weights=_matrices(model))


def _matrices(model: nn.Module) -> str | None:
    digest = hashlib.sha256()
    for module in adaptable_modules(model).values():
        if not module.weight.is_floating_point():
            return None
        digest.update(_sampled(module.weight, MATRIX_SAMPLES))
    for owner, name in fused_parameters(model).values():
        digest.update(_sampled(getattr(owner, name), MATRIX_SAMPLES))
    return digest.hexdigest()


def _sampled(weight: torch.Tensor, count: int) -> bytes:
    """``count`` evenly spaced values of a weight."""
    values = weight.detach().reshape(-1)
    spaced = torch.linspace(0, values.numel() - 1, count, dtype=torch.float64).long()
    return _canonical_bytes(values[spaced.to(values.device)])


def _canonical_bytes(values: torch.Tensor) -> bytes:
    rounded = values.float().cpu().to(torch.bfloat16)
    rounded = torch.where(rounded.abs() < SMALLEST, torch.zeros_like(rounded), rounded)
    return rounded.view(torch.int16).numpy().tobytes()
