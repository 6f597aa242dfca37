"""A finished run folder goes to the hub."""

from collections.abc import Callable

from huggingface_hub import HfApi

from aletheia.data.sources import one_line
from aletheia.errors import TrainingError
from aletheia.runs.schema import Run
from aletheia.training.settings import TrainSettings


def push(run: Run, training: TrainSettings, say: Callable[[str], None]) -> None:
    """Upload a finished folder, if ``training`` asks for it; the run is on disk whatever the hub says.

    Raises:
        TrainingError: the upload failed.
    """
    if not training.push_to_hub:
        return
    extra = training.model_extra or {}
    repository = training.hub_model_id or run.path.resolve().name
    try:
        api = HfApi()
        made = api.create_repo(repository, exist_ok=True, private=extra.get("hub_private_repo", True))
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=str(run.path),
            revision=extra.get("hub_revision"),
            ignore_patterns=[".lock", "checkpoints/*"],
        )
    except Exception as error:  # network, rights, names: the hub's client has many
        raise TrainingError(
            f"{run.path} is complete, but uploading it to {repository} failed: {one_line(error, 300)}; "
            "log in with 'hf auth login' and upload the folder with 'hf upload'"
        ) from error
    say(f"pushed {made.repo_id}")
