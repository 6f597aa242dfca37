"""Rows that are in a data set more than once, or also among the held-out rows, compared as tokens. No torch."""

from dataclasses import dataclass

from aletheia.data.examples import Examples


@dataclass(frozen=True)
class Overlap:
    """How many of the ``rows`` held-out rows are also training rows, and how many more share a prompt with one.

    ``same`` rows have the tokens and labels of a training row; ``same_prompt`` rows have its prompt and another answer.
    """

    rows: int
    same: int
    same_prompt: int

    def notes(self) -> list[str]:
        """Notes for people, one line each."""
        notes = []
        if self.same:
            are = "is" if self.same == 1 else "are"
            notes.append(f"{self.same} of the {self.rows} held-out rows {are} also among the training rows")
        if self.same_prompt:
            more = " more" if self.same else ""
            have = "has" if self.same_prompt == 1 else "have"
            notes.append(
                f"{self.same_prompt}{more} of the {self.rows} held-out rows {have} the prompt of a training row, "
                "with another answer"
            )
        return notes


def duplicates(examples: Examples) -> int:
    """How many rows have the tokens and labels of an earlier row."""
    return len(examples) - len({example.digest() for example in examples.examples})


def overlap(train: Examples, held_out: Examples) -> Overlap:
    """How much the training rows reveal about the held-out rows."""
    learned = {example.digest() for example in train.examples}
    prompts = {example.prompt_digest() for example in train.examples} - {None}
    same = [example.digest() in learned for example in held_out.examples]
    known = [example.prompt_digest() in prompts for example in held_out.examples]
    same_prompt = sum(prompt and not whole for whole, prompt in zip(same, known, strict=True))
    return Overlap(len(held_out), sum(same), same_prompt)
