"""Help pages that cut nothing off: options in groups, names and choices in full at any width."""

import re
from textwrap import wrap
from typing import Any

from typer.core import TyperCommand, TyperGroup

from aletheia.errors import SettingsError
from aletheia.settings import GIVEN, GROUPS, OUTPUT

NARROW = 70  # columns; below this width, help texts start under their options
LONGEST = 28  # characters; a longer option has its help text on the next line
OTHERS = "Options"
OR_IN_FILE = "(required, here or in --config)"
Rows = list[tuple[str, str]]  # an argument or option, and its help text


class Command(TyperCommand):
    """A command whose help lists its options by group and ends with an example."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Like typer's, but names everything that is missing at once.

        Raises:
            SettingsError: a required argument or option is missing.
        """
        try:
            given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        except Exception as error:
            if getattr(error, "ctx", ctx) is None:  # then the message names the help of this command
                error.ctx = ctx  # type: ignore[attr-defined]
            raise
        parameters = sorted(self.get_params(ctx), key=_place)
        absent = [_name(one) for one in parameters if _must(one, given) and not _is_given(given.get(one.name))]
        if absent and not given.get("help") and not ctx.resilient_parsing:
            raise SettingsError(self._missing(absent, ctx.command_path))
        return super().parse_args(ctx, args)

    def _missing(self, names: list[str], path: str) -> str:
        listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
        example = f"; expected for example: {example}" if (example := example_of(self)) else ""
        return f"{listed} {'is' if len(names) == 1 else 'are'} missing{example}; see '{path} --help'"

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The arguments of the usage line; optional ones in brackets."""
        arguments = [one for one in self.get_params(ctx) if one.param_type_name == "argument"]
        return ["[OPTIONS]", *(_metavar(one) if one.required else f"[{_metavar(one)}]" for one in arguments)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options, each group under its title."""
        for title, rows in options_by_group(self, ctx).items():
            _write_section(title, rows, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the example, on several lines if it is wider than the page."""
        _write_example(self, formatter)


class Group(TyperGroup):
    """A group of commands whose help shows the whole first sentence of each."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write commands, then options."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, found.get_short_help_str(limit=1000)) for name, found in commands if found]
        _write_section("Commands", rows, formatter)
        _write_section(OTHERS, [row for options in options_by_group(self, ctx).values() for row in options], formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the example."""
        _write_example(self, formatter)


def example_of(command: Any) -> str:
    """The example that a command's help ends with."""
    return str(command.epilog or "").rpartition("\b\n")[2].strip()


def options_by_group(command: Any, ctx: Any) -> dict[str, Rows]:
    """Arguments and options of a command under the titles of their groups, in the order of the help."""
    groups: dict[str, Rows] = {}
    for parameter in sorted(command.get_params(ctx), key=_place):
        if not getattr(parameter, "hidden", False):
            groups.setdefault(_group(parameter), []).append(_row(parameter))
    order = (GIVEN, OTHERS, *GROUPS)
    return {title: groups[title] for title in sorted(groups, key=lambda one: order.index(one) if one in order else 1)}


def _place(parameter: Any) -> int:
    """Sort key: arguments first, then what is read, then what is written."""
    first = ("argument", "data", "out")
    return min(
        first.index(name) if name in first else len(first) for name in (parameter.param_type_name, parameter.name)
    )


def _name(parameter: Any) -> str:
    return _metavar(parameter) if parameter.param_type_name == "argument" else str(parameter.opts[0])


def _must(parameter: Any, given: dict[str, Any]) -> bool:
    """Whether a parameter must be given on the command line, as no settings file can give it."""
    return parameter.required or (str(parameter.help or "").endswith(OR_IN_FILE) and not _is_given(given.get("config")))


def _is_given(value: Any) -> bool:
    return isinstance(value, str | list | tuple) and len(value) > 0


def _group(parameter: Any) -> str:
    if parameter.name == "help":
        return OUTPUT
    asked = getattr(parameter, "rich_help_panel", None)
    return str(asked or (GIVEN if parameter.param_type_name == "argument" or parameter.required else OTHERS))


def _metavar(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _row(parameter: Any) -> tuple[str, str]:
    text = str(parameter.help or "")
    if parameter.param_type_name == "argument":
        return _metavar(parameter), text
    short = [name for name in parameter.opts if not name.startswith("--")]
    name = ", ".join([*short, next(name for name in parameter.opts if name.startswith("--"))])
    if parameter.is_flag:
        return " / ".join([name, *parameter.secondary_opts]), text
    if parameter.required:
        text = f"{text} (required)"
    elif parameter.show_default and parameter.default not in (None, (), ""):
        text = f"{text} (default: {parameter.default})"
    return f"{name} {_metavar(parameter)}", text


def _write_section(title: str, rows: Rows, formatter: Any) -> None:
    if not rows:
        return
    column = 6 if formatter.width < NARROW else min(max(len(name) for name, _ in rows), LONGEST) + 4
    formatter.write(f"\n{title}:\n")
    for name, text in rows:
        lines = wrap(text, max(formatter.width - column, 20), break_on_hyphens=False, break_long_words=False)
        *heads, head = _wrapped_choices(f"  {name}", formatter.width)
        if lines and not heads and len(head) + 2 <= column:
            head = f"{head:<{column}}{lines.pop(0)}"
        formatter.write("\n".join([*heads, head, *(f"{'':<{column}}{line}" for line in lines)]) + "\n")


def _write_example(command: Any, formatter: Any) -> None:
    if example := example_of(command):
        lines = _wrapped_command(example, formatter.width - 4)
        formatter.write("\nExample:\n" + "".join(f"  {line}\n" for line in lines))


def _wrapped_choices(head: str, width: int) -> list[str]:
    """An option with its list of values; one that is too wide is wrapped after a comma."""
    lines = [""]
    for part in re.split(r"(?<=,)(?=\S)", head):
        if len(lines[-1]) + len(part) > width and lines[-1]:
            lines.append(" " * 8)
        lines[-1] += part
    return lines


def _wrapped_command(command: str, width: int) -> list[str]:
    """A command in lines that a shell reads as one."""
    lines = [""]
    for part in re.split(r" (?=--)", command):
        if lines[-1] and len(lines[-1]) + len(part) + 1 > width:
            lines[-1] += " \\"
            lines.append("  " + part)
        else:
            lines[-1] += f" {part}" if lines[-1] else part
    return lines
