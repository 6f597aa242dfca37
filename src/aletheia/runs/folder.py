"""The run folder: claimed before anything is computed, written when all is done."""

import os
import shutil
from pathlib import Path

from peft import PeftModel
from safetensors import SafetensorError

from aletheia.errors import ArtifactError
from aletheia.files import artifact_format, check_writable, free_bytes, write_text
from aletheia.runs.card import model_card
from aletheia.runs.schema import METRICS_FILE, PLAN_FILE, REPORT_FILE, SCORES_FILE, Metrics, Run


def claim_output(out: str | Path, overwrite: bool = False, size_bytes: int = 0) -> Path:
    """Check early that a run can be written to ``out``, and that there is room for ``size_bytes``.

    Raises:
        ArtifactError: it cannot be written, is a file, or holds something that may not be replaced: other files, or
            a run while ``overwrite`` is off.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ArtifactError(f"{out} is a file; expected a folder for the run, choose another --out")
    if out.is_dir() and any(out.iterdir()):
        if artifact_format(out / METRICS_FILE) != Metrics.FORMAT:
            raise ArtifactError(f"{out} holds other files; expected a new or empty folder, choose another --out")
        if not overwrite:
            raise ArtifactError(f"{out} holds another run; choose another --out or pass --overwrite")
    check_writable(out)
    free = free_bytes(out)
    if free < size_bytes:
        raise ArtifactError(
            f"{out}: the adapter needs {size_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "make room or choose another --out"
        )
    return out


def save(model: PeftModel, run: Run) -> None:
    """Write the run folder; ``metrics.json`` goes first and comes last, so a folder that has one is complete.

    The adapter is written beside it and moved in, so that a run which is replaced stays if that fails.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    temporary = run.path.with_name(f".{run.path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(str(temporary), save_embedding_layers=False)
        write_text(temporary / "README.md", model_card(run))
        run.path.mkdir(parents=True, exist_ok=True)
        for name in (METRICS_FILE, PLAN_FILE, SCORES_FILE, REPORT_FILE):
            (run.path / name).unlink(missing_ok=True)
        for file in temporary.iterdir():
            os.replace(file, run.path / file.name)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"cannot write the run to {run.path}: {getattr(error, 'strerror', None) or error}"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    run.plan.write(run.path / PLAN_FILE)
    run.metrics.write(run.path / METRICS_FILE)
