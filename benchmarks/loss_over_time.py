"""The picture of the README: held-out loss over time, a default run against plain LoRA, from docs/results/defaults.

    .venv/bin/python benchmarks/loss_over_time.py

Losses are means over the seeds of GSM8K over three passes (curves.csv.xz): plain LoRA at its best rate, and
``aletheia train`` at its default rate, up to where it stops early. Seconds are put together from the parts of a run,
which were timed in turn (time.json): probe, steps of each kind, and held-out losses, on both sides. Writes
docs/results/defaults/loss-over-time.svg.
"""

import csv
import json
import lzma
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from defaults_page import CURVES, DEFAULTS, EVERY, PATIENCE, PLACE

matplotlib.use("svg")
from matplotlib import pyplot
from pictures import small_svg

PLAIN_RATE = 0.00187  # the best of its rates, see the table of README.md
OURS, THEIRS, INK, GRID = "#1a7f5a", "#5f6368", "#202124", "#dadce0"
Curve = list[tuple[int, float]]


def main() -> None:
    parts = next(
        run
        for run in json.loads((PLACE / "time.json").read_text())["runs"]
        if (run["task"], run["length"]) == ("gsm8k", "epochs")
    )
    arm, rate = DEFAULTS["gsm8k", "epochs"]
    ours = [stopped(curve) for curve in curves(arm, rate, "mean 3", parts["steps"])]
    plain = curves(EVERY, PLAIN_RATE, "losses", parts["steps"])
    draw(
        {
            "aletheia train": (mean(ours), lambda step: our_seconds(parts, step), OURS, "o"),
            "plain LoRA (PEFT, Trainer)": (mean(plain), lambda step: plain_seconds(parts, step), THEIRS, "s"),
        }
    )


def curves(arm: str, rate: float, column: str, steps: int) -> list[Curve]:
    """Held-out losses of each seed by step."""
    asked = {"task": "gsm8k", "steps": str(steps), "device": "H200", "arm": arm, "rate": f"{rate:g}"}
    with lzma.open(CURVES, "rt", newline="") as file:
        rows = [row for row in csv.DictReader(file) if all(row[name] == value for name, value in asked.items())]
    return [[(int(step), float(loss)) for step, loss in (at.split(":") for at in row[column].split())] for row in rows]


def stopped(curve: Curve) -> Curve:
    """The points until as many as ``PATIENCE`` have brought no new lowest loss."""
    lowest = 0
    for at in range(len(curve)):
        lowest = at if curve[at][1] < curve[lowest][1] else lowest
        if at - lowest == PATIENCE:
            return curve[: at + 1]
    return curve


def mean(found: list[Curve]) -> Curve:
    """Means over the seeds, as far as all of them go."""
    return [(at[0][0], float(np.mean([loss for _, loss in at]))) for at in zip(*found, strict=False)]


def our_seconds(parts: dict[str, Any], step: int) -> float:
    """Probe, steps with every layer, the first pass after the freeze, steps from the cache, and held-out losses."""
    seconds, losses = parts["step_seconds"], parts["evaluation_seconds"]
    early = min(step, parts["early_steps"])
    fresh = min(step - early, parts["per_pass"])
    every = parts["steps"] / parts["evaluations"]
    cached = max(0.0, (step - parts["early_steps"]) // every - 1)  # the first one after the freeze fills the cache
    spent = early * seconds["every"] + fresh * seconds["fresh"] + (step - early - fresh) * seconds["cached"]
    return parts["probe_seconds"] + spent + (1 + step // every - cached) * losses["ours"] + cached * losses["cached"]


def plain_seconds(parts: dict[str, Any], step: int) -> float:
    """Steps, and a held-out loss as often as ours takes one."""
    every = parts["steps"] / parts["evaluations"]
    return step * parts["step_seconds"]["plain"] + (1 + step // every) * parts["evaluation_seconds"]["plain"]


def draw(sides: dict[str, tuple[Curve, Callable[[int], float], str, str]]) -> None:
    pyplot.rcParams |= {"svg.hashsalt": "loss", "font.family": "sans-serif", "font.size": 10, "text.color": INK}
    figure, axes = pyplot.subplots(figsize=(7.2, 3.4), layout="constrained")
    for name, (curve, seconds, color, marker) in sides.items():
        minutes, losses = [seconds(step) / 60 for step, _ in curve], [loss for _, loss in curve]
        axes.plot(minutes, losses, color=color, marker=marker, markersize=4.5, linewidth=1.8)
        low = int(np.argmin(losses))
        axes.plot(minutes[low], losses[low], marker="o", markersize=11, fillstyle="none", color=color)
        text = f"{name}\nlowest: {losses[low]:.3f} after {minutes[low]:.1f} min"
        is_last = minutes[-1] == max(seconds(curve[-1][0]) / 60 for curve, seconds, *_ in sides.values())
        place = {"ha": "right", "va": "bottom", "xytext": (0, 34)} if is_last else {"va": "center", "xytext": (10, -4)}
        axes.annotate(text, (minutes[-1], losses[-1]), textcoords="offset points", color=color, **place)
    axes.set_xlim(0, 22)
    axes.set_xticks(range(0, 21, 5))
    axes.set_xlabel("minutes", color=INK)
    axes.set_ylabel("held-out loss, nats a token", color=INK)
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("SmolLM2-135M learns GSM8K: 3 passes over 640 rows", loc="left", fontsize=11, weight="bold")
    (PLACE / "loss-over-time.svg").write_text(small_svg(figure))


if __name__ == "__main__":
    main()
