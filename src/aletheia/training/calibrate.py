"""Time a few kinds of whole training steps, to find what each part of a step costs on this machine."""

import gc
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from transformers import PreTrainedModel

from aletheia.anatomy.read import read_anatomy
from aletheia.anatomy.schema import Anatomy
from aletheia.data.batches import PackSize, labelled_tokens
from aletheia.data.examples import Examples
from aletheia.data.order import training_batches
from aletheia.errors import SettingsError, TrainingError
from aletheia.planning.cost import layer_costs
from aletheia.probing.timings import LayerTiming, Timings
from aletheia.progress import Progress, Say, say_as_asked
from aletheia.training.loop import collator_of, fixed_size, takes_average
from aletheia.training.packing import packs
from aletheia.training.processes import Launch
from aletheia.training.settings import TrainSettings
from aletheia.training.timed import Step, Timer

ROUNDS = 3
SAMPLED_BATCHES = 200
RANK, HIGH_RANK = 16, 64  # adapters are timed at both; their time is taken to be linear in their parameters


def calibrate(
    model: PreTrainedModel,
    data: Examples,
    settings: TrainSettings | None = None,
    rounds: int = ROUNDS,
    show_progress: bool | Say = True,
    **options: Any,
) -> Timings:
    """Time a few kinds of whole training steps on batches of average size, and divide the seconds among their parts.

    The steps are those of a run with ``settings``, in the loop of its trainer: packed, compiled, recorded, recomputed.
    They differ in one respect each: how many layers backward crosses, how many of them are adapted, or the rank.
    Forward, backward and adapter times and the rest (head, loss, embedding, loop) are the non-negative least-squares
    solution over these steps. Layers of different shapes get seconds in proportion to their operations. A plain step of
    uniform LoRA, by transformers' trainer, is the baseline. What is compiled or recorded first does not count. The
    model stays as it is.

    Args:
        model: the base model, without adapters.
        data: rows to train on.
        settings: settings of the run.
        rounds: how often each kind of step is timed; the median counts.
        show_progress: print progress on stderr, or call this function with a line now and then.
        **options: settings by name, instead of ``settings``.

    Returns:
        Seconds of each part of a step.

    Raises:
        SettingsError: the settings are not possible for the model or the device.
        TrainingError: there are several processes, or the model is on another GPU than Trainer uses.
    """
    if settings is not None and options:
        raise SettingsError(f"`settings` and `{next(iter(options))}` are both given; expected one of them")
    if (processes := Launch.here().processes) > 1:
        raise TrainingError(f"steps are timed in one process, found {processes}; call it before you launch several")
    started = time.perf_counter()
    settings = _resolved(settings or TrainSettings(**options), model, data)
    anatomy = read_anatomy(model)
    size = fixed_size(data, settings) if settings.cuda_graphs and settings.recompute == "off" else None
    rows, tokens = _average_batch(data, settings, size)
    plain = settings.model_copy(update={"packing": "off", "group_by_length": False})
    random_rows, random_tokens = _average_batch(data, plain)
    batch, random_batch = (
        collator_of(how, data.pad_token_id, fits)(chosen.examples)
        for how, fits, chosen in ((settings, size, rows), (plain, None, random_rows))
    )
    last, middle = anatomy.layer_count - 1, anatomy.layer_count // 2
    upper = range(middle, last + 1)
    baseline = Step(range(last + 1), RANK, "plain")
    steps = [Step([last], RANK), Step(upper, RANK), Step([middle], RANK), Step(upper, HIGH_RANK)]
    if middle:
        steps.append(Step(upper, RANK, "prefix"))
    with (
        Progress("time", rounds * (1 + len(steps)), "measurements", show_progress) as progress,
        _as_it_was(model),
    ):
        timer = Timer(model, settings, size, say_as_asked(show_progress))
        for _ in range(rounds):  # each round has every kind, so that a slower machine slows all of them
            for step in (baseline, *steps):
                step.seconds.append(timer.seconds(step, random_rows if step is baseline else rows))
                progress.advance()
    layers, head = _parts(anatomy, steps, batch, tokens)
    return Timings(
        device=model.device.type,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        batch_size=settings.batch_size,
        tokens=tokens,
        random_padding=max(1.0, random_tokens / tokens),
        layers=layers,
        head=head,
        baseline=statistics.median(baseline.seconds) * random_tokens / random_batch["input_ids"].numel(),
        baseline_rank=RANK,
        computed_by=timer.ways,
        seconds=time.perf_counter() - started,
    )


