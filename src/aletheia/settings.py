"""Settings that check themselves: one object is read from YAML, filled from flags, and recorded. No torch.

An error is one line with the Python names in backticks: ```steps` is 0; expected at least 1``. The command line
replaces the names by its flags.
"""

from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from aletheia.errors import SettingsError

# Sizes that no machine computes: a flag, a plan or a file that exceeds one is refused at once.
MOST_LAYERS = 1_000  # the deepest models have 126
WIDEST = 2**20  # hidden size, heads, experts, LoRA ranks; the widest have 53,248
MOST_TOKENS = 2**27  # vocabulary, positions of a model
MOST_PARAMETERS = 10**14
LARGEST_RANK = 2**16
MOST_ROWS = 2**20  # in a batch
LONGEST_ROW = 2**24  # tokens
MOST_STEPS = 10**7
MOST_EPOCHS = 10**4
MOST_WORKERS = 256  # loader processes, or jobs

# Titles of the groups in a command's help, in this order.
GIVEN, DATA, LOADING, PLAN = "What you give", "Data", "Model loading", "Plan"
LENGTH, RATE, SPEED = "Training length and batches", "Learning rate and optimizer", "Memory and speed"
SAVING, OUTPUT = "Saving and stopping", "Output"
GROUPS = (DATA, LOADING, PLAN, LENGTH, RATE, SPEED, SAVING, OUTPUT)

LIMITS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "path": "a path",
    "byte": "an amount such as 6GB or 500MiB",
}


class Settings(BaseModel):
    """Base of all settings: frozen, no unknown names, every error one line.

    Raises:
        SettingsError: a value is of the wrong kind or out of range, names contradict each other, or one is unknown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **given: Any) -> None:
        """Check the given values; the others take their defaults."""
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise SettingsError(_in_words(error.errors(), tuple(type(self).model_fields))) from None

    def given(self) -> dict[str, Any]:
        """The settings that were given rather than left at their defaults, as plain YAML and JSON values."""
        return self.model_dump(mode="json", exclude_unset=True)


def option(default: Any, help: str, group: str = "", flag: str = "", also: str = "", **limits: Any) -> Any:
    """A field that is also a command-line option: its help, its group, and its flag if that is not its name.

    ``also`` is a second flag for the same setting.
    """
    extra: dict[str, Any] = {"group": group, "flag": flag, "also": also}
    return Field(default=default, description=help, json_schema_extra=extra, **limits)


def _in_words(faults: list[ErrorDetails], known: tuple[str, ...]) -> str:
    """The first of pydantic's errors in one line, with the literal values that the field accepts as well."""
    fault = faults[0]
    kind, found, context = fault["type"], fault["input"], fault.get("ctx", {})
    name = str(fault["loc"][0]) if fault["loc"] else ""  # the rest says which of its types was tried
    if kind == "value_error":
        return str(context["error"])
    if kind == "extra_forbidden":
        near = get_close_matches(name, known, 1)
        return f"unknown setting `{name}`; expected " + (
            f"perhaps `{near[0]}`" if near else f"one of {', '.join(known)}"
        )
    if kind == "missing":
        return f"`{name}` is missing; give it"
    same = [other for other in faults[1:] if other["loc"][:1] == fault["loc"][:1]]
    others = "".join(f" or {_choices(other)}" for other in same if other["type"] == "literal_error")
    shown = f"{found:g}" if isinstance(found, float) else _shortened(found)
    if kind in LIMITS:
        words, key = LIMITS[kind]
        bound = context[key]
        limit = f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"
        return f"`{name}` is {shown}; expected {words} {limit}{others}"
    if kind == "literal_error":
        return f"`{name}` is {shown}; expected one of {_choices(fault)}"
    expected = next((words for start, words in KINDS.items() if kind.startswith(start)), None)
    return f"`{name}` is {shown}; expected {expected or fault['msg']}{others}"


def _choices(fault: ErrorDetails) -> str:
    return str(fault["ctx"]["expected"]).replace("'", "").replace(" or ", ", ")


def _shortened(found: Any) -> str:
    """The given value, cut to part of a line; Python cannot even print a number of thousands of digits."""
    if isinstance(found, int) and abs(found) >= 10**30:
        return f"a number of over {found.bit_length() * 3 // 10} digits"
    shown = repr(found) if isinstance(found, str) else str(found)
    return shown if len(shown) <= 100 else f"{shown[:97]}..."
