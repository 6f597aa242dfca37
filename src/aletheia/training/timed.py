"""Kinds of training steps and their times: a trainer takes each over one batch, again and again."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from aletheia.adapters.adapt import lora_config
from aletheia.anatomy.modes import in_mode
from aletheia.anatomy.read import read_anatomy
from aletheia.data.batches import PackSize, collate, on_device_of
from aletheia.data.examples import Example, Examples
from aletheia.execution.backend import entered, is_behind, step_ways
from aletheia.execution.recompute import recomputation
from aletheia.prefix.boundary import frozen_prefix
from aletheia.prefix.cache import MemoryCache
from aletheia.prefix.source import PrefixSource
from aletheia.prefix.stored import prefix_output, stored_prefix
from aletheia.progress import Say
from aletheia.training.feed import kept_on_host
from aletheia.training.loop import RowTrainer, device_arguments, training_arguments
from aletheia.training.packing import recorded_tokens
from aletheia.training.recorder import Recorder
from aletheia.training.settings import TrainSettings

SHORT_SECONDS, MOST_REPEATS = 0.2, 25
BEHIND_REPEATS = 5  # at least, where a step may end long after it was launched
WARM_UP = 1  # steps: the first one makes the optimizer's state and takes new memory
COMPILED_WARM_UP = 2  # in the first, layers are compiled or show how they are called; in the second, all are recorded
RATE = 1e-4


@dataclass(frozen=True)
class Step:
    """A kind of step and its measured seconds, one per round.

    ``way`` is ``fast`` (from a stored prefix where there is one), ``plain`` (as PEFT and transformers compute it) or
    ``prefix`` (only what the first epoch computes and stores: the layers below the first of ``layers``).
    """

    layers: Sequence[int]
    rank: int
    way: Literal["fast", "plain", "prefix"] = "fast"
    seconds: list[float] = field(default_factory=list)


class Timer:
    """Times kinds of steps of one model as a run with ``settings`` takes them; the model is left as it was.

    ``ways`` names how the fast steps that were timed are computed.
    """

    def __init__(self, model: PreTrainedModel, settings: TrainSettings, size: PackSize | None, say: Say) -> None:
        """Prepare; nothing changes before :meth:`seconds`.

        Args:
            model: the base model, without adapters.
            settings: settings of the run, with ``packing`` on or off.
            size: the size that packed batches are filled up to, with ``cuda_graphs``.
            say: called with a line when layers are recorded, or cannot be.
        """
        self.ways: tuple[str, ...] = ()
        self._model, self._size, self._tell = model, size, say
        # what happens around steps, and what the seconds of a batch do not depend on
        self._settings = settings.model_copy(
            update={"gradient_accumulation_steps": 1, "keep": "last", "early_stop": False, "report_to": ()}
        )
        self._is_compiled = is_behind(model.device) or settings.compile_layers or settings.cuda_graphs
        self._computed: torch.Tensor | None = None  # states that no cache can hold
        self._modules = read_anatomy(model).adaptable()

    def seconds(self, step: Step, rows: Examples) -> float:
        """Seconds of a step of this kind over a batch of ``rows``: the median of those that a trainer takes."""
        wanted = [module for module in self._modules if module.layer in step.layers]
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="aletheia-"))
            stack.enter_context(in_mode(self._model, training=True))
            adapted = get_peft_model(self._model, lora_config(wanted, self._model, step.rank, 2.0 * step.rank))
            stack.callback(adapted.unload)
            if step.way == "plain":
                if self._settings.recompute != "off":  # so would anyone whose steps do not fit otherwise
                    stack.enter_context(recomputation(adapted, "full"))
                return self._of_steps(_plain_trainer(adapted, rows, folder))
            trainer, boundary = self._trainer(adapted, rows, folder), min(step.layers)
            source = stack.enter_context(self._as_trained(trainer, boundary))
            if source is None:
                return self._of_steps(trainer)
            fill = self._filling(trainer, rows, boundary, source)
            if step.way == "prefix":
                return self._of_prefix(fill)
            source.cache = MemoryCache()
            fill()
            source.settle()
            return self._of_steps(trainer)

    def _trainer(self, adapted: PeftModel, rows: Examples, folder: str) -> "_OneBatch":
        """The trainer of a run, over ``rows`` again and again."""
        steps = MOST_REPEATS + COMPILED_WARM_UP + 1
        again = rows.subset(steps * list(range(len(rows))))
        settings = self._settings.model_copy(update={"batch_size": len(rows)})
        given: dict[str, Any] = {"eval_strategy": "no", "save_strategy": "no", "learning_rate": RATE}
        arguments = training_arguments(settings, folder, max_steps=steps, **given, **device_arguments(adapted))
        trainer = _OneBatch(adapted, again, rows, settings, arguments, Recorder(0, False))
        trainer.size = self._size
        trainer.begin_average()
        return trainer

    @contextmanager
    def _as_trained(self, trainer: RowTrainer, boundary: int) -> Iterator[PrefixSource | None]:
        """The contexts of a training step; yields the source of stored states where there is a prefix."""
        adapted, settings, said = trainer.model, self._settings, list[str]()
        assert adapted is not None
        graphed = recorded_tokens(trainer, settings, said.append)
        given = settings.recompute, settings.packing == "on", settings.compile_layers, settings.liger, graphed
        ways = step_ways(adapted, "loss", *given, said.append)
        source = None
        with ExitStack() as stack:
            trainer.add_callback(_Feed(trainer, stack))
            if boundary:
                source = PrefixSource(adapted, boundary, lambda dtype: _NeverFull(), trusted=True)
                states = partial(self._states, source)
                stack.enter_context(stored_prefix(adapted, boundary, source=states))
            stack.enter_context(frozen_prefix(adapted))
            stack.enter_context(entered(adapted, ways))
            yield source
        for line in said:
            self._tell(line)
        failed = any(line.startswith("graphs off") for line in said)
        self.ways = tuple(name for name in ways if not (failed and name == "layers as CUDA graphs"))

    def _states(self, source: PrefixSource, batch: Mapping[str, Any]) -> torch.Tensor | None:
        found = source(batch)
        return self._computed if found is None else found

    def _filling(self, trainer: RowTrainer, rows: Examples, boundary: int, source: PrefixSource) -> Callable[[], None]:
        """A function that computes the states of the batch and begins to store them, as the first epoch does."""
        model = trainer.model
        assert model is not None
        collate_as_trained: Any = trainer.data_collator
        batch = on_device_of(model, collate_as_trained(rows.examples))

        def fill() -> None:
            with trainer.accelerator.autocast():
                if source(batch) is None:  # nothing can be stored, so the layers run with every batch
                    self._computed = prefix_output(model, boundary, batch)

        return fill

    def _of_steps(self, trainer: Trainer) -> float:
        watch = _Watch(trainer.args.device, COMPILED_WARM_UP if self._is_compiled else WARM_UP)
        trainer.add_callback(_Clock(watch))
        trainer.train()
        return watch.seconds

    def _of_prefix(self, fill: Callable[[], None]) -> float:
        watch = _Watch(self._model.device, COMPILED_WARM_UP if self._is_compiled else 0)
        watch.mark()
        while not watch.is_done:
            fill()
            watch.mark()
        return watch.seconds


class _OneBatch(RowTrainer):
    """The trainer of a run; its rows come in their order, so that all batches have the same."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self._rows)


