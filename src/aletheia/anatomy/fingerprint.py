"""A fingerprint that tells one base model from another in milliseconds."""

import hashlib

import torch
from torch import nn

from aletheia.anatomy.read import find_layers, is_matrix, read_anatomy
from aletheia.anatomy.schema import Anatomy, ModelIdentity

EMBEDDING_SAMPLES = 1024
SMALLEST = 2.0**-10


def identify(model: nn.Module, anatomy: Anatomy | None = None) -> ModelIdentity:
    """Name and fingerprint of a loaded model.

    The fingerprint hashes every module's name and shape, 1,024 evenly spaced values of the embedding and all norm
    weights and biases of the layers. Those are not quantized by QLoRA, and they are hashed in bfloat16 with small
    values as zero, so the same checkpoint gives the same fingerprint whatever dtype it is loaded in. (An fp32
    checkpoint loaded in fp16 is rounded twice and may differ.)

    Raises:
        ModelError: the model cannot be taken apart.
    """
    anatomy = anatomy or read_anatomy(model)
    digest = hashlib.sha256()
    for module in anatomy.modules:
        digest.update(f"{module.name} {module.in_features} {module.out_features}\n".encode())
    embedding = model.get_input_embeddings().weight.detach().flatten()
    spaced = torch.linspace(0, embedding.numel() - 1, EMBEDDING_SAMPLES, dtype=torch.float64).long()
    digest.update(_canonical_bytes(embedding[spaced.to(embedding.device)]))
    _, layers = find_layers(model)
    for owner in layers.modules():
        if not is_matrix(owner):
            for parameter in owner.parameters(recurse=False):
                if parameter.dim() == 1:
                    digest.update(_canonical_bytes(parameter.detach()))
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    return ModelIdentity(name=name, fingerprint=digest.hexdigest())


def _canonical_bytes(values: torch.Tensor) -> bytes:
    rounded = values.float().cpu().to(torch.bfloat16)
    rounded = torch.where(rounded.abs() < SMALLEST, torch.zeros_like(rounded), rounded)
    return rounded.view(torch.int16).numpy().tobytes()
