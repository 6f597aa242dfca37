"""The run folder: claimed before anything is computed, written at the end. Importing this loads no torch."""

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout

from aletheia.errors import ArtifactError, ModelError
from aletheia.files import artifact_format, follow_umask, free_bytes, not_written, sync, whole_path, write_text
from aletheia.runs.card import model_card
from aletheia.runs.contents import Contents, write_contents
from aletheia.runs.manifest import MANIFEST_FILE, Manifest, checkpoint_folders
from aletheia.runs.schema import METRICS_FILE, PLAN_FILE, REPORT_FILE, SCORES_FILE, Metrics, Run

if TYPE_CHECKING:
    from collections.abc import Mapping

    from peft import PeftModel
    from torch import Tensor

CONFIG_FILE = "config.yaml"
CARD_FILE = "README.md"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
CHECKPOINTS = "checkpoints"
PARTIAL_FOLDER = ".partial"  # where an adapter is written before it is moved in
LOCK_FILE = ".lock"
REPLACING_FILE = ".replacing"  # marks a run in progress that will replace a finished one
FolderState = Literal["new", "interrupted", "finished", "foreign"]


class RunFolder:
    """A folder for a run, held by one process at a time; a context manager. Make it with :meth:`claim`.

    ``resumes`` says whether it holds an interrupted run to resume. With several processes, only the first one claims
    the folder.
    """

    def __init__(self, path: Path, lock: FileLock | None, is_new: bool, resumes: bool) -> None:
        """Use :meth:`claim` instead; ``is_new`` says that the folder was created for this run."""
        self.path, self.resumes = path, resumes
        self._lock, self._is_new = lock, is_new

    @classmethod
    def claim(
        cls,
        out: str | Path,
        overwrite: bool = False,
        resume: Literal["auto", "never"] = "auto",
    ) -> "RunFolder":
        """Claim ``out`` for a run. No other process can claim it until it is closed or this process ends.

        Args:
            out: the folder; it is created if necessary.
            overwrite: allow it to hold a finished run, which is replaced when the new one is saved.
            resume: what to do with an interrupted run: ``auto`` resumes it, ``never`` removes its checkpoints.

        Raises:
            ArtifactError: the folder cannot be written, is a file, is in use, or holds something that may not be
                replaced: other files, or a finished run while ``overwrite`` is off.
        """
        out = Path(out)
        check_out(out, overwrite)
        is_new = not out.exists()
        claimed = cls(out, _lock(out), is_new, resumes=False)
        try:
            state = check_out(out, overwrite)  # again: another run may have ended since
            shutil.rmtree(out / PARTIAL_FOLDER, ignore_errors=True)
            claimed.resumes = state == "interrupted" and resume == "auto"
            if not claimed.resumes:
                _remove_earlier(out, state)
        except BaseException:
            claimed.close()
            raise
        return claimed

    @classmethod
    def of_another_process(cls, path: Path, resumes: bool) -> "RunFolder":
        """The folder that the first process of this launch holds."""
        return cls(path, None, False, resumes)

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / CHECKPOINTS

    def check_room(self, size_bytes: int) -> None:
        """Check that an adapter of ``size_bytes`` could be saved.

        Raises:
            ArtifactError: fewer than ``size_bytes`` are free.
        """
        free = free_bytes(self.path)
        if free < size_bytes:
            raise ArtifactError(
                f"{self.path}: the adapter needs {size_bytes / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free; "
                "free some space or choose another `out`"
            )

    def remove_checkpoints(self) -> None:
        """Remove the checkpoints, which serve only to resume."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def close(self) -> None:
        """Release the folder; remove it if it was created for this run and is empty."""
        if self._lock is None or not self._lock.is_locked:
            return
        with suppress(OSError):
            self.checkpoints.rmdir()  # Trainer creates it before there is anything to save
        if self._is_new and _names(self.path) == set():
            with suppress(OSError):
                (self.path / LOCK_FILE).unlink()
                self.path.rmdir()
        self._lock.release()

    def __enter__(self) -> "RunFolder":
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the folder."""
        self.close()


