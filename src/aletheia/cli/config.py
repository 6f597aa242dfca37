"""The file of ``--config``: sections of settings in YAML, which the command line overrides. Loads no torch.

model: Qwen/Qwen2.5-0.5B-Instruct      # short for {name: ...}
data: train.jsonl                      # or {data: [...], max_length: ..., ...}
plan: {percent: 50}                    # or {file: plan.json}
training: {epochs: 2}                  # and any other field of transformers' TrainingArguments
"""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from aletheia.anatomy.settings import LoadSettings
from aletheia.cli.settings_options import Given, section_of
from aletheia.cli.wording import OTHER_NAMES, flag_of
from aletheia.data.settings import DataSettings
from aletheia.errors import SettingsError
from aletheia.kinds import mistaken
from aletheia.plain_yaml import parse_yaml, read_yaml
from aletheia.planning.plan import PlanSettings
from aletheia.runs.contents import check_file
from aletheia.settings import Settings
from aletheia.training.settings import NOT_TAKEN, TrainSettings

S = TypeVar("S", bound=Settings)

_CLASSES: tuple[Any, ...] = (LoadSettings, DataSettings, PlanSettings, TrainSettings)
SECTIONS: dict[str, Any] = {section_of(one): one for one in _CLASSES}
PLAN_FILE = "file"
SHORT = {"model": "model", "data": "data"}  # the field that a section sets if it is not a mapping
NEVER_FROM_A_FILE = ("trust_remote_code", "allow_pickle")  # the command line must give them, too
# a flag for one of a pair overrides the other one in the file
PAIRS = {"steps": "epochs", "epochs": "steps", "eval_data": "eval_fraction", "eval_fraction": "eval_data"}


def read_config(path: Path) -> Given:
    """The sections of a file, see :func:`parse_config`.

    Raises:
        SettingsError: it cannot be read, is too large, or is not as expected.
        ArtifactError: it is part of a run folder and was changed there.
    """
    if (fault := mistaken(path, "a YAML file of settings", "settings")) is not None:
        raise SettingsError(fault)
    found = read_yaml(path)
    check_file(path)
    return _sections(found, str(path))


def parse_config(text: str, name: str) -> Given:
    """The sections ``model``, ``data``, ``plan`` and ``training`` of a YAML text, each with its settings by name.

    Values are checked later, by :func:`build`.

    Raises:
        SettingsError: not YAML; an alias, merge key or double key; or an unknown section or setting.
    """
    return _sections(parse_yaml(text, name), name)


def _sections(found: Any, name: str) -> Given:
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise SettingsError(f"{name} holds {_kind(found)}; expected sections: {', '.join(SECTIONS)}")
    return {section: _section(section, value, name) for section, value in found.items()}


def merge(file_sections: Mapping[str, Mapping[str, Any]], given: Mapping[str, Mapping[str, Any]]) -> Given:
    """The settings of the file, overridden by those of the command line.

    A flag also overrides settings of the file that it excludes: ``steps`` and ``epochs`` exclude each other, and so do
    ``eval_data`` and ``eval_fraction``, and a plan file and settings for making a plan.
    """
    merged: Given = {}
    for section in dict.fromkeys((*file_sections, *given)):
        flags, values = given.get(section, {}), dict(file_sections.get(section, {}))
        for name in flags:
            values.pop(PAIRS.get(name, ""), None)
        elsewhere = {name for other, flags in given.items() if other != section for name in flags}
        if section == "plan" and flags.keys() - elsewhere and (PLAN_FILE in flags) != (PLAN_FILE in values):
            values = {}
        merged[section] = values | dict(flags)
    return merged


def build(
    settings: type[S], file_sections: Mapping[str, Mapping[str, Any]], given: Mapping[str, Mapping[str, Any]]
) -> S:
    """The settings from file and command line; a plan's ``file`` is not among them.

    Raises:
        SettingsError: a value is refused. One from the file is named with its section: ``training.steps``.
    """
    section = section_of(settings)
    for name in NEVER_FROM_A_FILE:
        if file_sections.get(section, {}).get(name) and section == "model" and not given.get(section, {}).get(name):
            raise SettingsError(
                f"`{section}.{name}` is true in the file, which may come from someone else; give `{name}` on the "
                "command line, too"
            )
    values = merge(file_sections, given).get(section, {})
    if section == "plan":
        values.pop(PLAN_FILE, None)
    try:
        return settings(**values)
    except SettingsError as error:
        from_file = values.keys() - given.get(section, {}).keys()

        def named(match: re.Match[str]) -> str:
            return f"`{section}.{_written(section, match[1])}`" if match[1] in from_file else match[0]

        raise SettingsError(re.sub(r"`(\w+)`", named, str(error))) from None


def _section(section: Any, value: Any, name: str) -> dict[str, Any]:
    if section not in SECTIONS:
        meant = _meant(str(section)) or _near(section, list(SECTIONS))
        raise SettingsError(f"{name}: unknown section {section}; expected {meant}")
    if value is None:
        return {}
    if section in SHORT and isinstance(value, str | list):
        return {SHORT[section]: value}
    if not isinstance(value, dict):
        raise SettingsError(f"{name}: `{section}` is {_kind(value)}; expected settings, each as name: value")
    found = {str(key): one for key, one in value.items()}
    known = [_written(section, field) for field in SECTIONS[section].model_fields]
    known += [PLAN_FILE] if section == "plan" else []
    if foreign := [key for key in found if key not in known]:
        others = training_arguments() if section == "training" else frozenset[str]()
        for key in foreign:
            if key not in others:
                near = _meant(key, section) or _near(key, known, others)
                raise SettingsError(f"{name}: unknown setting `{section}.{key}`; expected {near}")
    if section == "plan" and PLAN_FILE in found and len(found) > 1:
        other = next(key for key in found if key != PLAN_FILE)
        raise SettingsError(f"{name}: `plan.file` and `plan.{other}` are both given; expected the plan file alone")
    return {"model" if (section, key) == ("model", "name") else key: one for key, one in found.items()}


def _written(section: str, field: str) -> str:
    """The name of a field in its section: the model is ``model.name``."""
    return "name" if (section, field) == ("model", "model") else field


def training_arguments() -> frozenset[str]:
    """Fields of transformers' TrainingArguments, looked up only for settings that are not Aletheia's."""
    from dataclasses import fields

    from transformers import TrainingArguments

    return frozenset(one.name for one in fields(TrainingArguments)) | NOT_TAKEN.keys()


def _meant(name: str, own: str | None = None) -> str:
    """The setting that another program's name, or a name in the wrong section, means; empty if unknown."""
    name = name.replace("-", "_").lower()
    flag = OTHER_NAMES.get(name.replace("_", "-"), "").partition(" ")[0]
    for section in sorted(SECTIONS, key=lambda one: one != own):
        for field in SECTIONS[section].model_fields:
            if name == field or flag == flag_of(SECTIONS[section], field):
                written = _written(section, field)
                return written if section == own else f"{written} under {section}"
    return ""


def _near(found: Any, ours: list[str], others: frozenset[str] = frozenset()) -> str:
    near = get_close_matches(str(found), ours, 1) or get_close_matches(str(found), others, 1)
    return f"perhaps {near[0]}" if near else f"one of {', '.join(ours)}"


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else "a mapping" if isinstance(value, dict) else repr(value)
