"""Which rows a run learns from, and which are held out. No torch."""

from datetime import date
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import field_validator, model_validator

from aletheia.settings import LONGEST_ROW, MOST_ROWS, Settings, option

GROUP = "Data"

TrainOn = Literal["all", "last"]


class DataSettings(Settings):
    """Rows to learn from and rows to test on."""

    SECTION: ClassVar[str] = "data"
    data: tuple[str, ...] = option(
        ...,
        "Rows to learn from: a .jsonl, .json, .csv or .parquet file, a folder, a pattern in quotes, or a hub data set; "
        "folders and hub data sets as name[:config[:split]]. Give it again for more.",
        GROUP,
        min_length=1,
    )
    max_length: int = option(1024, "Tokens per row; longer rows are cut on the right.", GROUP, ge=2, le=LONGEST_ROW)
    skip_unusable: bool = option(
        False,
        "Leave out rows without an answer, or whose answer `max_length` cuts off, and count them by reason, instead of "
        "stopping.",
        GROUP,
        also="--skip-emptied",
    )
    train_on: TrainOn = option("all", "Answers of a conversation that are learned.", GROUP)
    chat_template: Path | None = option(
        None,
        "Chat template to use instead of the model's: a .jinja file, or a tokenizer_config.json or chat_template.json.",
        GROUP,
    )
    template_date: date | None = option(
        None, "Date that a chat template writes, such as 2026-01-31, where it writes one (today by default).", GROUP
    )
    eval_data: tuple[str, ...] = option((), "Held-out rows, in any form that `data` takes.", GROUP)
    eval_fraction: float | None = option(
        None, "Share of `data` held out where there is no `eval_data` (0.05 by default).", GROUP, gt=0, lt=1
    )
    eval_rows: int = option(96, "Held-out rows used, at most.", GROUP, ge=1, le=MOST_ROWS)

    @field_validator("data", "eval_data", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> "DataSettings":
        if self.eval_data and self.eval_fraction is not None:
            raise ValueError("`eval_data` and `eval_fraction` are both given; expected one of them")
        return self
