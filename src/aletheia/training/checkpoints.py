"""Trainer's checkpoints, made trustworthy: written to another folder, synced, listed in a manifest, then renamed.

Trainer still decides what a checkpoint holds, when it is due, and which ones are kept. This module replaces private
methods of a Trainer on the instance, and no other module does: ``_save_checkpoint``, ``_get_output_dir``,
``_push_from_checkpoint``, ``_run_epoch`` and ``_load_best_model``.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from aletheia.data.sources import one_line
from aletheia.errors import ArtifactError, TrainingError
from aletheia.files import free_bytes
from aletheia.runs.manifest import (
    MANIFEST_FILE,
    PARTIAL,
    TrainingCheckpoint,
    check_same_run,
    checkpoint_folders,
    clear_partial,
    move_in,
    newest_checkpoint,
    read_manifest,
    step_of,
    verified,
    write_manifest,
)
from aletheia.training.processes import Launch

BYTES_PER_PARAMETER = 12  # the weight and the two moments of Adam, in float32
STATE_FILE = "trainer_state.json"
REPLACED_METHODS = (
    *("_save_checkpoint", "_get_output_dir", "_push_from_checkpoint", "_run_epoch", "_load_best_model", "train"),
)
WRITER_FAULTS = (
    "PytorchStreamWriter",
    "inline_container",
    "unexpected pos",
    "iostream error",
    "(os error ",
)  # of torch, of Rust


def trustworthy_checkpoints(
    trainer: Trainer,
    about: Mapping[str, Any] | None = None,
    extra: Callable[[], Mapping[str, Any]] | None = None,
    alone: bool = False,
) -> "TrustworthyCheckpoints":
    """Make the checkpoints of ``trainer`` complete or absent, and resume only from complete ones.

    Args:
        trainer: any Trainer, including those of TRL.
        about: values that identify the run, by name; ``trainer.train(resume_from_checkpoint=...)`` refuses a checkpoint
            with other values.
        extra: called at each save; the manifest of the checkpoint keeps its JSON values.
        alone: whether only this run uses ``output_dir``, so that checkpoints of later steps may be deleted.

    Returns:
        An object with ``undo()``; as a context manager, it undoes the changes on leaving.
    """
    present = trainer.__dict__.get("_save_checkpoint")
    if isinstance(owner := getattr(present, "__self__", None), TrustworthyCheckpoints):
        owner.undo()
    return TrustworthyCheckpoints(trainer, about or {}, extra or dict, alone)


class TrustworthyCheckpoints:
    """See :func:`trustworthy_checkpoints`."""

    def __init__(
        self, trainer: Trainer, about: Mapping[str, Any], extra: Callable[[], Mapping[str, Any]], alone: bool
    ) -> None:
        """Replace the methods of ``trainer`` that save, and ``train``, which resumes."""
        self.resumed: TrainingCheckpoint | None = None  # the checkpoint that ``train`` resumed from
        self.faults: list[str] = []  # one line for each checkpoint that was skipped then
        self._trainer: Any = trainer
        self._about, self._extra, self._alone = about, extra, alone
        self._size_bytes = 0  # size of the last checkpoint
        self._earlier = {name: trainer.__dict__[name] for name in REPLACED_METHODS if name in trainer.__dict__}
        self._original = {name: getattr(trainer, name) for name in REPLACED_METHODS}
        trainer.__dict__.update(self._own())

    def undo(self) -> None:
        """Restore the trainer's own methods."""
        for name in self._own():
            self._trainer.__dict__.pop(name, None)
            if name in self._earlier:
                setattr(self._trainer, name, self._earlier[name])

    def _own(self) -> dict[str, Callable[..., Any]]:
        """The methods that replace those of the trainer."""
        return {
            "_save_checkpoint": self._save,
            "_run_epoch": self._run_epoch,
            "_load_best_model": self._load_best_model,
            "train": self._train,
        }

    def __enter__(self) -> "TrustworthyCheckpoints":
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Undo."""
        self.undo()

    def resume_path(self, resume: str | os.PathLike[str] | bool | None) -> str | None:
        """The verified checkpoint that Trainer's ``resume_from_checkpoint`` refers to, the same in every process.

        Args:
            resume: a checkpoint, or True for the newest complete one in ``output_dir``.

        Raises:
            TrainingError: the checkpoint is damaged or belongs to another run, or there is none. The message names the
                file and the fault.
        """
        if resume is None or resume is False:
            return None
        found: list[Any] = [None, None, []]
        if not self._several or self._trainer.args.process_index == 0:
            try:
                found = [self._find(resume), None, self.faults]
            except TrainingError as error:
                found = [None, str(error), self.faults]
        if self._several:
            dist.broadcast_object_list(found, src=0, device=self._trainer.args.device)
        self.resumed, fault, self.faults = found
        if fault is not None:
            raise TrainingError(fault)
        assert self.resumed is not None
        return str(self.resumed.path)

    def _find(self, resume: str | os.PathLike[str] | bool) -> TrainingCheckpoint:
        folder = Path(self._trainer.args.output_dir)
        self.faults = []
        found = newest_checkpoint(folder, self.faults) if resume is True else verified(Path(str(resume)))
        if found is None:
            raise TrainingError(
                f"{folder} holds no complete checkpoint; expected one to resume from"
                + "".join(f"; {fault}" for fault in self.faults)
            )
        if self._about and found.manifest.about:
            check_same_run(found.manifest.about, self._about, folder)
        return found

    @property
    def _several(self) -> bool:
        return Launch.here().processes > 1

    def _train(self, resume_from_checkpoint: Any = None, *given: Any, **named: Any) -> Any:
        """Trainer's ``train``, from a complete checkpoint; by itself, Trainer takes the one with the highest number.

        Raises:
            TrainingError: a pickle in the checkpoint holds more than tensors and numbers.
        """
        path = self.resume_path(resume_from_checkpoint)
        try:
            return self._original["train"](path, *given, **named)
        except UnpicklingError as error:
            if path is None:
                raise
            raise TrainingError(
                f"{_refused_pickle(Path(path))} holds more than tensors and numbers, so it may run code; expected a "
                "checkpoint that aletheia wrote"
            ) from error

    def _run_epoch(self, *given: Any, **named: Any) -> None:
        """Trainer's epoch, unless all steps are done: Trainer resumed after the last step would take one more."""
        state = self._trainer.state
        if state.global_step >= state.max_steps > 0:
            self._trainer.control.should_training_stop = True
            return
        self._original["_run_epoch"](*given, **named)

    def _load_best_model(self) -> None:
        """Trainer's ``_load_best_model``, after the checkpoint is verified.

        Raises:
            TrainingError: the checkpoint is damaged. The message names the file and the fault.
        """
        best = Path(self._trainer.state.best_model_checkpoint)
        if (best / MANIFEST_FILE).exists():  # a checkpoint of another program has none
            verified(best)
        self._original["_load_best_model"]()

    def _save(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint to a partial folder, sync it, add a manifest, rename it, and rotate.

        Raises:
            TrainingError: it cannot be written. Earlier checkpoints stay as they are.
        """
        trainer = self._trainer
        folder = Path(self._original["_get_output_dir"](trial))
        partial = folder / PARTIAL / f"checkpoint-{trainer.state.global_step}"
        best, pushed = trainer.state.best_model_checkpoint, False
        try:
            self._together(self._make_room, folder)
            with self._redirected(partial.parent) as pushes:
                self._together(self._original["_save_checkpoint"], model, trial)
                pushed = bool(pushes)
            trainer.state.best_model_checkpoint = self._best(folder, best)
            self._together(self._finish, partial, folder)
        except BaseException as error:
            trainer.state.best_model_checkpoint = best
            if trainer.args.should_save:
                clear_partial(folder)
            if isinstance(error, _NotWrittenError):
                raise TrainingError(self._not_written(folder, partial.name, str(error))) from error
            raise
        if pushed:
            self._original["_push_from_checkpoint"](str(folder / partial.name))
        if trainer.args.should_save:
            self._rotate(folder)

    def _together(self, action: Callable[..., object], *given: Any) -> None:
        """Call ``action`` in every process, and fail in all of them if one cannot write."""
        fault: str | None = None
        try:
            action(*given)
        except Exception as error:
            if not is_write_fault(error):
                raise
            fault = system_message(error)
        if self._several:
            faults: list[str | None] = [None] * dist.get_world_size()
            dist.all_gather_object(faults, fault)
            fault = next((text for text in faults if text is not None), None)
        if fault is not None:
            raise _NotWrittenError(fault)

    def _make_room(self, folder: Path) -> None:
        """Remove what a killed save left.

        Raises:
            OSError: the disk has no room for a checkpoint.
        """
        if not self._trainer.args.should_save:
            return
        clear_partial(folder)
        if free_bytes(folder) < self._needed_bytes(folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextmanager
    def _redirected(self, place: Path) -> Iterator[list[str]]:
        """Let Trainer write into ``place``; yields the pushes that it asks for meanwhile, which wait."""
        pushes: list[str] = []
        self._trainer._get_output_dir = lambda trial: str(place)
        self._trainer._push_from_checkpoint = pushes.append
        try:
            yield pushes
        finally:
            for name in ("_get_output_dir", "_push_from_checkpoint"):
                del self._trainer.__dict__[name]
                if name in self._earlier:
                    setattr(self._trainer, name, self._earlier[name])

    def _best(self, folder: Path, before: str | None) -> str | None:
        """The final path of the best checkpoint: Trainer has looked for it in the partial folder."""
        step = self._trainer.state.best_global_step
        path = folder / f"checkpoint-{step}"
        return str(path) if step and (step == self._trainer.state.global_step or path.is_dir()) else before

    def _finish(self, partial: Path, folder: Path) -> None:
        trainer = self._trainer
        if not trainer.args.should_save:
            return
        if (partial / STATE_FILE).exists():
            trainer.state.save_to_json(str(partial / STATE_FILE))  # with the final path of the best checkpoint
        manifest = write_manifest(partial, trainer.state.global_step, self._about, self._extra())
        move_in(partial, folder)
        shutil.rmtree(partial.parent, ignore_errors=True)
        self._size_bytes = manifest.size_bytes

    def _rotate(self, folder: Path) -> None:
        """Trainer's rotation.

        Where only this run uses the folder, checkpoints of later steps are deleted first. Otherwise a run that resumed
        from before a damaged checkpoint would lose its newest ones to them.
        """
        trainer = self._trainer
        limit, best = trainer.args.save_total_limit, trainer.state.best_model_checkpoint
        if limit is None or limit <= 0:
            return
        for path in checkpoint_folders(folder) if self._alone else ():
            if step_of(path) > trainer.state.global_step:
                shutil.rmtree(path, ignore_errors=True)
        # by number where no later checkpoint is left: a folder's time changes when a file is added
        rotate_checkpoints(str(folder), limit, best, use_mtime=not self._alone)

    def _needed_bytes(self, folder: Path) -> int:
        """The size of the last checkpoint, or an estimate before there is one."""
        if not self._size_bytes:
            for path in sorted(checkpoint_folders(folder), key=step_of):
                try:
                    self._size_bytes = read_manifest(path).size_bytes
                except TrainingError:
                    continue
        trainable = (parameter.numel() for parameter in self._trainer.model.parameters() if parameter.requires_grad)
        return self._size_bytes or BYTES_PER_PARAMETER * sum(trainable)

    def _not_written(self, folder: Path, name: str, fault: str) -> str:
        kept = [path for path in checkpoint_folders(folder) if (path / MANIFEST_FILE).exists()]
        then = f"the same command resumes from step {max(map(step_of, kept))}" if kept else "there is no earlier one"
        return (
            f"{folder / name} cannot be written ({fault}): a checkpoint needs about "
            f"{self._needed_bytes(folder):,} bytes, but {free_bytes(folder):,} bytes are free; "
            f"free some space or choose another `out`; {then}"
        )


class _NotWrittenError(Exception):
    """A process could not write its part; the message says why."""


def is_write_fault(error: BaseException) -> bool:
    """Whether an error of a save comes from the disk; torch.save and tokenizers have no error class for that."""
    if isinstance(error, OSError | ArtifactError | SafetensorError):
        return True
    return any(words in str(error) for words in WRITER_FAULTS)


def system_message(error: BaseException) -> str:
    """The operating system's message for an error, or else the error's own message in one line."""
    return getattr(error, "strerror", None) or one_line(error)


def _refused_pickle(checkpoint: Path) -> Path:
    """The file of a checkpoint that torch refuses to unpickle; Trainer's error does not name it."""
    random = sorted(checkpoint.glob("rng_state*.pth"))
    for path in sorted({*checkpoint.glob("*.pt"), *checkpoint.glob("*.bin")}):
        if path.name != "training_args.bin":
            try:
                torch.load(path, map_location="cpu", weights_only=True)
            except UnpicklingError:
                return path
    return random[0] if random else checkpoint
