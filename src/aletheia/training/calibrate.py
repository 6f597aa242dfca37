"""Time a few kinds of whole training steps, to find what each part of a step costs on this machine."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from scipy.optimize import nnls
from torch import nn

from aletheia.adapters.adapt import lora_config
from aletheia.anatomy.modes import in_mode
from aletheia.anatomy.read import read_anatomy
from aletheia.anatomy.schema import Anatomy
from aletheia.data.batches import collate, collate_packed, labelled_tokens, on_device_of
from aletheia.data.examples import Examples
from aletheia.data.order import Order, training_batches
from aletheia.execution.backend import fast_layers, packing_pays
from aletheia.execution.fast import adapters_in_bfloat16, bfloat16_autocast
from aletheia.execution.packed import attention_by_row, why_not_packed
from aletheia.planning.cost import layer_costs
from aletheia.prefix.stored import PREFIX, prefix_output
from aletheia.probing.timings import LayerTiming, Timings
from aletheia.progress import Progress, Say
from aletheia.training.fast_steps import fast_steps

ROUNDS = 3
SHORT_SECONDS, MOST_REPEATS = 0.2, 25
SAMPLED_BATCHES = 200
RANK, HIGH_RANK = 16, 64  # adapters are timed at both; their time is taken to be linear in their parameters
Batch = dict[str, Any]


@dataclass(frozen=True)
class _Step:
    """A kind of step and its measured seconds, one per round.

    ``way`` is ``fast`` (from a stored prefix where there is one), ``plain`` (as PEFT and transformers compute it) or
    ``prefix`` (only forward through the layers below the first of ``layers``).
    """

    layers: Sequence[int]
    rank: int = RANK
    way: str = "fast"
    seconds: list[float] = field(default_factory=list)


def calibrate(
    model: nn.Module,
    data: Examples,
    batch_size: int = 4,
    seed: int = 0,
    rounds: int = ROUNDS,
    show_progress: bool | Say = True,
) -> Timings:
    """Time a few kinds of whole training steps on batches of average size, and divide the seconds among their parts.

    The fast steps differ in one respect each: how many layers backward crosses, how many of them are adapted, or the
    rank. Forward, backward and adapter times and the rest (head, loss, embedding) are the non-negative least-squares
    solution over these steps. Layers of different shapes get seconds in proportion to their operations. A plain step of
    uniform LoRA is the baseline. The model stays as it is.

    Args:
        model: the base model, without adapters.
        data: rows to train on.
        batch_size: rows per training step.
        seed: seed of the batches.
        rounds: how often each kind of step is timed; the median counts.
        show_progress: print progress on stderr, or call this function with a line now and then.

    Returns:
        Seconds of each part of a step.
    """
    started = time.perf_counter()
    anatomy = read_anatomy(model)
    packed = packing_pays(model) and why_not_packed(model, data.examples, data.pad_token_id) is None
    rows, tokens = _average_batch(data, batch_size, seed, "balanced" if packed else "grouped", packed)
    random_rows, random_tokens = _average_batch(data, batch_size, seed, "random")
    padded, random_batch = (
        on_device_of(model, collate([data[row] for row in chosen], data.pad_token_id)) for chosen in (rows, random_rows)
    )
    batch = on_device_of(model, collate_packed([data[row] for row in rows])) if packed else padded
    batches = {"fast": batch, "plain": random_batch, "prefix": padded}  # stored states are computed on padded rows
    last, middle = anatomy.layer_count - 1, anatomy.layer_count // 2
    upper = range(middle, last + 1)
    baseline = _Step(range(last + 1), way="plain")
    steps = [_Step([last]), _Step(upper), _Step([middle]), _Step(upper, HIGH_RANK), _Step(upper, way="prefix")]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with (
            Progress("time", rounds * (1 + len(steps)), "measurements", show_progress) as progress,
            in_mode(model, training=False),
            torch.random.fork_rng(),  # adapters start at random
        ):
            for _ in range(rounds):  # each round has every kind, so that a slower machine slows all of them
                for step in (baseline, *steps):
                    with _prepared(model, anatomy, step, batches[step.way], packed) as job:
                        step.seconds.append(_timed(job))
                    progress.advance()
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    stretched = padded["input_ids"].numel() / batch["input_ids"].numel()
    layers, head = _parts(anatomy, steps, batch, tokens, stretched)
    return Timings(
        device=batch["input_ids"].device.type,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        batch_size=batch_size,
        tokens=tokens,
        random_padding=max(1.0, random_tokens / tokens),
        layers=layers,
        head=head,
        baseline=statistics.median(baseline.seconds) * random_tokens / random_batch["input_ids"].numel(),
        baseline_rank=RANK,
        seconds=time.perf_counter() - started,
    )


def _average_batch(
    data: Examples, batch_size: int, seed: int, order: Order, packed: bool = False
) -> tuple[list[int], float]:
    """Rows of the batch whose size is nearest to the mean, and the mean in tokens, padding included."""
    lengths = [len(example) for example in data.examples]
    size = min(batch_size, len(lengths))

    def size_of(batch: Sequence[int]) -> int:
        own = [lengths[row] for row in batch]
        return sum(own) if packed else max(own) * len(own)

    count = min(SAMPLED_BATCHES, max(1, len(lengths) // size))
    batches = training_batches(lengths, size, count, seed, order)
    mean = statistics.fmean(map(size_of, batches))
    return min(batches, key=lambda batch: abs(size_of(batch) - mean)), mean


@contextmanager
def _prepared(
    model: nn.Module, anatomy: Anatomy, step: _Step, batch: Batch, packed: bool
) -> Iterator[Callable[[], object]]:
    """Yield the step as a function; on leaving, the adapters are removed again."""
    boundary = min(step.layers)
    if step.way == "prefix":
        with fast_layers(model):
            yield lambda: prefix_output(model, boundary, batch)
        return
    wanted = [module for module in anatomy.adaptable() if module.layer in step.layers]
    adapted = get_peft_model(model, lora_config(wanted, model, step.rank, 2.0 * step.rank))
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    with ExitStack() as stack:
        stack.callback(adapted.unload)
        if step.way == "fast":
            if boundary:
                with attention_by_row(adapted):
                    batch = batch | {PREFIX: prefix_output(adapted, boundary, batch)}
            stack.enter_context(adapters_in_bfloat16(adapted))
            stack.enter_context(fast_steps(adapted, boundary or None, packed=packed))

        def run() -> None:
            with bfloat16_autocast(model) if step.way == "plain" else nullcontext():
                loss = adapted(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        yield run


def _timed(job: Callable[[], object]) -> float:
    """Shortest time of a job in seconds, over repeats if it is short: other work only ever adds time."""
    spent: list[float] = []
    while not spent or (sum(spent) < SHORT_SECONDS and len(spent) < MOST_REPEATS):
        _synchronize()
        started = time.perf_counter()
        job()
        _synchronize()
        spent.append(time.perf_counter() - started)
    return min(spent)


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _parts(
    anatomy: Anatomy, steps: Sequence[_Step], batch: Batch, tokens: float, stretched: float = 1.0
) -> tuple[tuple[LayerTiming, ...], float]:
    """Seconds per layer, and of the head and the rest, for a batch of ``tokens``.

    ``stretched`` is the ratio of the tokens that the prefix was timed on to those of ``batch``.

    A fast step from boundary k over layers S takes
    ``rest + sum_{l >= k} (u F_l + v B_l) + sum_{l in S} (p + q r) w_l``. F and B are the operations of the cost model,
    and w is the sum of in and out features of a layer's modules. Each step's equation is divided by its seconds, so
    that the fit minimizes relative errors.
    """
    count, bounds = batch["input_ids"].numel(), batch.get("cu_seq_lens_q")
    sequence = count / (len(batch["input_ids"]) if bounds is None else len(bounds) - 1)
    share = float(labelled_tokens(batch["labels"])) / count
    operations = layer_costs(anatomy, {module.name: RANK for module in anatomy.modules}, RANK, sequence, share)
    features = [0] * anatomy.layer_count
    for module in anatomy.adaptable():
        features[module.layer] += module.lora_parameters(1)
    rows = []
    for step in steps:
        boundary, spent = min(step.layers), statistics.median(step.seconds)
        width = sum(features[layer] for layer in step.layers)
        if step.way == "prefix":
            row = [0.0, stretched * sum(operations.forward[:boundary]), 0.0, 0.0, 0.0]
        else:
            crossed = sum(operations.forward[boundary:]), sum(operations.backward[boundary:])
            row = [1.0, *crossed, width, width * step.rank]
        if any(row):
            rows.append(np.array(row) / spent)
    matrix = np.stack(rows)
    largest = matrix.max(axis=0)
    rest, forward, backward, fixed, slope = nnls(matrix / largest, np.ones(len(rows)))[0] / largest * tokens / count
    layers = tuple(
        LayerTiming(
            forward=forward * operations.forward[layer],
            backward=backward * operations.backward[layer],
            adapter_fixed=fixed * features[layer],
            adapter_per_parameter=slope,
        )
        for layer in range(anatomy.layer_count)
    )
    return layers, float(rest)
