"""Rows that stand in a data set more than once, or among held-out rows too, as the model will see them. No torch."""

from dataclasses import dataclass

from aletheia.data.examples import Examples


@dataclass(frozen=True)
class Overlap:
    """Of ``rows`` held-out rows, how many stand among the rows to learn from, and how many more share a prompt there.

    ``same`` rows have the same tokens and labels as a row to learn from; ``same_prompt`` rows have its prompt and
    another answer.
    """

    rows: int
    same: int
    same_prompt: int

    def notes(self) -> list[str]:
        """What a person should know, one line each."""
        notes = []
        if self.same:
            stand = "stands" if self.same == 1 else "stand"
            notes.append(f"{self.same} of the {self.rows} held-out rows also {stand} in the rows to learn from")
        if self.same_prompt:
            more = " more" if self.same else ""
            have = "has" if self.same_prompt == 1 else "have"
            notes.append(
                f"{self.same_prompt}{more} of the {self.rows} held-out rows {have} the prompt of a row to learn from, "
                "with another answer"
            )
        return notes


def duplicates(examples: Examples) -> int:
    """How many rows have the tokens and labels of an earlier one."""
    return len(examples) - len({example.digest() for example in examples.examples})


def overlap(train: Examples, held_out: Examples) -> Overlap:
    """How much of the held-out rows the rows to learn from give away."""
    learned = {example.digest() for example in train.examples}
    prompts = {example.prompt_digest() for example in train.examples} - {None}
    same = [example.digest() in learned for example in held_out.examples]
    known = [example.prompt_digest() in prompts for example in held_out.examples]
    same_prompt = sum(prompt and not whole for whole, prompt in zip(same, known, strict=True))
    return Overlap(len(held_out), sum(same), same_prompt)
