"""The table of docs/results/scale/README.md on memory: predicted, counted on fake tensors and, if available, measured on an H200.

.venv/bin/python benchmarks/memory_estimates.py

Takes about two minutes on one core and 2 GB of memory, and needs no GPU and no download.
"""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from fake_steps import Kind, peak_of
from gpu_models import Shape, rows_of, shapes

from aletheia.planning.memory import GPU_BYTES

MEASURED = Path(__file__).parents[1] / "docs" / "results" / "gpu" / "h200-steps.json"
ARMS = {  # of the GPU's benchmark, by how our steps are called here
    ("every layer", "off"): "ours, every layer",
    ("upper half, cached", "off"): "ours, upper half, cached",
    ("upper half, cached", "selective"): "ours, cached, selective recomputation",
}
STEPS = 8  # of that benchmark, over all rows
LONG_ROW = 32_768  # tokens of a held-out row after steps of 512 tokens


def main() -> None:
    warnings.simplefilter("ignore")
    print("| model, batch | layers | recomputed | predicted GB | counted GB | H200 GB | predicted / counted |")
    print("|---|---|---|---:|---:|---:|---:|")
    known = measured()
    for name, shape in shapes(tiny=False).items():
        kinds = [("every layer", how, False) for how in ("off", "selective", "full")]
        kinds += [("upper half, cached", how, False) for how in ("off", "selective")]
        if name == "8b":
            kinds += [("every layer, NF4", how, True) for how in ("off", "selective", "full")]
        for layers, recompute, nf4 in kinds:
            kind = as_kind(shape, layers, recompute, nf4)
            on_gpu = None if nf4 else known.get((name, ARMS.get((layers, recompute), "")))
            print(line(shape, layers, kind, on_gpu), flush=True)
    shape = shapes(tiny=False)["8b"]
    for rows in (1, 2):
        for recompute in ("off", "full"):
            kind = Kind(shape.config, torch.bfloat16, 0, rows, 1024, 1.0, recompute, nf4=True)
            print(line(shape, "every layer, NF4", kind, None), flush=True)
    for shape in shapes(tiny=False).values():  # the largest peak is that of evaluation
        half = shape.config.num_hidden_layers // 2
        for layers, boundary in (("every layer", 0), ("upper half, cached", half)):
            kind = Kind(shape.config, torch.bfloat16, boundary, 1, 512, 0.55, "full", cached=bool(boundary))
            print(line(shape, layers, replace(kind, held_out=(1, LONG_ROW)), None), flush=True)


def as_kind(shape: Shape, layers: str, recompute: str, nf4: bool) -> Kind:
    """With the largest batch that the GPU's benchmark has: the longest rows come together."""
    data = rows_of(shape, shape.batch_size * STEPS)
    longest = sorted(data.examples, key=len)[-shape.batch_size :]
    tokens = len(longest[-1])
    labelled = sum(row.labelled_tokens for row in longest) / (shape.batch_size * tokens)
    boundary = 0 if layers.startswith("every") else shape.config.num_hidden_layers // 2
    return Kind(
        shape.config, torch.bfloat16, boundary, shape.batch_size, tokens, labelled, recompute, bool(boundary), nf4
    )


def line(shape: Shape, layers: str, kind: Kind, on_gpu: int | None) -> str:
    """A row of the table; the GPU's context counts on both sides, of which the H200's figure tells nothing."""
    found = peak_of(kind)
    predicted, counted = found.predicted + GPU_BYTES, found.measured + GPU_BYTES
    measured = f"{(on_gpu + GPU_BYTES) / 1e9:.1f}" if on_gpu else "-"
    held_out = f", held out {kind.held_out[0]} x {kind.held_out[1]:,}" if kind.held_out else ""
    return (
        f"| {shape.name}, {kind.rows} x {kind.row_tokens:,}{held_out} | {layers} | {kind.recompute} | {predicted / 1e9:.1f} | "
        f"{counted / 1e9:.1f} | {measured} | {predicted / counted:.2f} |"
    )


def measured() -> dict[tuple[str, str], int]:
    """Peak bytes that the GPU's allocator gave, by model and arm."""
    arms = [arm for arm in json.loads(MEASURED.read_text())["arms"] if "peak_bytes" in arm]
    return {(arm["model"], arm["name"]): arm["peak_bytes"] for arm in arms}


if __name__ == "__main__":
    main()
