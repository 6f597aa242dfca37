"""The processes of a run, which one is first, and how they agree on values."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, cast

import torch
import torch.distributed as dist

from aletheia.errors import AletheiaError
from aletheia.runs.folder import RunFolder

Value = TypeVar("Value")


class Agreement:
    """A separate process group on the CPU. Every process opens it at the same time; one process needs none."""

    def __init__(self) -> None:
        """Start without a group."""
        self._group: dist.ProcessGroup | None = None

    def open(self) -> None:
        """Open the group where there are several processes."""
        if self._group is None and Launch.here().processes > 1:
            self._group = dist.new_group(backend="gloo")

    def largest(self, number: int) -> int:
        """The largest ``number`` of all processes."""
        if self._group is None:
            return number
        found = torch.tensor([number])
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._group)
        return int(found.item())

    def of_first(self, flag: bool) -> bool:
        """The ``flag`` of the first process."""
        if self._group is None:
            return flag
        found = torch.tensor([int(flag)])
        dist.broadcast(found, src=0, group=self._group)
        return bool(found.item())


@dataclass(frozen=True)
class Launch:
    """The launch that this process belongs to: one process, or several under ``torchrun`` or ``accelerate launch``."""

    rank: int = 0
    processes: int = 1

    @classmethod
    @contextmanager
    def join(cls) -> Iterator["Launch"]:
        """Join the other processes, if a launcher has started several."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            yield cls()
            return
        from accelerate import PartialState

        state = PartialState(cpu=not torch.accelerator.is_available())
        yield cls(state.process_index, state.num_processes)

    @classmethod
    def here(cls) -> "Launch":
        """The present launch: the processes that have joined, or this process alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run folder and prints."""
        return self.rank == 0

    def from_first(self, value: Value) -> Value:
        """The ``value`` of the first process, in every process."""
        if self.processes == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    @contextmanager
    def claim(self, out: str | Path, overwrite: bool, resume: Literal["auto", "never"]) -> Iterator[RunFolder]:
        """The run folder, claimed by the first process for all.

        Raises:
            AletheiaError: in every process, the error of the first one.
        """
        folder: RunFolder | None = None
        fault: AletheiaError | None = None
        if self.is_first:
            try:
                folder = RunFolder.claim(out, overwrite, resume)
            except AletheiaError as error:
                fault = error
        fault, resumes = self.from_first((fault, folder is not None and folder.resumes))
        if fault is not None:
            raise fault
        with folder or RunFolder.of_another_process(Path(out), resumes) as claimed:
            yield claimed

    def computed_by_first(self, compute: Callable[[], Value]) -> Value:
        """The result of ``compute`` in the first process, in every process.

        Raises:
            AletheiaError: in every process, the error of ``compute``.
        """
        if self.processes == 1:
            return compute()
        found: Value | None = None
        fault: AletheiaError | None = None
        if self.is_first:
            try:
                found = compute()
            except AletheiaError as error:
                fault = error
        found, fault = self.from_first((found, fault))
        if fault is not None:
            raise fault
        return cast(Value, found)
