"""Messages about unknown or wrong arguments, with the option that was probably meant."""

from difflib import get_close_matches
from typing import Any

from aletheia.cli.config import training_arguments
from aletheia.cli.wording import OTHER_NAMES
from aletheia.training.settings import NOT_TAKEN


def usage(error: BaseException) -> str | None:
    """The message for arguments that the command-line library refuses; None for other errors."""
    if not hasattr(error, "format_message"):  # its base class is not public
        return None
    message, context = error.format_message(), getattr(error, "ctx", None)
    if not message:
        return ""
    asked = context.command_path if context else "aletheia"
    if context and (name := getattr(error, "option_name", None)) and type(error).__name__ == "NoSuchOption":
        message = f"No such option: {name}{_meant(str(name), context.command)}"
    return f"{message.rstrip('.')}; see '{asked} --help'"


def _meant(given: str, command: Any) -> str:
    """The option that was probably meant, for the end of a message; empty if none is close."""
    known = {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
    name = given.lstrip("-").replace("_", "-").lower()
    ours = f"--{name}" if f"--{name}" in known else OTHER_NAMES.get(name, "")
    if ours.split(" ")[0] in known:
        return f"; expected {ours}"
    if ours == "MODEL" and any(one.metavar == "MODEL" for one in command.params):
        return f"; expected the model without an option, as in: aletheia {command.name} MODEL"
    field = name.replace("-", "_")
    if "--config" in known and field in NOT_TAKEN:
        return f"; expected it to be left out: {NOT_TAKEN[field]}"
    if "--config" in known and field in training_arguments():
        return f"; expected it as {field} under training in the file of --config"
    near = get_close_matches(f"--{name}", sorted(known), 2, 0.7)
    return f"; did you mean {' or '.join(near)}?" if near else ""
