"""What an evaluation measures, and how. No torch."""

from pathlib import Path
from typing import Any, ClassVar

from pydantic import field_validator

from aletheia.settings import GIVEN, Settings, option

GROUP = "Tasks"


class EvalChoice(Settings):
    """Tasks, items and form of prompts; :func:`aletheia.eval_settings` checks the values."""

    SECTION: ClassVar[str] = "eval"
    tasks: tuple[str, ...] = option(
        ("mmlu", "gsm8k", "wikitext"),
        "Tasks, separated by commas: mmlu, gsm8k, humaneval, wikitext, or heldout (the loss on `eval_data`).",
        GIVEN,
    )
    eval_data: str | None = option(
        None, "Rows for the task heldout: a file, a folder or a hub data set. (default: none)", GIVEN
    )
    limit: int | None = option(
        None, "Number of items per task; evenly spaced and always the same. (default: all)", GROUP
    )
    data_dir: Path | None = option(
        None, "Folder that holds mmlu/, gsm8k/, humaneval/ and wikitext2/. (default: the hub's data)", GROUP
    )
    num_fewshot: int | None = option(None, "Solved examples in each prompt. (default: the task's own number)", GROUP)
    chat: bool = option(False, "Wrap prompts in the model's chat template.", GROUP)
    max_new_tokens: int | None = option(
        None, "Longest answer, in tokens. (default: 1024 for humaneval, 256 for others)", GROUP
    )
    batch_size: int = option(8, "Prompts per batch.", GROUP)
    context_length: int | None = option(
        None, "Longest prompt in tokens, and the window of wikitext. (default: the model's)", GROUP
    )

    @field_validator("tasks", mode="before")
    @classmethod
    def _split(cls, given: Any) -> Any:
        """Split a text, or each text of a list, at its commas."""
        texts = (given,) if isinstance(given, str) else given
        return tuple(name.strip() for text in texts for name in text.split(",") if name.strip())

    def of_result(self) -> dict[str, Any]:
        """The settings that an evaluation records, by name."""
        return {name: value for name, value in self if name != "data_dir"}
