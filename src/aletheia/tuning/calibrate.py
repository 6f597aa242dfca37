"""A few seconds of measurement: what each part of a training step costs here. Shapes as in ``prefix.py``."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
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
from aletheia.tuning.prefix import hidden_states, prefix_output

ROUNDS = 3
SHORT_SECONDS, MOST_REPEATS = 0.2, 25
ROWS = 4  # of the batch that is timed; times grow in proportion to tokens
SAMPLED_BATCHES = 200
Job = Callable[[], object]
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
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with torch.random.fork_rng(), ExitStack() as stack:  # adapters are drawn
        jobs, parameters = _layer_jobs(model, batch, [members[0] for members in kinds], stack)
        jobs["head"] = _head_job(model, batch)
        jobs["outside"] = partial(prefix_output, model, 0, batch)
        jobs["baseline"] = _baseline_job(model, batch, stack)
        seconds = _interleaved(jobs)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    model.train(was_training)
    scale = tokens / batch["input_ids"].numel()  # from the tokens at hand to those of an average batch
    measured: dict[int, LayerTiming] = {}
    for members in kinds:
        measured |= dict.fromkeys(members, _timing(members[0], seconds, parameters, scale))
    return Timings(
        device=batch["input_ids"].device.type,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        batch_size=batch_size,
        tokens=tokens,
        random_padding=padding,
        layers=tuple(measured[index] for index in range(len(measured))),
        head=seconds["head"] * scale,
        outside=seconds["outside"] * scale,
        baseline=seconds["baseline"] * scale * padding,
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


def _layer_jobs(
    model: nn.Module, batch: dict[str, torch.Tensor], wanted: Sequence[int], stack: ExitStack
) -> tuple[dict[str, Job], dict[str, int]]:
    """A layer of each kind, on a copy: forward, and forward and backward without and with adapters of both ranks.

    Also the trainable parameters of each adapted copy.
    """
    _, layers = find_layers(model)
    inputs = _inputs(model, batch, wanted)
    jobs: dict[str, Job] = {}
    parameters: dict[str, int] = {}
    for index in wanted:
        args, kwargs = inputs[index]
        frozen = copy.deepcopy(layers[index]).requires_grad_(False)
        names = [name for name, module in frozen.named_modules() if is_matrix(module)]
        jobs[f"{index} forward"] = torch.no_grad()(partial(frozen, *args, **kwargs))
        jobs[f"{index} frozen"] = _pass(frozen, args, kwargs)
        for rank in RANKS:
            adapted = inject_adapter_in_model(LoraConfig(r=rank, target_modules=names), copy.deepcopy(frozen))
            for adapter in _adapters(adapted):
                adapter.data = adapter.data.float()  # as get_peft_model keeps them
            stack.enter_context(lean_adapters(adapted))
            jobs[f"{index} rank {rank}"] = _pass(adapted, args, kwargs)
            parameters[f"{index} rank {rank}"] = sum(parameter.numel() for parameter in _adapters(adapted))
    return jobs, parameters


def _timing(index: int, seconds: dict[str, float], parameters: dict[str, int], scale: float) -> LayerTiming:
    """The parts of a layer, from what was run: differences, and a line through both ranks."""
    forward, frozen = seconds[f"{index} forward"], seconds[f"{index} frozen"]
    low, high = (max(seconds[f"{index} rank {rank}"] - frozen, 0.0) for rank in RANKS)
    few, many = (parameters[f"{index} rank {rank}"] for rank in RANKS)
    slope = max((high - low) / (many - few), 0.0)
    return LayerTiming(
        forward=forward * scale,
        backward=max(frozen - forward, 0.0) * scale,
        adapter_fixed=max(low - slope * few, 0.0) * scale,
        adapter_per_parameter=slope * scale,
    )


@torch.no_grad()
def _inputs(model: nn.Module, batch: dict[str, torch.Tensor], wanted: Sequence[int]) -> dict[int, Any]:
    """The arguments that layers are called with."""
    _, layers = find_layers(model)
    caught: dict[int, Any] = {}
    with ExitStack() as stack:
        for index in wanted:

            def catch(module: nn.Module, args: tuple, kwargs: dict[str, Any], index: int = index) -> None:
                caught[index] = (args, kwargs)

            stack.callback(layers[index].register_forward_pre_hook(catch, with_kwargs=True).remove)
        model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return caught


def _pass(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Job:
    """A layer forward and backward, with the optimizer's step where it has adapters."""
    hidden_BTD = hidden_states(args, kwargs).detach()
    upstream = torch.randn_like(hidden_BTD)
    adapters = _adapters(layer)
    step = _optimizer_step(adapters) if adapters else None

    def run() -> None:
        start = hidden_BTD.clone().requires_grad_(True)
        output = layer(start, *args[1:], **kwargs) if args else layer(**kwargs | {"hidden_states": start})
        (output[0] if isinstance(output, tuple) else output).backward(upstream)
        if step is not None:
            step()

    return run


def _head_job(model: nn.Module, batch: dict[str, torch.Tensor]) -> Job:
    """Head and loss at labelled tokens, forward and backward."""
    head = model.get_output_embeddings()
    targets_N = batch["labels"][:, 1:]
    targets_N = targets_N[targets_N != NO_LOSS]
    hidden_ND = torch.randn(len(targets_N), head.weight.shape[1], dtype=head.weight.dtype, device=head.weight.device)

    def run() -> None:
        logits_NV = head(hidden_ND.clone().requires_grad_(True))
        lean_causal_loss(logits_NV, None, logits_NV.shape[-1], shift_labels=targets_N).backward()

    return run


def _baseline_job(model: nn.Module, batch: dict[str, torch.Tensor], stack: ExitStack) -> Job:
    """A whole step with adapters on every matrix, as PEFT and transformers take it; ``stack`` takes them off again."""
    names = list(adaptable_modules(model))
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=RANKS[0], target_modules=names))
    stack.callback(adapted.unload)
    step = _optimizer_step([parameter for parameter in adapted.parameters() if parameter.requires_grad])

    def run() -> None:
        adapted(**batch, use_cache=False).loss.backward()
        step()

    return run


def _optimizer_step(adapters: list[nn.Parameter]) -> Job:
    optimizer = torch.optim.AdamW(adapters, lr=1e-4, fused=True)

    def run() -> None:
        torch.nn.utils.clip_grad_norm_(adapters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def _adapters(layer: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in layer.named_parameters() if "lora_" in name]


def _interleaved(jobs: dict[str, Job]) -> dict[str, float]:
    """Median seconds of each job over rounds of all, so that a machine that slows down slows all of them.

    Short jobs are repeated within a round, after one run that is not counted.
    """
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(ROUNDS):
        for name, job in jobs.items():
            spent: list[float] = []
            while not spent or (sum(spent) < SHORT_SECONDS and len(spent) < MOST_REPEATS):
                _synchronize()
                started = time.perf_counter()
                job()
                _synchronize()
                spent.append(time.perf_counter() - started)
            found[name].append(statistics.median(spent[1:] or spent))
    return {name: statistics.median(values) for name, values in found.items()}


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
