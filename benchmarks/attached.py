"""Steps of TRL's SFTTrainer with and without ``aletheia.attach``, in the first epoch and from the cache."""

import tempfile
import time

import torch
import trl
from datasets import Dataset
from ratios import table
from transformers import TrainerCallback

import aletheia
from aletheia.anatomy.load import Loaded
from aletheia.data.examples import Examples
from aletheia.planning.plan import Plan
from aletheia.probing.scores import Scores

BATCH_SIZE, STEPS, ROUNDS = 8, 4, 3  # steps per epoch


class Clock(TrainerCallback):
    """Seconds of every step, from the first forward pass to the step of the optimizer."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *given, **named) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *given, **named) -> None:
        self.seconds.append(time.perf_counter() - self._began)


def steps(base: Loaded, rows: Dataset, plan: Plan, attached: bool) -> list[float]:
    """Seconds of two epochs of SFTTrainer with its defaults, in order."""
    model = aletheia.adapt(base.model, plan)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = trl.SFTConfig(
            output_dir=folder, num_train_epochs=2, per_device_train_batch_size=BATCH_SIZE, report_to="none",
            save_strategy="no", disable_tqdm=True, use_cpu=not torch.accelerator.is_available(),
        )  # fmt: skip
        trainer = trl.SFTTrainer(model, config, train_dataset=rows, processing_class=base.tokenizer, callbacks=[clock])
        if attached:
            aletheia.attach(trainer, plan)
        trainer.train()
    model.unload()
    return clock.seconds


def attached_steps(base: Loaded, data: Examples, scores: Scores) -> list[str]:
    """A Markdown table: SFTTrainer alone, attached in the first epoch, attached from the cache."""
    plan = aletheia.plan(scores, policy="last", freeze_after=0)
    chosen = data.examples[: BATCH_SIZE * STEPS]
    rows = Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in chosen])
    own: list[float] = []
    first: list[float] = []
    later: list[float] = []
    for _ in range(ROUNDS):
        plain, ours = (steps(base, rows, plan, attached) for attached in (False, True))
        own += [sum(plain[:STEPS])]
        first += [sum(ours[:STEPS])]
        own += [sum(plain[STEPS:])]
        later += [sum(ours[STEPS:])]
    found = {"SFTTrainer": own[::2], "attached, first epoch": first}
    again = {"SFTTrainer": own[1::2], "attached, second epoch": later}
    return [
        f"TRL {trl.__version__}, SFTTrainer with its defaults, gradient checkpointing among them. Both sides have the same adapters in "
        f"layers {plan.layers[0]}-{plan.layers[-1]} of {plan.layer_count}. Seconds of an epoch of {STEPS} steps of {BATCH_SIZE} rows, "
        f"{ROUNDS} interleaved rounds.",
        "",
        "| steps | seconds | speed-up |",
        "|---|---:|---:|",
        *table(found),
        table(again)[1],
    ]
