"""``aletheia.export``: a run, an adapter or a plan for another program, written completely or not at all."""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import ClassVar, Literal, get_args

from safetensors import SafetensorError

from aletheia.errors import ArtifactError, SettingsError
from aletheia.files import Artifact, artifact_format, check_writable, follow_umask, not_written, sync
from aletheia.runs.exports.origin import Origin
from aletheia.runs.exports.written import Task, Written

Target = Literal["merged", "vllm", "gguf", "ollama", "axolotl", "llama-factory", "unsloth", "trl", "mlx"]
RECORD_FILE = "export.json"
FROM_A_PLAN = ("axolotl", "llama-factory", "unsloth", "trl")
_HOMES = {"gguf": "llama_cpp", "ollama": "llama_cpp", **dict.fromkeys(FROM_A_PLAN, "trainers")}


class ExportRecord(Artifact):
    """``export.json``: what an export was made from. It also marks a folder that may be replaced."""

    FORMAT: ClassVar[str] = "aletheia-export"

    to: Target
    source: str
    base: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Exported:
    """A finished export: its folder and files, the ``command`` that uses it, and notes for the user."""

    path: Path
    to: Target
    files: tuple[str, ...]
    command: str
    notes: tuple[str, ...] = ()


def export(
    source: str | Path,
    to: Target,
    out: str | Path | None = None,
    base: str | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Exported:
    """Write a run, an adapter or a plan in the format that another program reads.

    Args:
        source: a run folder or any PEFT adapter folder; for the trainers ``axolotl``, ``llama-factory``, ``unsloth``
            and ``trl`` also a plan file.
        to: the program, or ``merged`` for a model folder of transformers.
        out: the folder to write; by default ``<source>-<to>`` next to the source.
        base: the base model, in place of the one that the source names: hub id, folder or ``.gguf`` file.
        dtype: dtype of ``merged``: ``auto`` (as the base checkpoint), ``bfloat16``, ``float16`` or ``float32``.
        overwrite: replace an earlier export in ``out``.
        trust_remote_code: run code that comes with the model.
        allow_pickle: read weights from ``.bin`` and other pickles, with torch's ``weights_only``.

    Raises:
        SettingsError: ``to`` is unknown.
        ArtifactError: ``out`` holds something else or cannot be written, or a file of the run was changed.
        AdapterError: the adapter cannot be expressed in that format.
        ModelError: the base model cannot be found or read, or does not fit in memory.
        PlanError: the run or plan was made on another base model.
    """
    if to not in get_args(Target):
        raise SettingsError(f"`to` is {to!r}; expected one of {', '.join(get_args(Target))}")
    source = Path(source)
    origin = Origin.of(source, base)
    if to not in FROM_A_PLAN:
        origin.check_trained(to)
    place = source.resolve()
    target = Path(out).absolute() if out else place.with_name(f"{place.stem if origin.is_plan else place.name}-{to}")
    _check_out(target, overwrite)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=".aletheia-"))
    try:
        written = _writer(to)(Task(origin, folder, target, dtype, trust_remote_code, allow_pickle))
        files = tuple(sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()))
        ExportRecord(to=to, source=str(source), base=origin.base, files=files).write(folder / RECORD_FILE)
        _move(folder, target)
    except (OSError, SafetensorError) as error:
        raise not_written(target, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Exported(target, to, files, written.command, written.notes)


def _writer(to: Target) -> Callable[[Task], Written]:
    """The function that writes a target, imported only when needed."""
    home = import_module(f"aletheia.runs.exports.{_HOMES.get(to, to)}")
    writer: Callable[[Task], Written] = getattr(home, f"write_{to.replace('-', '_')}")
    return writer


def _check_out(out: Path, overwrite: bool) -> None:
    """Check that ``out`` is new, empty, or an earlier export that may be replaced."""
    check_writable(out.parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists() and not out.is_dir():
        raise ArtifactError(f"{out} is a file; expected a folder for the export; choose another `out`")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if artifact_format(out / RECORD_FILE) != ExportRecord.FORMAT:
        raise ArtifactError(f"{out} holds other files; expected a new or empty folder; choose another `out`")
    if not overwrite:
        raise ArtifactError(f"{out} holds an earlier export; choose another `out` or set `overwrite`")


def _move(folder: Path, out: Path) -> None:
    """Move a finished export to its place; an earlier one is removed only when the new one is on the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            follow_umask(file)
            sync(file)
    os.chmod(folder, out.parent.stat().st_mode & 0o777)
    if out.exists():
        shutil.rmtree(out)
    os.replace(folder, out)
    sync(out.parent)
