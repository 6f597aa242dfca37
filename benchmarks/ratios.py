"""Ratios of interleaved times, with intervals, and tables of them."""

import statistics
from collections.abc import Sequence

from aletheia.lab.statistics.ratios import ratio_of_times


def speedup(reference: Sequence[float], seconds: Sequence[float]) -> str:
    """``2.88x (2.41-3.34)``: ratio of the summed times over paired rounds and its interval."""
    found = ratio_of_times(reference, seconds)
    bounds = f" ({found.interval.low:.2f}-{found.interval.high:.2f})" if found.interval else ""
    return f"{found.value:.2f}x{bounds}"


def table(seconds: dict[str, list[float]], notes: dict[str, str] | None = None) -> list[str]:
    """A Markdown row per arm, ratios against the first."""
    reference = next(iter(seconds.values()))
    lines = []
    for name, values in seconds.items():
        note = f" {notes.get(name, '')} |" if notes is not None else ""
        lines.append(f"| {name} | {statistics.median(values):.2f} | {speedup(reference, values)} |{note}")
    return lines
