"""The record of a finished evaluation: ``eval.json`` and ``items.parquet`` in its folder. Torch-free."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, FiniteFloat

from aletheia.anatomy.schema import ModelIdentity, TokenizerIdentity
from aletheia.errors import ArtifactError
from aletheia.files import DIGITS_SHOWN, Artifact, file_sha256
from aletheia.kinds import mistaken

EVAL_FILE = "eval.json"
ITEMS_FILE = "items.parquet"
PACKAGES = ("aletheia-tune", "lm-eval", "torch", "transformers", "peft", "datasets", "numpy")
NEARLY_ALL = 0.95  # of the items of a multiple-choice task
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


class Metric(BaseModel):
    """One number of a task with its 95 % interval; ``interval`` names the method. Without one, bounds are None."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    value: FiniteFloat
    low: FiniteFloat | None
    high: FiniteFloat | None
    interval: str
    items: int
    higher_is_better: bool


class Difference(BaseModel):
    """How much worse this evaluation is than another, paired by item, with a 95 % interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    this: FiniteFloat
    other: FiniteFloat
    worse_by: FiniteFloat
    low: FiniteFloat | None
    high: FiniteFloat | None
    interval: str
    items: int


class TaskResult(BaseModel):
    """One task: upstream's version, the number of items, a hash of all prompts, and the results.

    ``answers`` counts how often the model gave each choice of a multiple-choice task.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    version: str
    num_fewshot: int
    items: int
    items_available: int
    prompts_sha256: str
    metrics: tuple[Metric, ...]
    answers: dict[str, int] = {}


def single_answer(answers: Mapping[str, int]) -> str | None:
    """``A to 198 of 200 items`` if nearly all items got one answer, so that accuracy is its share; else None."""
    total = sum(answers.values())
    choice, count = max(answers.items(), key=lambda pair: pair[1], default=("", 0))
    return f"{choice} to {count:,} of {total:,} items" if total and count >= NEARLY_ALL * total else None


class EvalSettings(BaseModel):
    """The settings of an evaluation; together with the model's weights, they determine every number."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    model: str
    adapter: str | None = None
    adapter_sha256: str | None = None
    tasks: tuple[str, ...]
    limit: int | None = None
    data_sha256: dict[str, str] = {}
    eval_data: str | None = None
    num_fewshot: int | None = None
    chat: bool = False
    max_new_tokens: int | None = None
    context_length: int | None = None
    max_length: int = 1024
    skip_unusable: bool = False
    batch_size: int = 8
    dtype: str = "auto"
    quantize: str | None = None
    attention: str | None = None

    def first_difference(self, other: "EvalSettings") -> str | None:
        """The first setting that differs, with both values, or None. The place of an adapter does not count."""
        return differing(self.model_dump(mode="json"), other.model_dump(mode="json"), ignored={"adapter"})


class EvalSeconds(BaseModel):
    """Wall-clock seconds by phase, without those of interrupted calls."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    load: float = 0.0
    eval: float


class Evaluation(Artifact):
    """The record of an evaluation, with the sha256 of the file of its items."""

    FORMAT: ClassVar[str] = "aletheia-evaluation"

    model: ModelIdentity
    tokenizer: TokenizerIdentity
    settings: EvalSettings
    dtype: str
    device: str
    packages: dict[str, str]
    tasks: tuple[TaskResult, ...]
    items_sha256: str
    seconds: EvalSeconds


class Comparison(BaseModel):
    """An evaluation against another: how much worse it is, by task. ``kind`` names the difference."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    this: str
    other: str
    kind: str
    tasks: dict[str, tuple[Difference, ...]]


@dataclass(frozen=True)
class Evaluated:
    """A folder with a finished evaluation."""

    path: Path
    evaluation: Evaluation

    @classmethod
    def read(cls, path: str | Path) -> "Evaluated":
        """Read what ``aletheia eval`` wrote.

        Raises:
            ArtifactError: the folder holds no finished evaluation, or a file in it was changed after it was written.
        """
        path = Path(path)
        if (fault := mistaken(path, "the folder of a finished evaluation", "evaluation")) is not None:
            raise ArtifactError(fault)
        if not is_finished(path):
            raise ArtifactError(f"{path} holds no finished evaluation; expected a folder written by 'aletheia eval'")
        evaluation, items = Evaluation.read(path / EVAL_FILE), path / ITEMS_FILE
        try:
            found = file_sha256(items)
        except OSError as error:
            raise ArtifactError(f"cannot read {items}: {error.strerror}; run the evaluation again") from error
        if found != evaluation.items_sha256:
            raise ArtifactError(
                f"{items} was changed after it was written: its sha256 is {found[:DIGITS_SHOWN]}, expected "
                f"{evaluation.items_sha256[:DIGITS_SHOWN]}; restore it or run the evaluation again"
            )
        return cls(path, evaluation)

    @cached_property
    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """The items by task, in the order of the file.

        Raises:
            ArtifactError: ``items.parquet`` cannot be read.
        """
        import pyarrow
        import pyarrow.parquet

        try:
            rows = pyarrow.parquet.read_table(self.path / ITEMS_FILE).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise ArtifactError(f"{self.path / ITEMS_FILE} is missing or damaged; run the evaluation again") from error
        tasks = [task.name for task in self.evaluation.tasks]
        return {task: [row for row in rows if row["task"] == task] for task in tasks}


def is_finished(path: Path) -> bool:
    """Whether a folder holds a finished evaluation; ``eval.json`` is written last."""
    return (path / EVAL_FILE).is_file()


def adapter_sha256(folder: Path) -> str:
    """One hash of an adapter's configuration and weights.

    Raises:
        ArtifactError: the folder holds no adapter.
    """
    import hashlib

    found = [file_sha256(folder / name) for name in ADAPTER_FILES if (folder / name).is_file()]
    if len(found) < 2:
        raise ArtifactError(
            mistaken(folder, "a run folder or another adapter folder", "adapter", "run")
            or f"{folder} holds no adapter; expected a run folder, or {', '.join(ADAPTER_FILES[:2])}"
        )
    return hashlib.sha256("".join(found).encode()).hexdigest()


def differing(one: Mapping[str, Any], other: Mapping[str, Any], ignored: Iterable[str] = ()) -> str | None:
    """The first key of two records whose values differ, with both values, or None."""
    for key in sorted((one.keys() | other.keys()) - set(ignored)):
        if one.get(key) != other.get(key):
            return f"{key} {one.get(key)!r} here, {other.get(key)!r} there"
    return None
