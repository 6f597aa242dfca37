"""Where the wall-clock time of runs went, as parts that add up to the total."""

from collections.abc import Sequence
from dataclasses import dataclass

from aletheia.planning.plan import layer_ranges
from aletheia.runs.schema import PHASES, Run

PART_NAMES = {
    "load": "Loading the model",
    "probe": "Probe",
    "plan": "Planning",
    "cache": "Filling the prefix cache",
    "correction": "Correcting the quantization",
    "race": "Trying learning rates",
    "early": "Training until lower layers freeze",
    "train": "Training",
    "eval": "Held-out evaluation",
    "other": "Everything else",
}


@dataclass(frozen=True)
class Part:
    """Seconds of one kind of work; ``key`` names its colour in the style sheet."""

    key: str
    name: str
    seconds: float


def learning_layers(run: Run) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(layers that learned to the end of the run, those that froze on the way)."""
    plan, metrics = run.plan, run.metrics
    if 0 < metrics.early_steps < metrics.steps:
        return plan.layers, plan.early_layers
    return (tuple(sorted({*plan.layers, *plan.early_layers})) if metrics.early_steps else plan.layers), ()


def time_parts(run: Run) -> tuple[Part, ...]:
    """The parts of a run that took time, in order; training is two parts if lower layers froze on the way."""
    seconds = run.metrics.seconds
    parts = [Part(phase, PART_NAMES[phase], getattr(seconds, phase)) for phase in PHASES if getattr(seconds, phase)]
    return tuple(piece for part in parts for piece in (_training(run, part) if part.key == "train" else [part]))


def _training(run: Run, whole: Part) -> list[Part]:
    lasting, early = learning_layers(run)
    curve = run.metrics.train_curve
    seconds = next((point.train_seconds for point in curve if point.step == run.metrics.early_steps), None)
    if not early or seconds is None:
        return [whole]
    every = layer_ranges(sorted({*early, *lasting}))
    return [
        Part("early", f"Training layers {every}", seconds),
        Part("train", f"Training layers {layer_ranges(lasting)}", whole.seconds - seconds),
    ]


def time_table(runs: Sequence[Run]) -> list[tuple[str, str, list[float | None]]]:
    """(key, name, seconds of each run or None if it has no such part), in the order of a run."""
    found = [{part.key: part for part in time_parts(run)} for run in runs]
    names = PART_NAMES if len(runs) > 1 else {key: part.name for key, part in found[0].items()}
    return [
        (key, names[key], [each[key].seconds if key in each else None for each in found])
        for key in PART_NAMES
        if any(key in each for each in found)
    ]