def folder_state(out: Path) -> FolderState:
    """What a folder holds: nothing, an interrupted run, a finished run, or something else.

    An interrupted run is recognised by its lock together with settings or checkpoints, or by a checkpoint's manifest.
    """
    names = _names(out)
    if not names:
        return "new"
    if artifact_format(out / METRICS_FILE) == Metrics.FORMAT:
        return "interrupted" if REPLACING_FILE in names else "finished"
    was_claimed = (out / LOCK_FILE).is_file() and names & {CONFIG_FILE, CHECKPOINTS, REPLACING_FILE}
    manifests = (path / MANIFEST_FILE for path in checkpoint_folders(out / CHECKPOINTS))
    if was_claimed or any(artifact_format(path) == Manifest.FORMAT for path in manifests):
        return "interrupted"
    return "foreign"


def check_out(out: Path, overwrite: bool = False) -> FolderState:
    """The state of a folder, if a run may use it; nothing is created.

    Raises:
        ArtifactError: it is a file, cannot be read, or holds other files, or a finished run while ``overwrite`` is off.
    """
    try:
        os.fspath(out.absolute()).encode()
    except UnicodeEncodeError as error:  # the libraries that write adapters also refuse such a name
        raise ArtifactError(f"{out} is not a valid UTF-8 name; choose another `out`") from error
    try:
        if out.exists() and not out.is_dir():
            raise ArtifactError(f"{out} is a file; expected a folder for the run; choose another `out`")
        state = folder_state(out)
    except OSError as error:
        raise ArtifactError(f"cannot read {out}: {error.strerror}; choose another `out`") from error
    if state == "foreign":
        raise ArtifactError(f"{out} holds other files; expected a new or empty folder; choose another `out`")
    if not overwrite and (out / METRICS_FILE).exists():
        kind = "a finished run" if state == "finished" else "another run"
        raise ArtifactError(f"{out} holds {kind}; choose another `out`, or replace it with `overwrite`")
    return state


def _names(out: Path) -> set[str]:
    """The names in the folder besides the lock."""
    return {path.name for path in out.iterdir()} - {LOCK_FILE, PARTIAL_FOLDER} if out.is_dir() else set()


def _lock(out: Path) -> FileLock:
    """Take the folder's lock; the error names the process that holds it."""
    place = out / LOCK_FILE
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place, timeout=0)
        lock.acquire()
        place.write_text(f"{os.getpid()}\n")
    except Timeout as error:
        with suppress(OSError, ValueError):
            holder = f" (process {int(place.read_text())})"
            raise ArtifactError(_in_use(out, holder)) from error
        raise ArtifactError(_in_use(out, "")) from error
    except (OSError, NotImplementedError) as error:
        raise not_written(out, error) from error
    return lock


def _in_use(out: Path, holder: str) -> str:
    return f"{out} is in use by another run{holder}; expected an unused folder; wait for it or choose another `out`"


def _remove_earlier(out: Path, state: FolderState) -> None:
    """Remove the checkpoints of a run that is not resumed; a finished run stays until the next one is saved."""
    try:
        if (out / METRICS_FILE).exists():
            write_text(out / REPLACING_FILE, "")
        else:  # the adapter of an interrupted run
            for name in ADAPTER_FILES:
                (out / name).unlink(missing_ok=True)
        if state != "new" and (out / CHECKPOINTS).exists():
            shutil.rmtree(out / CHECKPOINTS)
    except OSError as error:
        raise ArtifactError(f"cannot remove {out / CHECKPOINTS}: {error.strerror}; choose another `out`") from error


def _write_beside(
    model: "PeftModel", folder: Path, state: "Mapping[str, Tensor] | None", card: str | None
) -> list[Path]:
    """Write the adapter to a partial folder in ``folder`` and sync it to the disk; returns its files.

    Raises:
        ArtifactError: it cannot be written.
    """
    from safetensors import SafetensorError

    temporary = folder / PARTIAL_FOLDER
    shutil.rmtree(temporary, ignore_errors=True)
    for config in model.peft_config.values():  # an absolute path, so that the base is found from any working directory
        config.base_model_name_or_path = whole_path(config.base_model_name_or_path or "") or None
    try:
        model.save_pretrained(str(temporary), save_embedding_layers=False, state_dict=state)
        (temporary / CARD_FILE).unlink(missing_ok=True)  # PEFT's
        if card is not None:
            write_text(temporary / CARD_FILE, card)
        files = sorted(temporary.iterdir())
        for file in files:
            follow_umask(file)
            sync(file)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise not_written(folder, error, _adapter_bytes(model)) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return files


