"""The file of a campaign: models, arms and seeds in YAML, with types. Torch-free."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from aletheia.errors import CampaignError, SettingsError
from aletheia.kinds import mistaken
from aletheia.plain_yaml import read_yaml
from aletheia.planning.plan import RankMode
from aletheia.planning.targets import SPEED_SHARE, Policy
from aletheia.settings import LARGEST_RANK, LONGEST_ROW, MOST_ROWS, MOST_STEPS

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=60)]
BASE = "base"  # the arm that is not trained
BenchmarkName = Literal["mmlu", "gsm8k", "humaneval", "wikitext"]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelEntry(_Strict):
    """A model: an existing one, or a random one of a given shape, which is good for speed and useless for quality."""

    name: Name
    path: str | None = Field(default=None, description="hub id, local folder, .gguf file, or 'demo'")
    config: dict[str, Any] | None = Field(default=None, description="transformers config with its model_type")

    @model_validator(mode="after")
    def _one_source(self) -> "ModelEntry":
        if (self.path is None) == (self.config is None):
            raise ValueError("expected either a path or a config, and not both")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("the config has no model_type; expected one, such as llama")
        return self


class Arm(_Strict):
    """One way to fine-tune; ``execution`` is ``plain`` (PEFT, transformers' Trainer) or ``fast`` (aletheia train)."""

    name: Name
    policy: Policy
    percent: float = Field(default=50, gt=0, le=100)
    rank: int = Field(default=16, ge=1, le=LARGEST_RANK)
    ranks: RankMode = "uniform"
    freeze_after: float = Field(default=0.0, ge=0, lt=1)
    learning_rate: float | None = Field(default=None, gt=0)
    execution: Literal["plain", "fast"] = "plain"


PRESETS: dict[str, dict[str, Any]] = {
    "uniform": {"policy": "uniform", "percent": 100},
    "paper": {"policy": "top-percent"},
    "paper-asym": {"policy": "top-percent", "ranks": "by-role"},
    "depth-aware": {"policy": "depth-aware", "freeze_after": SPEED_SHARE, "execution": "fast"},
    "random": {"policy": "random"},
    "last": {"policy": "last"},
    "first": {"policy": "first"},
    "bottom": {"policy": "bottom"},
}


def _filled_in(given: Any) -> Any:
    """A predefined arm by its name, or a mapping; its missing keys come from the predefined arm of that name."""
    entry = {"name": given} if isinstance(given, str) else given
    if not isinstance(entry, Mapping):
        return given
    preset = PRESETS.get(str(entry.get("name")), {})
    if not preset and "policy" not in entry:
        known = ", ".join(PRESETS)
        raise ValueError(f"{entry.get('name')!r} is not a predefined arm ({known}); expected one of them, or a policy")
    return {**preset, **entry}


class _Campaign(_Strict):
    """What both kinds of campaign share: all arms see the same rows in the same order, dtype and optimizer."""

    name: Name
    models: tuple[ModelEntry, ...] = Field(min_length=1)
    arms: tuple[Annotated[Arm, BeforeValidator(_filled_in)], ...] = Field(min_length=1)
    seeds: tuple[Annotated[int, Field(ge=0, le=2**32 - 1)], ...] = Field(min_length=1)
    data_dir: str = Field(
        default=".",
        description="folder of the data; the command line may override it",
    )
    data: str = Field(description="rows to train on")
    rows: int = Field(
        default=640, ge=1, le=10**8, description="number of rows to use: the first that fit into max_length"
    )
    max_length: int = Field(default=256, ge=2, le=LONGEST_ROW, description="tokens; longer rows are left out")
    batch_size: int = Field(default=4, ge=1, le=MOST_ROWS)
    steps: int = Field(default=200, ge=1, le=MOST_STEPS)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    baseline: str = "uniform"
    comparisons: tuple[tuple[str, str], ...] = Field(default=(), description="pairs of arms to compare")

    @model_validator(mode="after")
    def _names(self) -> "_Campaign":
        for what, names in (
            ("models", [model.name for model in self.models]),
            ("arms", [arm.name for arm in self.arms]),
            ("seeds", [str(seed) for seed in self.seeds]),
        ):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{what}: {', '.join(twice)} twice; expected different names")
        arms = {arm.name for arm in self.arms}
        if BASE in arms:
            raise ValueError(f"arms: {BASE!r} is the name of the model before training; choose another")
        for name in (self.baseline, *(name for pair in self.comparisons for name in pair)):
            if name not in arms:
                raise ValueError(f"{name!r} is to be compared and is not among the arms ({', '.join(sorted(arms))})")
        return self

    @property
    def epochs(self) -> float:
        """Passes over the rows."""
        return self.steps * self.batch_size / self.rows


class SpeedCampaign(_Campaign):
    """Step times of all arms, interleaved in one process per model and seed, as ratios to the baseline."""

    kind: Literal["speed"]
    rounds: int = Field(
        default=12, ge=2, le=MOST_STEPS, description="timed steps of each arm; the time of a run is computed from them"
    )


class TaskSettings(_Strict):
    """How much of a benchmark to run, and the margin within which an arm counts as not worse."""

    limit: int | None = Field(default=None, ge=1, description="items")
    max_new_tokens: int | None = Field(default=None, ge=1, le=LONGEST_ROW)
    seeds: tuple[int, ...] | None = Field(default=None, description="seeds that run it; all by default")
    margin: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="largest drop that counts as not worse: share of items (0.03: 3 points), wikitext: nats per word",
    )


