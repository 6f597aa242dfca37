"""Answers of a model next to those of its base: settings and results. No torch."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from aletheia.settings import LONGEST_ROW, MOST_ROWS, Settings, option

GROUP = "Answers"


class GenerateSettings(Settings):
    """How answers are generated; all else comes from the model's own generation config."""

    SECTION: ClassVar[str] = "generate"
    max_new_tokens: int = option(256, "Maximum number of tokens in an answer.", GROUP, ge=1, le=LONGEST_ROW)
    temperature: float = option(0.0, "Sampling temperature; 0 always takes the likeliest token.", GROUP, ge=0, le=100)
    limit: int | None = option(
        None, "Answer only this many rows of `data`, from the first. (default: all)", GROUP, ge=1
    )
    batch_size: int = option(8, "Prompts answered at once.", GROUP, ge=1, le=MOST_ROWS)
    seed: int = option(0, "Seed of sampling, with a temperature above 0.", GROUP, ge=0, le=2**32 - 1)


class Answer(BaseModel):
    """One prompt and its answers.

    Attributes:
        where: ``prompt 1``, or the place of a row, such as ``rows.jsonl:3``.
        prompt: the last turn before the answer.
        answer: the model's answer, with its adapter if it has one.
        ended: whether the answer is complete; False if it was cut at ``max_new_tokens``.
        base: the answer without the adapter; None if it was not asked for.
        base_ended: whether that answer is complete.
        reference: the answer in the row; None for a prompt.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    where: str
    prompt: str
    answer: str
    ended: bool
    base: str | None = None
    base_ended: bool | None = None
    reference: str | None = None
