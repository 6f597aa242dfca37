"""The values for another trainer's settings: those of the run, or defaults for a plan and a foreign adapter."""

from dataclasses import dataclass
from pathlib import Path

from aletheia.data.forms import FORMS
from aletheia.planning.plan import layer_ranges
from aletheia.runs.exports.bridge import FOLDER
from aletheia.runs.exports.origin import Origin
from aletheia.runs.exports.written import Task

NO_ROWS = "train.jsonl"  # a placeholder where the rows are not known; a note says so

_TOKENIZER = "tokenizer_config.json"


@dataclass(frozen=True)
class Recipe:
    """How another trainer trains the adapter. ``columns`` name question and answer; None: rows are conversations."""

    base: str
    adapter: str
    tokenizer: str
    out: str
    data_files: tuple[str, ...]
    columns: tuple[str, str] | None
    quantization: str | None
    learning_rate: float = 2e-4
    batch_size: int = 4
    accumulation: int = 1
    epochs: float = 1.0
    max_length: int = 1024
    seed: int = 0

    @classmethod
    def of(cls, task: Task) -> "Recipe":
        """The recipe of a run, adapter or plan."""
        origin, settings = task.origin, task.origin.settings
        own: dict[str, float | int] = {}
        if settings is not None:
            own = {
                "learning_rate": settings.learning_rate,
                "batch_size": settings.batch_size,
                "accumulation": settings.gradient_accumulation_steps,
                "max_length": settings.max_length,
                "seed": settings.seed,
            }
        if origin.plan is not None and origin.plan.settings.epochs is not None:
            own["epochs"] = origin.plan.settings.epochs
        return cls(
            base=origin.base,
            adapter=str(task.out / FOLDER),
            tokenizer=str(task.out / FOLDER) if (task.folder / FOLDER / _TOKENIZER).is_file() else origin.base,
            out=str(task.out / "trained"),
            data_files=_files(origin),
            columns=_columns(origin),
            quantization=origin.quantization,
            **own,  # type: ignore[arg-type]  # by name
        )


def notes_on(task: Task) -> tuple[str, ...]:
    """Notes for the user before another trainer trains the adapter."""
    origin = task.origin
    notes = []
    if _files(origin) == (NO_ROWS,):
        notes.append(f"the training rows are not on this machine; replace {NO_ROWS} by the path of yours")
    elif _columns(origin) is None and origin.data is not None and origin.data.form != "messages":
        notes.append(f"the rows have the form `{origin.data.form}`; the settings expect a column `messages`")
    if origin.plan is not None and origin.plan.early_layers:
        early = layer_ranges(origin.plan.early_layers)
        notes.append(f"the other trainer trains layers {early} to the end; only Aletheia freezes them midway")
    return tuple(notes)


def _files(origin: Origin) -> tuple[str, ...]:
    sources = origin.data.sources if origin.data else ()
    if sources and all(Path(source).is_file() for source in sources):
        return tuple(str(Path(source).resolve()) for source in sources)
    return (NO_ROWS,)


def _columns(origin: Origin) -> tuple[str, str] | None:
    names = FORMS.get(origin.data.form, ()) if origin.data else ()
    return (names[0], names[1]) if len(names) == 2 else None
