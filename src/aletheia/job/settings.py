"""All settings of a job, in the sections of its file. Importing this loads no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from aletheia.anatomy.settings import LoadSettings
from aletheia.data.find import whole_source
from aletheia.data.settings import DataSettings
from aletheia.errors import SettingsError
from aletheia.files import whole_path
from aletheia.planning.plan import PlanSettings
from aletheia.settings import Settings
from aletheia.training.settings import WITHOUT_INFLUENCE, TrainSettings


class PlanChoice(PlanSettings):
    """How a run is planned: by the settings of :func:`aletheia.plan`, or by a plan that was made before."""

    SECTION: ClassVar[str] = "plan"

    file: Path | None = None


class JobSettings(Settings):
    """All settings of a job, in the sections of its file: ``model``, ``data``, ``plan`` and ``training``."""

    model: LoadSettings
    data: DataSettings
    plan: PlanChoice
    training: TrainSettings

    @classmethod
    def of(
        cls,
        model: str | Mapping[str, Any] | LoadSettings,
        data: str | Mapping[str, Any] | DataSettings,
        plan: str | Path | Mapping[str, Any] | PlanSettings | None = None,
        training: Mapping[str, Any] | TrainSettings | None = None,
    ) -> "JobSettings":
        """From settings, or what they are made of: a name for the model, a source of rows, a plan's file.

        Raises:
            SettingsError: a setting is out of range, unknown, or contradicts another.
        """
        made = cls(
            model=model if isinstance(model, LoadSettings) else LoadSettings(**_section(model, "model")),
            data=data if isinstance(data, DataSettings) else DataSettings(**_section(data, "data")),
            plan=PlanChoice(**_section(plan, "file")),
            training=training if isinstance(training, TrainSettings) else TrainSettings(**dict(training or {})),
        )
        made.check()
        return made

    def check(self) -> None:
        """Whether the sections fit each other.

        Raises:
            SettingsError: they contradict each other.
        """
        chosen = self.plan.given()
        if self.plan.file is not None and len(chosen) > 1:
            other = next(name for name in chosen if name != "file")
            raise SettingsError(f"`plan` and `{other}` are both given; expected the plan alone, which says so itself")
        if self.training.correct_quantization and self.model.quantize != "nf4":
            raise SettingsError(
                "`correct_quantization` takes back what `quantize` nf4 does to weights; found `quantize` "
                f"{self.model.quantize}, expected nf4"
            )
        if self.model.stream:
            self._check_no_target("where the model is streamed")
            self.check_streamed()
        elif self.training.free_prefix:
            self._check_no_target("with `free_prefix`")
            self._check_upper_layers_alone("with `free_prefix`")

    def check_streamed(self) -> None:
        """Refuse what a streamed model cannot do, before anything is read.

        A target is not refused here: where the model turns out to be too large, a note says what is not done.

        Raises:
            SettingsError: the setting that cannot be.
        """
        streamed = "where the model is streamed"
        self._check_upper_layers_alone(streamed)
        if self.training.cache not in ("auto", "disk"):
            raise SettingsError(
                f"`cache` is {self.training.cache}; expected auto or disk {streamed}: its prefix is computed once"
            )

    def _check_upper_layers_alone(self, where: str) -> None:
        if self.plan.freeze_after:
            raise SettingsError(
                f"`freeze_after` is {self.plan.freeze_after:g}; expected 0 {where}: lower layers are not in memory"
            )

    def _check_no_target(self, where: str) -> None:
        if self.plan.target is not None:
            raise SettingsError(
                f"`target` is {self.plan.target}; expected none {where}: in every target the lower layers learn, too, "
                "and they are not in memory; `policy` and `percent` choose upper layers"
            )

    def sections(self) -> dict[str, dict[str, Any]]:
        """Every setting that has a value, as its file has it: files by their whole path."""
        model = self.model.model_dump(mode="json", exclude_none=True)
        data = self.data.model_dump(mode="json", exclude_none=True)
        for name in ("data", "eval_data"):
            data[name] = [whole_source(source) for source in data[name]]
        if "chat_template" in data:
            data["chat_template"] = whole_path(data["chat_template"])
        if self.plan.file is None:
            plan = self.plan.model_dump(mode="json", exclude_none=True)
        else:
            plan = {"file": whole_path(str(self.plan.file))}
        if "base" in model:
            model["base"] = whole_path(model["base"])
        return {
            "model": {"name": whole_path(model.pop("model"))} | model,
            "data": data,
            "plan": plan,
            "training": self.training.model_dump(mode="json", exclude_none=True),
        }

    def to_yaml(self) -> str:
        """The file that repeats the job."""
        return yaml.safe_dump(self.sections(), sort_keys=False, allow_unicode=True)

    def about(self) -> dict[str, Any]:
        """What tells this job from others, name by name: all settings that may change its result."""
        sections = self.sections()
        told = {"model": sections["model"].pop("name")}
        for section in sections.values():
            told |= section
        return {name: value for name, value in told.items() if name not in WITHOUT_INFLUENCE}


def _section(given: object, name: str) -> dict[str, Any]:
    """A section as a mapping; one value stands for the one that ``name`` says."""
    if given is None:
        return {}
    if isinstance(given, Settings):
        return given.given()
    return dict(given) if isinstance(given, Mapping) else {name: given}