def save_tokenizer(tokenizer: Any, folder: Path) -> list[str]:
    """Write a tokenizer with its chat template into a run folder, for those who serve the adapter.

    Returns:
        The names of its files in the folder.

    Raises:
        ArtifactError: they cannot be written.
        ModelError: the tokenizer cannot be saved.
    """
    temporary = folder / PARTIAL_FOLDER
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        tokenizer.save_pretrained(str(temporary))
        files = sorted(path.relative_to(temporary) for path in temporary.rglob("*") if path.is_file())
        for file in files:
            follow_umask(temporary / file)
            sync(temporary / file)
            (folder / file).parent.mkdir(exist_ok=True)
            os.replace(temporary / file, folder / file)
        sync(folder)
    except OSError as error:
        raise not_written(folder, error) from error
    except Exception as error:  # from a tokenizer with its own code, or one whose source file is missing
        raise ModelError(
            f"the tokenizer cannot be saved ({type(error).__name__}: {str(error)[:200]}); expected one that supports "
            f"`save_pretrained`; copy the tokenizer files of the base model into {folder}"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [file.as_posix() for file in files]


def _of_former_run(folder: Path) -> list[str]:
    """The files of the run that is replaced, from its manifest, except those that are overwritten or kept."""
    try:
        found = Contents.read(folder / MANIFEST_FILE).files if (folder / MANIFEST_FILE).exists() else {}
    except ArtifactError:  # damaged, which no longer matters
        return []
    inside = (name for name in found if not Path(name).is_absolute() and ".." not in Path(name).parts)
    return [name for name in inside if name not in (CONFIG_FILE, *ADAPTER_FILES, CARD_FILE)]


def _adapter_bytes(model: "PeftModel") -> int:
    return sum(value.nbytes for name, value in model.named_parameters() if "lora_" in name)


def save_so_far(model: "PeftModel", folder: RunFolder, state: "Mapping[str, Tensor] | None" = None) -> bool:
    """Write the adapter of an interrupted run, without the files of a finished run; returns whether it was written.

    Nothing is written if the run was meant to replace a finished one, or if the disk is full. The checkpoints suffice
    to resume.
    """
    if (folder.path / METRICS_FILE).exists():
        return False
    try:
        for file in _write_beside(model, folder.path, state, None):
            os.replace(file, folder.path / file.name)
        sync(folder.path)
    except (ArtifactError, OSError):
        return False
    finally:
        shutil.rmtree(folder.path / PARTIAL_FOLDER, ignore_errors=True)
    return True


def save(model: "PeftModel", run: Run, state: "Mapping[str, Tensor] | None" = None) -> None:
    """Write the run folder. ``metrics.json`` is removed first and written last, so a folder that has one is complete.

    The adapter is written to a partial folder and moved in, so that a run that is replaced survives a failure.
    Checkpoints, settings and the lock stay as they are. ``state`` holds the weights if those of ``model`` are sharded.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    files = _write_beside(model, run.path, state, model_card(run))
    try:
        for name in (METRICS_FILE, *_of_former_run(run.path), MANIFEST_FILE, PLAN_FILE, SCORES_FILE, REPORT_FILE):
            (run.path / name).unlink(missing_ok=True)
        for file in files:
            os.replace(file, run.path / file.name)
        sync(run.path)
        run.plan.write(run.path / PLAN_FILE)
        write_contents(run.path, [*(file.name for file in files), PLAN_FILE])
        (run.path / REPLACING_FILE).unlink(missing_ok=True)
        run.metrics.write(run.path / METRICS_FILE)
        sync(run.path)
    except OSError as error:
        (run.path / METRICS_FILE).unlink(missing_ok=True)
        raise not_written(run.path, error) from error
    finally:
        shutil.rmtree(run.path / PARTIAL_FOLDER, ignore_errors=True)
