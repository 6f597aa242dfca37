"""How a model steps at this time of its run: every layer learning, or from a frozen prefix, stored or not."""

import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from peft import PeftModel
from rich.console import Console
from torch import nn

from aletheia.anatomy.read import find_layers
from aletheia.data.batches import collate
from aletheia.data.examples import Example, Examples
from aletheia.errors import CacheError
from aletheia.execution.backend import lean_layers
from aletheia.execution.lean import adapters_in_bfloat16
from aletheia.execution.recompute import Recompute, recomputation
from aletheia.planning.plan import Plan
from aletheia.prefix.cache import DiskCache, PrefixCache, collate_with_prefix
from aletheia.prefix.fill import CacheDecision, CacheKind, fill, open_cache
from aletheia.training.fast_steps import fast_steps


class Stage:
    """The fast steps of a run, which begin anew when its boundary rises.

    Layers that a plan adapts early only are frozen as they are by then, as in FreezeOut [arXiv:1706.04983] and
    AutoFreeze [arXiv:2102.01386], which stores what enters the layers that go on, too. A context manager; ``collate``
    makes the batches for the stage the run is in.
    """

    def __init__(
        self, model: PeftModel, plan: Plan, held_out: Examples, batch_size: int, free: bool, recompute: Recompute
    ) -> None:
        """For a run of ``plan``; ``free`` drops a stored prefix from memory if none of its layers was adapted."""
        self.cache: PrefixCache | None = None
        self.decision = CacheDecision("off", "the run ended before the boundary rose")
        self.cache_seconds = 0.0
        self._model, self._plan, self._held_out = model, plan, held_out
        self._batch_size, self._free, self._recompute = batch_size, free, recompute
        self._frozen: list[nn.Parameter] = []
        self._stack = ExitStack()

    def __enter__(self) -> "Stage":
        """Fast steps with every adapter learning."""
        self._begin()
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave the model as it is trained: all adapters trainable, no hooks; a cache of this run alone is deleted."""
        self._stack.close()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        if self._frozen:
            self._delete_cache()

    def collate(self, rows: Sequence[Example]) -> dict[str, torch.Tensor]:
        """A batch as the model takes it now."""
        if self.cache is None:
            return collate(rows, self._held_out.pad_token_id)
        return collate_with_prefix(rows, self._held_out.pad_token_id, self.cache)

    def rise(
        self,
        schedule: list[list[Example]],
        kind: CacheKind,
        folder: Path | None,
        prefix: PrefixCache | None,
        evaluations: int,
        show_progress: bool,
    ) -> None:
        """Freeze the early layers and go on from the plan's boundary, from a filled cache where that pays.

        Args:
            schedule: the batches to come.
            kind: see :func:`aletheia.prefix.fill.open_cache`.
            folder: for a cache on disk.
            prefix: a cache that holds every row already.
            evaluations: how often the held-out rows are read.
            show_progress: say what was decided, and draw a bar.
        """
        self._stack.close()
        _, layers = find_layers(self._model)
        for index in self._plan.early_layers:
            self._frozen += [parameter for parameter in layers[index].parameters() if parameter.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        started = time.perf_counter()
        if prefix is not None:
            self.cache, self.decision = prefix, CacheDecision("disk", "filled layer by layer")
        else:
            try:
                self._store(schedule, kind, folder, evaluations, show_progress)
            except CacheError as error:
                if not self._frozen:
                    raise
                self._delete_cache()  # only this run could use it, and the run needs the room
                self.cache, self.decision = None, CacheDecision("off", str(error))  # what was trained is not lost
                Console(stderr=True).print(f"cache  off: {error}", highlight=False, soft_wrap=True)
        self.cache_seconds = time.perf_counter() - started
        self._begin()

    def _store(
        self, schedule: list[list[Example]], kind: CacheKind, folder: Path | None, evaluations: int, show_progress: bool
    ) -> None:
        """A filled cache for every row to come, or none; says what was decided."""
        trained = [row for batch in schedule for row in batch]
        uses = sum(map(len, trained)) + (1 + evaluations) * self._held_out.tokens
        rows, pad = [*trained, *self._held_out.examples], self._held_out.pad_token_id
        boundary = self._plan.boundary
        # the prefix computes as it did while its adapters learned
        with adapters_in_bfloat16(self._model), lean_layers(self._model):
            self.cache, self.decision = open_cache(
                self._model, boundary, rows, uses, self._batch_size, pad, kind, folder
            )
            if show_progress:
                told = f"cache  {self.decision.kind}: {self.decision.reason}"
                Console(stderr=True).print(told, highlight=False, soft_wrap=True)
            if self.cache is not None:
                fill(self._model, boundary, rows, self.cache, self._batch_size, pad, show_progress)

    def _delete_cache(self) -> None:
        if isinstance(self.cache, DiskCache):
            shutil.rmtree(self.cache.folder, ignore_errors=True)

    def _begin(self) -> None:
        stored_from = None if self.cache is None else self._plan.boundary
        free = self._free and not self._plan.early_layers
        self._stack.enter_context(adapters_in_bfloat16(self._model))
        self._stack.enter_context(fast_steps(self._model, stored_from, free))
        self._stack.enter_context(recomputation(self._model, self._recompute))
