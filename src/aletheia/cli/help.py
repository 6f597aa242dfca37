"""Help pages that cut nothing off: options by group, names and choices in full at any width."""

from textwrap import wrap
from typing import Any

from typer.core import TyperCommand, TyperGroup

NARROW = 70  # columns below which a text stands under its option
LONGEST = 28  # characters of an option that leave its text on the same line


class Command(TyperCommand):
    """A command whose help lists its options by group."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options, each group under its title."""
        _write_options(self, ctx, formatter)


class Group(TyperGroup):
    """A group of commands whose help has the whole first sentence of each."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write options, then commands."""
        _write_options(self, ctx, formatter)
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, found.get_short_help_str(limit=1000)) for name, found in commands if found]
        _write_section("Commands", rows, formatter)


def _write_options(command: Any, ctx: Any, formatter: Any) -> None:
    groups: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(ctx):
        if (record := parameter.get_help_record(ctx)) is not None:
            is_argument = parameter.param_type_name == "argument"
            title = "Arguments" if is_argument else getattr(parameter, "rich_help_panel", None) or "Options"
            groups.setdefault(title, []).append(record)
    for title, rows in groups.items():
        _write_section(title, rows, formatter)


def _write_section(title: str, rows: list[tuple[str, str]], formatter: Any) -> None:
    if not rows:
        return
    column = 6 if formatter.width < NARROW else min(max(len(name) for name, _ in rows), LONGEST) + 4
    formatter.write(f"\n{title}:\n")
    for name, text in rows:
        lines = wrap(text, max(formatter.width - column, 20), break_on_hyphens=False, break_long_words=False)
        head = f"  {name}"
        if lines and len(head) + 2 <= column:
            head = f"{head:<{column}}{lines.pop(0)}"
        formatter.write("\n".join([head, *(f"{'':<{column}}{line}" for line in lines)]) + "\n")
