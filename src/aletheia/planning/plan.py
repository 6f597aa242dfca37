"""The Plan file: exactly which modules get LoRA, at which rank and alpha, and where that came from."""

from collections.abc import Iterable
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from aletheia.anatomy.schema import DataIdentity, ModelIdentity, Role
from aletheia.errors import PlanError
from aletheia.files import Artifact
from aletheia.probing.scores import ProbeSettings

Policy = Literal["depth-aware", "top-percent", "last", "first", "random", "bottom", "uniform"]
RankMode = Literal["uniform", "by-role", "by-score"]
FREEZE_AFTER = 0.25  # of the steps: reached a given loss soonest of what was tried, see docs/log.md


class Adapter(BaseModel):
    """LoRA on one weight: ``y = x W + (alpha / rank) x A B``; where ``fused``, each expert has its own A and B."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    layer: int = Field(ge=0)
    role: Role
    rank: int = Field(ge=1)
    alpha: FiniteFloat = Field(gt=0)
    fused: bool = False
    parameters: int = Field(ge=1, description="trainable parameters of this adapter")


class PlanSettings(BaseModel):
    """What the user asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    policy: Policy
    percent: float
    ranks: RankMode
    rank: int
    attention_rank: int | None
    mlp_rank: int | None
    alpha: float = Field(description="alpha at ``rank``; every adapter keeps the ratio alpha / rank")
    seed: int
    speedup: float | None = None
    epochs: float = 1.0
    routers: bool = False
    freeze_after: float = Field(default=0.0, ge=0, lt=1, description="share of the steps in which all layers learn")


class Prediction(BaseModel):
    """What the cost model expects of the plan, relative to uniform LoRA at the same rank in plain PEFT and Trainer.

    ``relative_step_time`` is a step of the first epoch, ``relative_cached_step_time`` one from a filled prefix cache,
    ``relative_early_step_time`` one while the early layers learn, too.
    ``baseline_step_seconds`` is the baseline's step where the parts were measured; None: counted in operations.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    relative_step_time: FiniteFloat = Field(gt=0)
    relative_cached_step_time: FiniteFloat | None = Field(default=None, gt=0)
    relative_early_step_time: FiniteFloat | None = Field(default=None, gt=0)
    baseline_step_seconds: FiniteFloat | None = Field(default=None, gt=0)
    captured_importance: FiniteFloat = Field(ge=0, description="share of the summed layer scores in the adapted layers")

    @property
    def speedup(self) -> float:
        """Baseline step time divided by this plan's in the first epoch."""
        return 1.0 / self.relative_step_time

    @property
    def cached_speedup(self) -> float:
        """Baseline step time divided by this plan's from a filled cache."""
        return 1.0 / (self.relative_cached_step_time or self.relative_step_time)


class Plan(Artifact):
    """A reviewed, versioned choice of adapters for one model.

    ``layers`` learn to the end of a run. ``early_layers`` have adapters, too, which learn in the first
    ``settings.freeze_after`` of its steps and then freeze as they are; from there on the layers below ``boundary``
    are a frozen prefix. ``layer_scores`` are those of the probe, one per decoder layer, kept so that a plan can be
    drawn without the scores file.
    """

    FORMAT: ClassVar[str] = "aletheia-plan"

    model: ModelIdentity
    data: DataIdentity | None
    probe: ProbeSettings
    packages: dict[str, str]
    settings: PlanSettings
    layer_count: int
    layers: tuple[int, ...]
    predicted: Prediction
    layer_scores: tuple[FiniteFloat, ...]
    adapters: tuple[Adapter, ...]
    early_layers: tuple[int, ...] = ()

    @property
    def boundary(self) -> int:
        """Index of the lowest layer that learns to the end: nothing below it needs a gradient then."""
        return self.layers[0]

    def early_steps(self, steps: int) -> int:
        """How many of a run's steps the early layers learn in; never all."""
        return min(round(self.settings.freeze_after * steps), steps - 1) if self.early_layers else 0

    @property
    def uses_scores(self) -> bool:
        """Whether the probe had a say in this plan."""
        return self.settings.ranks == "by-score" or self.settings.policy in ("depth-aware", "top-percent", "bottom")

    @property
    def trainable_parameters(self) -> int:
        """Trainable parameters of all adapters."""
        return sum(adapter.parameters for adapter in self.adapters)

    @model_validator(mode="after")
    def _consistent(self) -> "Plan":
        names = [adapter.name for adapter in self.adapters]
        if not names:
            raise ValueError("a plan needs at least one adapter")
        if len(set(names)) != len(names):
            raise ValueError("a module is planned twice")
        lasting = {adapter.layer for adapter in self.adapters} - set(self.early_layers)
        if not lasting or tuple(sorted(lasting)) != self.layers:
            raise ValueError("'layers' must be the sorted layers of the adapters, without 'early_layers'")
        if self.layers[-1] >= self.layer_count or len(self.layer_scores) != self.layer_count:
            raise ValueError("a layer index or the scores do not fit 'layer_count'")
        return self

    def check_model(self, model: ModelIdentity) -> None:
        """Refuse a plan that was made for another model.

        Raises:
            PlanError: the fingerprints differ; names both models.
        """
        if not self.model.is_same_model(model):
            raise PlanError(
                f"the plan was made for {self.model}, this model is {model}; "
                "make a plan for this model with 'aletheia probe' and 'aletheia plan'"
            )


def layer_ranges(layers: Iterable[int]) -> str:
    """Layer indices for people, neighbours joined: ``0-2, 8, 15-29``."""
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)
