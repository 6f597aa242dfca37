"""The page of ``scores.py``: what was asked, what was measured, what it means.

Figures come from the tables; those of layers together from docs/results/defaults.
"""

from argparse import Namespace
from typing import Any

COST = " per FLOP"
NAMES = {
    "paper_5": "gradient norm, 5 rows (the paper's)",
    "paper_32": "gradient norm, 32 rows",
    "unbiased": "norm of the mean gradient, noise taken out",
    "per_parameter": "the same per root of the parameters",
    "whitened": "the same, inputs whitened",
    "adam_gain": "first-order gain of an Adam step on LoRA",
    "depth": "depth: the layer's number",
    "from_top": "the layer's number from the top",
    "near_middle": "nearness to the middle: layers to the nearer end",
}
DRAWS = 2000

PAGE = """# Does a score predict what a layer is worth?

Made by `benchmarks/single_layers.py`, or the job `single` of `benchmarks/population.py` on a GPU, and `benchmarks/scores.py`. Tables:
[gains.csv](gains.csv), [scores.csv](scores.csv), [spearman.csv](spearman.csv).
gains.jsonl.xz holds the loss of every held-out row, also of tasks that are not finished. To continue from there, unpack it into OUT/gains.jsonl.

## The question

Aletheia chooses layers by the norm of their loss gradient, as the paper does [arXiv:2604.15351]. Training a layer alone shows
what it is worth. Do layers with a high score gain more?

## What was measured

SmolLM2-135M-Instruct. Each layer was trained alone: LoRA of rank 16 on its seven matrices, {steps} steps of 4 rows, AdamW, a peak
rate of 0.004. The gain is the share of the base model's held-out loss that this takes away.

{gains}

Scores come from the base model and {rows} training rows:

- **Gradient norm**: `aletheia.probe`, a sum of norms over rows, with the published 5 rows and with {rows}.

- **Noise taken out**: the norm of the mean gradient, estimated from products of the gradients of different rows. Negative
  estimates count as 0, matrix by matrix: {clipped}. Norms are summed over a layer's matrices, here and below.

- **Per root of the parameters**: each matrix's norm is divided by the root of its number of entries.

- **Inputs whitened**: the gradient is multiplied by the inverse root of its inputs' second moments. 1 % of the mean second moment
  is added to every direction first.

- **Gain of an Adam step**: rate x sum of |s G At| for the mean gradient G, at LoRA's random start, mean of 4 draws of A.

Depth and nearness to the middle look at no gradient. The second table divides each score by the FLOPs of a step that adapts the layer alone,
without a cache (`aletheia.planning.cost`).

## Rank correlation with the gains

1 means the same order of layers, 0 none, -1 the opposite order. In brackets: 95 % intervals from {draws} draws of layers, held-out
rows and seeds together. Of {count} layers, chance alone gives up to about {chance:.2f}. Drawing rows again adds noise to the gains, so
intervals tend towards 0. With the layers as they are, and rows and seeds alone drawn, the paper's score has a mean of {rows_alone}; all
such intervals are in spearman.csv.

{plain}

The gains agree with themselves as follows. The last column is about what a perfect score could reach.

{ceiling}

Each score divided by FLOPs:

{per_flop}

## What it means

{meaning}
"""


def page(
    gains: list[Any], lines: list[dict], agreement: dict[str, tuple[dict, float]], clipped: str, args: Namespace
) -> str:
    """The page in Markdown.

    Args:
        gains: of each task.
        lines: of spearman.csv.
        agreement: by task, the reliability of its gains and the most that a score could reach.
        clipped: matrices whose estimate was negative.
        args: how many rows and steps.
    """
    by = {(line["task"], line["score"]): line for line in lines}
    tasks = [own.task for own in gains]
    count = min(len(own.layers) for own in gains)
    return PAGE.format(
        steps=args.steps,
        rows=args.rows,
        draws=f"{DRAWS:,}",
        clipped=clipped,
        count=count,
        chance=1.96 / max(count - 1, 1) ** 0.5,
        rows_alone=_cell(by["mean", "paper_5"], "_rows"),
        gains=_gains(gains),
        plain=_table(by, tasks, ""),
        per_flop=_table(by, tasks, COST),
        ceiling=_ceiling(agreement),
        meaning="\n\n".join(f"- {line}" for line in _meaning(by, agreement)),
    )


