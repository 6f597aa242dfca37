"""A few seconds of measurement: what each part of a training step costs here. Shapes as in ``prefix.py``."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from aletheia.anatomy.read import adaptable_modules, find_layers, is_matrix, read_anatomy
from aletheia.data.batches import collate, on_device_of
from aletheia.data.examples import NO_LOSS, Examples
from aletheia.data.order import training_batches
from aletheia.probing.timings import LayerTiming, Timings
from aletheia.tuning.lean import lean_adapters, lean_causal_loss
from aletheia.tuning.prefix import hidden_states

REPEATS = 3
SHORT_SECONDS, MOST_REPEATS = 0.2, 25
ROWS = 4  # of the batch that is timed; times grow in proportion to tokens
SAMPLED_BATCHES = 200
RANKS = (16, 64)  # adapter times are measured at both; between and beyond, they are a line in the parameters


def calibrate(model: nn.Module, data: Examples, batch_size: int = 4, seed: int = 0) -> Timings:
    """Measure forward, backward and adapter times of each kind of layer, and of the head, on a typical batch.

    Layers with modules of the same shapes count as one kind; one of each is run by itself on the hidden states that
    reach it. One whole step of uniform LoRA, as PEFT takes it, is the yardstick. The model is left as it was.

    Args:
        model: the base model, without adapters.
        data: rows to train on; a typical batch is one of median size among 200 length-grouped ones.
        batch_size: rows per training step.
        seed: of the batches.
    """
    started = time.perf_counter()
    was_training = model.training
    model.eval()
    rows, tokens, padding = _typical_batch(data, batch_size, seed)
    batch = on_device_of(model, collate([data[row] for row in rows[:ROWS]], data.pad_token_id))
    kinds = _kinds(model)
    _, layers = find_layers(model)
    inputs, whole = _inputs(model, batch, [members[0] for members in kinds])
    measured: dict[int, LayerTiming] = {}
    with torch.random.fork_rng():  # adapters are drawn
        for members in kinds:
            measured |= dict.fromkeys(members, _layer(layers[members[0]], *inputs[members[0]]))
        baseline = _baseline(model, batch)
    head, head_forward = _head(model, hidden_states(*inputs[kinds[0][0]]), batch["labels"])
    inside = sum(timing.forward for timing in measured.values())
    model.train(was_training)
    scale = tokens / batch["input_ids"].numel()  # from the tokens at hand to those of an average batch
    return Timings(
        device=batch["input_ids"].device.type,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        batch_size=batch_size,
        tokens=tokens,
        random_padding=padding,
        layers=tuple(_scaled(measured[index], scale) for index in range(len(layers))),
        head=head * scale,
        outside=max(whole - inside - head_forward, 0.0) * scale,
        baseline=baseline * scale * padding,
        baseline_rank=RANKS[0],
        seconds=time.perf_counter() - started,
    )


def _typical_batch(data: Examples, batch_size: int, seed: int) -> tuple[list[int], float, float]:
    """Rows of a batch of median size, the mean tokens of a batch with padding, and random batches' tokens to that."""
    lengths = [len(example) for example in data.examples]
    size = min(batch_size, len(lengths))

    def padded(batch: Sequence[int]) -> int:
        return max(lengths[row] for row in batch) * len(batch)

    count = min(SAMPLED_BATCHES, max(1, len(lengths) // size))
    batches = {grouped: training_batches(lengths, size, count, seed, grouped) for grouped in (True, False)}
    means = {grouped: statistics.fmean(map(padded, found)) for grouped, found in batches.items()}
    middle = sorted(batches[True], key=padded)[count // 2]
    return middle, means[True], max(1.0, means[False] / means[True])


def _kinds(model: nn.Module) -> list[list[int]]:
    """Layer indices, those of like modules together."""
    anatomy = read_anatomy(model)
    found: dict[tuple, list[int]] = {}
    for layer in range(anatomy.layer_count):
        shape = tuple((m.role, m.in_features, m.out_features) for m in anatomy.in_layer(layer))
        found.setdefault(shape, []).append(layer)
    return list(found.values())


@torch.no_grad()
def _inputs(model: nn.Module, batch: dict[str, torch.Tensor], wanted: Sequence[int]) -> tuple[dict[int, Any], float]:
    """Arguments that the layers are called with, and the seconds of a whole forward pass."""
    _, layers = find_layers(model)
    caught: dict[int, Any] = {}
    with ExitStack() as stack:
        for index in wanted:

            def catch(module: nn.Module, args: tuple, kwargs: dict[str, Any], index: int = index) -> None:
                caught[index] = (args, kwargs)

            stack.callback(layers[index].register_forward_pre_hook(catch, with_kwargs=True).remove)
        seconds = _seconds(
            lambda: model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False), repeats=1
        )
    return caught, seconds


def _layer(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> LayerTiming:
    hidden_BTD = hidden_states(args, kwargs).detach()
    with torch.no_grad():
        forward = _seconds(lambda: layer(*args, **kwargs))
    frozen = _pass(layer, args, kwargs, hidden_BTD)
    names = [name for name, module in layer.named_modules() if is_matrix(module)]
    points = []
    for rank in RANKS:
        adapted = inject_adapter_in_model(LoraConfig(r=rank, target_modules=names), copy.deepcopy(layer))
        for adapter in _adapters(adapted):
            adapter.data = adapter.data.float()  # as get_peft_model keeps them
        parameters = sum(parameter.numel() for parameter in _adapters(adapted))
        with lean_adapters(adapted):
            points.append((parameters, max(_pass(adapted, args, kwargs, hidden_BTD) - frozen, 0.0)))
    (few, low), (many, high) = points
    slope = max((high - low) / (many - few), 0.0)
    return LayerTiming(
        forward=forward,
        backward=max(frozen - forward, 0.0),
        adapter_fixed=max(low - slope * few, 0.0),
        adapter_per_parameter=slope,
    )


def _baseline(model: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Seconds of a whole step with adapters on every matrix, as PEFT and transformers take it; then takes them off."""
    names = list(adaptable_modules(model))
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=RANKS[0], target_modules=names))
    adapters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-4, fused=True)

    def run() -> None:
        adapted(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(adapters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    try:
        return _seconds(run, repeats=1)
    finally:
        adapted.unload()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _pass(layer: nn.Module, args: tuple, kwargs: dict[str, Any], hidden_BTD: torch.Tensor) -> float:
    """Seconds of a layer forward and backward, with the optimizer's step where something is trainable."""
    flags = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]
    layer.requires_grad_(False)
    adapters = _adapters(layer)
    for parameter in adapters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(adapters, lr=1e-4, fused=True) if adapters else None
    upstream = torch.randn_like(hidden_BTD)

    def run() -> None:
        start = hidden_BTD.clone().requires_grad_(True)
        output = layer(start, *args[1:], **kwargs) if args else layer(**kwargs | {"hidden_states": start})
        (output[0] if isinstance(output, tuple) else output).backward(upstream)
        if optimizer is not None:
            torch.nn.utils.clip_grad_norm_(adapters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    try:
        return _seconds(run)
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _adapters(layer: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in layer.named_parameters() if "lora_" in name]


def _head(model: nn.Module, hidden_BTD: torch.Tensor, labels_BT: torch.Tensor) -> tuple[float, float]:
    """Seconds of head and loss at labelled tokens, forward and backward; and of the head alone, over every token."""
    head = model.get_output_embeddings()
    targets = nn.functional.pad(labels_BT[:, 1:], (0, 1), value=NO_LOSS).reshape(-1)
    kept = targets != NO_LOSS
    flat = hidden_BTD.detach().flatten(0, 1)
    flags = [(parameter, parameter.requires_grad) for parameter in head.parameters()]
    head.requires_grad_(False)

    def run() -> None:
        logits = head(flat[kept].requires_grad_(True))
        lean_causal_loss(logits, None, logits.shape[-1], shift_labels=targets[kept]).backward()

    labelled = _seconds(run, repeats=2)
    with torch.no_grad():
        alone = _seconds(lambda: head(flat), repeats=1)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    return labelled, alone


def _seconds(job: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median seconds of a job, after one run that is not counted; short jobs are repeated more often."""
    found: list[float] = []
    job()
    while len(found) < repeats or (sum(found) < SHORT_SECONDS and len(found) < MOST_REPEATS):
        _synchronize()
        started = time.perf_counter()
        job()
        _synchronize()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _scaled(timing: LayerTiming, scale: float) -> LayerTiming:
    return LayerTiming(**{name: value * scale for name, value in timing.model_dump().items()})
