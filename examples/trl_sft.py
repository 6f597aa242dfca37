"""An ordinary script for TRL's SFTTrainer, made faster by a plan.

New lines are marked: the plan is read, gives the LoRA configuration, and is attached. The rest is unchanged. Make the
plan first, then run the script as you always do, with ``torchrun`` or ``accelerate launch`` too:

    aletheia probe MODEL --data train.jsonl --out scores.json
    aletheia plan scores.json --out plan.json
    python examples/trl_sft.py MODEL train.jsonl plan.json OUT

``train.jsonl`` has rows with ``prompt`` and ``completion``.
"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

import aletheia

name, data, plan_file, out = sys.argv[1:]
rows = load_dataset("json", data_files=data, split="train")
model = AutoModelForCausalLM.from_pretrained(name)
plan = aletheia.Plan.read(plan_file)  # new
trainer = SFTTrainer(
    model,
    args=SFTConfig(
        out,
        num_train_epochs=3,
        per_device_train_batch_size=4,
        learning_rate=2e-4,
        report_to="none",
        use_cpu=not torch.accelerator.is_available(),  # otherwise several processes on CPUs do not find each other
    ),
    train_dataset=rows,
    peft_config=plan.lora_config(model),  # was LoraConfig(r=16, ...)
)
aletheia.attach(trainer, plan)  # new
trainer.train()
trainer.save_model()
