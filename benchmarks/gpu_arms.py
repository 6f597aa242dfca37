"""Arms of the benchmark of a GPU: whole steps of real trainers, and of ours, over the same rows."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch
from gpu_clock import Batch, Clock, Collate, Counted, Ran, trained
from gpu_models import Work, some_tokenizer
from transformers import Trainer, TrainingArguments
from transformers.utils import is_liger_kernel_available

import aletheia
from aletheia.data.batches import collate, on_device_of
from aletheia.data.examples import Example
from aletheia.data.order import training_batches
from aletheia.execution.backend import compile_seconds
from aletheia.execution.fast import bfloat16_autocast
from aletheia.lab.campaign.steps import StepKind, prepared
from aletheia.planning.plan import Plan
from aletheia.prefix.cache import MemoryCache, collate_with_prefix
from aletheia.prefix.fill import fill
from aletheia.training.attach import Attachment, AttachSettings
from aletheia.training.loop import RowTrainer, device_arguments, training_arguments
from aletheia.training.packing import packs, recorded_tokens
from aletheia.training.recorder import Recorder
from aletheia.training.settings import TrainSettings

LONGEST_SECONDS = 240  # of a process of Unsloth


@dataclass
class Measured:
    """Steps of one arm, warm-up left out; one entry per step.

    ``tokens`` are real ones, ``places`` count padding, too; ``operations`` is what a step must compute at least.
    """

    name: str
    step_seconds: list[float]
    tokens: list[int]
    places: list[int]
    operations: list[float]
    peak_bytes: int
    notes: list[str] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Real tokens over all steps."""
        return sum(self.tokens) / sum(self.step_seconds)

    @property
    def median_seconds(self) -> float:
        """Of a step."""
        return statistics.median(self.step_seconds)

    def share(self, limit_flops: float) -> float:
        """Of the time that the least operations take at ``limit_flops`` per second, in the time that was taken."""
        return sum(self.operations) / limit_flops / sum(self.step_seconds)


def measured(work: Work, name: str, plan: Plan, ran: Ran, steps: slice, cached: bool = False) -> Measured:
    """The result of an arm, of the steps in ``steps``; its peak memory is that of all its epochs."""
    tokens, labelled, places = map(list, zip(*ran.batches[steps], strict=True))
    least = [work.operations.of(real, lost, plan.boundary, cached) for real, lost in zip(tokens, labelled, strict=True)]
    return Measured(name, ran.seconds[steps], tokens, places, least, max(ran.peaks))


def common(work: Work, folder: str) -> dict[str, Any]:
    """Arguments of Trainer that are no default: nothing is written, rows come in their order, and then once more.

    So the timed steps, the last ones, cover every row once, as in all arms that do not say otherwise.
    """
    return {
        "output_dir": folder,
        "max_steps": work.warm_up + work.steps,
        "per_device_train_batch_size": work.shape.batch_size,
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": work.device == "cpu",
    }


def plain(work: Work) -> list[Measured]:
    """PEFT and transformers' Trainer, ``bf16=True``."""
    model = aletheia.adapt(work.model(), work.uniform)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(**common(work, folder), bf16=True, remove_unused_columns=False)
        collator = partial(collate, pad_token_id=work.data.pad_token_id)
        trainer = Trainer(model, arguments, collator, train_dataset=work.data)
        ran = trained(trainer, work.device)
    return [measured(work, "plain PEFT and Trainer", work.uniform, ran, work.last_steps)]


def trl(work: Work) -> list[Measured]:
    """SFTTrainer with its defaults, but for ``max_length``: no row is cut."""
    return [measured(work, "TRL, defaults", work.uniform, sft(work), work.last_steps)]


def trl_at_its_best(work: Work) -> list[Measured]:
    """SFTTrainer with packing and Liger's kernels, nothing recomputed. Its steps go over whole blocks, not rows."""
    blocks, tokens = work.shape.packed
    has_liger = is_liger_kernel_available()
    options: dict[str, Any] = {"packing": True, "max_length": tokens, "per_device_train_batch_size": blocks}
    options |= {"gradient_checkpointing": False, "use_liger_kernel": has_liger}
    if hasattr(work.shape.config, "num_experts"):
        options["liger_kernel_config"] = {"swiglu": False}  # its experts would go past the adapters
    found = measured(work, "TRL, packing, Liger", work.uniform, sft(work, **options), work.last_steps)
    found.notes += [f"{blocks} blocks of {tokens} tokens"] + ([] if has_liger else ["Liger is not installed"])
    return [found]


