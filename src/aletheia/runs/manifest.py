"""Checkpoints that can be trusted: a manifest of every file, and the newest checkpoint that matches its manifest.

A checkpoint is the folder ``checkpoint-N`` that Trainer writes after step N, with a ``manifest.json`` written last. It
is complete if every file of the manifest exists and is unchanged. Files that were added later, for example by a logger,
are not checked. Torch-free.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from aletheia.errors import ArtifactError, TrainingError
from aletheia.files import Artifact, file_sha256, follow_umask, sync, write_text

MANIFEST_FILE = "manifest.json"
PARTIAL = "_partial"  # where checkpoints are written; the underscore excludes it from Trainer's uploads
REPLACED = ".replaced"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
HASH = re.compile(r"\b[0-9a-f]{16,}\b")
HASH_SHOWN = 12


class FileRecord(BaseModel):
    """Size and checksum that a file must have."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """The record of the file as it is now.

        Raises:
            OSError: the file cannot be read.
        """
        return cls(size_bytes=path.stat().st_size, sha256=file_sha256(path))

    def fault(self, path: Path) -> str | None:
        """What is wrong with the file, in words that follow its name; None if it is unchanged."""
        try:
            found = path.stat().st_size
            if found != self.size_bytes:
                return f"has {found:,} bytes; expected {self.size_bytes:,}"
            if file_sha256(path) != self.sha256:
                return "was changed since it was written (its sha256 differs)"
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        return None


class Manifest(Artifact):
    """Every file of a checkpoint by its relative path, and what the run needs to resume from it.

    ``about`` identifies the run; ``extra`` holds small state of the caller.
    """

    FORMAT: ClassVar[str] = "aletheia-checkpoint"

    step: int
    files: dict[str, FileRecord]
    about: dict[str, Any] = Field(default_factory=dict)
    extra: dict[str, Any] = Field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Size of all files together."""
        return sum(record.size_bytes for record in self.files.values())


@dataclass(frozen=True)
class TrainingCheckpoint:
    """A complete checkpoint: its path and its manifest."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest.step


def write_manifest(folder: Path, step: int, about: Mapping[str, Any], extra: Mapping[str, Any]) -> Manifest:
    """Sync all files of ``folder`` to the disk, then write their manifest there and sync it.

    Raises:
        ArtifactError: the manifest cannot be written.
        OSError: a file cannot be read or synced.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            follow_umask(path)
        sync(path)
        if path.is_file() and path != folder / MANIFEST_FILE:
            files[path.relative_to(folder).as_posix()] = FileRecord.of(path)
    manifest = Manifest(step=step, files=files, about=dict(about), extra=dict(extra))
    write_text(folder / MANIFEST_FILE, manifest.to_json())
    sync(folder)
    return manifest


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a checkpoint; its files are not checked.

    Raises:
        TrainingError: there is no manifest, or it was changed since it was written.
    """
    path = Path(folder) / MANIFEST_FILE
    if not path.is_file():
        raise TrainingError(
            f"{folder} has no {MANIFEST_FILE}; expected a complete checkpoint; to resume from one that a plain Trainer "
            "wrote, attach with `whole_checkpoints` False"
        )
    try:
        return Manifest.read(path)
    except ArtifactError as error:
        raise TrainingError(f"{error}; expected the manifest as written; resume from another checkpoint") from error


def verified(folder: str | Path) -> TrainingCheckpoint:
    """The checkpoint in ``folder``, every file compared with the manifest.

    Raises:
        TrainingError: it is not complete. The message names the file and its fault.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TrainingError(f"{folder} is not a folder; expected a checkpoint, such as RUN/checkpoints/checkpoint-100")
    manifest = read_manifest(folder)
    for name, record in manifest.files.items():
        here = Path(name)
        if here.is_absolute() or ".." in here.parts or ((folder / name).exists() and not (folder / name).is_file()):
            raise TrainingError(
                f"{folder / MANIFEST_FILE} names {name[:80]!r}, which is not a file of this checkpoint; resume from "
                "another checkpoint"
            )
        if fault := record.fault(folder / name):
            raise TrainingError(f"{folder / name} {fault}; resume from another checkpoint")
    return TrainingCheckpoint(folder, manifest)


def newest_checkpoint(folder: str | Path, faults: list[str] | None = None) -> TrainingCheckpoint | None:
    """The newest complete checkpoint in ``folder``, or None; also cleans up what a killed save left.

    Call it before training starts, when no other process writes there.

    Args:
        folder: the folder that holds the folders ``checkpoint-N``.
        faults: a list that receives one line for each newer checkpoint that was skipped.
    """
    folder = Path(folder)
    clear_partial(folder)
    for path in sorted(checkpoint_folders(folder), key=step_of, reverse=True):
        try:
            return verified(path)
        except TrainingError as error:
            if faults is not None:
                faults.append(str(error))
    return None


def checkpoint_folders(folder: Path) -> list[Path]:
    """Every ``checkpoint-N`` in ``folder``, complete or not."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if CHECKPOINT.fullmatch(path.name) and path.is_dir()]


def step_of(path: Path) -> int:
    """The N of ``checkpoint-N``."""
    return int(path.name.rpartition("-")[2])


def move_in(partial: Path, folder: Path) -> Path:
    """Move a checkpoint that is written and synced to its place; it replaces one of the same step.

    Raises:
        OSError: it cannot be moved.
    """
    final, replaced = folder / partial.name, partial.with_name(partial.name + REPLACED)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)  # clear_partial repairs a kill between the two renames
    os.rename(partial, final)
    sync(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def clear_partial(folder: Path) -> None:
    """Remove what a killed save left, and move in a checkpoint that it had completed."""
    place = folder / PARTIAL
    if not place.is_dir():
        return
    for path in checkpoint_folders(place):
        replaced = path.with_name(path.name + REPLACED)
        try:
            if not (folder / path.name).exists():
                move_in(verified(path).path, folder)
        except (TrainingError, OSError):
            if replaced.exists() and not (folder / path.name).exists():
                os.rename(replaced, folder / path.name)
    shutil.rmtree(place, ignore_errors=True)


def check_same_run(saved: Mapping[str, Any], now: Mapping[str, Any], run: str | Path = "the folder") -> None:
    """Check that a checkpoint belongs to this run.

    Args:
        saved: ``about`` of the checkpoint.
        now: the values that identify this run.
        run: the run folder, for the message.

    Raises:
        TrainingError: it belongs to another run. The message names the first difference, with both values.
    """
    for name in dict.fromkeys([*now, *saved]):
        before, after = (_shown(side[name]) if name in side else "absent" for side in (saved, now))
        if before != after:
            raise TrainingError(
                f"{run} holds an interrupted run with `{name}` {_short(before)}, but this one has {_short(after)}; "
                "expected the same command; choose another `out`, or set `resume` never to start again"
            )


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _short(text: str) -> str:
    return HASH.sub(lambda found: found.group()[:HASH_SHOWN], text)
