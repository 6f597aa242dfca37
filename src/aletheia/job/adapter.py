"""MODEL is an adapter folder: its base model, and what a run goes on from."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from aletheia.anatomy.foreign import ADAPTER_CONFIG, read_settings
from aletheia.anatomy.settings import LoadSettings
from aletheia.data.settings import DataSettings
from aletheia.errors import ModelError, SettingsError
from aletheia.files import file_sha256, whole_path
from aletheia.job.settings import JobSettings
from aletheia.planning.plan import Plan
from aletheia.probing.scores import Scores
from aletheia.runs.saved import template_file
from aletheia.runs.schema import PLAN_FILE, SCORES_FILE, StartingAdapter
from aletheia.settings import Settings

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
OF_A_RUN = {"seed", "epochs"}  # settings of a plan that a run has under the same names
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def _may_be_there(name: str) -> bool:
    """Whether a name is of something on this machine, or may be of the hub."""
    if not name or ".." in Path(name).parts:
        return False
    return os.path.exists(name) or (_HUB_ID.fullmatch(name) is not None and not name.endswith(".gguf"))


def adapter_folder(model: str) -> Path | None:
    """The folder, if MODEL is one that holds an adapter."""
    folder = Path(model)
    return folder if folder.is_dir() and (folder / ADAPTER_CONFIG).exists() else None


def base_settings(how: LoadSettings, folder: Path) -> LoadSettings:
    """The same settings for the base model: where ``base`` says, else the one that the adapter names.

    Raises:
        ModelError: it names none, an adapter again, or something that is neither a hub id nor a folder that is there.
    """
    found = read_settings(folder / ADAPTER_CONFIG)
    named = found.get("base_model_name_or_path")
    shown = f"{folder / ADAPTER_CONFIG}: base_model_name_or_path is {str(named)[:200]!r}"
    name = named if how.base is None else how.base
    if not isinstance(name, str) or (how.base is None and not _may_be_there(name)):
        raise ModelError(f"{shown}; found no such model; expected a hub id or a path; `base` names where it lies now")
    if adapter_folder(name) is not None:
        raise ModelError(
            f"{shown}, an adapter folder again; expected a base model; merge that adapter into its own, save "
            "it, and name that folder there"
        )
    if found.get("revision") not in (None, "main"):
        raise ModelError(
            f"{folder / ADAPTER_CONFIG}: the base is at revision {str(found['revision'])[:60]!r}; expected none; "
            "download that revision and name its folder instead"
        )
    if how.stream:
        raise SettingsError(
            "`stream` is given and MODEL is an adapter folder; expected its base to be loaded as a whole"
        )
    return LoadSettings(**how.model_dump(exclude_unset=True) | {"model": name, "fresh": False, "base": None})


@dataclass(frozen=True)
class Start:
    """An adapter that a run goes on with."""

    folder: Path
    base: LoadSettings

    @classmethod
    def of(cls, settings: JobSettings) -> "Start | None":
        """Where MODEL is an adapter folder that is not to be merged first.

        Raises:
            ModelError: as :func:`base_settings`.
            SettingsError: a setting contradicts going on with an adapter, or ``fresh`` is given without one.
        """
        how, folder = settings.model, adapter_folder(settings.model.model)
        if folder is None:
            if how.fresh:
                raise SettingsError(
                    f"`fresh` is given and {how.model} is no adapter folder; expected one to merge first"
                )
            return None
        if how.fresh:
            return None
        chosen = [name for name in _changed(settings.plan) if name not in OF_A_RUN]  # the file of a run has all of them
        if settings.plan.freeze_after == 0 and not _learns_early(folder):
            chosen = [name for name in chosen if name != "freeze_after"]
        if chosen:
            name = "plan" if "file" in chosen else chosen[0]
            raise SettingsError(
                f"`{name}` is given and MODEL is an adapter folder, which has its plan; expected neither, or "
                "`fresh` to merge the adapter first"
            )
        if settings.training.correct_quantization:
            raise SettingsError(
                "`correct_quantization` is given and MODEL is an adapter folder; expected its own weights to start"
            )
        return cls(folder, base_settings(how, folder))

    @property
    def record(self) -> StartingAdapter:
        """What the run folder says of it."""
        weights = next(self.folder / name for name in WEIGHTS if (self.folder / name).is_file())
        return StartingAdapter(name=whole_path(str(self.folder)), sha256=file_sha256(weights))

    def data(self, asked: DataSettings) -> DataSettings:
        """The same settings, with the chat template that the adapter was trained with where none is asked for."""
        template = template_file(self.folder)
        if asked.chat_template is not None or template is None:
            return asked
        return asked.model_copy(update={"chat_template": template})

    @property
    def own_plan(self) -> tuple[Scores | None, Plan] | None:
        """Scores and plan of a run folder; None for an adapter of another program."""
        if not (self.folder / PLAN_FILE).is_file():
            return None
        scores = self.folder / SCORES_FILE
        return Scores.read(scores) if scores.is_file() else None, Plan.read(self.folder / PLAN_FILE)


def _changed(settings: Settings) -> list[str]:
    """The settings that are not at their defaults, by name."""
    fields = type(settings).model_fields
    return sorted(name for name, field in fields.items() if getattr(settings, name) != field.default)


def _learns_early(folder: Path) -> bool:
    """Whether the plan of a run folder has layers that learn at first only."""
    return (folder / PLAN_FILE).is_file() and bool(Plan.read(folder / PLAN_FILE).early_layers)