def unsloth(work: Work, packages: Path | None, recomputed: str | bool = "unsloth") -> list[Measured]:
    """Unsloth with packing, and with its own recomputation or none. Its steps go over whole blocks, not rows.

    It runs in a process of its own, which finds the folder ``packages`` before any other.
    """
    paths = [str(packages), *sys.path] if packages else sys.path
    if PathFinder.find_spec("unsloth", paths) is None:
        raise ModuleNotFoundError("No module named 'unsloth'")
    blocks, tokens = work.shape.packed
    trainer = common(work, str(work.saved / "out")) | {"packing": True, "max_length": tokens}
    request = {
        "device": work.device,
        "recomputed": recomputed,
        "adapters": as_unsloth_names_them(work.uniform),
        "trainer": trainer | {"per_device_train_batch_size": blocks},
    }
    (work.saved / "request.json").write_text(json.dumps(request))
    command = [sys.executable, str(Path(__file__).with_name("gpu_unsloth.py")), str(work.saved)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LONGEST_SECONDS)
    if done.returncode:
        raise RuntimeError(f"Unsloth: {done.stderr.strip()[-1500:]}")
    found = json.loads((work.saved / "ran.json").read_text())
    how = "" if recomputed else ", no recomputation"
    one = measured(work, f"Unsloth, packing{how}", work.uniform, Ran(**found["ran"]), work.last_steps)
    one.notes += found["notes"]
    return [one]


def as_unsloth_names_them(plan: Plan) -> dict[str, Any]:
    """The adapters of a plan that has the same in every layer."""
    stacks = {adapter.name.split(".", 3)[-1] for adapter in plan.adapters if adapter.fused}
    return {
        "r": plan.adapters[0].rank,
        "lora_alpha": plan.adapters[0].alpha,
        "target_modules": sorted({adapter.name.rpartition(".")[2] for adapter in plan.adapters if not adapter.fused}),
        "target_parameters": sorted(stacks) or None,
    }


def sft(work: Work, **options: Any) -> Ran:
    """A few steps of SFTTrainer."""
    import trl as library
    from datasets import Dataset

    base = work.model()
    rows = Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in work.data.examples])
    with unpatched(sys.modules[type(base).__module__]), tempfile.TemporaryDirectory() as folder:
        config = library.SFTConfig(**common(work, folder) | {"max_length": work.shape.longest} | options)
        model = aletheia.adapt(base, work.uniform)
        trainer = library.SFTTrainer(model, config, train_dataset=rows, processing_class=some_tokenizer())
        return trained(trainer, work.device)


@contextmanager
def unpatched(module: Any) -> Iterator[None]:
    """Give a module of transformers its own functions and classes back: Liger puts others in their places."""
    before = dict(vars(module))
    try:
        yield
    finally:
        vars(module).update(before)


def ours_every_layer(work: Work, how: str = "", **settings: Any) -> list[Measured]:
    """Our training with adapters in every layer; ``how`` tells ``settings`` that are no defaults."""
    ran, notes = ours(work, work.uniform, 2, settings)
    found = measured(work, f"ours, every layer{how}", work.uniform, ran, work.last_steps)
    found.notes += notes
    return [found]


def ours_upper_half(work: Work, how: str = "", **settings: Any) -> list[Measured]:
    """Our training of the upper half: an epoch that fills the cache in memory, later ones that read it.

    The first steps of the first epoch warm up, so it is not over every row.
    """
    ran, notes = ours(work, work.half, 3, settings)
    first = measured(work, f"ours, upper half, first epoch{how}", work.half, ran, slice(work.warm_up, work.steps))
    later = measured(work, f"ours, upper half, cached{how}", work.half, ran, work.last_steps, cached=True)
    first.peak_bytes, later.peak_bytes = ran.peaks[0], ran.peaks[-1]
    later.notes += notes
    return [first, later]


def ours_recomputed(work: Work) -> list[Measured]:
    """The same with selective recomputation; its first epoch is not reported."""
    return ours_upper_half(work, ", selective recomputation", gradient_checkpointing="selective")[1:]


def in_nf4(work: Work, arm: Callable[..., list[Measured]]) -> list[Measured]:
    """An arm over weights in NF4, by bitsandbytes."""
    with work.quantized():
        return arm(work, ", NF4")


