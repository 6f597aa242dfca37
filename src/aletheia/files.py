"""Versioned JSON artefacts (scores, plan, metrics): sealed, validated, and written atomically. Torch-free.

A seal is the sha256 of all bytes of the file except its own 64 digits. It is the top-level key ``sha256``, before the
content, so a person can delete its line and the rest stays valid JSON.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from aletheia.errors import ArtifactError, SettingsError
from aletheia.kinds import OF_FORMAT, mistaken, near

SEAL = "sha256"
_SEAL_LINE = re.compile(rb'^ "sha256": "([0-9a-f]{64})",?$', re.MULTILINE)  # nested keys are indented further
DIGITS_SHOWN = 12  # digits of a hash that people see
TRACKED_PACKAGES = ("aletheia-tune", "torch", "transformers", "peft", "accelerate", "datasets", "numpy")

FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_WORDS = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "database or disk is full")  # as libraries word it
LONGEST_NAME_BYTES = 255
LARGEST_BYTES = 250_000_000  # of one artefact; scores of 50,000 modules are below 50 MB


def package_versions(names: Iterable[str] = TRACKED_PACKAGES) -> dict[str, str]:
    """Versions of packages, by default those that can change a result; missing ones are left out."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write the whole file or nothing: a temporary file in the same folder, then an atomic rename.

    Raises:
        ArtifactError: the folder cannot be written; on a full disk the message names the bytes needed and free.
    """
    write_bytes(path, text.encode("utf-8", "surrogateescape"))  # it may contain a file name of arbitrary bytes


def write_bytes(path: Path, data: bytes) -> None:
    """As :func:`write_text`, for bytes.

    Raises:
        ArtifactError: as there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".aletheia-")
        try:
            with os.fdopen(descriptor, "wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())  # else a power cut after the rename could leave an empty file
            follow_umask(Path(temporary))
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise not_written(path, error, len(data)) from error


def not_written(path: Path, error: Exception, needed_bytes: int | None = None) -> ArtifactError:
    """The error for a ``path`` that could not be written; on a full disk it names the bytes needed and free."""
    if not is_full_disk(error):
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        return ArtifactError(f"cannot write {path}: {reason}; choose another `out`")
    try:
        free = f"{free_bytes(path.parent):,} bytes are free"
    except OSError:
        free = "the disk is full"
    needed = "" if needed_bytes is None else f"{needed_bytes:,} bytes are needed, "
    return ArtifactError(
        f"cannot write {path}: {os.strerror(errno.ENOSPC)}: {needed}{free}; make room or choose another `out`"
    )


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, says that a disk or a quota is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if any(words in str(error) for words in FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def whole_path(name: str) -> str:
    """The absolute path of a name that exists on this machine; other names, such as hub ids, unchanged."""
    return os.path.abspath(name) if os.path.exists(name) else name


def sibling(path: Path, ending: str) -> Path:
    """A path in the folder of ``path``: its name plus ``ending``, or a hash plus ``ending`` where that is too long."""
    name = os.fsencode(path.name)
    if len(name) + len(os.fsencode(ending)) <= LONGEST_NAME_BYTES:
        return path.with_name(path.name + ending)
    return path.with_name(hashlib.sha256(name).hexdigest()[:32] + ending)


def follow_umask(file: Path) -> None:
    """Give a file the permissions of a new one: some libraries make files readable by their owner only.

    Raises:
        OSError: the file is missing, or belongs to another user.
    """
    current = os.umask(0)
    os.umask(current)
    os.chmod(file, 0o666 & ~current)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on disk.

    Raises:
        OSError: they cannot be written.
    """
    if path.is_dir() and os.name != "posix":
        return  # elsewhere folders cannot be opened
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(folder: Path) -> None:
    """Write to ``folder`` once and leave no trace, so that no work is lost because its result cannot be saved.

    Raises:
        ArtifactError: the folder cannot be created or written.
    """
    try:
        is_new = not folder.exists()
        for again in (True, False):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                with tempfile.TemporaryFile(dir=folder):
                    break
            except FileNotFoundError:  # another command that just checked this folder removed it again
                if not again:
                    raise
        if is_new:
            with suppress(OSError):  # another command already writes to it
                folder.rmdir()
    except OSError as error:
        raise ArtifactError(f"cannot write to {folder}: {error.strerror}; choose another `out`") from error


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk where ``folder`` is, or would be created."""
    return shutil.disk_usage(nearest_existing(folder)).free


def nearest_existing(folder: Path) -> Path:
    """``folder``, or the lowest folder above it that exists."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def sealed_json(content: Mapping[str, Any], head: Mapping[str, Any] | None = None) -> str:
    """Indented JSON of ``head``, a seal over everything, and ``content``.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps({**(head or {}), SEAL: "", **content}, indent=1, allow_nan=False) + "\n"
    line = f' "{SEAL}": "'
    return text.replace(line, line + hashlib.sha256(text.encode()).hexdigest(), 1)


def check_seal(path: Path, content: bytes, remedy: str) -> None:
    """Compare a sealed file's bytes with its seal.

    Raises:
        ArtifactError: they differ, or the line of the seal was edited.
    """
    line = _SEAL_LINE.search(content)
    if line is None:
        raise ArtifactError(f"{path} was changed after it was written: its sha256 line was edited; {remedy}")
    found = hashlib.sha256(content[: line.start(1)] + content[line.end(1) :]).hexdigest()
    expected = line[1].decode()
    if found != expected:
        raise ArtifactError(
            f"{path} was changed after it was written: the sha256 of its content is {found[:DIGITS_SHOWN]}, "
            f"expected {expected[:DIGITS_SHOWN]}; {remedy}"
        )


def read_sealed(path: Path) -> dict[str, Any]:
    """The content of a file written with :func:`sealed_json`, without its seal.

    Raises:
        ArtifactError: missing, not JSON, not sealed, or changed since it was written.
    """
    content = _bytes_of(path)
    found = _parsed(path, content)
    if not isinstance(found, dict) or SEAL not in found:
        raise ArtifactError(f"{path} has no sha256; expected it as it was written; write the file again")
    check_seal(path, content, "write the file again")
    return {key: value for key, value in found.items() if key != SEAL}


class Artifact(BaseModel):
    """Base of the files we write: JSON with a ``format`` name, an integer ``version`` and a seal.

    Unknown keys are refused, so that a typo in a hand-edited plan cannot pass unnoticed. A format that people may edit
    is ``EDITABLE``: its files are read without a seal, too; see :func:`is_sealed`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    FORMAT: ClassVar[str]
    VERSION: ClassVar[int] = 2
    EDITABLE: ClassVar[bool] = False

    def to_json(self) -> str:
        """The file's text: indented JSON, keys in the order of the schema.

        Raises:
            ValueError: a number is not finite.
        """
        return sealed_json(self.model_dump(mode="json"), {"format": self.FORMAT, "version": self.VERSION})

    def write(self, path: str | Path) -> Path:
        """Write the artefact; an existing file is replaced only if it is one of the same format.

        Raises:
            ArtifactError: the path holds something else or cannot be written.
        """
        path = Path(path)
        self.check_out(path)
        write_text(path, self.to_json())
        return path

    @classmethod
    def check_out(cls, path: str | Path) -> None:
        """Check that :meth:`write` may write there; call it before hours of work.

        Raises:
            ArtifactError: the path holds something else, or its folder cannot be written.
        """
        path = Path(path)
        try:
            is_there = path.exists()
        except OSError as error:  # the name is too long
            raise not_written(path, error) from error
        if is_there and artifact_format(path) != cls.FORMAT:
            raise ArtifactError(
                f"{path} exists and is not an {cls.FORMAT} file; choose another `out` or remove it first"
            )
        check_writable(path.parent)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read and validate an artefact.

        Raises:
            ArtifactError: missing, not JSON, of another format or version, changed since it was written, or with
                invalid fields.
        """
        path = Path(path)
        kinds = [OF_FORMAT[cls.FORMAT]] if cls.FORMAT in OF_FORMAT else []
        if kinds and (fault := mistaken(path, f"a {kinds[0]} file", *kinds)):
            raise ArtifactError(fault)
        if not os.path.lexists(path) and (hint := near(path, *kinds)):
            raise ArtifactError(f"cannot read {path}: there is no such file{hint}")
        content = _bytes_of(path)
        found = _parsed(path, content)
        if not isinstance(found, dict) or found.get("format") != cls.FORMAT:
            named = found.get("format") if isinstance(found, dict) else None
            raise ArtifactError(f"{path} is not an {cls.FORMAT} file (format: {named!r})")
        if found.get("version") != cls.VERSION:
            raise ArtifactError(
                f"{path} has {cls.FORMAT} version {found.get('version')!r}; this release reads "
                f"version {cls.VERSION}; write the file again with this release"
            )
        cls._check_seal(path, content, found)
        body = {key: value for key, value in found.items() if key not in ("format", "version", SEAL)}
        try:
            return cls.model_validate(body)
        except SettingsError as error:
            raise ArtifactError(f"{path} is not a valid {cls.FORMAT} file: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise ArtifactError(
                f"{path} is not a valid {cls.FORMAT} file: {where}: {first['msg']} "
                f"({error.error_count()} problem{'s' * (error.error_count() > 1)} in all)"
            ) from error

    @classmethod
    def _check_seal(cls, path: Path, content: bytes, found: Mapping[str, Any]) -> None:
        if SEAL in found:
            remedy = "write the file again"
            edited = "to keep your edits, delete its sha256 line; else "
            check_seal(path, content, edited + remedy if cls.EDITABLE else remedy)
        elif not cls.EDITABLE:
            raise ArtifactError(f"{path} has no sha256; expected it as it was written; write the file again")


def is_sealed(path: Path) -> bool:
    """Whether an Aletheia file has a seal; a plan that was edited by hand has none.

    Raises:
        ArtifactError: the file is not JSON, or cannot be read.
    """
    found = read_json(path)
    return isinstance(found, dict) and SEAL in found


def read_json(path: Path) -> object:
    """Parse an Aletheia JSON file without checking its seal.

    Raises:
        ArtifactError: missing, a folder, unreadable, or not JSON (with the line).
    """
    return _parsed(path, _bytes_of(path))


def _bytes_of(path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # reading a pipe may block, a device may never end
            raise ArtifactError(f"{path} is not a regular file; expected JSON")
        with path.open("rb") as file:
            content = file.read(LARGEST_BYTES + 1)
        if len(content) > LARGEST_BYTES:
            raise ArtifactError(
                f"{path} is larger than {LARGEST_BYTES / 1e6:.0f} MB; expected a file that Aletheia wrote"
            )
        return content
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ArtifactError(f"cannot read {path}: {error}") from error  # a NUL in its name


def _parsed(path: Path, content: bytes) -> object:
    try:
        return json.loads(content.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{path}:{error.lineno}: not JSON ({error.msg}); write the file again") from error
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path}: not a text file; expected JSON") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or deep nesting
        raise ArtifactError(
            f"{path}: not JSON that Aletheia wrote ({type(error).__name__}); write the file again"
        ) from error


def artifact_format(path: Path) -> str | None:
    """The ``format`` that a file declares, or None if Aletheia did not write it."""
    try:
        found = read_json(path)
    except ArtifactError:
        return None
    name = found.get("format") if isinstance(found, dict) else None
    return name if isinstance(name, str) else None
