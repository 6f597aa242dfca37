"""Checkpoints that can be trusted: a manifest of every file, and the newest checkpoint that still agrees with it.

A checkpoint is the folder ``checkpoint-N`` that Trainer writes after step N, with a ``manifest.json`` written last. It
is whole if every file of the manifest is there and has its bytes. Files that came later, from a logger say, are not
looked at. Torch-free.
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
PARTIAL = "_partial"  # where checkpoints are written; an underscore keeps Trainer's uploads of its folder out of it
REPLACED = ".replaced"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
HASH = re.compile(r"\b[0-9a-f]{16,}\b")
HASH_SHOWN = 12


class FileRecord(BaseModel):
    """What a file must be."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """What it is now.

        Raises:
            OSError: it cannot be read.
        """
        return cls(size_bytes=path.stat().st_size, sha256=file_sha256(path))

    def fault(self, path: Path) -> str | None:
        """What is wrong with the file, in words that follow its name; None if it has its bytes."""
        try:
            found = path.stat().st_size
            if found != self.size_bytes:
                return f"has {found:,} bytes; expected {self.size_bytes:,}"
            if file_sha256(path) != self.sha256:
                return "has other bytes than were written (its sha256 differs)"
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        return None


class Manifest(Artifact):
    """Every file of a checkpoint by its path within, and what the run wants to know when it goes on from there.

    ``about`` is the identity of the run, ``extra`` small state of the caller.
    """

    FORMAT: ClassVar[str] = "aletheia-checkpoint"

    step: int
    files: dict[str, FileRecord]
    about: dict[str, Any] = Field(default_factory=dict)
    extra: dict[str, Any] = Field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """All files together."""
        return sum(record.size_bytes for record in self.files.values())


@dataclass(frozen=True)
class TrainingCheckpoint:
    """A whole checkpoint: where it is and its manifest."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest.step


def write_manifest(folder: Path, step: int, about: Mapping[str, Any], extra: Mapping[str, Any]) -> Manifest:
    """Bring all files of ``folder`` to the disk, then write their manifest beside them and sync that.

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
    """The manifest of a checkpoint; its files are not looked at.

    Raises:
        TrainingError: there is none, or it was changed since it was written.
    """
    path = Path(folder) / MANIFEST_FILE
    if not path.is_file():
        raise TrainingError(
            f"{folder} has no {MANIFEST_FILE}; expected a checkpoint that was written whole; to go on from one that a "
            "Trainer wrote by itself, attach with `whole_checkpoints` False"
        )
    try:
        return Manifest.read(path)
    except ArtifactError as error:
        raise TrainingError(f"{error}; expected it as it was written, go on from another checkpoint") from error


def verified(folder: str | Path) -> TrainingCheckpoint:
    """The checkpoint in ``folder``, every file compared with the manifest.

    Raises:
        TrainingError: it is not whole; names the file and its fault.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TrainingError(f"{folder} is no folder; expected a checkpoint, such as RUN/checkpoints/checkpoint-100")
    manifest = read_manifest(folder)
    for name, record in manifest.files.items():
        here = Path(name)
        if here.is_absolute() or ".." in here.parts or ((folder / name).exists() and not (folder / name).is_file()):
            raise TrainingError(f"{folder / MANIFEST_FILE} names {name[:80]!r}, which is no file of this checkpoint")
        if fault := record.fault(folder / name):
            raise TrainingError(f"{folder / name} {fault}; go on from another checkpoint")
    return TrainingCheckpoint(folder, manifest)


def newest_checkpoint(folder: str | Path, faults: list[str] | None = None) -> TrainingCheckpoint | None:
    """The newest whole checkpoint in ``folder``, or None; what a killed save left behind is cleared up.

    Call it before training begins, not while another process may write there.

    Args:
        folder: where the folders ``checkpoint-N`` are.
        faults: takes one line for each newer checkpoint that was passed over.
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
    """Every ``checkpoint-N`` in ``folder``, whole or not."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if CHECKPOINT.fullmatch(path.name) and path.is_dir()]


def step_of(path: Path) -> int:
    """The N of ``checkpoint-N``."""
    return int(path.name.rpartition("-")[2])


def move_in(partial: Path, folder: Path) -> Path:
    """Put a checkpoint that is written and synced in its place; one of the same step gives way.

    Raises:
        OSError: it cannot be moved.
    """
    final, replaced = folder / partial.name, partial.with_name(partial.name + REPLACED)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)  # a kill between the two renames is mended by clear_partial
    os.rename(partial, final)
    sync(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def clear_partial(folder: Path) -> None:
    """Remove what a killed save left behind; a checkpoint that it had finished takes its place after all."""
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
    """Refuse to go on from a checkpoint of another run.

    Args:
        saved: ``about`` of the checkpoint.
        now: the identity of the run that begins.
        run: the run folder, for the message.

    Raises:
        TrainingError: names the first difference, with both values.
    """
    for name in dict.fromkeys([*now, *saved]):
        before, after = (_shown(side[name]) if name in side else "absent" for side in (saved, now))
        if before != after:
            raise TrainingError(
                f"{run} holds an interrupted run with `{name}` {_short(before)}, this one has {_short(after)}; "
                "expected the same command; give another `out`, or `resume` never to begin anew"
            )


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _short(text: str) -> str:
    return HASH.sub(lambda found: found.group()[:HASH_SHOWN], text)
