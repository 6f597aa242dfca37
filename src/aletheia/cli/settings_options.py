"""Options of a command, made from the fields of settings classes: name, help, values and default are written once."""

import inspect
from collections.abc import Callable, Collection, Iterable
from datetime import date
from functools import wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import ByteSize
from pydantic.fields import FieldInfo

from aletheia.cli.help import OR_IN_FILE
from aletheia.cli.wording import FLAGS, flag_of, flags_of, translate
from aletheia.settings import Settings

Given = dict[str, dict[str, Any]]  # section -> name -> value, as given on the command line
_SHOWN: dict[Any, str] = {ByteSize: "SIZE", Path: "PATH", int: "INT", float: "NUMBER", str: "TEXT", date: "DATE"}


def section_of(settings: type[Settings]) -> str:
    """The section of a settings class in ``--config``: its SECTION, else its name without ``Settings``."""
    return str(getattr(settings, "SECTION", "") or settings.__name__.removesuffix("Settings").lower())


def from_settings(
    *classes: type[Settings], leave_out: Collection[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command one option for each field of these settings, and the function one argument ``given``.

    ``given`` holds a dictionary for each class, by :func:`section_of`, with only the options that were given; the
    settings class checks them. A field of two classes is one option with the help of the last one, and goes to both.
    Fields without :func:`aletheia.settings.option` get no option, nor do those in ``leave_out``. Required fields become
    required options, unless the function has a parameter ``config``, as that file may give them.

    Raises:
        ValueError: a field is named like a parameter of the function, or ``leave_out`` names no field.
    """
    owners: dict[str, list[type[Settings]]] = {}
    for one in classes:
        for name, field in one.model_fields.items():
            if name not in leave_out and "group" in _extra(field):
                owners[name] = [*owners.pop(name, []), one]  # in the place where the last class has it
    flags = flags_of(*classes)
    if unknown := set(leave_out) - flags.keys():
        raise ValueError(f"{', '.join(sorted(unknown))} to leave out; expected fields of the settings")

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        own = [one for one in inspect.signature(function).parameters.values() if one.name != "given"]
        if twice := [one.name for one in own if one.name in owners]:
            raise ValueError(f"{twice[0]} is a parameter and a field; expected it in leave_out, or another name")
        words = FLAGS | flags | _own_words(own)
        has_file = any(one.name == "config" for one in own)
        options = [_parameter(some[-1], name, words, has_file) for name, some in owners.items()]

        @wraps(function)
        def command(**values: Any) -> Any:
            given: Given = {section_of(one): {} for one in classes}
            for name, some in owners.items():
                value = values.pop(name)
                if value is None or value == []:
                    continue
                for one in some:
                    given[section_of(one)][name] = _typed(value, one.model_fields[name].annotation)
            return function(**values, given=given)

        parameters = [*own, *options]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {one.name: one.annotation for one in parameters}
        return command

    return decorate


def _extra(field: FieldInfo) -> dict[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def _own_words(parameters: Iterable[inspect.Parameter]) -> dict[str, str]:
    """How help texts name the command's own arguments and options, by parameter or flag."""
    words = {}
    for one in parameters:
        for info in get_args(one.annotation):
            if isinstance(info, typer.models.ArgumentInfo):
                words[one.name] = one.name.upper()
            elif isinstance(info, typer.models.OptionInfo):
                flag = str(info.default).partition("/")[0]  # the first declaration, as typer reads an annotation
                words[flag.lstrip("-").replace("-", "_")] = flag
    return words


def _parameter(settings: type[Settings], name: str, words: dict[str, str], has_file: bool) -> inspect.Parameter:
    """The parameter from which typer makes the option of a field; None means not given."""
    field, flag = settings.model_fields[name], flag_of(settings, name)
    kinds = _kinds(field.annotation)
    is_switch = bool in kinds
    annotation: Any = Annotated[
        bool | None if is_switch else list[str] | None if _is_list(field.annotation) else str | None,
        typer.Option(
            f"{flag}/--no-{flag[2:]}" if is_switch else flag,
            *filter(None, [_extra(field).get("also")]),
            help=_help(field, words, has_file),
            metavar=None if is_switch else _metavar(kinds),
            show_default=False,
            rich_help_panel=_extra(field)["group"] or None,
        ),
    ]
    must = field.is_required() and not has_file
    default = inspect.Parameter.empty if must else None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _help(field: FieldInfo, words: dict[str, str], has_file: bool) -> str:
    text = translate(field.description or "", words)
    if field.is_required():
        return f"{text} {OR_IN_FILE}" if has_file else text
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is None or default in ((), ""):
        return text
    if isinstance(default, bool):
        shown = "yes" if default else "no"
    elif isinstance(default, float):
        shown = f"{default:g}"
    else:
        shown = ", ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return f"{text} (default: {shown})"


def _members(annotation: Any) -> list[Any]:
    """The alternatives of a type, without None and annotations."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [one for part in get_args(annotation) for one in _members(part)]
    return [] if annotation is NoneType else [annotation]


def _is_list(annotation: Any) -> bool:
    return any(get_origin(one) in (tuple, list) for one in _members(annotation))


def _kinds(annotation: Any) -> list[Any]:
    """The types that a single value may have; for lists, those of the items."""
    return [
        kind
        for one in _members(annotation)
        for kind in (_members(get_args(one)[0]) if get_origin(one) in (tuple, list) else [one])
    ]


def _metavar(kinds: list[Any]) -> str:
    choices = [str(value) for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]
    names = ["{" + ",".join(choices) + "}"] if choices else []
    names += [_SHOWN.get(kind, "VALUE") for kind in kinds if get_origin(kind) is not Literal]
    return "|".join(dict.fromkeys(names))


def _typed(value: Any, annotation: Any) -> Any:
    """A typed value as a number if the field takes numbers; anything else is left for the class to refuse."""
    if isinstance(value, list):
        return tuple(_typed(one, annotation) for one in value)
    kinds = _kinds(annotation)
    if not isinstance(value, str) or str in kinds:
        return value
    for kind in (int, float):
        if int in kinds or float in kinds:
            try:
                return kind(value)
            except ValueError:
                continue
    return value
