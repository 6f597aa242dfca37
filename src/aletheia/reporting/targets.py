"""What each target would cost, in the terminal."""

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from aletheia.planning.plan import Plan, layer_ranges
from aletheia.planning.targets import MEASURED, Target
from aletheia.reporting.format import NOTHING, human_percent


def targets_view(plans: Mapping[Target, Plan]) -> RenderableType:
    """A row per target: which layers learn for how long, the predicted time of the run, and the measured loss."""
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("--target", "learn to the end", "learn at first", "time", "loss"):
        table.add_column(name, justify="right" if name in ("time", "loss") else "left", no_wrap=True)
    for target, plan in plans.items():
        early = (
            f"{layer_ranges(plan.early_layers)}, {human_percent(plan.freeze_after)}" if plan.early_layers else NOTHING
        )
        time = human_percent(plan.predicted.relative_run_time or 1.0)
        table.add_row(
            target, layer_ranges(plan.layers), early, time, MEASURED[target if plan.early_layers else "quality"]
        )
    epochs = next(iter(plans.values())).settings.epochs or 1.0
    note = (
        f"Time: predicted for {epochs:g} pass{'' if epochs == 1 else 'es'} over the rows, as a share of what uniform "
        "LoRA takes in plain PEFT. Loss: the change measured on SmolLM2-135M, see docs/results/defaults."
    )
    return Group(Text(), table, Text(note, style="dim"))
