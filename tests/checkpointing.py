"""A tiny run with Trainer, and the same as a program that tests kill or interrupt."""

import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tiny import make_model, make_tokenizer
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator
from transformers.trainer_callback import PrinterCallback

from aletheia.errors import AletheiaError
from aletheia.runs import manifest
from aletheia.training.checkpoints import trustworthy_checkpoints
from aletheia.training.interrupts import interrupts

STEPS = 8
ABOUT = {"model": "tiny", "learning_rate": 0.01}


class Rows(torch.utils.data.Dataset):
    """Rows of random tokens, the same each time."""

    def __init__(self, count=24):
        self.ids = torch.randint(1, 250, (count, 8), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, row):
        return {"input_ids": self.ids[row], "labels": self.ids[row]}


class Curve(TrainerCallback):
    """The loss of every step."""

    def __init__(self):
        self.losses = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.losses[state.global_step] = logs["loss"]


def make_trainer(out, callbacks=(), trainer_class=Trainer, model=None, **settings):
    """LoRA with dropout on a tiny Llama; 24 rows in batches of 2."""
    torch.manual_seed(0)
    if model is None:
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
        model = get_peft_model(make_model("llama", layers=2), lora)
    defaults = {"max_steps": STEPS, "save_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.01}
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_steps": 1, "use_cpu": True}
    arguments = TrainingArguments(str(out), **defaults | quiet | settings)
    rows = Rows()
    trainer = trainer_class(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows, callbacks=list(callbacks),
        processing_class=make_tokenizer(), data_collator=default_data_collator,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def weights(trainer):
    """The adapter's bytes."""
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters() if "lora_" in name}


class Slow(TrainerCallback):
    """Say each step, and take some time for it, so that a signal meets it."""

    def on_step_end(self, args, state, control, **kwargs):
        print("step", state.global_step, flush=True)
        time.sleep(0.05)


def main(out, pause):
    """Train into ``out``, from where an earlier run was; each part of a save takes ``pause`` seconds."""
    for name in ("file_sha256", "sync", "write_text"):
        if float(pause):
            original = getattr(manifest, name)

            def slowly(*given, original=original):
                time.sleep(float(pause))
                return original(*given)

            setattr(manifest, name, slowly)
    torch.set_num_threads(1)
    try:
        with interrupts() as interrupted:
            trainer = make_trainer(out, [interrupted, Slow()], max_steps=30, save_steps=2)
            newest = manifest.newest_checkpoint(out)
            interrupted.saved_step = newest.step if newest else None
            trustworthy_checkpoints(trainer, ABOUT)
            trainer.train(resume_from_checkpoint=newest.path if newest else None)
            if interrupted.signal:
                raise interrupted.error()
            torch.save(weights(trainer), Path(out) / "weights.pt")
    except AletheiaError as error:
        print("error:", error, file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 2))


if __name__ == "__main__":
    main(*sys.argv[1:])
