"""The inputs of the boundary layer for each batch: read if they are stored, otherwise computed and stored.

Shapes: B samples of the batch, T tokens of each or of a row, D model width.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from aletheia.data.batches import collate, on_device_of
from aletheia.data.examples import Example
from aletheia.errors import CacheError
from aletheia.execution.backend import is_behind
from aletheia.execution.later import Later
from aletheia.prefix.cache import PrefixCache, row_key
from aletheia.prefix.exact import packs_differ, positions_vary, why_not_exact
from aletheia.prefix.spans import Span, find_spans, is_packed
from aletheia.prefix.stored import prefix_output


def row_states(
    model: nn.Module, boundary: int, rows: Sequence[Example], at_once: int | None = None
) -> list[torch.Tensor]:
    """The inputs of layer ``boundary`` for each row, [T, D] without padding.

    On a CPU each row runs alone. Its states are then the same bytes whatever rows are in its batch, so a resumed run
    computes exactly what the interrupted run stored. On other devices rows run in padded batches of up to ``at_once``
    tokens, or all in one batch.
    """
    found: list[torch.Tensor | None] = [None] * len(rows)
    for group in _groups(model, rows, at_once):
        batch = on_device_of(model, collate([rows[at] for at in group], 0))
        hidden_BTD = prefix_output(model, boundary, batch)
        for at, hidden_TD in zip(group, hidden_BTD, strict=True):
            found[at] = hidden_TD[: len(rows[at])]
    return [hidden_TD for hidden_TD in found if hidden_TD is not None]


def _groups(model: nn.Module, rows: Sequence[Example], at_once: int | None) -> list[list[int]]:
    """Indices of the rows that run through the prefix together: on a CPU each alone, elsewhere by similar length."""
    if _one_by_one(model):
        return [[at] for at in range(len(rows))]
    groups: list[list[int]] = []
    for at in sorted(range(len(rows)), key=lambda at: -len(rows[at])):
        longest = len(rows[groups[-1][0]]) if groups else 0
        if groups and (at_once is None or longest * (len(groups[-1]) + 1) <= at_once):
            groups[-1].append(at)
        else:
            groups.append([at])
    return groups


def _one_by_one(model: nn.Module) -> bool:
    return not is_behind(next(model.parameters()).device)


Use = Literal["keep", "read", "none"]


@dataclass(frozen=True)
class Group:
    """The processes that train one model. ``largest`` gives the maximum of each number over all of them.

    All processes gather ``sharded`` layers at the same time, so all must run them equally often.
    """

    largest: Callable[[Sequence[int]], Sequence[int]] = lambda numbers: numbers
    sharded: bool = False


@dataclass(frozen=True)
class _InFlight:
    """States that are on their way from the device to the cache: those of all rows, and whether each row is finite."""

    rows: Sequence[Example]
    states: Later
    are_finite: Later


class PrefixSource:
    """Gives the hidden states [B, T, D] that enter the boundary layer, for the arguments of a forward pass.

    Rows are looked up by their tokens, so any data loader works. Missing states are computed without a graph, and kept
    if ``use`` says that rows come back. The first batch shows whether stored states are exact. Where they are not, or
    rows cannot be separated, the model's own layers run.
    """

    def __init__(
        self,
        model: nn.Module,
        boundary: int,
        open_cache: Callable[[torch.dtype], PrefixCache | None],
        use: Callable[[], Use] = lambda: "keep",
        on_obstacle: Callable[[str], None] = lambda reason: None,
        group: Group | None = None,
        trusted: bool = False,
        state: Callable[[], object] = lambda: None,
    ) -> None:
        """Make the source for layer ``boundary`` of ``model``.

        Args:
            model: the model whose forward pass calls this.
            boundary: the lowest layer that learns.
            open_cache: called once with the dtype of the states, when they are known to be exact.
            use: what to do with the rows that pass now: ``keep`` them for later, only ``read`` stored ones, or
                ``none`` if no row comes back.
            on_obstacle: called with a reason if stored states are not exact, and if they can no longer be written.
            group: the processes that train.
            trusted: the cache was filled from the whole model, of which only a part is here, so nothing is tried.
            state: what the prefix depends on besides its weights, such as adapters that are switched off. All layers
                run while it differs from its first value.
        """
        self.cache: PrefixCache | None = None
        self.seconds = 0.0  # spent computing, storing and reading
        self._model, self._boundary, self._open = model, boundary, open_cache
        self._use, self._on_obstacle, self._group = use, on_obstacle, group or Group()
        self._state, self._at_first = state, state()
        self._checked = self._packs_checked = trusted
        self._given_up = False
        if trusted:
            self.cache = open_cache(next(model.parameters()).dtype)
        self._writes = True
        self._in_flight: list[_InFlight] = []
        self._pins = next(model.parameters()).device.type == "cuda"  # a copy from such memory is not waited for

    def __call__(self, batch: Mapping[str, Any]) -> torch.Tensor | None:
        """The states of a batch; None where all layers must run."""
        if self._given_up or self._use() == "none":
            return None
        started = time.perf_counter()
        spans = find_spans(batch) or []
        unusable = not spans or self._state() != self._at_first
        unusable = unusable or positions_vary(self._model, max(len(span.row) for span in spans))
        unusable, packed = map(bool, self._agreed([int(unusable), int(is_packed(spans))]))
        found = None
        if not unusable and self._is_exact(batch, spans, packed):
            found = self._states(batch, spans)
        self.seconds += time.perf_counter() - started
        return found

    def settle(self) -> None:
        """Store the finite states that were computed so far; once the cache cannot be written, it is only read."""
        while self._in_flight:
            computed = self._in_flight.pop(0)
            states = torch.split(computed.states.tensor(), [len(row) for row in computed.rows])
            are_finite = computed.are_finite.tensor().numpy()  # read as numbers of the host
            for row, hidden_TD, is_finite in zip(computed.rows, states, are_finite, strict=True):
                if is_finite and self._writes:
                    self._put(row, hidden_TD)

    def _agreed(self, numbers: Sequence[int]) -> Sequence[int]:
        """The largest over all processes until the cache is open; after that, each process's own unless sharded."""
        return self._group.largest(numbers) if self._group.sharded or not self._checked else numbers

    def _is_exact(self, batch: Mapping[str, Any], spans: list[Span], packed: bool) -> bool:
        """Whether stored states are exact; tries the first batch, and the first one with packed rows."""
        if self._checked and (self._packs_checked or not packed):
            return self.cache is not None
        obstacle, dtype = None, None
        if not self._checked:
            obstacle, dtype = why_not_exact(self._model, self._boundary, [span.row for span in spans], 0)
        if obstacle is None and packed and packs_differ(self._model, self._boundary, batch, spans):
            obstacle = "rows that are packed together attend to each other"
        self._packs_checked = self._packs_checked or packed
        if any(self._agreed([int(obstacle is not None)])):
            self._given_up, self.cache = True, None
            self._on_obstacle(obstacle or "another process found that stored states are not exact")
        elif not self._checked and dtype is not None:
            self.cache = self._open(dtype)
            self._given_up = any(self._agreed([int(self.cache is None)]))
            self.cache = None if self._given_up else self.cache
        self._checked = True
        return self.cache is not None

    def _states(self, batch: Mapping[str, Any], spans: list[Span]) -> torch.Tensor:
        cache = self.cache
        assert cache is not None
        self.settle()
        missing = cache.missing([span.row for span in spans])
        are_most = 2 * sum(map(len, missing)) >= sum(span.stop - span.start for span in spans)
        if missing and are_most and not self._group.sharded and not _one_by_one(self._model):
            return self._of_batch(batch, spans, missing)
        ids_BT = batch["input_ids"]
        at_once = ids_BT.numel()
        passes = len(_groups(self._model, missing, at_once))
        # agreed on before any pass, since each pass waits for the other processes
        idle = self._group.largest([passes])[0] - passes if self._group.sharded else 0
        computed = row_states(self._model, self._boundary, missing, at_once)
        for _ in range(idle):
            row_states(self._model, self._boundary, [spans[0].row])
        by_key = {row_key(row.input_ids): hidden_TD for row, hidden_TD in zip(missing, computed, strict=True)}
        self._keep(missing, computed)
        return self._assembled(cache, ids_BT, spans, by_key)

    def _of_batch(self, batch: Mapping[str, Any], spans: list[Span], missing: list[Example]) -> torch.Tensor:
        """The states of a batch from one pass over it as it is; begins to store those of ``missing`` rows."""
        hidden_BTD = prefix_output(self._model, self._boundary, batch)
        place = {row_key(span.row.input_ids): span for span in spans}
        found = [place[row_key(row.input_ids)] for row in missing]
        self._keep(missing, [hidden_BTD[span.sample, span.start : span.stop] for span in found])
        return hidden_BTD

    def _assembled(
        self, cache: PrefixCache, ids_BT: torch.Tensor, spans: list[Span], by_key: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """The states of a batch [B, T, D]: from ``by_key`` where they are in it, otherwise from the cache.

        What is read goes to the device in one copy, which is not waited for.
        """
        places = [(span, row_key(span.row.input_ids)) for span in spans]
        read = {key: self._read(cache, span.row) for span, key in places if key not in by_key}
        sample_TD = next(iter((read or by_key).values()))
        shape_BTD = (*ids_BT.shape, sample_TD.shape[1])
        hidden_BTD = torch.zeros(shape_BTD, dtype=sample_TD.dtype, pin_memory=self._pins)
        for states in (read, by_key):
            for span, key in places:
                if key in states:
                    hidden_BTD[span.sample, span.start : span.stop] = states[key]
            hidden_BTD = hidden_BTD.to(ids_BT.device, non_blocking=True)
        return hidden_BTD

    def _read(self, cache: PrefixCache, row: Example) -> torch.Tensor:
        """A stored entry; a damaged one is computed again, unless layers are sharded over processes."""
        try:
            return cache.get(row)
        except CacheError:
            if self._group.sharded:
                raise
            return row_states(self._model, self._boundary, [row])[0]

    def _keep(self, rows: Sequence[Example], states: Sequence[torch.Tensor]) -> None:
        """Begin to copy the states of rows that come back; :meth:`settle` stores them, at the latest before a read."""
        if not rows or not self._writes or self._use() != "keep":
            return
        are_finite = torch.stack([torch.isfinite(hidden_TD).all() for hidden_TD in states])
        self._in_flight.append(_InFlight(rows, Later(torch.cat(list(states))), Later(are_finite)))
        if _one_by_one(self._model):
            self.settle()

    def _put(self, row: Example, hidden_TD: torch.Tensor) -> None:
        assert self.cache is not None
        try:
            self.cache.put(row, hidden_TD)
        except CacheError as error:
            self._writes = False
            self._on_obstacle(f"no more states are stored: {error}")
