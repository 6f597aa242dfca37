"""The choice of ``learning_rate`` auto: a few rates take the same first steps, and the held-out loss decides.

Afterwards the adapters and the random state are restored, so the run is the same as with the chosen rate as a number.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import fmean, stdev

import torch
from peft import PeftModel
from torch import nn

from aletheia.anatomy.modes import in_mode
from aletheia.data.batches import collate, labelled_tokens, on_device_of
from aletheia.data.examples import Example, Examples
from aletheia.data.order import batches_within
from aletheia.errors import SettingsError, TrainingError
from aletheia.prefix.cache import PrefixCache, collate_with_prefix
from aletheia.progress import Progress, Say
from aletheia.runs.schema import RateRace
from aletheia.training.fast_steps import fast_steps
from aletheia.training.loop import RowTrainer
from aletheia.training.settings import Recompute
from aletheia.training.sharded import is_sharded

FACTORS = (1 / 3, 1.0, 3.0)  # multiples of the default rate: a rate wrong by a factor of two costs little
STEPS = 8  # per rate; after 4, a rate that is three times too high looked best (docs/log.md, 2026-11-27)
MOST_ROWS = 32  # held-out rows that decide
FEWEST_ROWS = 8  # rows needed for a standard error of the mean
STANDARD_ERRORS = 2.0
HALF_SCALE = 2.0**10  # initial scale of a float16 loss: torch's default would skip several of so few steps

MakeBatch = Callable[[Sequence[Example]], dict[str, torch.Tensor]]


def race_steps(run_steps: int) -> int:
    """Optimizer steps that each rate gets, in a run of ``run_steps``."""
    return min(run_steps, STEPS)


def share_of_rate(step: int, steps: int) -> float:
    """The share of the rate at ``step`` of a race: a short warm-up, then a linear decay towards zero."""
    warm_up = 1 if steps < 6 else 2
    return (step + 1) / (warm_up + 1) if step < warm_up else (steps - step) / (steps - warm_up)


def choose(losses: Mapping[float, Sequence[float] | None], default: float) -> float:
    """The rate to take: that of the lowest mean loss if it is clearly better than the default, else the default.

    Clearly better means that the mean of the paired differences between rows is below minus two standard errors, over
    at least eight rows. If the loss of the default was not finite, the lowest remaining rate replaces it.

    Args:
        losses: by rate, the loss of each row, the same rows for all; None if one was not finite.
        default: one of the rates.

    Raises:
        TrainingError: no rate has finite losses.
    """
    left = {rate: rows for rate, rows in losses.items() if rows is not None}
    if not left:
        tried = ", ".join(f"{rate:.1e}" for rate in losses)
        raise TrainingError(
            f"`learning_rate` auto tried {tried}, but no loss was finite; expected at least one; give a lower rate as "
            "a number, or set `dtype` float32"
        )
    fallback = default if default in left else min(left)
    clear = [rate for rate in left if _is_clearly_lower(left[rate], left[fallback])]
    return min(clear, key=lambda rate: fmean(left[rate]), default=fallback)


def _is_clearly_lower(rows: Sequence[float], than: Sequence[float]) -> bool:
    differences = [loss - other for loss, other in zip(rows, than, strict=True)]
    if len(differences) < FEWEST_ROWS:
        return False
    return fmean(differences) < -STANDARD_ERRORS * stdev(differences) / math.sqrt(len(differences))


def race_rates(
    trainer: RowTrainer,
    steps: Sequence[Sequence[Example]],
    held_out: Examples,
    boundary: int = 0,
    prefix: PrefixCache | None = None,
    recompute: Recompute = "off",
    liger: bool = True,
    show_progress: bool | Say = False,
) -> RateRace:
    """Train a few steps at a third of the trainer's rate, at that rate, and at three times that rate, and choose one.

    Each rate starts from the present adapters, with the run's seed, optimizer and clipping. Its loss is then measured
    on up to 32 held-out rows, in nats per labelled token of a row.

    Args:
        trainer: a trainer that is not training yet; its ``learning_rate`` is the default rate.
        steps: the rows of each optimizer step.
        held_out: the rows that decide.
        boundary: with ``prefix``, the layer at which stored states enter.
        prefix: a cache that holds every row; the layers below may not be in memory.
        recompute: what is computed again in backward.
        liger: whether to use Liger's kernels on a GPU where they are installed.
        show_progress: print progress on stderr, or call this function with a line now and then.

    Returns:
        The rates, their mean losses, and the chosen rate.

    Raises:
        SettingsError: layers are sharded over processes.
        TrainingError: no rate has a finite loss.
    """
    model, default, pad = trainer.model, trainer.args.learning_rate, held_out.pad_token_id
    assert isinstance(model, PeftModel)
    if is_sharded(trainer):
        raise SettingsError("`learning_rate` is auto, but layers are sharded over processes; expected a number")
    make: MakeBatch = partial(collate, pad_token_id=pad)
    if prefix is not None:
        make = partial(collate_with_prefix, pad_token_id=pad, cache=prefix)
    count = min(len(held_out), MOST_ROWS)
    judges = [held_out[number * len(held_out) // count] for number in range(count)]  # evenly spaced
    losses: dict[float, list[float] | None] = {}
    with (
        Progress("rate", len(FACTORS) * len(steps), "steps", show_progress) as progress,
        fast_steps(model, boundary if prefix is not None else None, recompute=recompute, liger=liger),
    ):
        for rate in (default * factor for factor in FACTORS):
            with _as_it_was(model):
                torch.manual_seed(trainer.args.seed)
                is_finite = _learn(trainer, rate, steps, make, progress)
                losses[rate] = _judge(trainer, judges, make) if is_finite else None
    chosen = choose(losses, default)
    means = tuple(fmean(rows) if rows is not None else None for rows in losses.values())
    return RateRace(steps=len(steps), rows=len(judges), rates=tuple(losses), losses=means, chosen=chosen)


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Restore adapters and random state on leaving, bit for bit."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in learning]
    devices = range(torch.cuda.device_count()) if learning[0].device.type == "cuda" else ()
    try:
        with torch.random.fork_rng(devices), in_mode(model, training=True):
            yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(learning, start, strict=True):
                parameter.copy_(before)
                parameter.grad = None


def _optimizer(trainer: RowTrainer, rate: float) -> torch.optim.Optimizer:
    """The run's optimizer at another rate; the trainer creates its own later."""
    default = trainer.args.learning_rate
    try:
        trainer.args.learning_rate = rate
        return trainer.create_optimizer()
    finally:
        trainer.args.learning_rate, trainer.optimizer = default, None


