"""Which rows a run learns from, and which are held out. No torch."""

from datetime import date
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import field_validator, model_validator

from aletheia.settings import DATA, GIVEN, LONGEST_ROW, MOST_ROWS, Settings, option

TrainOn = Literal["all", "last"]


class DataSettings(Settings):
    """Rows to learn from and rows to test on."""

    SECTION: ClassVar[str] = "data"
    data: tuple[str, ...] = option(
        ...,
        "Rows to learn from: a .jsonl, .json, .csv or .parquet file, a folder of them, a pattern in quotes such as "
        "'data/*.jsonl', or a hub data set. To choose a part of a folder or data set, write name:config:split. Repeat "
        "the option to add more.",
        GIVEN,
        min_length=1,
    )
    max_length: int = option(
        1024, "Longest row, in tokens; longer rows are cut at the end.", DATA, ge=2, le=LONGEST_ROW
    )
    skip_unusable: bool = option(
        False,
        "Leave out and count rows without anything to learn: no answer, or one that begins after `max_length`. "
        "Without this option, the first such row ends the command.",
        DATA,
        also="--skip-emptied",
    )
    train_on: TrainOn = option("all", "Which answers of a conversation are learned: all, or only the last.", DATA)
    chat_template: Path | None = option(
        None,
        "File with a chat template: .jinja, tokenizer_config.json or chat_template.json. (default: the model's own)",
        DATA,
    )
    template_date: date | None = option(
        None,
        "Date such as 2026-01-31, for a chat template that writes the date into the prompt. (default: today)",
        DATA,
    )
    eval_data: tuple[str, ...] = option(
        (),
        "Held-out rows to measure the loss on, never trained on; in any form that `data` takes. (default: a share of "
        "`data`)",
        DATA,
    )
    eval_fraction: float | None = option(
        None,
        "Share of `data` to hold out if there is no `eval_data`, above 0 and below 1. (default: 0.05)",
        DATA,
        gt=0,
        lt=1,
    )
    eval_rows: int = option(
        96, "Most held-out rows to use; a small number keeps evaluations short.", DATA, ge=1, le=MOST_ROWS
    )

    @field_validator("data", "eval_data", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> "DataSettings":
        if self.eval_data and self.eval_fraction is not None:
            raise ValueError("`eval_data` and `eval_fraction` are both given; expected one of them")
        return self
