"""The files of a finished run with the sha256 of each: ``manifest.json`` of the run folder. Torch-free.

Files that were added later are not checked. A missing file is left to its reader to report. People may rewrite the
model card and the report page.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from aletheia.errors import ArtifactError
from aletheia.files import Artifact, write_text
from aletheia.runs.manifest import MANIFEST_FILE, FileRecord

FOR_PEOPLE = ("README.md", "report.html")
_OF_A_RUN = ("metrics.json", "plan.json", MANIFEST_FILE)  # the first is written last, so the manifest leaves it out


class Contents(Artifact):
    """Every file of a run by its name in the folder."""

    FORMAT: ClassVar[str] = "aletheia-run"

    files: dict[str, FileRecord]


def write_contents(folder: Path, names: Iterable[str]) -> None:
    """Write the manifest of these files of ``folder`` as they are now, without those that do not exist.

    Raises:
        ArtifactError: the manifest cannot be written.
        OSError: a file cannot be read.
    """
    files = {name: FileRecord.of(folder / name) for name in sorted(set(names)) if (folder / name).is_file()}
    write_text(folder / MANIFEST_FILE, Contents(files=files).to_json())


def add_to_contents(folder: Path, names: Iterable[str]) -> None:
    """Add these files to the manifest of ``folder``; its other entries stay as they are.

    Raises:
        ArtifactError: the manifest cannot be read or written.
        OSError: a file cannot be read.
    """
    found = Contents.read(folder / MANIFEST_FILE)
    added = {name: FileRecord.of(folder / name) for name in names if (folder / name).is_file()}
    write_text(folder / MANIFEST_FILE, Contents(files=dict(sorted((found.files | added).items()))).to_json())


def check_contents(folder: Path) -> list[str]:
    """Compare the files of a run folder with its manifest, if it has one.

    Returns:
        A line for each changed file that people may rewrite.

    Raises:
        ArtifactError: another file was changed, or the manifest itself was.
    """
    place = folder / MANIFEST_FILE
    if not place.exists():
        return []
    notes = []
    for name, record in Contents.read(place).files.items():
        path = folder / name
        fault = record.fault(path) if path.exists() else None
        if fault and name in FOR_PEOPLE:
            notes.append(f"{path} was changed after the run: it {fault}")
        elif fault:
            raise _changed(path, fault)
    return notes


def check_file(path: Path) -> None:
    """Compare a file with the manifest of its run folder; a file outside a run folder passes.

    Raises:
        ArtifactError: the file or the manifest was changed after the run.
    """
    if not all((path.parent / name).is_file() for name in _OF_A_RUN):
        return
    record = Contents.read(path.parent / MANIFEST_FILE).files.get(path.name)
    if record is not None and (fault := record.fault(path)):
        raise ArtifactError(
            f"{path} {fault}; expected the file that the run wrote; restore it, or edit a copy in another folder"
        )


def _changed(path: Path, fault: str) -> ArtifactError:
    return ArtifactError(f"{path} {fault}; expected the file that the run wrote; restore it or train again")
