"""The source of an export: a run folder, an adapter folder of another program, or a plan file; and its base model."""

from dataclasses import dataclass
from pathlib import Path

from aletheia.anatomy.foreign import ADAPTER_CONFIG, read_settings
from aletheia.anatomy.schema import DataIdentity
from aletheia.errors import AdapterError, ArtifactError, ModelError
from aletheia.files import artifact_format, whole_path
from aletheia.planning.plan import Plan
from aletheia.runs.schema import METRICS_FILE, PLAN_FILE, Run, UsedSettings


@dataclass(frozen=True)
class Origin:
    """The source of an export. ``base`` is a hub id, or the absolute path of a folder or ``.gguf`` file.

    ``run`` is None for an adapter of another program and for a plan file. ``plan`` is None for such an adapter.
    """

    path: Path
    base: str
    run: Run | None = None
    plan: Plan | None = None

    @classmethod
    def of(cls, path: Path, base: str | None = None) -> "Origin":
        """Read the source at ``path``; ``base`` overrides the base model that it names.

        Raises:
            AdapterError: there is neither an adapter nor a plan, or it names no base model.
            ArtifactError: a file of the run, or the plan, was changed since it was written.
            ModelError: the adapter's configuration cannot be read.
        """
        if path.is_file() and artifact_format(path) == Plan.FORMAT:
            alone = Plan.read(path)
            return cls(path, whole_path(base or alone.model.name), plan=alone)
        if not (path / ADAPTER_CONFIG).is_file():
            found = "is not a plan" if path.is_file() else "holds no adapter" if path.is_dir() else "does not exist"
            raise AdapterError(f"{path} {found}; expected a run folder, a PEFT adapter folder or a plan file")
        run = Run.read(path) if (path / METRICS_FILE).is_file() else None
        named = base or read_settings(path / ADAPTER_CONFIG).get("base_model_name_or_path")
        if not isinstance(named, str) or not named:
            raise AdapterError(f"{path / ADAPTER_CONFIG} names no base model; expected one; set `base` to it")
        plan = Plan.read(path / PLAN_FILE) if (path / PLAN_FILE).is_file() else None
        return cls(path, whole_path(named), run, plan)

    @property
    def is_plan(self) -> bool:
        """Whether it is a plan without learned weights."""
        return self.path.is_file()

    @property
    def settings(self) -> UsedSettings | None:
        """The settings of the run, if it is one."""
        return self.run.metrics.settings if self.run else None

    @property
    def quantization(self) -> str | None:
        """How the base was quantized in training, such as ``nf4``; None if it was not, or if that is not known."""
        return self.settings.quantization if self.settings else None

    @property
    def data(self) -> DataIdentity | None:
        """The rows that it was trained on, or that the plan was made from."""
        if self.run is not None:
            return self.run.metrics.data
        return self.plan.data if self.plan else None

    def check_fits_any_base(self) -> None:
        """Check that the adapter holds no correction of a quantized base, which would be wrong on other weights.

        Raises:
            AdapterError: it holds one.
        """
        if self.settings is not None and self.settings.quantization_corrected:
            raise AdapterError(
                f"half of each rank of {self.path} corrects its {self.quantization} base, so it fits no other weights; "
                "set `to` merged, which keeps the quantized values"
            )

    def check_no_gguf(self, who_reads: str) -> None:
        """Check that the base is not a GGUF file; ``who_reads`` is for example "mlx-lm reads".

        Raises:
            ModelError: the base is a GGUF file.
        """
        if self.base.endswith(".gguf"):
            raise ModelError(
                f"the base is {self.base}, but {who_reads} no GGUF files; expected a hub id or a folder; set `base` to "
                "that of the same model"
            )

    def check_trained(self, to: str) -> None:
        """Check that the source has learned weights.

        Raises:
            ArtifactError: it is a plan.
        """
        if self.is_plan:
            raise ArtifactError(f"{self.path} is a plan, which has no weights; expected a run folder for `to` {to}")
