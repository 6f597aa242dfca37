"""The processes of a run: who is first, and what they agree on; alone, what this one says."""

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

Told = TypeVar("Told")


class Agreement:
    """A group of its own on the CPU, opened by every process at the same time; no cost in a run of one process."""

    def __init__(self) -> None:
        """Not open yet."""
        self._group: dist.ProcessGroup | None = None

    def open(self) -> None:
        """Open the group where there are several processes."""
        if self._group is None and Launch.here().processes > 1:
            self._group = dist.new_group(backend="gloo")

    def largest(self, number: int) -> int:
        """The largest number that a process says."""
        if self._group is None:
            return number
        told = torch.tensor([number])
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._group)
        return int(told.item())

    def of_first(self, flag: bool) -> bool:
        """What the first process says."""
        if self._group is None:
            return flag
        told = torch.tensor([int(flag)])
        dist.broadcast(told, src=0, group=self._group)
        return bool(told.item())


@dataclass(frozen=True)
class Launch:
    """The launch that this process belongs to: one process, or several under ``torchrun`` or ``accelerate launch``."""

    rank: int = 0
    processes: int = 1

    @classmethod
    @contextmanager
    def join(cls) -> Iterator["Launch"]:
        """Join the other processes, where a launcher says that there are some."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            yield cls()
            return
        from accelerate import PartialState

        state = PartialState(cpu=not torch.accelerator.is_available())
        yield cls(state.process_index, state.num_processes)

    @classmethod
    def here(cls) -> "Launch":
        """The launch as it is, joined or of one process."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def is_first(self) -> bool:
        """Whether this process writes the folder and talks."""
        return self.rank == 0

    def from_first(self, value: Told) -> Told:
        """What the first process has, in every process."""
        if self.processes == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, src=0)
        return told[0]

    @contextmanager
    def claim(self, out: str | Path, overwrite: bool, resume: Literal["auto", "never"]) -> Iterator[RunFolder]:
        """The run folder, claimed by the first process for all.

        Raises:
            AletheiaError: in every process, what the first one found.
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

    def computed_by_first(self, compute: Callable[[], Told]) -> Told:
        """What the first process computes, in every process; its error is everyone's.

        Raises:
            AletheiaError: what ``compute`` raised.
        """
        if self.processes == 1:
            return compute()
        found: Told | None = None
        fault: AletheiaError | None = None
        if self.is_first:
            try:
                found = compute()
            except AletheiaError as error:
                fault = error
        found, fault = self.from_first((found, fault))
        if fault is not None:
            raise fault
        return cast(Told, found)
