"""The resident probe: score layers and modules of a model that fits in memory. Nothing is trained."""

import math
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from aletheia.anatomy.fingerprint import identify
from aletheia.anatomy.layerwise import Call, hidden_states, with_hidden_states
from aletheia.anatomy.read import (
    adaptable_modules,
    find_layers,
    fused_parameters,
    layer_index,
    read_anatomy,
)
from aletheia.anatomy.schema import Anatomy
from aletheia.data.batches import on_device_of
from aletheia.data.examples import Examples
from aletheia.errors import ProbeError
from aletheia.probing.experts import ExpertRecorder
from aletheia.probing.ghost import GhostRecorder
from aletheia.probing.preflight import broken_output
from aletheia.probing.scores import Scores, WeightBytes
from aletheia.probing.state import borrowed
from aletheia.probing.tally import Batch, Measured, Tally, draw, measured, other_parameters, probe_settings
from aletheia.progress import Progress, Say


def probe(
    model: nn.Module,
    data: Examples | Iterable[Batch],
    batches: int = 5,
    batch_size: int = 1,
    seed: int = 0,
    show_progress: bool | Say = True,
) -> Scores:
    """Score every decoder layer and module by the gradient it receives on task data [arXiv:2604.15351].

    Each batch takes one forward and one backward pass over activations. Weight gradients are never formed (ghost
    norms), so frozen and quantized weights are scored like any other. The model runs in eval mode (no dropout) and is
    given back unchanged: modes, ``requires_grad``, ``.grad`` and hooks.

    Args:
        model: a transformers causal language model.
        data: encoded rows, of which ``batches x batch_size`` are drawn with ``seed``; or the batches themselves, each
            with ``input_ids``, ``attention_mask`` and ``labels`` [B, T] (-100: no loss). With batches, ``batches``,
            ``batch_size`` and ``seed`` are ignored.
        batches: number of batches; the published method uses 5.
        batch_size: rows per batch; the published method uses 1.
        seed: seed of the draw.
        show_progress: show progress on stderr; or a function that gets its lines.

    Raises:
        ModelError: the model cannot be taken apart.
        ProbeError: there is no batch, a batch has no label, or a loss or score is not finite (names the layer).
    """
    started = time.perf_counter()
    anatomy = read_anatomy(model)
    used = draw(data, batches, batch_size, seed)
    tally = Tally(anatomy)
    losses = []
    stacks = fused_parameters(model)
    with (
        Progress("probe", len(used), "batches", show_progress) as progress,
        borrowed(model),
        GhostRecorder(adaptable_modules(model)) as recorder,
        ExpertRecorder(stacks) as experts,
    ):
        for number, batch in enumerate(used, start=1):
            loss, found = _score_scaled(model, batch, recorder, experts)
            losses.append(loss)
            _check_finite(model, anatomy, batch, number, loss, found.norms)
            tally.add(found)
            progress.advance()
    first = next(model.parameters())
    return tally.scores(
        identify(model, anatomy),
        data if isinstance(data, Examples) else None,
        probe_settings(
            used,
            losses,
            seed if isinstance(data, Examples) else None,
            getattr(model, "dtype", first.dtype),
            first.device,
            time.perf_counter() - started,
        ),
        weight_bytes(model),
    )


def weight_bytes(model: nn.Module) -> WeightBytes:
    """Bytes of the parts of a loaded model."""
    _, layers = find_layers(model)
    inside = {id(parameter) for parameter in layers.parameters()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    left_out = set() if head is None else set(embedding.parameters()) - set(head.parameters())
    return WeightBytes(
        layers=tuple(sum(parameter.nbytes for parameter in layer.parameters()) for layer in layers),
        outside=sum(
            parameter.nbytes
            for parameter in model.parameters()
            if id(parameter) not in inside and parameter not in left_out
        ),
        embedding=sum(parameter.nbytes for parameter in left_out),
    )


def _score_scaled(
    model: nn.Module, batch: Batch, recorder: GhostRecorder, experts: ExpertRecorder
) -> tuple[float, Measured]:
    """Loss and measurements of a batch; in float16 the loss is scaled up against underflow, less if that overflows."""
    half = next(model.parameters()).dtype == torch.float16
    for scale in (2.0**12, 2.0**6, 1.0) if half else (1.0,):
        loss, found = _score_batch(model, batch, recorder, experts, scale)
        if all(map(math.isfinite, found.norms.values())):
            break
    return loss, found


def _score_batch(
    model: nn.Module, batch: Batch, recorder: GhostRecorder, experts: ExpertRecorder, loss_scale: float
) -> tuple[float, Measured]:
    path, layers = find_layers(model)
    others = other_parameters(layers, path)
    for parameter in others.values():
        parameter.requires_grad_(True)
    leaf: list[torch.Tensor] = []

    def start_graph(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Make the first layer's input a leaf, so that gradients reach layer 0 and stop there."""
        leaf.append(hidden_states(args, kwargs).detach().requires_grad_(True))
        return with_hidden_states(args, kwargs, leaf[0])

    experts.mask_N = batch["attention_mask"].flatten()
    handle = layers[0].register_forward_pre_hook(start_graph, with_kwargs=True)
    try:
        with torch.enable_grad():
            loss = model(**on_device_of(model, batch), use_cache=False).loss
        # autograd.grad walks only the paths to these tensors and does not touch any .grad
        wanted = [*others.values(), *leaf, experts.anchor]
        gradients = torch.autograd.grad(loss * loss_scale, wanted, allow_unused=True)
    finally:
        handle.remove()
    return loss.item(), measured(recorder, experts, dict(zip(others, gradients, strict=False)), loss_scale)


def _check_finite(
    model: nn.Module, anatomy: Anatomy, batch: Batch, number: int, loss: float, norms: dict[str, float]
) -> None:
    broken = [name for name, norm in norms.items() if not math.isfinite(norm)]
    if not broken and math.isfinite(loss):
        return
    forward = broken_output(model, batch)
    if forward is not None:
        what = forward
    elif broken:
        nearest = max(broken, key=lambda name: layer_index(name, anatomy.layer_path))
        what = f"the gradient in layer {layer_index(nearest, anatomy.layer_path)} ({nearest})"
    else:
        what = "the loss, after the last layer,"
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    raise ProbeError(
        f"{what} is not finite in probe batch {number}, computed in {dtype}; "
        f"check the checkpoint{'' if dtype == 'float32' else ', or try `dtype` float32'}"
    )
