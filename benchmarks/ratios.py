"""Ratios of interleaved times, with intervals, and tables of them."""

import statistics
from collections.abc import Sequence

import numpy as np
from scipy.stats import t as student


def speedup(reference: Sequence[float], seconds: Sequence[float]) -> tuple[float, float, float]:
    """Ratio of the summed times and its 95 % interval: the ratio estimator over paired rounds, Student's t."""
    a, b = np.asarray(reference), np.asarray(seconds)
    ratio = a.sum() / b.sum()
    error = np.sqrt(((a - ratio * b) ** 2).sum() / (len(a) * (len(a) - 1))) / b.mean()
    half = student.ppf(0.975, len(a) - 1) * error
    return float(ratio), float(ratio - half), float(ratio + half)


def table(seconds: dict[str, list[float]], notes: dict[str, str] | None = None) -> list[str]:
    """A Markdown row per arm, ratios against the first."""
    reference = next(iter(seconds.values()))
    lines = []
    for name, values in seconds.items():
        ratio, low, high = speedup(reference, values)
        note = f" {notes.get(name, '')} |" if notes is not None else ""
        lines.append(f"| {name} | {statistics.median(values):.2f} | {ratio:.2f}x ({low:.2f}-{high:.2f}) |{note}")
    return lines
