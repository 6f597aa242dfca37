"""The command ``aletheia``: registers the commands and turns errors into one line and exit code 2."""

import sys
from typing import NoReturn

import typer

from aletheia import __version__
from aletheia.cli import cache, campaign, demo, doctor, eval, inspect, plan, probe, report, show, train
from aletheia.cli.help import Command, Group
from aletheia.cli.wording import learn, translate
from aletheia.errors import AletheiaError
from aletheia.names import printable

app = typer.Typer(
    name="aletheia",
    help="Fine-tune only the layers of a language model that the task needs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut options and choices off
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    cls=Group,
)
for module in (inspect, probe, plan, show, train, eval, report, cache, demo, doctor):
    command = module.__name__.rsplit(".", 1)[-1]
    app.command(command, epilog=f"Example:\n\n\b\n{module.EXAMPLE}", cls=Command)(getattr(module, command))

app.add_typer(campaign.app, name="campaign")


@app.callback(invoke_without_command=True)
def _options(
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True),
) -> None:
    """Fine-tune only the layers of a language model that the task needs."""
    if version:
        typer.echo(f"aletheia {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point: exit code 0, or 2 for bad input, or 130 after Ctrl-C, or what an error asks for."""
    command = typer.main.get_command(app)
    learn(command)
    try:
        code = command(prog_name="aletheia", standalone_mode=False)
    except AletheiaError as error:
        fail(translate(str(error)), getattr(error, "exit_code", 2))
    except (typer.Abort, KeyboardInterrupt):
        fail("interrupted", 130)
    except Exception as error:
        # usage errors of the command-line library, whose base class is not public, describe themselves
        if not hasattr(error, "format_message"):
            raise
        message, context = error.format_message(), getattr(error, "ctx", None)
        asked = context.command_path if context else "aletheia"
        fail(f"{message.rstrip('.')}; see '{asked} --help'", 2) if message else sys.exit(2)
    sys.exit(code or 0)


def fail(message: str, code: int) -> NoReturn:
    """One line on stderr, then out."""
    print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(code)