def _gains(gains: list[Any]) -> str:
    rows = ["| task | seeds | held-out rows | base loss | mean gain | lowest | highest | five best layers |"]
    rows.append("|---|---:|---:|---:|---:|---:|---:|---|")
    for own in gains:
        gains_L = own.gains().mean(axis=0)
        worst, best = gains_L.argmin(), gains_L.argmax()
        top = ", ".join(str(own.layers[at]) for at in gains_L.argsort()[::-1][:5])
        rows.append(
            f"| {own.task} | {len(own.seeds)} | {len(own.counts)} | {own.losses()[0]:.3f} | {100 * gains_L.mean():.1f} % | "
            f"{100 * gains_L[worst]:.1f} % (layer {own.layers[worst]}) | {100 * gains_L[best]:.1f} % (layer {own.layers[best]}) | {top} |"
        )
    return "\n".join(rows)


def _cell(line: dict, suffix: str = "") -> str:
    return f"{line['spearman']:+.2f} ({line['low' + suffix]:+.2f} to {line['high' + suffix]:+.2f})"


def _table(by: dict, tasks: list[str], suffix: str) -> str:
    columns = [*tasks, "mean"]
    rows = [f"| score | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name, label in NAMES.items():
        rows.append(f"| {label} | {' | '.join(_cell(by[task, name + suffix]) for task in columns)} |")
    return "\n".join(rows)


def _ceiling(agreement: dict[str, tuple[dict, float]]) -> str:
    rows = ["| task | one seed with another | halves of the held-out rows | a perfect score |", "|---|---:|---:|---:|"]
    for task, (found, most) in agreement.items():
        seeds = f"{found['seeds']:+.2f}" if "seeds" in found else "one seed"
        rows.append(f"| {task} | {seeds} | {found['rows']:+.2f} | {most:.2f} |")
    return "\n".join(rows)


def _said(line: dict) -> str:
    """What an interval says."""
    if line["low"] > 0:
        return "predicts the gains"
    return "predicts the opposite of the gains" if line["high"] < 0 else "is not shown to differ from chance"


def _meaning(by: dict, agreement: dict[str, tuple[dict, float]]) -> list[str]:
    mean = {name: by["mean", name] for name in NAMES}
    free = ["depth", "from_top", "near_middle"]
    scores = [name for name in NAMES if name not in free]
    best = max(scores, key=lambda name: mean[name]["spearman"])
    simple = max(free, key=lambda name: mean[name]["spearman"])
    clear = [NAMES[name] for name in scores if mean[name]["low"] > 0]
    paper = mean["paper_5"]
    lines = [
        f"Over the tasks, the paper's score {_said(paper)}: {_cell(paper)}.",
        f'The best of {len(scores)} scores is "{NAMES[best]}", {_cell(mean[best])}; it {_said(mean[best])}. '
        "It is the best after the fact, so its figure flatters it.",
        f'Of those that look at no gradient, "{NAMES[simple]}" is the best, {_cell(mean[simple])}; it {_said(mean[simple])}.',
        f"Scores whose interval lies above 0: {', '.join(clear) if clear else 'none'}.",
        f"There is no correction for looking at {len(NAMES)} intervals.",
    ]
    weak = [task for task, (_, most) in agreement.items() if most < 0.7]
    if weak:
        lines.append(f"The gains themselves are too noisy to judge a score by in: {', '.join(weak)}.")
    lines.append(
        "What a layer is worth alone is not what it adds to others: layers 8 to 22 together, 13 of the 15 best alone "
        "among them, ended higher than as many spread over the model, on all three tasks ([defaults](../defaults/README.md))."
    )
    lines.append("This is one small model, one rate and one length of training.")
    return lines
