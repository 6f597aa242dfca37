"""The resident probe: score layers and modules of a model that fits in memory. Nothing is trained."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from aletheia.anatomy.fingerprint import identify
from aletheia.anatomy.read import (
    adaptable_modules,
    find_layers,
    fused_parameters,
    is_matrix,
    layer_index,
    read_anatomy,
)
from aletheia.anatomy.schema import Anatomy
from aletheia.data.batches import labelled_tokens, on_device_of, sample_batches
from aletheia.data.examples import Examples
from aletheia.errors import ProbeError
from aletheia.files import package_versions
from aletheia.probing.experts import ExpertRecorder
from aletheia.probing.ghost import GhostRecorder, at_least_float32
from aletheia.probing.scores import ExpertScores, ProbeSettings, Scores
from aletheia.probing.state import borrowed

SCORE = "gradient-norm"
Batch = dict[str, torch.Tensor]


def probe(
    model: nn.Module,
    data: Examples | Iterable[Batch],
    batches: int = 5,
    batch_size: int = 1,
    seed: int = 0,
) -> Scores:
    """Score every decoder layer and module by the gradient it receives on task data [arXiv:2604.15351].

    One forward and one activation-backward pass per batch; weight gradients are never formed (ghost norms), so
    frozen and quantized weights are scored like any other. The model runs in eval mode (no dropout) and is given
    back unchanged: mode, ``requires_grad``, ``.grad`` and hooks.

    Args:
        model: a transformers causal language model.
        data: encoded rows, of which ``batches x batch_size`` are drawn with ``seed``; or the very batches to use,
            each with ``input_ids_BT``, ``attention_mask_BT`` and ``labels_BT`` (-100: no loss) under the names
            transformers gives them. ``batches``, ``batch_size`` and ``seed`` are ignored then.
        batches: how many batches; the published method takes 5.
        batch_size: sequences per batch; the published method takes 1.
        seed: of the draw.

    Raises:
        ModelError: the model cannot be taken apart.
        ProbeError: there is no batch, or a loss or score is not finite; the message names the layer.
    """
    started = time.perf_counter()
    anatomy = read_anatomy(model)
    drawn = isinstance(data, Examples)
    used = _draw(data, batches, batch_size, seed)
    layer_scores = [0.0] * anatomy.layer_count
    module_scores: dict[str, float | None] = {
        module.name: None if module.role == "expert" else 0.0 for module in anatomy.modules
    }
    fused = fused_parameters(model)
    stacks: dict[str, list[Stack]] = {name: [] for name in fused}
    losses = []
    with borrowed(model), GhostRecorder(adaptable_modules(model)) as recorder, ExpertRecorder(fused) as experts:
        for number, batch in enumerate(used, start=1):
            if not labelled_tokens(batch["labels"]):
                raise ProbeError(f"probe batch {number} has no labelled token; expected labels other than -100")
            measured = _score_scaled(model, batch, recorder, experts)
            losses.append(measured.loss)
            norms = measured.modules | measured.others
            _check_finite(model, anatomy, batch, number, measured.loss, norms)
            for name, norm in measured.modules.items():
                module_scores[name] = (module_scores[name] or 0.0) + norm
            for name, norm in norms.items():
                layer_scores[layer_index(name, anatomy.layer_path)] += norm
            for name, stack in measured.experts.items():
                stacks[name].append(stack)
    first = next(model.parameters())
    return Scores(
        model=identify(model, anatomy),
        data=data.identity if drawn else None,
        probe=ProbeSettings(
            score=SCORE,
            batches=len(used),
            batch_size=max(batch["input_ids"].shape[0] for batch in used),
            seed=seed if drawn else None,
            dtype=str(getattr(model, "dtype", first.dtype)).removeprefix("torch."),
            device=first.device.type,
            tokens=sum(int(batch["attention_mask"].sum()) for batch in used),
            labelled_tokens=sum(int(labelled_tokens(batch["labels"])) for batch in used),
            mean_loss=sum(losses) / len(losses),
            seconds=time.perf_counter() - started,
        ),
        packages=package_versions(),
        layers=tuple(layer_scores),
        modules=module_scores,
        experts={name: _expert_scores(found) for name, found in stacks.items() if found},
        anatomy=anatomy,
    )


def _draw(data: Examples | Iterable[Batch], batches: int, batch_size: int, seed: int) -> list[Batch]:
    if isinstance(data, Examples):
        if batches < 1 or batch_size < 1:
            raise ProbeError(f"--batches is {batches} and the batch size {batch_size}; expected at least 1 each")
        return sample_batches(data, batches, batch_size, seed)
    used = list(data)
    if not used:
        raise ProbeError("no batch to probe with; expected at least one")
    return used


Norms = dict[str, float]  # by full name
Stack = tuple[list[float], list[int] | None]  # of experts: gradient norms, and tokens where the routing was seen


@dataclass(frozen=True)
class _Measured:
    """One batch: its loss, gradient norms of matrices and stacks, of all other parameters, and of single experts."""

    loss: float
    modules: Norms
    others: Norms
    experts: dict[str, Stack]


def _expert_scores(stacks: Sequence[Stack]) -> ExpertScores:
    """Summed over the batches; an expert without a token, or, where that was not seen, without a gradient, has None."""
    norms = [sum(of_expert) for of_expert in zip(*(norms for norms, _ in stacks), strict=True)]
    counted = [tokens for _, tokens in stacks if tokens is not None]
    tokens = tuple(map(sum, zip(*counted, strict=True))) if len(counted) == len(stacks) else None
    reached = tokens or norms
    return ExpertScores(
        norms=tuple(norm if seen else None for norm, seen in zip(norms, reached, strict=True)), tokens=tokens
    )


def _score_scaled(model: nn.Module, batch: Batch, recorder: GhostRecorder, experts: ExpertRecorder) -> _Measured:
    """In float16 small gradients underflow, so the loss is scaled up, and less where that overflows."""
    half = next(model.parameters()).dtype == torch.float16
    for scale in (2.0**12, 2.0**6, 1.0) if half else (1.0,):
        measured = _score_batch(model, batch, recorder, experts, scale)
        if all(map(math.isfinite, (*measured.modules.values(), *measured.others.values()))):
            break
    return measured


def _score_batch(
    model: nn.Module, batch: Batch, recorder: GhostRecorder, experts: ExpertRecorder, loss_scale: float
) -> _Measured:
    path, layers = find_layers(model)
    ghosts = {id(module.weight) for module in layers.modules() if is_matrix(module)}
    ghosts |= {id(owner._parameters[name]) for owner, name in fused_parameters(model).values()}
    others = {
        f"{path}.{name}": parameter.requires_grad_(True)
        for name, parameter in layers.named_parameters()
        if id(parameter) not in ghosts and parameter.is_floating_point()
    }
    leaf: list[torch.Tensor] = []

    def start_graph(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Make the first layer's input a leaf, so that gradients reach layer 0 and stop there."""
        held = args[0] if args else kwargs["hidden_states"]
        leaf.append(held.detach().requires_grad_(True))
        return ((leaf[0], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": leaf[0]})

    experts.mask_N = batch["attention_mask"].flatten()
    handle = layers[0].register_forward_pre_hook(start_graph, with_kwargs=True)
    try:
        with torch.enable_grad():
            loss = model(**on_device_of(model, batch), use_cache=False).loss
        # autograd.grad walks only the path to these tensors and leaves every .grad alone
        wanted = [*others.values(), *leaf, experts.anchor]
        gradients = torch.autograd.grad(loss * loss_scale, wanted, allow_unused=True)
    finally:
        handle.remove()
    norms = {name: norm.item() / loss_scale for name, norm in recorder.pop().items()}
    stacks: dict[str, Stack] = {}
    for name, (norms_E, tokens_E) in experts.pop().items():
        norms[name] = norms_E.norm().item() / loss_scale
        stacks[name] = ((norms_E / loss_scale).tolist(), None if tokens_E is None else tokens_E.tolist())
    other_norms = {
        name: torch.linalg.vector_norm(at_least_float32(gradient)).item() / loss_scale
        for name, gradient in zip(others, gradients, strict=False)
        if gradient is not None
    }
    return _Measured(loss.item(), norms, other_norms, stacks)


def _check_finite(
    model: nn.Module, anatomy: Anatomy, batch: Batch, number: int, loss: float, norms: dict[str, float]
) -> None:
    broken = [name for name, norm in norms.items() if not math.isfinite(norm)]
    if not broken and math.isfinite(loss):
        return
    forward = _first_broken_layer(model, batch)
    if forward is not None:
        what = f"the output of layer {forward} ({anatomy.layer_path}.{forward})"
    elif broken:
        nearest = max(broken, key=lambda name: layer_index(name, anatomy.layer_path))
        what = f"the gradient in layer {layer_index(nearest, anatomy.layer_path)} ({nearest})"
    else:
        what = "the loss, behind the last layer,"
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    raise ProbeError(
        f"{what} is not finite in probe batch {number}, computed in {dtype}; "
        "try --dtype bfloat16 or float32, or check the checkpoint"
    )


@torch.no_grad()
def _first_broken_layer(model: nn.Module, batch: Batch) -> int | None:
    """Index of the first layer whose output is not finite in a plain forward pass."""
    _, layers = find_layers(model)
    broken: list[int] = []

    def watch(index: int):
        def hook(module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
            hidden_BTD = output[0] if isinstance(output, tuple) else output
            if not torch.isfinite(hidden_BTD).all():
                broken.append(index)

        return hook

    handles = [layer.register_forward_hook(watch(index)) for index, layer in enumerate(layers)]
    try:
        model(**on_device_of(model, batch), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return min(broken, default=None)
