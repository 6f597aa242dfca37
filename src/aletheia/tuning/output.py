"""The run folder: claimed before anything is computed, written when all is done."""

from pathlib import Path

from peft import PeftModel

from aletheia.errors import ArtifactError
from aletheia.files import artifact_format, check_writable, write_text
from aletheia.tuning.card import model_card
from aletheia.tuning.run import METRICS_FILE, PLAN_FILE, REPORT_FILE, SCORES_FILE, Metrics, Run


def claim_output(out: str | Path, overwrite: bool = False) -> Path:
    """Check early that a run can be written to ``out``.

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
    return out


def save(model: PeftModel, run: Run) -> None:
    """Write the run folder; ``metrics.json`` goes first and comes last, so a folder that has one is complete.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    try:
        for name in (METRICS_FILE, PLAN_FILE, SCORES_FILE, REPORT_FILE):
            (run.path / name).unlink(missing_ok=True)
        model.save_pretrained(str(run.path), save_embedding_layers=False)
        write_text(run.path / "README.md", model_card(run))
    except OSError as error:
        raise ArtifactError(f"cannot write the run to {run.path}: {error.strerror or error}") from error
    run.plan.write(run.path / PLAN_FILE)
    run.metrics.write(run.path / METRICS_FILE)