class _Feed(TrainerCallback):
    """Feeds a trainer as a run does, from its first batch on until ``stack`` is closed."""

    def __init__(self, trainer: Trainer, stack: ExitStack) -> None:
        self._trainer, self._stack = trainer, stack

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The loader is there by now."""
        self._stack.enter_context(kept_on_host(self._trainer))


class _NeverFull(MemoryCache):
    """Takes states, and still lacks all of them."""

    def missing(self, rows: Sequence[Example]) -> list[Example]:
        """All rows."""
        return list(rows)


def _plain_trainer(adapted: PeftModel, rows: Examples, folder: str) -> Trainer:
    """transformers' own trainer, with its defaults, over ``rows`` again and again."""
    steps, dtype = MOST_REPEATS + COMPILED_WARM_UP + 1, adapted.dtype
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=len(rows),
        train_sampling_strategy="sequential",
        learning_rate=RATE,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=adapted.device.type == "cpu",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # otherwise Trainer splits every batch over all GPUs it sees
    collator = partial(collate, pad_token_id=rows.pad_token_id)
    trainer = Trainer(adapted, arguments, collator, train_dataset=rows.subset(steps * list(range(len(rows)))))
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Watch:
    """Times of what is done again and again, from the end of one to the end of the next.

    They are times of the device: nothing waits for it in between.
    """

    def __init__(self, device: torch.device, warm_up: int) -> None:
        self._is_behind, self._warm_up = is_behind(device), warm_up
        self._marks: list[Any] = []
        self._seen: list[float] = []  # on the host

    def mark(self) -> None:
        """The beginning of the first one, or the end of another."""
        self._seen.append(time.perf_counter())
        if self._is_behind:
            event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append(event)

    @property
    def has_begun(self) -> bool:
        """Whether there is a mark."""
        return bool(self._seen)

    @property
    def is_done(self) -> bool:
        """Whether enough were timed after those that warm up."""
        taken = len(self._seen) - 1 - self._warm_up
        if taken < (BEHIND_REPEATS if self._is_behind else 1):
            return False
        return taken >= MOST_REPEATS or self._seen[-1] - self._seen[self._warm_up] >= SHORT_SECONDS

    @property
    def seconds(self) -> float:
        """The median."""
        if self._is_behind:
            torch.cuda.synchronize()
            spent = [float(before.elapsed_time(after)) / 1000 for before, after in pairwise(self._marks)]
        else:
            spent = [after - before for before, after in pairwise(self._seen)]
        return statistics.median(spent[self._warm_up :])


class _Clock(TrainerCallback):
    """Marks the steps of a trainer, and ends its training when enough of them are timed."""

    def __init__(self, watch: _Watch) -> None:
        self._watch = watch

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Begin with the first step."""
        if not self._watch.has_begun:
            self._watch.mark()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the end of a step."""
        self._watch.mark()
        control.should_training_stop = control.should_training_stop or self._watch.is_done