def _learn(
    trainer: RowTrainer, rate: float, steps: Sequence[Sequence[Example]], make: MakeBatch, progress: Progress
) -> bool:
    """Take all steps; returns whether every loss was finite."""
    args = trainer.args
    optimizer = _optimizer(trainer, rate)
    peaks = [group["lr"] for group in optimizer.param_groups]
    learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    scaler = torch.amp.GradScaler(args.device.type, init_scale=HALF_SCALE, enabled=args.fp16)
    for number, rows in enumerate(steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * share_of_rate(number, len(steps))
        groups = batches_within([len(row) for row in rows], trainer.most_tokens, args.per_device_train_batch_size)
        batches = [make([rows[at] for at in group]) for group in groups]
        tokens = [int(labelled_tokens(batch["labels"])) for batch in batches]
        for batch, count in zip(batches, tokens, strict=True):
            loss = _loss(trainer, batch) * (count / sum(tokens))
            if not math.isfinite(loss.item()):
                return False
            torch.autograd.backward(scaler.scale(loss))
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(learning, args.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        progress.advance()
    return True


@torch.no_grad()
def _judge(trainer: RowTrainer, rows: Sequence[Example], make: MakeBatch) -> list[float] | None:
    """The loss of each row, one at a time; None where one is not finite."""
    assert trainer.model is not None
    losses: list[float] = []
    with in_mode(trainer.model, training=False):
        for row in rows:
            losses.append(_loss(trainer, make([row])).item())
            if not math.isfinite(losses[-1]):
                return None
    return losses


def _loss(trainer: RowTrainer, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    model = trainer.model
    assert model is not None
    with trainer.accelerator.autocast():
        loss: torch.Tensor = model(**on_device_of(model, batch), use_cache=False).loss
    return loss


def summary(race: RateRace) -> str:
    """The chosen rate and the losses of all rates, in one line."""
    tried = ", ".join(
        f"{'not finite' if loss is None else f'{loss:.3f}'} at {rate:.1e}"
        for rate, loss in zip(race.rates, race.losses, strict=True)
    )
    return f"rate   {race.chosen:.1e} chosen; held-out loss {tried}"
