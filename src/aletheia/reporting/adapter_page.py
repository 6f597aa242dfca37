"""The page about adapter folders of other programs: what they adapt, and losses if a Trainer's state has them."""

from collections.abc import Sequence

from aletheia.planning.plan import layer_ranges
from aletheia.reporting import figures
from aletheia.reporting.adapter_facts import adapter_facts
from aletheia.reporting.blocks import Block, Card, Figure, Page, Panels, Table
from aletheia.reporting.format import NOTHING
from aletheia.runs.adapter_folder import AdapterFolder

NO_LOSSES = "No losses are shown: the folder holds neither trainer_state.json nor metrics.json of 'aletheia train'."


def adapter_page(folders: Sequence[AdapterFolder], labels: Sequence[str]) -> Page:
    """Layers, ranks and losses of adapters, side by side; their times are unknown."""
    columns = [adapter_facts(folder) for folder in folders]
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    rows = [row for row in rows if set(row[1:]) != {NOTHING}]
    blocks: list[Block] = []
    if any(folder.train_curve or folder.held_out_curve for folder in folders):
        drawn = figures.adapter_losses_figure(folders, labels, "losses")
        about = "Marks: held-out loss. Faint: training loss, smoothed. Both as the Trainer logged them."
        blocks.append(Panels("Loss", [Figure("By optimizer step", drawn)], about))
    blocks.append(Table("In numbers", ("", *labels), rows, "" if blocks else NO_LOSSES))
    ranks = [
        Figure(label, figures.adapter_ranks_figure(folder, label, index, f"ranks-{index}"))
        for index, (folder, label) in enumerate(zip(folders, labels, strict=True))
        if folder.adapters
    ]
    if ranks:
        about = (
            "Empty: not adapted. Layers above the highest adapted one are not drawn, as the folder does not name them."
        )
        blocks.append(Panels("Ranks by layer", ranks, about))
    first = columns[0]
    cards = (
        Card("Adapted layers", str(len(folders[0].layers)), first["Layers"]),
        Card("Parameters", first["Parameters"], "as stored"),
        Card("Rank", str(folders[0].rank), f"alpha {folders[0].alpha:g}"),
    )
    return Page(", ".join(labels), _verdict(folders[0]), cards if len(folders) == 1 else (), tuple(blocks))


def _verdict(folder: AdapterFolder) -> str:
    layers = f"layers {layer_ranges(folder.layers)}" if folder.layers else "no layer"
    return f"A LoRA adapter for {folder.base or 'an unnamed base model'}: it changes {layers}."
