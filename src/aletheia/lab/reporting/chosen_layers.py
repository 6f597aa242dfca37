"""Which layers the arms of a campaign chose, and how stable the choice is."""

from collections.abc import Sequence

from markupsafe import Markup

from aletheia.lab.campaign.speed_summary import Chosen
from aletheia.lab.reporting.figures_of_campaigns import layers_row
from aletheia.planning.plan import layer_ranges
from aletheia.reporting.blocks import Block, Panels, Table

ENDS = Markup('<span class="ends"><span>embedding</span><span>head</span></span>')


def layer_blocks(chosen: Sequence[Chosen], more: str = "") -> list[Block]:
    """A table per model, with a row and a strip of layers per arm; arms that adapt every layer are left out."""
    some = [found for found in chosen if len(found.layers[0]) < found.layer_count]
    tables = []
    for model in dict.fromkeys(found.model for found in some):
        own = [found for found in some if found.model == model]
        rows = [
            (
                found.arm,
                "; ".join(dict.fromkeys(layer_ranges(layers) for layers in found.layers)),
                "" if found.stability is None else f"{found.stability:.2f}",
            )
            for found in own
        ]
        strips = tuple(layers_row(_shares(found)) for found in own)
        title = f"{model}, {own[0].layer_count} layers"
        tables.append(Table(title, ("arm", "layers", "stability"), rows, drawn=strips, scale=ENDS))
    note = (
        "Layers that learn to the end, by seed; equal choices appear once. In the strip, paler cells are chosen with "
        "some seeds only. Stability is the mean Jaccard index over pairs of seeds: 1 if all agree."
    )
    return [Panels("Which layers were chosen", tables, f"{note} {more}".strip())]


def _shares(chosen: Chosen) -> list[float]:
    """For each layer, the share of runs that adapt it."""
    runs = len(chosen.layers)
    return [sum(layer in layers for layers in chosen.layers) / runs for layer in range(chosen.layer_count)]
