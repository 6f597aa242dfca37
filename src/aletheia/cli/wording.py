"""Translation of Python names in messages to options of the command line."""

import re
from collections.abc import Iterator
from typing import Any

from aletheia.anatomy.settings import LoadSettings
from aletheia.data.settings import DataSettings
from aletheia.settings import Settings
from aletheia.training.settings import TrainSettings

# other programs' name -> the name here; the first word is the option
OTHER_NAMES = {
    "lr": "--learning-rate",
    **dict.fromkeys(("r", "lora-r", "lora-rank", "lora-dim"), "--rank"),
    "lora-alpha": "--alpha",
    "lora-target-modules": "--target-modules",
    **dict.fromkeys(("epoch", "num-epochs", "num-train-epochs"), "--epochs"),
    **dict.fromkeys(("step", "max-steps", "iters", "num-steps"), "--steps"),
    **dict.fromkeys(
        ("batch", "bs", "micro-batch-size", "train-batch-size", "per-device-train-batch-size"), "--batch-size"
    ),
    **dict.fromkeys(("gradient-accumulation", "grad-accumulation-steps"), "--gradient-accumulation-steps"),
    **dict.fromkeys(("max-seq-length", "max-seq-len", "seq-len", "sequence-len", "cutoff-len"), "--max-length"),
    **dict.fromkeys(("dataset", "dataset-name", "train-file", "train-data", "train", "rows"), "--data"),
    **dict.fromkeys(("eval-file", "validation-file", "val-data", "valid-data", "test-data"), "--eval-data"),
    **dict.fromkeys(("val-size", "val-set-size", "validation-split"), "--eval-fraction"),
    **dict.fromkeys(("output", "output-dir", "output-file", "save-dir", "adapter-path"), "--out"),
    **dict.fromkeys(("model", "model-name", "model-id", "model-name-or-path", "base-model"), "MODEL"),
    **dict.fromkeys(("load-in-4bit", "use-4bit", "qlora", "4bit"), "--quantize nf4"),
    **dict.fromkeys(("load-in-8bit", "use-8bit", "8bit"), "--quantize int8"),
    "bf16": "--dtype bfloat16",
    "fp16": "--dtype float16",
    "fp32": "--dtype float32",
    **dict.fromkeys(("attn-implementation", "attn"), "--attention"),
    "resume-from-checkpoint": "--resume",
    "force": "--overwrite",
    **dict.fromkeys(("scheduler", "lr-scheduler"), "--lr-scheduler-type"),
    "optimizer": "--optim",
    "patience": "--early-stopping-patience",
}  # fmt: skip

_SET = re.compile(r"`([A-Za-z_]\w*)(?:=([^`]+))?`")
_QUOTED = re.compile(r"`([^`\n]+)`")


def flag_of(settings: type[Settings], name: str) -> str:
    """The option of a settings field: its own flag if it has one, else its name with dashes."""
    extra = settings.model_fields[name].json_schema_extra
    asked = str(extra.get("flag") or "") if isinstance(extra, dict) else ""
    return "--" + (asked.lstrip("-") or name.replace("_", "-"))


def flags_of(*classes: type[Settings]) -> dict[str, str]:
    """Field name to option, for all fields of settings classes."""
    return {name: flag_of(one, name) for one in classes for name in one.model_fields}


FLAGS = flags_of(LoadSettings, DataSettings, TrainSettings)


def learn(command: Any) -> None:
    """Add the parameters of a typer command, or of all commands in a group: options by flag, arguments by metavar."""
    found = list(_parameters(command))
    for kind in ("argument", "option"):  # an option of any command goes before an argument of another
        for one in found:
            if one.param_type_name == kind:
                shown = max(one.opts, key=len) if kind == "option" else one.metavar or one.name.upper()
                FLAGS[one.name] = shown
                if kind == "option":  # such as `plan`, a name that its parameter cannot have
                    FLAGS.setdefault(shown.lstrip("-").replace("-", "_"), shown)


def _parameters(command: Any) -> Iterator[Any]:
    yield from command.params
    for inner in getattr(command, "commands", {}).values():
        yield from _parameters(inner)


def translate(message: str, flags: dict[str, str] | None = None) -> str:
    """A message in which known names in backticks are options, and other words lose their backticks.

    ```steps` is 0`` becomes ``--steps is 0``, ```cache=off``` becomes ``--cache off``, ```stream=False``` becomes
    ``--no-stream``.
    """
    known = FLAGS if flags is None else flags

    def option(match: re.Match[str]) -> str:
        name, value = match.groups()
        if name not in known:
            return match[0][1:-1]
        flag = known[name]
        if value is None or value == "True":
            return flag
        return flag.replace("--", "--no-", 1) if value == "False" else f"{flag} {value}"

    return _QUOTED.sub(r"\1", _SET.sub(option, message))
