"""Which layers the arms of a campaign chose, and how stable that is."""

from collections.abc import Sequence

from aletheia.lab.campaign.speed_summary import Chosen
from aletheia.lab.reporting.figures_of_campaigns import share_of_models_svg
from aletheia.planning.plan import layer_ranges
from aletheia.reporting.blocks import Block, Figure, Table


def layer_blocks(chosen: Sequence[Chosen], more: str = "") -> list[Block]:
    """A figure over all runs and a table of models and arms; those that adapt every layer are left out."""
    rows = [
        (
            found.model,
            found.arm,
            "; ".join(dict.fromkeys(layer_ranges(layers) for layers in found.layers)),
            str(found.layer_count),
            "" if found.stability is None else f"{found.stability:.2f}",
        )
        for found in chosen
        if len(found.layers[0]) < found.layer_count
    ]
    note = "Layers seed by seed, equal ones once. Stability: mean Jaccard index over pairs of seeds, 1 where all agree."
    return [
        Figure(
            "Which layers were chosen",
            share_of_models_svg(chosen, "layers"),
            "Share of runs that adapt a layer to the end, by relative depth.",
        ),
        Table("Layers, model by model", ("model", "arm", "layers", "of", "stability"), rows, f"{note} {more}".strip()),
    ]