def _resolved(settings: TrainSettings, model: PreTrainedModel, data: Examples) -> TrainSettings:
    """The settings as a run over ``data`` resolves them."""
    takes: dict[str, Any] = {
        "packing": "on" if packs(model, data, settings)[0] else "off",
        "averaging": "on" if takes_average(len(data), settings) else "off",
    }
    if any(module.fused for module in read_anatomy(model).adaptable()):
        takes["compile_layers"] = False  # adapted experts cannot be compiled
    return settings.model_copy(update=takes)


@contextmanager
def _as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Put back which parameters learn, and what trainers set: the random state and a field of the config."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    config = dict(vars(model.config))
    drawn, drawn_by_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        vars(model.config).clear()
        vars(model.config).update(config)
        random.setstate(drawn)
        np.random.set_state(drawn_by_numpy)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        gc.collect()  # a trainer refers to itself; it collects earlier ones, but the last one has no successor


def _average_batch(data: Examples, settings: TrainSettings, fits: PackSize | None = None) -> tuple[Examples, float]:
    """Rows of the batch whose size is nearest to the mean, and the mean in tokens, padding and filler included."""
    lengths = [len(example) for example in data.examples]
    size = min(settings.batch_size, len(lengths))

    def size_of(batch: Sequence[int]) -> int:
        own = [lengths[row] for row in batch]
        if settings.packing != "on":
            return max(own) * len(own)
        return fits.tokens if fits is not None and sum(own) <= fits.tokens else sum(own)

    count = min(SAMPLED_BATCHES, max(1, len(lengths) // size))
    batches = training_batches(lengths, size, count, settings.seed, settings.order)
    mean = statistics.fmean(map(size_of, batches))
    nearest = min(batches, key=lambda batch: abs(size_of(batch) - mean))
    return data.subset(nearest), mean


def _parts(
    anatomy: Anatomy, steps: Sequence[Step], batch: dict[str, Any], tokens: float
) -> tuple[tuple[LayerTiming, ...], float]:
    """Seconds per layer, and of the head and the rest, for a batch of ``tokens``; ``batch`` is the one that was timed.

    A fast step from boundary k over layers S takes
    ``rest + sum_{l >= k} c (F_l + B_l) + sum_{l in S} (p + q r) w_l``. F and B are the operations of the cost model,
    and w is the sum of in and out features of a layer's modules. Each step's equation is divided by its seconds, so
    that the fit minimizes relative errors. The prefix shows what a layer takes forward, and the rest of what it takes
    in a step is its backward. On a CPU the prefix of a tiny model may take longer than that, row by row: then all
    counts as forward.
    """
    count, bounds = batch["input_ids"].numel(), batch.get("cu_seq_lens_q")
    sequence = count / (len(batch["input_ids"]) if bounds is None else int((bounds.diff() > 0).sum()))
    share = float(labelled_tokens(batch["labels"])) / count
    operations = layer_costs(anatomy, {module.name: RANK for module in anatomy.modules}, RANK, sequence, share)
    both = [sum(pair) for pair in zip(operations.forward, operations.backward, strict=True)]
    features = [0] * anatomy.layer_count
    for module in anatomy.adaptable():
        features[module.layer] += module.lora_parameters(1)
    rows, forward = [], 0.0
    for step in steps:
        boundary, spent = min(step.layers), statistics.median(step.seconds)
        if step.way == "prefix":
            forward = spent / sum(operations.forward[:boundary])
            continue
        width = sum(features[layer] for layer in step.layers)
        rows.append(np.array([1.0, sum(both[boundary:]), width, width * step.rank]) / spent)
    matrix = np.stack(rows)
    largest = matrix.max(axis=0)
    rest, crossed, fixed, slope = nnls(matrix / largest, np.ones(len(rows)))[0] / largest
    more = tokens / count  # than were timed
    layers = []
    for layer in range(anatomy.layer_count):
        whole = crossed * both[layer]
        alone = min(whole, (forward or crossed) * operations.forward[layer])
        layers.append(
            LayerTiming(
                forward=more * alone,
                backward=more * (whole - alone),
                adapter_fixed=more * fixed * features[layer],
                adapter_per_parameter=more * slope,
            )
        )
    return tuple(layers), float(more * rest)
