"""Upload of a finished run to the hub: what others need to use the adapter, without paths of this machine."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, metadata_load, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from pydantic import BaseModel

from aletheia.anatomy.foreign import ADAPTER_CONFIG
from aletheia.anatomy.schema import BETWEEN_SOURCES
from aletheia.data.find import name_parts
from aletheia.data.sources import one_line
from aletheia.errors import ArtifactError
from aletheia.plain_yaml import read_yaml
from aletheia.probing.scores import Scores
from aletheia.reporting.page import report
from aletheia.runs.card import card_metadata, is_hub_id, is_hub_name, model_card, with_metadata
from aletheia.runs.contents import Contents, check_contents
from aletheia.runs.folder import CARD_FILE, CONFIG_FILE
from aletheia.runs.manifest import MANIFEST_FILE, FileRecord
from aletheia.runs.schema import METRICS_FILE, PLAN_FILE, REPORT_FILE, SCORES_FILE, Run

_NAMED = ("model", "data", "held_out_data", "tokenizer", "went_on_from")  # parts of our files that hold a name
_Artifact = TypeVar("_Artifact", bound=BaseModel)


@dataclass(frozen=True)
class Pushed:
    """What is uploaded, or would be: ``files`` by name with their sizes in bytes, and the card's ``metadata``."""

    repo: str
    files: Mapping[str, int]
    metadata: Mapping[str, Any]
    address: str | None = None  # None: nothing was uploaded