class BehaviourCampaign(_Campaign):
    """Held-out loss and benchmarks before and after fine-tuning with each arm, paired per item."""

    kind: Literal["behaviour"]
    held_out: str | None = Field(
        default=None, description="file of held-out rows; by default, the rows after the training rows"
    )
    held_out_rows: int = Field(default=96, ge=1, le=10**8)
    evaluations: int = Field(
        default=4, ge=1, le=MOST_STEPS, description="held-out losses during training, evenly spaced"
    )
    held_out_margin: float | None = Field(
        default=None, gt=0, description="largest rise, in nats per token, that counts as not worse"
    )
    match: Literal["steps", "compute"] = Field(
        default="steps", description="compute: an arm takes as many steps as the FLOPs of the baseline's run allow"
    )
    tasks: dict[BenchmarkName, TaskSettings] = {}
    eval_batch_size: int = Field(default=8, ge=1, le=MOST_ROWS)
    unsafe_exec: bool = Field(default=False, description="run generated code without bubblewrap")


Campaign = Annotated[SpeedCampaign | BehaviourCampaign, Field(discriminator="kind")]
_ADAPTER: TypeAdapter[SpeedCampaign | BehaviourCampaign] = TypeAdapter(Campaign)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a campaign file, for editors."""
    return _ADAPTER.json_schema()


def read_campaign(path: str | Path) -> SpeedCampaign | BehaviourCampaign:
    """Read and check a campaign file.

    Raises:
        CampaignError: the file is missing, is not YAML, or does not match the schema; names the first wrong field.
    """
    path = Path(path)
    if (fault := mistaken(path, "a YAML file that describes a campaign", "settings")) is not None:
        raise CampaignError(fault)
    try:
        found = read_yaml(path)
    except SettingsError as error:
        raise CampaignError(str(error)) from error
    if not isinstance(found, dict):
        raise CampaignError(
            f"{path}: found {type(found).__name__}; expected a mapping with kind, name, models and arms"
        )
    return parse_campaign(found, str(path))


def parse_campaign(found: Mapping[str, Any], source: str) -> SpeedCampaign | BehaviourCampaign:
    """Check a campaign; errors name ``source``.

    Raises:
        CampaignError: it does not match the schema; names the first wrong field.
    """
    try:
        return _ADAPTER.validate_python(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("speed", "behaviour")) or "the file"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        message = first["msg"].removeprefix("Value error, ")
        raise CampaignError(f"{source}: {where}: {message}{more}") from error
