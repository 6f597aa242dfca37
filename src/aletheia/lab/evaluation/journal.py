"""The answers of a running evaluation, one per line, so that a killed evaluation resumes where it stopped.

Each line is JSON that ends with the sha256 of the previous line's sha256 and its own text.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aletheia.errors import ArtifactError, EvaluationError
from aletheia.lab.evaluation.record import differing

JOURNAL_FILE = "answers.partial.jsonl"
_LINE = re.compile(rb'(\{.*), "sha256": "([0-9a-f]{64})"\}', re.DOTALL)


class OtherEvaluationError(EvaluationError):
    """The folder holds an evaluation of something else, or one made with other packages."""


class Journal:
    """Answers by (task, position), appended to a file whose first line says what they belong to.

    Raises:
        OtherEvaluationError: the file belongs to an evaluation of something else.
        ArtifactError: it cannot be written, or a line of it was changed.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        """Open or start the journal in ``folder``; ``header`` must be JSON."""
        self.path = folder / JOURNAL_FILE
        self.answers: dict[tuple[str, int], Any] = {}
        self._last = ""  # sha256 of the last line
        header = json.loads(json.dumps(header))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found = [self._entry(number, line) for number, line in enumerate(self._whole_lines(), 1)]
            if found:
                self._check(found[0], header)
                for entry in found[1:]:
                    self.answers[entry["task"], entry["at"]] = entry["answer"]
            else:
                self._append([header])
        except OSError as error:
            raise ArtifactError(f"cannot write {self.path}: {error.strerror}; choose another `out`") from error

    def add(self, task: str, positions: Sequence[int], answers: Sequence[Any]) -> None:
        """Write the answers of one batch; they are on disk when this returns."""
        pairs = list(zip(positions, answers, strict=True))
        self._append([{"task": task, "at": at, "answer": answer} for at, answer in pairs])
        self.answers |= {(task, at): answer for at, answer in pairs}

    def remove(self) -> None:
        """Delete the file, once its answers are stored elsewhere."""
        self.path.unlink(missing_ok=True)

    def _whole_lines(self) -> list[bytes]:
        """The complete lines; a last line that was cut off during writing is removed from the file."""
        if not self.path.is_file():
            return []
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.path, whole)
        return content[:whole].split(b"\n")[:-1]

    def _entry(self, number: int, line: bytes) -> dict[str, Any]:
        """What a line holds.

        Raises:
            ArtifactError: this line or an earlier one was changed; names the line.
        """
        parts = _LINE.fullmatch(line)
        if parts is None or parts[2].decode() != self._sha256(parts[1]):
            raise ArtifactError(
                f"{self.path}:{number}: the line was changed after it was written (its sha256 differs); restore the "
                "file, or pass `overwrite` to start from the beginning"
            )
        self._last = parts[2].decode()
        found: dict[str, Any] = json.loads(parts[1] + b"}")
        return found

    def _sha256(self, text: bytes) -> str:
        return hashlib.sha256(self._last.encode() + text).hexdigest()

    def _append(self, entries: Sequence[Mapping[str, Any]]) -> None:
        lines = []
        for entry in entries:
            text = json.dumps(entry)[:-1]
            self._last = self._sha256(text.encode())
            lines.append(f'{text}, "sha256": "{self._last}"}}\n')
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.writelines(lines)
            handle.flush()
            os.fsync(handle.fileno())

    def _check(self, found: Mapping[str, Any], header: Mapping[str, Any]) -> None:
        for part in header:  # settings come first and explain the other differences
            if difference := differing(header.get(part, {}), found.get(part, {}), ignored={"adapter"}):
                raise OtherEvaluationError(
                    f"{self.path.parent} holds another evaluation that was interrupted ({part}: {difference}); "
                    "use its arguments to resume it, choose another `out` or pass `overwrite`"
                )
