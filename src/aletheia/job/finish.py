"""The files that go with the adapter of a finished run, and its upload to the hub."""

from collections.abc import Callable
from typing import Any

from aletheia.errors import ArtifactError, ModelError, TrainingError
from aletheia.files import write_text
from aletheia.job.push import push as push_run
from aletheia.job.settings import JobSettings
from aletheia.probing.scores import Scores
from aletheia.reporting.page import report
from aletheia.runs.contents import add_to_contents
from aletheia.runs.folder import CONFIG_FILE, save_tokenizer
from aletheia.runs.schema import REPORT_FILE, SCORES_FILE, Run
from aletheia.training.settings import TrainSettings


def complete(
    run: Run, settings: JobSettings, tokenizer: Any, scores: Scores | None, say: Callable[[str], None]
) -> None:
    """Write settings, scores, the report, and the tokenizer with the chat template that the run learned with.

    Raises:
        ArtifactError: they cannot be written; the run is complete without them.
    """
    try:
        write_text(run.path / CONFIG_FILE, settings.to_yaml())
        if scores is not None:
            scores.write(run.path / SCORES_FILE)
        report([run], run.path / REPORT_FILE)
        add_to_contents(run.path, [CONFIG_FILE, SCORES_FILE, REPORT_FILE])
        try:
            add_to_contents(run.path, save_tokenizer(tokenizer, run.path))
        except ModelError as error:
            say(f"note: {error}")
    except ArtifactError as error:
        raise ArtifactError(f"the run is complete, but not the files that go with its adapter: {error}") from error


def push(run: Run, training: TrainSettings, say: Callable[[str], None]) -> None:
    """Upload a finished run folder if ``training`` asks for it; the run is on disk in any case.

    Raises:
        TrainingError: the upload failed.
    """
    if not training.push_to_hub:
        return
    extra = training.model_extra or {}
    repository = training.hub_model_id or run.path.resolve().name
    try:
        done = push_run(run, repository, extra.get("hub_private_repo", True), extra.get("hub_revision"), say=say)
    except ArtifactError as error:
        raise TrainingError(f"{run.path} is complete, but {error}; 'aletheia push' uploads it later") from error
    say(f"pushed {done.address}")
