"""The resident probe: score layers and modules of a model that fits in memory. Nothing is trained."""

import math
import time
from collections.abc import Iterable

import torch
from torch import nn

from aletheia.anatomy.fingerprint import identify
from aletheia.anatomy.read import adaptable_modules, find_layers, is_matrix, layer_index, read_anatomy
from aletheia.anatomy.schema import Anatomy
from aletheia.data.batches import labelled_tokens, on_device_of, sample_batches
from aletheia.data.examples import Examples
from aletheia.errors import ModelError, ProbeError
from aletheia.files import package_versions
from aletheia.probing.ghost import GhostRecorder, at_least_float32
from aletheia.probing.scores import ProbeSettings, Scores
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
        ModelError: the model cannot be taken apart, or holds fused experts.
        ProbeError: there is no batch, or a loss or score is not finite; the message names the layer.
    """
    started = time.perf_counter()
    anatomy = read_anatomy(model)
    if anatomy.fused_parameters:
        raise ModelError(
            f"{anatomy.model_type} keeps its experts in fused parameters such as {anatomy.fused_parameters[0]}; "
            "this release scores and adapts Linear and Conv1D modules only"
        )
    drawn = isinstance(data, Examples)
    used = _draw(data, batches, batch_size, seed)
    layer_scores = [0.0] * anatomy.layer_count
    module_scores = {module.name: 0.0 for module in anatomy.modules}
    losses = []
    with borrowed(model), GhostRecorder(adaptable_modules(model)) as recorder:
        for number, batch in enumerate(used, start=1):
            if not labelled_tokens(batch["labels"]):
                raise ProbeError(f"probe batch {number} has no labelled token; expected labels other than -100")
            loss, norms, others = _score_scaled(model, batch, recorder)
            losses.append(loss)
            _check_finite(model, anatomy, batch, number, loss, norms | others)
            for name, norm in norms.items():
                module_scores[name] += norm
            for name, norm in (norms | others).items():
                layer_scores[layer_index(name, anatomy.layer_path)] += norm
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


def _score_scaled(model: nn.Module, batch: Batch, recorder: GhostRecorder) -> tuple[float, Norms, Norms]:
    """In float16 small gradients underflow, so the loss is scaled up, and less where that overflows."""
    half = next(model.parameters()).dtype == torch.float16
    for scale in (2.0**12, 2.0**6, 1.0) if half else (1.0,):
        loss, norms, others = _score_batch(model, batch, recorder, scale)
        if all(map(math.isfinite, (*norms.values(), *others.values()))):
            break
    return loss, norms, others


def _score_batch(
    model: nn.Module, batch: Batch, recorder: GhostRecorder, loss_scale: float
) -> tuple[float, Norms, Norms]:
    """Loss, gradient norms of the modules' weights, and of all other parameters of the layers."""
    path, layers = find_layers(model)
    ghosts = {id(module.weight) for module in layers.modules() if is_matrix(module)}
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

    handle = layers[0].register_forward_pre_hook(start_graph, with_kwargs=True)
    try:
        with torch.enable_grad():
            loss = model(**on_device_of(model, batch), use_cache=False).loss
        # autograd.grad walks only the path to these tensors and leaves every .grad alone
        gradients = torch.autograd.grad(loss * loss_scale, [*others.values(), *leaf], allow_unused=True)
    finally:
        handle.remove()
    norms = {name: norm.item() / loss_scale for name, norm in recorder.pop().items()}
    other_norms = {
        name: torch.linalg.vector_norm(at_least_float32(gradient)).item() / loss_scale
        for name, gradient in zip(others, gradients, strict=False)
        if gradient is not None
    }
    return loss.item(), norms, other_norms


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
