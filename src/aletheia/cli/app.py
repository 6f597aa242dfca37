"""The commands of ``aletheia``, registered."""

import typer

from aletheia import __version__
from aletheia.cli import (
    cache,
    campaign,
    demo,
    doctor,
    eval,
    export,
    generate,
    inspect,
    plan,
    preview,
    probe,
    push,
    report,
    show,
    train,
)
from aletheia.cli.help import Command, Group
from aletheia.cli.wording import learn

app = typer.Typer(
    name="aletheia",
    help="Fine-tune only the layers of a language model that the task needs.",
    epilog=f"\b\n{train.EXAMPLE}",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut off options and choices
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    cls=Group,
)
for module in (train, preview, probe, plan, show, report, generate, eval, export, push, inspect, cache, doctor, demo):
    command = module.__name__.rsplit(".", 1)[-1]
    app.command(command, epilog=f"Example:\n\n\b\n{module.EXAMPLE}", cls=Command)(getattr(module, command))

app.add_typer(campaign.app, name="campaign")


@app.callback(invoke_without_command=True)
def _options(
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True),
    debug: bool = typer.Option(
        False,
        "--debug",
        help="Show tracebacks and the output of libraries. Give it before the command, or set ALETHEIA_DEBUG=1.",
    ),
) -> None:
    """Fine-tune only the layers of a language model that the task needs."""
    if version:
        typer.echo(f"aletheia {__version__}")
        raise typer.Exit


def run() -> int:
    """Run the command in ``sys.argv`` and return its exit code; errors are raised."""
    command = typer.main.get_command(app)
    learn(command)
    try:
        return command(prog_name="aletheia", standalone_mode=False) or 0
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    except Exception as error:
        if type(error).__name__ != "NoArgsIsHelpError":  # not public
            raise
        typer.echo(error.format_message(), err=True)  # type: ignore[attr-defined]
        return 2
