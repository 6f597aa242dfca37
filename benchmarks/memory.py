"""Peak memory of the training phase beyond the process before loading, each side in its own process."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import aletheia
from aletheia.anatomy.demo import demo_checkpoint
from aletheia.data.batches import collate
from aletheia.execution.fast import bfloat16_autocast
from aletheia.execution.peak_memory import peak_memory_bytes, reset_peak_memory
from aletheia.execution.recompute import recomputation
from aletheia.libraries import quiet_libraries
from aletheia.planning.plan import Plan

DATA = Path(os.environ.get("ALETHEIA_DATA", "../shared/data")) / "gsm8k" / "train.jsonl"
MAX_TOKENS, STEPS = 256, 6
SIDES = {
    "baseline": "baseline",
    "baseline-full": "baseline, full recomputation",
    "fill": "",  # fills the cache for those that follow
    "cached": "default plan, cached",
    "cached-selective": "default plan, cached, selective recomputation",
    "cached-full": "default plan, cached, full recomputation",
}


def peaks(plan: Plan, batch_size: int) -> list[str]:
    """A section of the page: the baseline against the plan from a full cache on disk."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        plan.write(folder / "plan.json")
        found = {side: _measured(side, folder, batch_size) for side in SIDES}
    lines = [
        f"Peak beyond the process before loading, in {STEPS} steps over the longest rows, batch {batch_size}. Each side has its own process. Ours "
        "reads a full cache on disk and holds only the layers from the boundary up.",
        "",
        "| side | peak | against the first |",
        "|---|---:|---:|",
        *(
            f"| {label} | {found[side] / 2**30:.2f} GiB | {found[side] / found['baseline']:.2f}x |"
            for side, label in SIDES.items()
            if label
        ),
        "",
    ]
    print("\n".join(lines), flush=True)
    return lines


def _measured(side: str, folder: Path, batch_size: int) -> int:
    command = [sys.executable, __file__, side, str(folder), str(batch_size)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return int(json.loads(output.splitlines()[-1]))


def _resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS in /proc/self/status; this benchmark needs Linux")


def run(side: str, folder: Path, batch_size: int) -> int:
    """Peak bytes of the training phase beyond what the process held before loading."""
    quiet_libraries()
    torch.zeros(1).sum()
    before = _resident_bytes()
    base = aletheia.load(str(demo_checkpoint()), "auto")
    every = aletheia.load_data(str(DATA), base.tokenizer)
    fitting = [index for index, row in enumerate(every.examples) if len(row) <= MAX_TOKENS]
    longest = sorted(fitting, key=lambda index: -len(every[index]))[: STEPS * batch_size]  # the same for both sides
    data = every.subset(longest)
    plan = Plan.read(folder / "plan.json")
    _, _, recompute = side.partition("-")
    if side.startswith("baseline"):
        return _baseline(base.model, data, batch_size, recompute or "off") - before
    model = aletheia.adapt(base.model, plan)
    del base  # nothing else may hold the prefix
    made = aletheia.train(
        model, data, plan, folder / side, data.subset(range(8)), steps=STEPS, batch_size=batch_size, cache="disk",
        cache_dir=folder / "cache", free_prefix=True, gradient_checkpointing=recompute or "off", show_progress=False,
    )  # fmt: skip
    return made.metrics.peak_memory_bytes - before


def _baseline(model: torch.nn.Module, data: aletheia.Examples, batch_size: int, recompute: str) -> int:
    from peft import LoraConfig, get_peft_model

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=names)
    ).train()
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    device = torch.device("cpu")
    reset_peak_memory(device)
    with recomputation(adapted, recompute):
        for step in range(STEPS):
            batch = collate(data.examples[step * batch_size : (step + 1) * batch_size], data.pad_token_id)
            with bfloat16_autocast(adapted):
                loss = adapted(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return peak_memory_bytes(device)


if __name__ == "__main__":
    print(run(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
