"""The held-out loss of each row, as a task of an evaluation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from aletheia.data.batches import collate, on_device_of
from aletheia.data.examples import NO_LOSS, Example, Examples
from aletheia.lab.evaluation.work import Row, chosen, cut, sha256_of


@torch.no_grad()
def row_losses(model: nn.Module, examples: Sequence[Example], pad_token_id: int) -> list[tuple[float, int]]:
    """For each row of one batch: cross-entropy in nats, summed over labelled tokens, and their number."""
    batch = on_device_of(model, collate(examples, pad_token_id))
    labels_BT = batch.pop("labels")[:, 1:]
    logits_BTV = model(**batch, use_cache=False).logits[:, :-1]
    found = []
    for logits_TV, labels_T in zip(logits_BTV, labels_BT, strict=True):
        kept = labels_T != NO_LOSS
        nats = cross_entropy(logits_TV[kept].float(), labels_T[kept], reduction="none")
        found.append((nats.double().sum().item(), int(kept.sum())))
    return found


class HeldOut:
    """The task ``heldout``: the loss on the completions of a data file, encoded as for training."""

    name = "heldout"
    version = "1"
    num_fewshot = 0

    def __init__(self, model: nn.Module, examples: Examples, batch_size: int, limit: int | None = None) -> None:
        """Choose the rows; the model is put into eval mode."""
        self._model, self._batch_size = model.eval(), batch_size
        self.items_available = len(examples)
        self._indices = chosen(len(examples), limit)
        self._examples = examples.subset(self._indices)
        self._hashes = [sha256_of([example.input_ids, example.labels]) for example in self._examples.examples]
        self.prompts_sha256 = sha256_of(self._hashes)

    def __len__(self) -> int:
        """Rows chosen."""
        return len(self._indices)

    def batches(self) -> list[list[int]]:
        """Rows of similar length together, longest first."""
        order = sorted(range(len(self)), key=lambda at: (-len(self._examples[at]), at))
        return cut(order, self._batch_size)

    def answer(self, positions: Sequence[int]) -> list[Any]:
        """[nats, labelled tokens] per row."""
        rows = [self._examples[at] for at in positions]
        return [list(pair) for pair in row_losses(self._model, rows, self._examples.pad_token_id)]

    def rows(self, answers: Sequence[Any]) -> list[Row]:
        """A row per item."""
        return [
            {
                "task": self.name,
                "subject": "",
                "item": index,
                "sha256": sha256,
                "prompt_tokens": len(example) - tokens,
                "tokens": tokens,
                "loss_sum": nats,
            }
            for index, sha256, example, (nats, tokens) in zip(
                self._indices, self._hashes, self._examples.examples, answers, strict=True
            )
        ]
