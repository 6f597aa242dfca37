"""The anatomy of a model in the terminal: layers of the same build are shown once."""

from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from aletheia.anatomy.schema import Anatomy, Module
from aletheia.reporting.format import human_count


def anatomy_view(anatomy: Anatomy, name: str) -> RenderableType:
    """Header and one table row per module, layers of the same build folded into a range."""
    head = Text.assemble(
        (name, "bold"),
        f"  {anatomy.model_type}, {anatomy.layer_count} decoder layers at {anatomy.layer_path}\n",
        f"{human_count(anatomy.parameters)} parameters: {human_count(sum(anatomy.layer_parameters))} in the layers, "
        f"{human_count(anatomy.embedding_parameters)} in the embedding; hidden {anatomy.hidden_size}, "
        f"vocabulary {anatomy.vocab_size:,}",
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("layers", "module", "role"):
        table.add_column(column)
    for column in ("in x out", "parameters", "FLOPs/token"):
        table.add_column(column, justify="right")
    for layers, modules in _folded(anatomy):
        for position, module in enumerate(modules):
            table.add_row(
                layers if position == 0 else "",
                _inside(module, anatomy.layer_path),
                module.role,
                f"{module.in_features} x {module.out_features}" + (f" x {module.experts}" if module.fused else ""),
                f"{module.parameters:,}",
                human_count(module.flops_per_token),
            )
    table.add_row(
        "head", "", "", f"{anatomy.hidden_size} x {anatomy.vocab_size}", "", human_count(anatomy.head_flops_per_token)
    )
    return Group(head, table, *(Text(f"note: {note}") for note in anatomy.notes))


def _inside(module: Module, layer_path: str) -> str:
    """The module's name inside its layer."""
    return module.name.removeprefix(f"{layer_path}.{module.layer}.")


def _folded(anatomy: Anatomy) -> list[tuple[str, tuple[Module, ...]]]:
    """Neighbouring layers with the same modules, roles and shapes as one range."""

    def build(layer: int) -> tuple[tuple[str, str, int, int, int], ...]:
        return tuple(
            (_inside(module, anatomy.layer_path), module.role, module.in_features, module.out_features, module.experts)
            for module in anatomy.in_layer(layer)
        )

    folded = []
    for _, group in groupby(range(anatomy.layer_count), key=build):
        layers = list(group)
        label = str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
        folded.append((label, anatomy.in_layer(layers[0])))
    return folded
