"""The record of a finished run: ``metrics.json`` and the folder around it. Torch-free."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, FiniteFloat, model_validator

from aletheia.anatomy.schema import DataIdentity, ModelIdentity, TokenizerIdentity
from aletheia.data.order import Order
from aletheia.errors import AdapterError, ArtifactError
from aletheia.files import Artifact
from aletheia.kinds import mistaken, near
from aletheia.planning.plan import Plan
from aletheia.runs.contents import check_contents

METRICS_FILE = "metrics.json"
PLAN_FILE = "plan.json"
SCORES_FILE = "scores.json"
REPORT_FILE = "report.html"


class PhaseSeconds(BaseModel):
    """Wall-clock seconds by phase.

    ``cache`` is the time to fill the prefix cache before the first step, ``correction`` to correct the quantization of
    a 4-bit base, and ``race`` to try learning rates. ``train`` counts optimizer steps alone, and ``eval`` the held-out
    evaluation. ``other`` is all time between them, such as writing checkpoints.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    load: float
    probe: float
    plan: float
    cache: float = 0.0
    correction: float = 0.0
    race: float = 0.0
    train: float
    eval: float
    other: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of all phases: from the start until the run folder is written."""
        total: float = sum(getattr(self, phase) for phase in PHASES)
        return total


Verdict = Literal["learned", "nothing", "worse"]  # "worse": the held-out loss is above the one before training
PHASES = tuple(PhaseSeconds.model_fields)  # in the order in which they run


class TrainPoint(BaseModel):
    """One optimizer step. ``train_seconds`` is the time since the first step, without evaluation."""

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
    """The settings of a run besides its plan, with every default filled in."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    batch_size: int
    gradient_accumulation_steps: int = 1
    processes: int = 1
    learning_rate: float
    max_length: int
    dtype: str
    device: str
    machine: str | None = None  # the device that computed the steps: the GPU's name, or CPU and threads
    seed: int
    packing: bool = False  # rows of a batch in one sequence, without padding
    order: Order = "random"  # how rows were put into batches
    compile_layers: bool = False
    cuda_graphs: bool = False
    liger: bool = True  # whether Liger's kernels were allowed; `steps_computed_by` lists those that were used
    gradient_checkpointing: Literal["off", "selective", "full"] = "off"
    cache: Literal["memory", "disk", "off"] = "off"
    loaded_by: str = "AutoModelForCausalLM"  # the class of transformers that loads the base
    quantization: str | None = None  # quantization of the base's matrices
    quantization_corrected: bool = False  # by a frozen part of the adapters, which doubles their rank
    attention: str | None = None
    keep: Literal["last", "best"] = "last"
    evaluations: int | None = None  # planned evaluations; None: Trainer's own settings decided
    early_stopping_patience: int | None = None  # None: the run could not stop early
    rescale: bool = False  # whether weaker versions of the kept adapter were tried
    averaging: Literal["on", "off"] = "off"  # whether averaged weights were evaluated and kept

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_releases(cls, given: Any) -> Any:
        """Read records from before there were balanced batches."""
        if isinstance(given, dict) and "group_by_length" in given:
            given = dict(given)
            given["order"] = "grouped" if given.pop("group_by_length") else "random"
        return given


class RateRace(BaseModel):
    """Learning rates that were tried for a few ``steps`` each, and the one that was chosen.

    ``losses`` are means over ``rows`` held-out rows after these steps, in nats per labelled token of a row; None where
    a loss was not finite.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    steps: int
    rows: int
    rates: tuple[float, ...]
    losses: tuple[FiniteFloat | None, ...]
    chosen: float


class StartingAdapter(BaseModel):
    """The adapter that a run trained further: its path, and the sha256 of its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    sha256: str


class Metrics(Artifact):
    """Everything measured in one run."""

    FORMAT: ClassVar[str] = "aletheia-metrics"

    model: ModelIdentity
    data: DataIdentity | None
    tokenizer: TokenizerIdentity | None = None
    held_out_data: DataIdentity | None
    held_out_rows: int
    held_out_tokens: int
    packages: dict[str, str]
    settings: UsedSettings
    went_on_from: StartingAdapter | None = None
    rate_race: RateRace | None = None
    rows_truncated: int = 0
    rows_skipped: int = 0
    steps: int
    planned_steps: int | None = None  # the length of the learning-rate schedule
    kept_step: int | None = None
    kept_scale: FiniteFloat = 1.0  # strength of the kept adapter: the factor of every B
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
    compile_seconds: FiniteFloat = 0.0  # part of the seconds of training
    held_out_loss_before: FiniteFloat
    held_out_loss_after: FiniteFloat
    verdict: Verdict = "learned"
    train_curve: tuple[TrainPoint, ...]
    held_out_curve: tuple[HeldOutPoint, ...]

    @property
    def steps_saved(self) -> int:
        """Planned steps that were not taken, because the held-out loss no longer fell."""
        return (self.planned_steps or self.steps) - self.steps

    def check_tokenizer(self, tokenizer: TokenizerIdentity | None) -> None:
        """Check that ``tokenizer`` is the one of the run; None, for an unknown tokenizer, passes.

        Raises:
            AdapterError: vocabularies or chat templates differ. The message names both tokenizers.
        """
        if self.tokenizer and (difference := self.tokenizer.difference(tokenizer)):
            raise AdapterError(
                f"the adapter was trained with the tokenizer {self.tokenizer}, but this one is {tokenizer}: their "
                f"{difference} differ; use the tokenizer that it was trained with"
            )


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, its measurements and its plan.

    ``metrics.verdict`` says whether it learned, and ``warning`` explains a bad verdict in a line. ``notes`` has a line
    for each model card or report that was changed after the run.
    """

    path: Path
    metrics: Metrics
    plan: Plan
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def warning(self) -> str | None:
        """Why the adapter is not useful, in one line; None if it learned and the held-out loss did not rise."""
        metrics = self.metrics
        if metrics.verdict == "nothing":
            return (
                f"nothing was learned: after {metrics.steps} step(s) the adapters or the held-out loss are unchanged; "
                "use more `steps`, or a `learning_rate` and a schedule above 0"
            )
        if metrics.verdict == "worse":
            return (
                f"the held-out loss rose from {metrics.held_out_loss_before:.4f} to {metrics.held_out_loss_after:.4f}; "
                f"the adapter is kept in {self.path}; try a lower `learning_rate`, fewer steps or more rows; "
                "`allow_worse` ends such a run with exit code 0"
            )
        return None

    @classmethod
    def read(cls, path: str | Path) -> "Run":
        """Read a run folder, and check its files against its manifest, see :mod:`aletheia.runs.contents`.

        Raises:
            ArtifactError: the folder holds no finished run, or one of its files was changed since it was written.
        """
        path = Path(path)
        if (fault := mistaken(path, "the folder of a finished run", "run")) is not None:
            raise ArtifactError(fault)
        if not path.exists():
            raise ArtifactError(f"cannot read {path}: there is no such folder{near(path, 'run')}")
        if not (path / METRICS_FILE).is_file():
            raise ArtifactError(
                f"{path} holds no finished run (no {METRICS_FILE}); give a folder written by 'aletheia train'"
            )
        metrics, plan = Metrics.read(path / METRICS_FILE), Plan.read(path / PLAN_FILE)
        return cls(path, metrics, plan, tuple(check_contents(path)))
