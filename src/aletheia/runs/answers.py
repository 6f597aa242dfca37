"""Answers of a model beside those of its base: what is asked for, and what came of it. No torch."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from aletheia.settings import LONGEST_ROW, MOST_ROWS, Settings, option

GROUP = "Answers"


class GenerateSettings(Settings):
    """How answers are generated; what is not set here is as the model's own generation config says."""

    SECTION: ClassVar[str] = "generate"
    max_new_tokens: int = option(256, "Most tokens of an answer.", GROUP, ge=1, le=LONGEST_ROW)
    temperature: float = option(
        0.0, "Temperature at which tokens are drawn; 0 takes the likeliest token each time.", GROUP, ge=0, le=100
    )
    limit: int | None = option(None, "Rows of `data` to answer, from the first on. (default: all)", GROUP, ge=1)
    batch_size: int = option(8, "Prompts answered at once.", GROUP, ge=1, le=MOST_ROWS)
    seed: int = option(0, "Seed of the tokens that are drawn, above temperature 0.", GROUP, ge=0, le=2**32 - 1)


class Answer(BaseModel):
    """One prompt and its answers.

    Attributes:
        where: ``prompt 1``, or the place of a row, such as ``rows.jsonl:3``.
        prompt: the last turn before the answer.
        answer: of the model, with its adapter where it has one.
        ended: whether that ended by itself; False where it was cut at ``max_new_tokens``.
        base: the answer without the adapter; None where it was not asked for.
        base_ended: whether that one ended by itself.
        reference: the answer that the row has; None for a prompt.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    where: str
    prompt: str
    answer: str
    ended: bool
    base: str | None = None
    base_ended: bool | None = None
    reference: str | None = None
