"""A plan attached to transformers' Trainer, with evaluation, checkpoints and resuming left to Trainer.

    aletheia probe MODEL --data train.jsonl --out scores.json
    aletheia plan scores.json --out plan.json
    python examples/trainer.py MODEL train.jsonl plan.json OUT

``train.jsonl`` has rows with ``prompt`` and ``completion``. Run again after a crash, it resumes from its last
checkpoint. The batches here are plain text; any data set and collator will do.
"""

import os
import sys

import torch
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

import aletheia

name, data, plan_file, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
rows = load_dataset("json", data_files=data, split="train")
rows = rows.map(
    lambda row: tokenizer(row["prompt"] + row["completion"], truncation=True, max_length=512),
    remove_columns=rows.column_names,
).train_test_split(test_size=0.1, seed=0)

plan = aletheia.Plan.read(plan_file)
model = aletheia.adapt(AutoModelForCausalLM.from_pretrained(name), plan)  # a PEFT model
arguments = TrainingArguments(
    out,
    num_train_epochs=3,
    per_device_train_batch_size=4,
    learning_rate=2e-4,
    eval_strategy="epoch",
    save_strategy="epoch",
    report_to="none",
    use_cpu=not torch.accelerator.is_available(),  # otherwise several processes on CPUs do not find each other
)
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
trainer = Trainer(model, arguments, collator, train_dataset=rows["train"], eval_dataset=rows["test"])
attachment = aletheia.attach(trainer, plan, notify=print)
trainer.train(resume_from_checkpoint=os.path.isdir(out) and bool(get_last_checkpoint(out)))  # the newest complete one
trainer.save_model()
if trainer.is_world_process_zero():
    print(f"prefix cache: {attachment.decision.kind}, {attachment.decision.reason}")
