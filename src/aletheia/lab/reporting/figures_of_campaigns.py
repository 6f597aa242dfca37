"""Figures of a campaign's report: plain data in, an SVG fragment out."""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from aletheia.lab.campaign.behaviour_summary import Curve
from aletheia.lab.campaign.speed_summary import Chosen, ModelSpeed
from aletheia.reporting.figures import canvas
from aletheia.reporting.format import shorten
from aletheia.reporting.svg import INK, MUTED, drawing, run_color, run_dash, to_svg

ROW_HEIGHT = 5.5  # points per arm
COLUMNS = 3  # of a legend
BINS = 10  # of relative depth


def ratios_svg(models: Sequence[ModelSpeed], baseline: str, identifier: str) -> str:
    """A point with its interval per model and arm; the baseline is the line at 1."""
    arms = [name for name in dict.fromkeys(found.arm for found in models) if name != baseline]
    names = list(dict.fromkeys(found.model for found in models))
    block = len(arms) + 1
    with drawing(identifier):
        top = _legend_height(arms) + 12  # and the numbers of the axis, which is long enough to need them at both ends
        figure, axes = canvas(top + 30 + ROW_HEIGHT * block * len(names), left=92, top=top)
        for found in models:
            if found.arm == baseline:
                continue
            y = names.index(found.model) * block + arms.index(found.arm)
            color = run_color(arms.index(found.arm))
            if found.step.interval:
                axes.plot([found.step.interval.low, found.step.interval.high], [y, y], color=color, linewidth=1.0)
            axes.plot([found.step.value], [y], "o", color=color, markersize=3.2)
        axes.axvline(1.0, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
        for index in range(1, len(names)):
            axes.axhline(index * block - 1, color=MUTED, linewidth=0.3, alpha=0.5)
        middle = (len(arms) - 1) / 2
        axes.set_yticks([index * block + middle for index in range(len(names))], [shorten(name, 16) for name in names])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_ylim(block * len(names) - 1, -1)
        axes.set_xlim(left=min(0.9, axes.get_xlim()[0]))
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="x", labeltop=True)
        axes.set_xlabel("times as fast", fontsize=9)
        handles = [
            axes.plot([], [], "o-", color=run_color(index), markersize=3.6, label=arm)[0]
            for index, arm in enumerate(arms)
        ]
        legend = axes.legend(handles=handles, ncols=COLUMNS, handlelength=1.2, loc="lower left", borderaxespad=2.0)
        legend.set_bbox_to_anchor((-0.25, 1.0, 0.0, 0.0), axes.transAxes)
        return to_svg(figure, identifier, f"Step speed-up of {', '.join(arms)} on {', '.join(names)}.")


def _legend_height(names: Sequence[str]) -> float:
    """Points above a figure that the names of its lines take."""
    return 12.0 + 13.0 * math.ceil(len(names) / COLUMNS)


def share_of_models_svg(chosen: Sequence[Chosen], identifier: str) -> str:
    """Share of (model, seed) runs that adapt a layer against its relative depth, a line per arm."""
    arms = [
        name
        for name in dict.fromkeys(found.arm for found in chosen)
        if any(len(layers) < found.layer_count for found in chosen if found.arm == name for layers in found.layers)
    ]
    with drawing(identifier):
        top = _legend_height(arms)
        figure, axes = canvas(186 + top, left=40, top=top)
        centres = (np.arange(BINS) + 0.5) / BINS
        for index, arm in enumerate(arms):
            shares = _shares([found for found in chosen if found.arm == arm])
            axes.plot(centres, shares, "o-", color=run_color(index), markersize=3, linewidth=1.1, label=arm)
        axes.set(xlim=(0, 1), ylim=(-0.03, 1.03))
        axes.grid(axis="y")
        axes.set_xlabel("depth: 0 at the embedding, 1 at the head", fontsize=9)
        axes.legend(ncols=COLUMNS, loc="lower left", bbox_to_anchor=(-0.1, 1.0), handlelength=1.2)
        return to_svg(figure, identifier, f"Share of runs that adapt a layer, by depth: {', '.join(arms)}.")


def _shares(chosen: Sequence[Chosen]) -> list[float]:
    """By bin of relative depth: mean over runs of whether the layer there is adapted."""
    hits = np.zeros(BINS)
    runs = 0
    for found in chosen:
        for layers in found.layers:
            runs += 1
            for index in range(BINS):
                hits[index] += int((index + 0.5) / BINS * found.layer_count) in layers
    return [float(value) for value in hits / max(runs, 1)]


def curves_svg(curves: Sequence[Curve], identifier: str, by: Literal["seconds", "steps"]) -> str:
    """Held-out loss while training, a line per run, the same colour and dash per arm; not the loss before it."""
    arms = list(dict.fromkeys(curve.arm for curve in curves))
    with drawing(identifier):
        top = _legend_height(arms)
        figure, axes = canvas(212 + top, left=40, top=top)
        for curve in curves:
            index = arms.index(curve.arm)
            trained = [point for point in curve.points if point[0] > 0]
            axes.plot(
                [seconds if by == "seconds" else steps for steps, seconds, _ in trained],
                [loss for _, _, loss in trained],
                color=run_color(index),
                linestyle=run_dash(index),
                linewidth=1.0,
                marker="o",
                markersize=2.4,
                label=curve.arm if curve is next(other for other in curves if other.arm == curve.arm) else None,
            )
        axes.grid(axis="y")
        axes.set_xlim(left=0)
        axes.set_xlabel("seconds of training" if by == "seconds" else "optimizer steps", fontsize=9)
        axes.legend(ncols=COLUMNS, loc="lower left", bbox_to_anchor=(-0.1, 1.0), handlelength=1.4)
        return to_svg(figure, identifier, f"Held-out loss by {by} of training: {', '.join(arms)}.")
