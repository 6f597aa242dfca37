"""The record of a finished run: ``metrics.json`` and the folder around it. Torch-free."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, FiniteFloat

from aletheia.anatomy.schema import DataIdentity, ModelIdentity
from aletheia.errors import ArtifactError
from aletheia.files import Artifact
from aletheia.planning.plan import Plan

METRICS_FILE = "metrics.json"
PLAN_FILE = "plan.json"
SCORES_FILE = "scores.json"
REPORT_FILE = "report.html"


class PhaseSeconds(BaseModel):
    """Wall-clock seconds by phase.

    ``cache`` is filling the prefix cache before the first step, where that is done, ``init`` the passes that correct
    a 4-bit base and turn the adapters towards the gradient, ``train`` the optimizer steps alone, ``eval`` the held-out
    evaluation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    load: float
    probe: float
    plan: float
    cache: float = 0.0
    init: float = 0.0
    train: float
    eval: float

    @property
    def total(self) -> float:
        """All phases."""
        return self.load + self.probe + self.plan + self.cache + self.init + self.train + self.eval


PHASES = tuple(PhaseSeconds.model_fields)  # in the order in which they happen


class TrainPoint(BaseModel):
    """One optimizer step. ``train_seconds`` counts from the first step, without evaluation."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    step: int
    loss: FiniteFloat
    train_seconds: float


class HeldOutPoint(BaseModel):
    """The held-out loss after ``step`` steps, in nats per labelled token."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    step: int
    loss: FiniteFloat
    train_seconds: float


class UsedSettings(BaseModel):
    """What a run was trained with besides its plan, defaults resolved."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    batch_size: int
    gradient_accumulation_steps: int = 1
    processes: int = 1
    learning_rate: float
    max_length: int
    dtype: str
    device: str
    seed: int
    group_by_length: bool = False
    gradient_checkpointing: Literal["off", "selective", "full"] = "off"
    cache: Literal["memory", "disk", "off"] = "off"
    init: Literal["gradient", "random"] = "random"
    loaded_by: str = "AutoModelForCausalLM"  # class of transformers that loads the base
    quantization: str | None = None  # of the base's matrices
    quantization_corrected: bool = False  # by a frozen part of the adapters, which doubles their rank
    attention: str | None = None
    keep: Literal["last", "best"] = "last"


class Metrics(Artifact):
    """Everything measured in one run."""

    FORMAT: ClassVar[str] = "aletheia-metrics"

    model: ModelIdentity
    data: DataIdentity | None
    held_out_data: DataIdentity | None
    held_out_rows: int
    held_out_tokens: int
    packages: dict[str, str]
    settings: UsedSettings
    rows_truncated: int = 0
    rows_skipped: int = 0
    steps: int
    kept_step: int | None = None
    tokens: int
    labelled_tokens: int
    boundary: int
    early_steps: int = 0
    trainable_parameters: int
    seconds: PhaseSeconds
    peak_memory_bytes: int
    cache_bytes: int = 0
    cache_reason: str = ""
    steps_computed_by: tuple[str, ...] = ()
    held_out_loss_before: FiniteFloat
    held_out_loss_after: FiniteFloat
    train_curve: tuple[TrainPoint, ...]
    held_out_curve: tuple[HeldOutPoint, ...]


@dataclass(frozen=True)
class Run:
    """A finished run: where its folder is, what it measured and the plan it followed."""

    path: Path
    metrics: Metrics
    plan: Plan

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @classmethod
    def read(cls, path: str | Path) -> "Run":
        """Read a run folder.

        Raises:
            ArtifactError: the folder holds no finished run.
        """
        path = Path(path)
        if not (path / METRICS_FILE).is_file():
            raise ArtifactError(
                f"{path} holds no finished run (no {METRICS_FILE}); give a folder written by 'aletheia train'"
            )
        return cls(path, Metrics.read(path / METRICS_FILE), Plan.read(path / PLAN_FILE))
