"""How the cached step grows with length and with depth, against what the cost model says; small random models."""

import random
import statistics
from pathlib import Path

import torch
from matplotlib.figure import Figure
from pictures import small_svg
from transformers import LlamaConfig, LlamaForCausalLM

import aletheia
from aletheia.anatomy.schema import DataIdentity
from aletheia.data.examples import NO_LOSS, Example, Examples
from aletheia.lab.campaign.steps import StepKind, interleaved_steps

PICTURE = Path(__file__).parents[1] / "docs" / "results" / "benchmarks" / "growth.svg"
LENGTHS, DEPTHS = (128, 256, 512, 1024), (6, 12, 24, 48)
BATCH_SIZE, ROUNDS = 4, 15
VOCABULARY = 4096


def growth(dtype: torch.dtype) -> list[str]:
    """A section of the page, and its picture: the last half adapted, from a filled cache."""
    by_length = {length: _point(12, length, dtype) for length in LENGTHS}
    by_depth = {depth: _point(depth, 256, dtype) for depth in DEPTHS}
    lines = [
        f"Random Llama models of width 256, batch {BATCH_SIZE}, the last half of the layers adapted; {ROUNDS} rounds each. "
        "The prediction is calibrated at each size; growth is against the smallest size.",
        "",
        "| size | measured s | predicted s | measured / predicted | growth measured | growth predicted |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for unit, points in (("tokens, 12 layers", by_length), ("layers, 256 tokens", by_depth)):
        first = next(iter(points.values()))
        for size, (measured, predicted) in points.items():
            lines.append(
                f"| {size} {unit} | {measured:.3f} | {predicted:.3f} | {measured / predicted:.2f} | "
                f"{measured / first[0]:.2f}x | {predicted / first[1]:.2f}x |"
            )
    _draw(by_length, by_depth)
    lines += ["", f"![cached step against length and depth]({PICTURE.name})"]
    print("\n".join(lines), flush=True)
    return lines


def _point(layers: int, length: int, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of a cached step, the median measured and the prediction."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_attention_heads=4, num_key_value_heads=4,
        num_hidden_layers=layers, max_position_embeddings=2048,
    )  # fmt: skip
    model, data = LlamaForCausalLM(config).to(dtype), _rows(length)
    scores = aletheia.probe(model, data, batches=1)
    scores = scores.model_copy(update={"timings": aletheia.calibrate(model, data, batch_size=BATCH_SIZE)})
    plan = aletheia.plan(scores, policy="last")
    seconds = interleaved_steps(model, [StepKind.fast("cached", plan, cached=True)], data, BATCH_SIZE, ROUNDS)["cached"]
    relative, baseline = plan.predicted.relative_cached_step_time, plan.predicted.baseline_step_seconds
    assert relative is not None
    assert baseline is not None
    return statistics.median(seconds), relative * baseline


def _rows(length: int) -> Examples:
    """Rows of one length, the second half of each with labels."""
    draw = random.Random(0)
    rows = []
    for number in range(4 * BATCH_SIZE):
        ids = [draw.randrange(1, VOCABULARY) for _ in range(length)]
        labels = [NO_LOSS] * (length // 2) + ids[length // 2 :]
        rows.append(Example(input_ids=ids, labels=labels, where=f"row {number}"))
    identity = DataIdentity(name="random", fingerprint="0" * 64, form="random", rows=len(rows))
    return Examples(identity, tuple(rows), max_length=length, pad_token_id=0, skipped=0, truncated=0)


def _draw(by_length: dict[int, tuple[float, float]], by_depth: dict[int, tuple[float, float]]) -> None:
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    panels = (("tokens per row (12 layers)", by_length), ("decoder layers (256 tokens)", by_depth))
    for axes, (label, points) in zip(figure.subplots(1, 2), panels, strict=True):
        for index, name in enumerate(("measured", "predicted")):
            axes.plot(list(points), [point[index] for point in points.values()], ("o-", "x--")[index], label=name)
        axes.set_xlabel(label)
        axes.set_ylabel("seconds per cached step")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    PICTURE.write_text(small_svg(figure))
