"""Tokenised rows with their labels. No torch: plain lists of integers."""

import hashlib
import random
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from aletheia.anatomy.schema import DataIdentity, TokenizerIdentity
from aletheia.errors import DataError

NO_LOSS = -100  # the label that torch's cross entropy ignores
TRIED_TOKENS = 64  # of a row on which something is tried: whole rows may be too long for the logits of all positions


def _digest(*parts: list[int]) -> bytes:
    made = hashlib.blake2b(digest_size=16)
    for part in parts:
        made.update(array("q", part).tobytes())
    return made.digest()


@dataclass(frozen=True, slots=True)
class Example:
    """One row as tokens. ``labels`` has the length of ``input_ids``: the token itself, or -100 for no loss.

    Labels are not shifted; the model shifts them, so position 0 is never predicted.
    """

    input_ids: list[int]
    labels: list[int]
    where: str

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.input_ids)

    def cut(self, tokens: int) -> "Example":
        """Its first ``tokens`` tokens."""
        return Example(self.input_ids[:tokens], self.labels[:tokens], self.where)

    def digest(self) -> bytes:
        """A 128-bit digest, equal for rows with the same tokens and labels."""
        return _digest(self.input_ids, self.labels)

    def prompt_digest(self) -> bytes | None:
        """A 128-bit digest of all tokens before the last stretch of labels; None if there are none."""
        end = len(self.labels)
        while end and self.labels[end - 1] == NO_LOSS:
            end -= 1
        while end and self.labels[end - 1] != NO_LOSS:
            end -= 1
        return _digest(self.input_ids[:end]) if end else None

    @property
    def labelled_tokens(self) -> int:
        """Number of tokens that carry a loss; position 0 never does."""
        return sum(label != NO_LOSS for label in self.labels[1:])


@dataclass(frozen=True)
class Examples:
    """A tokenised data set, usable as the ``train_dataset`` of a transformers Trainer.

    ``skipped`` counts the rows left out, ``left_out`` counts them by reason, and ``truncated`` counts the kept rows
    that lost tokens. ``notes`` are lines about the rows that a person should know. All of these, and ``identity``,
    describe the whole data set, also in a subset of it. ``tokenizer`` identifies the tokenizer; None if unknown.
    """

    identity: DataIdentity
    examples: tuple[Example, ...]
    max_length: int
    pad_token_id: int
    skipped: int
    truncated: int
    tokenizer: TokenizerIdentity | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        """The example at ``index``.

        Raises:
            IndexError: ``index`` is beyond the end.
        """
        return self.examples[index]

    def digest(self) -> str:
        """A sha256 of the tokens and labels of all examples, in order."""
        return hashlib.sha256(b"".join(example.digest() for example in self.examples)).hexdigest()

    def subset(self, indices: Iterable[int]) -> "Examples":
        """The examples at ``indices``, in that order."""
        return replace(self, examples=tuple(self.examples[index] for index in indices))

    @property
    def tokens(self) -> int:
        """Number of tokens in all examples, without padding."""
        return sum(len(example) for example in self.examples)

    @property
    def labelled_tokens(self) -> int:
        """Number of tokens that carry a loss, in all examples."""
        return sum(example.labelled_tokens for example in self.examples)


def split_held_out(
    examples: Examples, fraction: float = 0.05, seed: int = 0, max_rows: int = 96
) -> tuple[Examples, Examples]:
    """Split at random into (train, held out): disjoint, both in the order of the rows, the same for a seed.

    ``fraction`` of the rows are held out, at least 1, at most ``max_rows``, and never all. Identical rows stay on one
    side, unless all rows are identical. If every drawn row has more copies than may be held out, the one with the
    fewest copies is held out with all of them.

    Raises:
        DataError: fraction is outside (0, 1), max_rows is below 1, or there are fewer than two rows.
    """
    if not 0 < fraction < 1:
        raise DataError(f"found the held-out fraction {fraction}, expected a number between 0 and 1; for example 0.05")
    if max_rows < 1:
        raise DataError(f"found a limit of {max_rows} held-out rows, expected at least 1; raise `max_rows`")
    if len(examples) < 2:
        raise DataError(
            f"{examples.identity.name}: found {len(examples)} usable row{'s' * (len(examples) != 1)}, expected at "
            "least 2 to hold one out; add rows, or give held-out rows as `eval_data`"
        )
    copies: dict[bytes, list[int]] = {}
    for index, example in enumerate(examples.examples):
        copies.setdefault(example.digest(), []).append(index)
    groups = list(copies.values())
    if len(groups) == 1:  # no split keeps copies together
        groups = [[index] for index in range(len(examples))]
    count = min(max(1, round(len(examples) * fraction)), max_rows, len(groups) - 1)
    drawn = random.Random(seed).sample(groups, count)
    held_out: set[int] = set()
    for group in drawn:
        if len(held_out) + len(group) <= count:
            held_out.update(group)
    smallest = min(drawn, key=len)
    held_out.update(() if held_out else smallest)
    train = [index for index in range(len(examples)) if index not in held_out]
    return examples.subset(train), examples.subset(sorted(held_out))