def push(
    run: str | Path | Run,
    repo: str,
    private: bool = True,
    revision: str | None = None,
    base: str | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Pushed:
    """Upload a finished run to the hub: adapter, tokenizer, plan, metrics, scores, report and card.

    Checkpoints, settings and data stay here. Uploaded files name local files by their last part, and the base model by
    its hub id. If the run has a local path instead, ``base`` gives the id. A card that was edited keeps its text.

    Args:
        run: the run folder.
        repo: ``owner/name``, or ``name`` for your own account; it is created if it does not exist.
        private: whether a new repository is private; an existing one stays as it is.
        revision: the branch, created if it does not exist; by default the main branch.
        base: hub id of the base model.
        dry_run: only return what would be uploaded.
        say: receives notes.

    Returns:
        The files with their sizes in bytes, and the metadata of the card.

    Raises:
        ArtifactError: the folder holds no finished run or was changed, a name is not a hub id, or the upload
            failed.
    """
    run = run if isinstance(run, Run) else Run.read(run)
    _check_names(repo, base)
    files, metadata = _contents(run, base, say)
    sizes = {name: len(held) if isinstance(held, bytes) else held.stat().st_size for name, held in files.items()}
    if dry_run:
        return Pushed(repo, sizes, metadata)
    try:
        api = HfApi()
        made = api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(made.repo_id, branch=revision, exist_ok=True)
        additions = [
            CommitOperationAdd(name, held if isinstance(held, bytes) else str(held)) for name, held in files.items()
        ]
        api.create_commit(
            made.repo_id,
            additions,
            commit_message=f"LoRA adapter trained with aletheia-tune {run.metrics.packages.get('aletheia-tune', '')}",
            revision=revision,
        )
    except Exception as error:  # network, permissions, names: the hub's client raises many kinds
        raise ArtifactError(f"uploading {run.path} to {repo} failed: {_reason(error)}") from error
    return Pushed(made.repo_id, sizes, metadata, str(made))


def _check_names(repo: str, base: str | None) -> None:
    for name, what in ((repo, "`repo`"), (base, "`base`")):
        if name is not None and not is_hub_name(name):
            raise ArtifactError(f"{what} is {name!r}; expected a hub id such as owner/name")


def _reason(error: Exception) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return "found no valid token; log in with 'hf auth login', or set HF_TOKEN"
    if status == 403:
        return "the token may not write there; create one with write access, or choose another repository"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to reach the hub"
    return f"{one_line(error, 300)}"


# --- what is uploaded


def _contents(run: Run, base: str | None, say: Callable[[str], None]) -> tuple[dict[str, bytes | Path], dict[str, Any]]:
    """Every file by its name, rewritten if it names paths of this machine; and the card's metadata."""
    known = base or (run.metrics.model.name if is_hub_id(run.metrics.model.name) else None)
    if known is None:
        say(
            f"note: the base is {run.metrics.model.name}, a path of this machine, so the card names no base; "
            "give its hub id with `base`"
        )
    public = replace(run, metrics=_public(run.metrics, known), plan=_public(run.plan, known))
    records = Contents.read(run.path / MANIFEST_FILE).files
    files: dict[str, bytes | Path] = {
        name: run.path / name for name in records if name != CONFIG_FILE and (run.path / name).is_file()
    }
    files[ADAPTER_CONFIG] = _adapter_config(run.path / ADAPTER_CONFIG, known)
    files[PLAN_FILE] = public.plan.to_json().encode()
    if SCORES_FILE in files:
        files[SCORES_FILE] = _public(Scores.read(run.path / SCORES_FILE), known).to_json().encode()
    if REPORT_FILE in files:
        files[REPORT_FILE] = _report(public)
    more = _license(run.metrics.model.name, known) | _data_sets(run.path / CONFIG_FILE)
    files[CARD_FILE], metadata = _card(run, public, known, more)
    listed = {name: _record(held) for name, held in sorted(files.items())}
    files[MANIFEST_FILE] = Contents(files=listed).to_json().encode()
    files[METRICS_FILE] = public.metrics.to_json().encode()
    return files, metadata


def _record(held: bytes | Path) -> FileRecord:
    if isinstance(held, Path):
        return FileRecord.of(held)
    return FileRecord(size_bytes=len(held), sha256=hashlib.sha256(held).hexdigest())


def _public(artifact: _Artifact, base: str | None) -> _Artifact:
    """The same, with the base named by its hub id and other paths by their last part."""
    changes = {}
    for part in _NAMED:
        if (held := getattr(artifact, part, None)) is not None:
            name = base if part == "model" and base else _last_parts(held.name)
            changes[part] = held.model_copy(update={"name": name})
    return artifact.model_copy(update=changes)


def _last_parts(name: str) -> str:
    """A name with absolute paths cut to their last part; other names stay as they are."""
    parts = name.split(BETWEEN_SOURCES)
    return BETWEEN_SOURCES.join(PurePath(part).name if PurePath(part).is_absolute() else part for part in parts)


def _adapter_config(path: Path, base: str | None) -> bytes:
    found = json.loads(path.read_bytes())
    return (json.dumps(found | {"base_model_name_or_path": base}, indent=2, sort_keys=True) + "\n").encode()


def _report(public: Run) -> bytes:
    with TemporaryDirectory() as folder:
        return report([public], Path(folder) / REPORT_FILE).read_bytes()


def _card(run: Run, public: Run, base: str | None, more: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """The card with the hub's metadata: a new one, or the existing text if a person edited it."""
    metadata = card_metadata(base, more)
    if not any(str(run.path / CARD_FILE) in note for note in check_contents(run.path)):
        return model_card(public, metadata).encode(), metadata
    path = run.path / CARD_FILE
    own = metadata_load(path) or {}
    tags = list(dict.fromkeys([*(own.get("tags") or []), *metadata["tags"]]))
    kept = {name: value for name, value in own.items() if not name.startswith("base_model")}
    metadata = dict(more) | kept | card_metadata(base) | {"tags": tags}
    text = path.read_text(encoding="utf-8")
    body = text.split("---", 2)[2].lstrip("\n") if text.startswith("---") else text
    return with_metadata(metadata, body).encode(), metadata


def _license(name: str, base: str | None) -> dict[str, Any]:
    """The license in the card of the base, if that card is in its folder or in the hub's cache."""
    card = Path(name) / CARD_FILE
    if not card.is_file():
        cached = try_to_load_from_cache(base, CARD_FILE) if base else None
        if not isinstance(cached, str):
            return {}
        card = Path(cached)
    try:
        found = metadata_load(card) or {}
    except (OSError, ValueError):  # not UTF-8, or no YAML in the header
        return {}
    kept = {key: found[key] for key in ("license", "license_name", "license_link") if isinstance(found.get(key), str)}
    return kept if "license" in kept else {}


def _data_sets(config: Path) -> dict[str, Any]:
    """The hub data sets that the run learned from; local data have absolute paths."""
    if not config.is_file():
        return {}
    sources = read_yaml(config)["data"]["data"]
    names = [name_parts(source)[0] for source in sources if not PurePath(source).is_absolute()]
    return {"datasets": list(dict.fromkeys(names))} if names else {}
