"""Facts about an adapter folder, in words. No matplotlib."""

from collections import Counter
from collections.abc import Sequence

from aletheia.planning.plan import layer_ranges
from aletheia.reporting.format import NOTHING, human_count, human_loss, rank_summary
from aletheia.runs.adapter_folder import AdapterFolder


def adapter_facts(folder: AdapterFolder) -> dict[str, str]:
    """Facts about an adapter folder, by name, for a table or a terminal."""
    kinds = Counter(adapter.name.rpartition(".")[2] for adapter in folder.adapters)
    scaled = "alpha / sqrt(rank)" if folder.rslora else "alpha / rank"
    return {
        "Base model": folder.base or "not named",
        "Layers": f"{layer_ranges(folder.layers)} ({len(folder.layers)})" if folder.layers else "none",
        "Modules": ", ".join(f"{kind} ({count})" for kind, count in kinds.items()) or NOTHING,
        "Outside the layers": ", ".join(folder.outside) or NOTHING,
        "Ranks": rank_summary(folder.adapters) or str(folder.rank),
        "Alpha": f"{_alphas(folder)}, scaled as {scaled}",
        "Dropout": f"{folder.dropout:g}",
        "Besides LoRA": ", ".join(folder.beside) or NOTHING,
        "Parameters": human_count(folder.parameters),
        "Steps": _steps(folder),
        "Training loss": curve_ends(folder.train_curve),
        "Held-out loss": curve_ends(folder.held_out_curve),
        "PEFT": folder.made_with or NOTHING,
    }


def _alphas(folder: AdapterFolder) -> str:
    found = sorted({adapter.alpha for adapter in folder.adapters} or {folder.alpha})
    return f"{found[0]:g}" if len(found) == 1 else f"{found[0]:g} to {found[-1]:g}"


def _steps(folder: AdapterFolder) -> str:
    last = max((step for step, _ in (*folder.train_curve, *folder.held_out_curve)), default=None)
    return NOTHING if last is None else f"{last:,}"


def curve_ends(curve: Sequence[tuple[int, float]]) -> str:
    """First and last loss of a curve, in words."""
    if not curve:
        return NOTHING
    (first_step, first), (last_step, last) = curve[0], curve[-1]
    return f"{human_loss(first)} (step {first_step:,}) to {human_loss(last)} (step {last_step:,})"
