"""Adapter folders as MODEL: the base model of the adapter, and further training of it."""

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
OF_A_RUN = {"seed", "epochs"}  # settings that a plan and a run share by name
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def _may_be_there(name: str) -> bool:
    """Whether a name exists on this machine, or could be an id on the hub."""
    if not name or ".." in Path(name).parts:
        return False
    return os.path.exists(name) or (_HUB_ID.fullmatch(name) is not None and not name.endswith(".gguf"))


def adapter_folder(model: str) -> Path | None:
    """The folder, if MODEL is one that holds an adapter."""
    folder = Path(model)
    return folder if folder.is_dir() and (folder / ADAPTER_CONFIG).exists() else None


def base_settings(how: LoadSettings, folder: Path) -> LoadSettings:
    """The same settings for the base model: the one in ``base``, otherwise the one that the adapter names.

    Raises:
        ModelError: the adapter names no base, another adapter, or neither a hub id nor an existing folder.
        SettingsError: ``stream`` is set; the base of an adapter must be loaded as a whole.
    """
    found = read_settings(folder / ADAPTER_CONFIG)
    named = found.get("base_model_name_or_path")
    shown = f"{folder / ADAPTER_CONFIG}: base_model_name_or_path is {str(named)[:200]!r}"
    name = named if how.base is None else how.base
    if not isinstance(name, str) or (how.base is None and not _may_be_there(name)):
        raise ModelError(f"{shown}; found no such model; expected a hub id or a path; set `base` to its present place")
    if adapter_folder(name) is not None:
        raise ModelError(
            f"{shown}, another adapter folder; expected a base model; merge that adapter into its base, save the "
            "result, and name its folder there"
        )
    if found.get("revision") not in (None, "main"):
        raise ModelError(
            f"{folder / ADAPTER_CONFIG}: the base is at revision {str(found['revision'])[:60]!r}; expected none; "
            "download that revision and name its folder instead"
        )
    if how.stream:
        raise SettingsError(
            "`stream` is given and MODEL is an adapter folder, whose base must be loaded as a whole; leave out `stream`"
        )
    return LoadSettings(**how.model_dump(exclude_unset=True) | {"model": name, "fresh": False, "base": None})


@dataclass(frozen=True)
class Start:
    """An adapter that a run trains further."""

    folder: Path
    base: LoadSettings

    @classmethod
    def of(cls, settings: JobSettings) -> "Start | None":
        """The adapter to train further, if MODEL is an adapter folder and is not to be merged first.

        Raises:
            ModelError: as :func:`base_settings`.
            SettingsError: a setting does not go together with an adapter, or ``fresh`` is given without one.
        """
        how, folder = settings.model, adapter_folder(settings.model.model)
        if folder is None:
            if how.fresh:
                raise SettingsError(
                    f"`fresh` is given and {how.model} is not an adapter folder; expected one, which is merged first"
                )
            return None
        if how.fresh:
            return None
        chosen = [name for name in _changed(settings.plan) if name not in OF_A_RUN]  # a run's file holds all settings
        if settings.plan.freeze_after == 0 and not _learns_early(folder):
            chosen = [name for name in chosen if name != "freeze_after"]
        if chosen:
            name = "plan" if "file" in chosen else chosen[0]
            raise SettingsError(
                f"`{name}` is given and MODEL is an adapter folder, which already has a plan; leave out `{name}`, or "
                "set `fresh` to merge the adapter first"
            )
        if settings.training.correct_quantization:
            raise SettingsError(
                "`correct_quantization` is given and MODEL is an adapter folder, whose weights training starts from; "
                "leave it out"
            )
        return cls(folder, base_settings(how, folder))

    @property
    def record(self) -> StartingAdapter:
        """What the run folder records about it."""
        weights = next(self.folder / name for name in WEIGHTS if (self.folder / name).is_file())
        return StartingAdapter(name=whole_path(str(self.folder)), sha256=file_sha256(weights))

    def data(self, asked: DataSettings) -> DataSettings:
        """The same settings; without a chat template, the one that the adapter was trained with is used."""
        template = template_file(self.folder)
        if asked.chat_template is not None or template is None:
            return asked
        return asked.model_copy(update={"chat_template": template})

    @property
    def own_plan(self) -> tuple[Scores | None, Plan] | None:
        """Scores and plan of a run folder; None for an adapter that another program wrote."""
        if not (self.folder / PLAN_FILE).is_file():
            return None
        scores = self.folder / SCORES_FILE
        return Scores.read(scores) if scores.is_file() else None, Plan.read(self.folder / PLAN_FILE)


def _changed(settings: Settings) -> list[str]:
    """The settings that are not at their defaults, by name."""
    fields = type(settings).model_fields
    return sorted(name for name, field in fields.items() if getattr(settings, name) != field.default)


def _learns_early(folder: Path) -> bool:
    """Whether the plan of a run folder has layers that learn only at the beginning."""
    return (folder / PLAN_FILE).is_file() and bool(Plan.read(folder / PLAN_FILE).early_layers)
