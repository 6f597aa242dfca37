"""Timings as ratios, interleaved in one process: the probe against the reference, plans against uniform LoRA.

    make bench

Reads GSM8K from ../shared/data or the folder in ALETHEIA_DATA. Every figure is a median over interleaved repeats with
its range; nothing is asserted.
"""

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from aletheia_lora.probe import gradient_probe

import aletheia
from aletheia.cli.demo import demo_checkpoint
from aletheia.cli.options import quiet_libraries
from aletheia.data.batches import collate

DATA = Path(os.environ.get("ALETHEIA_DATA", "../shared/data")) / "gsm8k" / "train.jsonl"
PROBE_REPEATS = 5
STEP_REPEATS = 8
BATCH_SIZE = 4


def main() -> None:
    quiet_libraries()
    base = aletheia.load(str(demo_checkpoint()), "float32")
    data = aletheia.load_data(str(DATA), base.tokenizer)
    print(f"SmolLM2-135M-Instruct, GSM8K, float32, {torch.get_num_threads()} threads\n")
    bench_probe(base.model, data)
    bench_steps(base.model, data)


def interleaved(jobs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each job, A B A B, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(repeats + 1):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def show(seconds: dict[str, list[float]]) -> None:
    """A line per job; ratios are taken repeat by repeat against the first job."""
    reference = next(iter(seconds.values()))
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(reference, values, strict=True)]
        print(
            f"  {name:34s} {statistics.median(values):7.2f} s   {statistics.median(ratios):5.2f}x "
            f"({min(ratios):.2f}-{max(ratios):.2f}, {len(values)} repeats)"
        )
    print()


def bench_probe(model: torch.nn.Module, data: aletheia.Examples) -> None:
    """The five-sequence probe of the published method: labels are the inputs."""
    rows = [torch.tensor(example.input_ids) for example in data.examples[:5]]
    dataset = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    batches = [
        {"input_ids": row[None], "attention_mask": torch.ones_like(row[None]), "labels": row[None].clone()}
        for row in rows
    ]
    layers = len(aletheia.probe(model, batches[:1]).layers)
    reference = gradient_probe(model, dataset, layers, 5)
    ours = aletheia.probe(model, batches).layers
    worst = max(abs(ours[layer] - reference[layer]) / reference[layer] for layer in range(layers))
    print(f"probe, 5 sequences of {sum(map(len, rows))} tokens; largest relative difference of a layer {worst:.1e}")
    jobs = {
        "aletheia-lora 0.1.2": lambda: gradient_probe(model, dataset, layers, 5),
        "aletheia probe": lambda: aletheia.probe(model, batches),
    }
    show(interleaved(jobs, PROBE_REPEATS))


def bench_steps(model: torch.nn.Module, data: aletheia.Examples) -> None:
    """One optimizer step of each plan on the same batch, interleaved; adapters are swapped between steps."""
    scores = aletheia.probe(model, data)
    plans = {
        "uniform": aletheia.plan(scores, "uniform"),
        "top-percent 50 (the paper)": aletheia.plan(scores, "top-percent"),
        "depth-aware 50 (default)": aletheia.plan(scores),
        "depth-aware 33": aletheia.plan(scores, percent=33),
    }
    batch = partial(collate, pad_token_id=data.pad_token_id)(data.examples[:BATCH_SIZE])
    print(f"step, {BATCH_SIZE} x {batch['input_ids'].shape[1]} tokens, forward + backward + AdamW")
    for name, plan in plans.items():
        print(f"  {name:34s} predicted {plan.predicted.speedup:.2f}x, layers {list(plan.layers)}")
    seconds: dict[str, list[float]] = {name: [] for name in plans}
    for number in range(STEP_REPEATS + 1):
        for name, plan in plans.items():
            adapted = aletheia.adapt(model, plan)
            adapted.train()
            optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad])
            started = time.perf_counter()
            adapted(**batch, use_cache=False).loss.backward()
            optimizer.step()
            if number:
                seconds[name].append(time.perf_counter() - started)
            adapted.unload()
    show(seconds)


if __name__ == "__main__":
    main()
