"""The frontier in the terminal: predicted step time against captured importance."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from aletheia.planning.frontier import FrontierPoint
from aletheia.planning.plan import Plan

BAR_WIDTH = 24


def frontier_view(points: Sequence[FrontierPoint], chosen: Plan, rows: int = 40) -> RenderableType:
    """At most about ``rows`` undominated choices, fastest first; the point with the chosen layers is marked."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for column in ("boundary", "layers", "step time", "speed-up", "importance"):
        table.add_column(column, justify="right")
    table.add_column("")
    every = max(1, len(points) // rows)
    for number, point in enumerate(points):
        is_chosen = point.layers == chosen.layers
        if number % every and not is_chosen and number != len(points) - 1:
            continue
        table.add_row(
            ">" if is_chosen else "",
            str(point.boundary),
            str(len(point.layers)),
            f"{point.relative_step_time:.3f}",
            f"{point.speedup:.2f}x",
            f"{point.captured_importance:.1%}",
            "█" * round(point.captured_importance * BAR_WIDTH),
            style="bold" if is_chosen else "",
        )
    note = (
        f"{len(points)} choices that no other beats in both; step time relative to uniform LoRA, predicted from FLOPs"
    )
    plan_line = (
        f"this plan ({chosen.settings.policy}, {len(chosen.layers)} layers from {chosen.boundary} up): "
        f"step time {chosen.predicted.relative_step_time:.3f}, importance {chosen.predicted.captured_importance:.1%}"
    )
    return Group(table, Text(note), Text(plan_line))
