"""What is exported: a run folder, an adapter folder of another program, or a plan file; and its base model."""

from dataclasses import dataclass
from pathlib import Path

from aletheia.anatomy.foreign import ADAPTER_CONFIG, read_settings
from aletheia.anatomy.schema import DataIdentity
from aletheia.errors import AdapterError, ArtifactError, ModelError
from aletheia.files import artifact_format
from aletheia.planning.plan import Plan
from aletheia.runs.schema import METRICS_FILE, PLAN_FILE, Run, UsedSettings


@dataclass(frozen=True)
class Origin:
    """Where an export comes from. ``base`` is a hub id, or the absolute path of a folder or ``.gguf`` file.

    ``run`` is None for an adapter of another program and for a plan file; ``plan`` is None for such an adapter.
    """

    path: Path
    base: str
    run: Run | None = None
    plan: Plan | None = None

    @classmethod
    def of(cls, path: Path, base: str | None = None) -> "Origin":
        """Read what lies at ``path``; ``base`` overrides the base model that it names.

        Raises:
            AdapterError: there is neither an adapter nor a plan, or it names no base model.
            ArtifactError: a file of the run, or the plan, was changed since it was written.
            ModelError: the adapter's configuration cannot be read.
        """
        if path.is_file() and artifact_format(path) == Plan.FORMAT:
            alone = Plan.read(path)
            return cls(path, _absolute(base or alone.model.name), plan=alone)
        if not (path / ADAPTER_CONFIG).is_file():
            found = "is no plan" if path.is_file() else "holds no adapter" if path.is_dir() else "is not there"
            raise AdapterError(f"{path} {found}; expected a run folder, a PEFT adapter folder or a plan file")
        run = Run.read(path) if (path / METRICS_FILE).is_file() else None
        named = base or read_settings(path / ADAPTER_CONFIG).get("base_model_name_or_path")
        if not isinstance(named, str) or not named:
            raise AdapterError(f"{path / ADAPTER_CONFIG} names no base model; give it as `base`")
        plan = Plan.read(path / PLAN_FILE) if (path / PLAN_FILE).is_file() else None
        return cls(path, _absolute(named), run, plan)

    @property
    def is_plan(self) -> bool:
        """Whether it is a plan without learned weights."""
        return self.path.is_file()

    @property
    def settings(self) -> UsedSettings | None:
        """What the run was trained with."""
        return self.run.metrics.settings if self.run else None

    @property
    def quantization(self) -> str | None:
        """How the base was quantized in training, such as ``nf4``; None: not at all, or not known."""
        return self.settings.quantization if self.settings else None

    @property
    def data(self) -> DataIdentity | None:
        """The rows that it was trained on, or planned for."""
        if self.run is not None:
            return self.run.metrics.data
        return self.plan.data if self.plan else None

    def check_fits_any_base(self) -> None:
        """Refuse an adapter that holds a correction of the quantized base: on other weights it is wrong.

        Raises:
            AdapterError: it does.
        """
        if self.settings is not None and self.settings.quantization_corrected:
            raise AdapterError(
                f"half of each rank of {self.path} corrects its {self.quantization} base, so it fits no other weights; "
                "export it with `to` merged, which keeps the quantized values"
            )

    def check_no_gguf(self, who_reads: str) -> None:
        """Refuse a GGUF base; ``who_reads`` is such as "mlx-lm reads".

        Raises:
            ModelError: it is one.
        """
        if self.base.endswith(".gguf"):
            raise ModelError(
                f"the base is {self.base}, and {who_reads} no GGUF files; give the hub id or folder of the same model "
                "as `base`"
            )

    def check_trained(self, to: str) -> None:
        """Refuse a plan where learned weights are needed.

        Raises:
            ArtifactError: it is a plan.
        """
        if self.is_plan:
            raise ArtifactError(f"{self.path} is a plan, which has no weights; expected a run folder for `to` {to}")


def _absolute(base: str) -> str:
    path = Path(base)
    return str(path.absolute()) if path.exists() else base