def ours(work: Work, plan: Plan, epochs: int, options: dict[str, Any]) -> tuple[Ran, list[str]]:
    """Epochs over the rows as in ``aletheia train``, without the work around training; and its messages."""
    model = aletheia.adapt(work.model(), plan)
    settings = TrainSettings(
        epochs=epochs, batch_size=work.shape.batch_size, keep="last", early_stop=False, averaging="off", **options
    )
    packed, reason = packs(model, work.data, settings)
    settings = settings.model_copy(update={"packing": "on" if packed else "off"})
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(
            settings, folder, max_steps=epochs * work.steps, learning_rate=1e-4, **device_arguments(model)
        )
        held_out = work.data.subset(range(work.shape.batch_size))
        trainer = RowTrainer(model, work.data, held_out, settings, arguments, Recorder(0, False))
        notes: list[str] = [f"padded: {reason}"] if reason else []
        attached = AttachSettings(cache="memory" if plan.boundary else "off", compile_layers=settings.compile_layers)
        attachment = Attachment(trainer, plan, attached, notes.append, settings.recompute)
        attachment.packed = packed
        attachment.graphed = recorded_tokens(trainer, settings, notes.append)
        attachment.install()
        ran = trained(trainer, work.device)
    return ran, [*notes, *attachment.ways, f"{compile_seconds():.1f} s spent on compiling so far"]


def plain_alone(work: Work) -> list[Measured]:
    """No trainer around the plain step: what its loop adds is the difference."""
    return [bare(work, StepKind("plain PEFT, no trainer", work.uniform))]


def every_layer_alone(work: Work) -> list[Measured]:
    """No trainer around our step with adapters in every layer."""
    return [bare(work, StepKind.fast("ours, every layer, no trainer", work.uniform))]


def cached_alone(work: Work) -> list[Measured]:
    """No trainer around our step from the cache."""
    return [bare(work, StepKind.fast("ours, upper half, cached, no trainer", work.half, cached=True))]


def bare(work: Work, kind: StepKind) -> Measured:
    """Batch to the device, forward, backward, clipping, fused AdamW."""
    model, data, size = work.model(), work.data, work.shape.batch_size
    lengths = [len(row) for row in data.examples]
    epoch = training_batches(lengths, size, work.steps, 0, "grouped" if kind.grouped else "random")
    cache = MemoryCache()
    if kind.cached:
        with prepared(model, StepKind.prefix("fill", kind.plan, False)) as adapted:
            fill(adapted, kind.plan.boundary, data.examples, cache, size, show_progress=False)
    clock, counted = Clock(work.device), Counted(batch_maker(kind, data.pad_token_id, cache))
    with prepared(model, kind) as adapted:
        parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        clock.mark()
        for rows in (*epoch[: work.warm_up], *epoch):
            batch = on_device_of(adapted, counted([data[row] for row in rows]))
            with nullcontext() if kind.in_place else bfloat16_autocast(adapted):
                loss = adapted(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            clock.mark()
        clock.on_epoch_end()
    ran = Ran(clock.seconds(), counted.batches, clock.peaks)
    return measured(work, kind.name, kind.plan, ran, work.last_steps, kind.cached)


def batch_maker(kind: StepKind, pad_token_id: int, cache: MemoryCache) -> Collate:
    """What makes a batch of rows for a kind of step."""

    def make(rows: list[Example]) -> Batch:
        if kind.cached:
            return collate_with_prefix(rows, pad_token_id, cache)
        return collate(rows, pad_token_id)

    return make


ARMS: dict[str, Callable[[Work], list[Measured]]] = {
    "plain": plain,
    "trl": trl,
    "trl-best": trl_at_its_best,
    "every-layer": ours_every_layer,
    "upper-half": ours_upper_half,
    "every-layer-compiled": partial(ours_every_layer, how=", compiled", compile_layers=True),
    "upper-half-compiled": partial(ours_upper_half, how=", compiled", compile_layers=True),
    "every-layer-graphs": partial(ours_every_layer, how=", graphs", packing="on", cuda_graphs=True),
    "upper-half-graphs": partial(ours_upper_half, how=", graphs", packing="on", cuda_graphs=True),
    "recomputed": ours_recomputed,
    "every-layer-padded": partial(ours_every_layer, how=", padded", packing="off"),
    "upper-half-padded": partial(ours_upper_half, how=", padded", packing="off"),
    "every-layer-nf4": partial(in_nf4, arm=ours_every_layer),
    "upper-half-nf4": partial(in_nf4, arm=ours_upper_half),
    "cached-alone": cached_alone,
    "plain-alone": plain_alone,
    "every-layer-alone": every_layer_alone,
}
UNSLOTH: dict[str, Callable[[Work, Path | None], list[Measured]]] = {
    "unsloth": unsloth,
    "unsloth-kept": partial(unsloth, recomputed=False),
}
