"""The Plan file: exactly which modules get LoRA, at which rank and alpha, and what the choice is based on."""

import hashlib
from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, field_validator, model_validator

from aletheia.anatomy.schema import DataIdentity, ModelIdentity, Role, TokenizerIdentity
from aletheia.errors import PlanError
from aletheia.files import Artifact
from aletheia.planning.targets import DEFAULT_TARGET, SPEED_SHARE, Choice, Policy, Target, choice_of
from aletheia.probing.scores import ProbeSettings
from aletheia.settings import LARGEST_RANK, MOST_EPOCHS, MOST_LAYERS, PLAN, Settings, option

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

RankMode = Literal["uniform", "by-role", "by-score"]
PERCENT = 50
FINITE: dict[str, Any] = {"allow_inf_nan": False}
NAME_LAYERS = ("policy", "percent", "speedup", "freeze_after")  # settings that replace a target
PAPER_MLP_RANK = 64  # asymmetric ranks of the published method: attention 16, MLP 64


class Adapter(BaseModel):
    """LoRA on one weight: ``y = x W + s x A B``. Where ``fused``, each expert has its own A and B.

    The scale ``s`` is alpha / rank, or alpha / sqrt(rank) where the plan's settings say ``rslora``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    layer: int = Field(ge=0, lt=MOST_LAYERS)
    role: Role
    rank: int = Field(ge=1, le=LARGEST_RANK)
    alpha: FiniteFloat = Field(gt=0)
    fused: bool = False
    parameters: int = Field(ge=1, description="trainable parameters of this adapter")


class PlanSettings(Settings):
    """Which layers and modules get LoRA, and how large it is. A Plan file records them with every default filled in."""

    target: Target | None = option(
        None,
        "What matters most: quality (the lowest loss), speed (the shortest run) or balanced. It decides which layers "
        "learn, and how long. (default: balanced)",
        PLAN,
    )
    policy: Policy | None = option(
        None,
        "Choose the layers in another way: depth-aware (the highest scores for the time they cost), top-percent or "
        "bottom (highest or lowest scores), last or first, random, or uniform (every layer, as plain LoRA does). "
        "(default: depends on `target`)",
        PLAN,
    )
    percent: float | None = option(
        None,
        "Percentage of the layers to adapt. With depth-aware, a plan takes no longer than adapting that share of the "
        f"layers from the top. (default: {PERCENT})",
        PLAN,
        gt=0,
        le=100,
        **FINITE,
    )
    rank: int = option(
        16,
        "LoRA rank. With `ranks` by-score, ranks differ, but the total number of parameters stays the same.",
        PLAN,
        ge=1,
        le=LARGEST_RANK,
    )
    ranks: RankMode = option(
        "uniform",
        "How ranks are allocated: uniform (the same everywhere), by-role (`attention_rank` and `mlp_rank`), or "
        "by-score (higher ranks for higher scores).",
        PLAN,
    )
    attention_rank: int | None = option(
        None,
        "Rank of attention modules; implies `ranks` by-role. (default with by-role: `rank`)",
        PLAN,
        ge=1,
        le=LARGEST_RANK,
    )
    mlp_rank: int | None = option(
        None,
        f"Rank of all other modules; implies `ranks` by-role. (default with by-role: {PAPER_MLP_RANK})",
        PLAN,
        ge=1,
        le=LARGEST_RANK,
    )
    alpha: float | None = option(
        None,
        "LoRA alpha at `rank`. Adapters of other ranks keep the same ratio alpha / rank. (default: 2 x rank)",
        PLAN,
        gt=0,
        **FINITE,
    )
    rslora: bool = option(
        False, "Scale adapters by alpha / sqrt(rank) instead of alpha / rank, with one alpha for all (rsLoRA).", PLAN
    )
    dropout: float = option(
        0.0,
        "Dropout on the input of the adapters: a probability from 0 to below 1.",
        PLAN,
        "lora-dropout",
        ge=0,
        lt=1,
        **FINITE,
    )
    target_modules: tuple[str, ...] = option(
        (),
        "Adapt only modules with these names, separated by commas, such as q_proj,v_proj. (default: all matrices of "
        "a layer)",
        PLAN,
    )
    routers: bool = option(False, "Also adapt the routers of a mixture of experts.", PLAN, "adapt-routers")
    freeze_after: float | None = option(
        None,
        "Share of the steps, from 0 to below 1, in which all other layers learn as well. Then they freeze with what "
        f"they learned. (default: depends on `target`; with depth-aware {SPEED_SHARE}, or 0 where memory is short)",
        PLAN,
        ge=0,
        lt=1,
        **FINITE,
    )
    speedup: float | None = option(
        None,
        "With depth-aware: the predicted speed-up over plain LoRA to reach, such as 1.5. The plan captures the most "
        "score at that speed. (default: `percent` decides)",
        PLAN,
        gt=0,
        **FINITE,
    )
    epochs: float | None = option(
        None,
        "Passes over the data that predicted times are for; frozen layers run in the first pass only. (default: 1)",
        PLAN,
        gt=0,
        le=MOST_EPOCHS,
        **FINITE,
    )
    seed: int = option(0, "Seed of the random policy: the same one chooses the same layers.", PLAN, ge=0, le=2**32 - 1)

    @field_validator("target_modules", mode="before")
    @classmethod
    def _split(cls, given: Any) -> Any:
        """Accept names separated by commas: in one string, or in each string of a list."""
        texts = (given,) if isinstance(given, str) else given
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            return given
        names = (name.strip() for text in texts for name in text.split(","))
        return tuple(dict.fromkeys(name for name in names if name))

    @model_validator(mode="after")
    def _consistent(self) -> "PlanSettings":
        if self.target is not None and self.names_layers:
            name = next(name for name in NAME_LAYERS if getattr(self, name) is not None)
            raise ValueError(f"`target` and `{name}` are both given; expected one of them")
        if self.speedup is not None and self.policy not in (None, "depth-aware"):
            raise ValueError(f"`speedup` is given and `policy` is {self.policy}; expected `policy` depth-aware with it")
        own_ranks = self.attention_rank is not None or self.mlp_rank is not None
        if own_ranks and self.ranks == "by-score":
            name = "mlp_rank" if self.attention_rank is None else "attention_rank"
            raise ValueError(f"`{name}` is given and `ranks` is by-score; expected `ranks` by-role with it")
        return self

    @property
    def names_layers(self) -> bool:
        """Whether these settings choose the layers themselves, so that no target does."""
        return any(getattr(self, name) is not None for name in NAME_LAYERS)

    def choice(self, every_layer_fits: bool, saving: float) -> Choice:
        """How layers are chosen: by these settings, else by the target; arguments as in :meth:`resolved`."""
        if every_layer_fits and not self.names_layers:
            return choice_of(self.target or DEFAULT_TARGET, saving)
        return Choice(self.policy or "depth-aware", SPEED_SHARE if every_layer_fits else 0.0)

    def resolved(self, every_layer_fits: bool = True, saving: float = 0.0) -> "PlanSettings":
        """The same with every default filled in, as a Plan file records them.

        Args:
            every_layer_fits: whether training all layers at once fits in memory.
            saving: share of the run's time that freezing the lower layers halfway would save.
        """
        by_role = self.ranks == "by-role" or self.attention_rank is not None or self.mlp_rank is not None
        chosen = self.choice(every_layer_fits, saving)
        share = chosen.freeze_after if chosen.policy == "depth-aware" else 0.0
        filled: dict[str, Any] = {
            "target": None,
            "policy": chosen.policy,
            "percent": PERCENT if self.percent is None else self.percent,
            "ranks": "by-role" if by_role else self.ranks,
            "attention_rank": (self.attention_rank or self.rank) if by_role else None,
            "mlp_rank": (self.mlp_rank or PAPER_MLP_RANK) if by_role else None,
            "alpha": self.common_alpha,
            "freeze_after": share if self.freeze_after is None else self.freeze_after,
            "epochs": 1.0 if self.epochs is None else self.epochs,
        }
        return PlanSettings(**self.model_dump() | filled)

    @property
    def common_alpha(self) -> float:
        """Alpha at ``rank``: the one given, or 2 x rank."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    def alpha_of(self, rank: int) -> float:
        """Alpha of an adapter of ``rank``: the common alpha with rsLoRA, else alpha in the common ratio to rank."""
        return self.common_alpha if self.rslora else self.common_alpha * rank / self.rank


class Prediction(BaseModel):
    """What the cost model expects of the plan, relative to uniform LoRA at the same rank in plain PEFT and Trainer.

    ``relative_step_time`` is a step of the first epoch, and ``relative_cached_step_time`` one from a filled prefix
    cache. ``relative_early_step_time`` is a step while the early layers learn, and ``relative_run_time`` the mean over
    a run. ``baseline_step_seconds`` is a step of the baseline, or None where costs are counted in operations.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    relative_step_time: FiniteFloat = Field(gt=0)
    relative_cached_step_time: FiniteFloat | None = Field(default=None, gt=0)
    relative_early_step_time: FiniteFloat | None = Field(default=None, gt=0)
    relative_run_time: FiniteFloat | None = Field(default=None, gt=0)
    baseline_step_seconds: FiniteFloat | None = Field(default=None, gt=0)
    captured_importance: FiniteFloat = Field(ge=0, description="share of the summed layer scores in the adapted layers")

    @property
    def speedup(self) -> float:
        """Baseline step time divided by this plan's in the first epoch."""
        return 1.0 / self.relative_step_time

    @property
    def run_speedup(self) -> float | None:
        """The baseline's time divided by this plan's over a whole run; None in plans of earlier releases."""
        return 1.0 / self.relative_run_time if self.relative_run_time else None

    @property
    def cached_speedup(self) -> float:
        """Baseline step time divided by this plan's from a filled cache."""
        return 1.0 / (self.relative_cached_step_time or self.relative_step_time)


class Plan(Artifact):
    """A versioned choice of adapters for one model, which you can review and edit.

    ``layers`` learn to the end of a run. The adapters of ``early_layers`` learn in the first ``settings.freeze_after``
    of the steps and then freeze as they are. From then on the layers below ``boundary`` are a frozen prefix.
    ``layer_scores`` holds the probe's score of each decoder layer, so that a plan can be drawn without the scores file.
    """

    FORMAT: ClassVar[str] = "aletheia-plan"
    EDITABLE: ClassVar[bool] = True

    model: ModelIdentity
    data: DataIdentity | None
    tokenizer: TokenizerIdentity | None = None
    probe: ProbeSettings
    packages: dict[str, str]
    settings: PlanSettings
    layer_count: int = Field(ge=1, le=MOST_LAYERS)
    layers: tuple[int, ...]
    reason: str = Field(default="", description="why these layers were chosen, where a target chose them")
    predicted: Prediction
    layer_scores: tuple[FiniteFloat, ...]
    adapters: tuple[Adapter, ...]
    early_layers: tuple[int, ...] = ()

    @property
    def boundary(self) -> int:
        """Index of the lowest layer that learns to the end; once the rest is frozen, none below needs a gradient."""
        return self.layers[0]

    @property
    def freeze_after(self) -> float:
        """Share of a run's steps in which the early layers learn; 0 where there are none."""
        return (self.settings.freeze_after or 0.0) if self.early_layers else 0.0

    def early_steps(self, steps: int) -> int:
        """How many of a run's ``steps`` the early layers learn in; always fewer than all."""
        return min(round(self.freeze_after * steps), steps - 1) if self.early_layers else 0

    @property
    def fingerprint(self) -> str:
        """The sha256 of the plan's file."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def uses_scores(self) -> bool:
        """Whether this plan depends on the probe's scores."""
        return self.settings.ranks == "by-score" or self.settings.policy in ("depth-aware", "top-percent", "bottom")

    @property
    def trainable_parameters(self) -> int:
        """Trainable parameters of all adapters."""
        return sum(adapter.parameters for adapter in self.adapters)

    @model_validator(mode="after")
    def _consistent(self) -> "Plan":
        names = [adapter.name for adapter in self.adapters]
        if not names:
            raise ValueError("'adapters' is empty; expected at least one adapter")
        if len(set(names)) != len(names):
            raise ValueError("'adapters' names a module twice; expected each module once")
        lasting = {adapter.layer for adapter in self.adapters} - set(self.early_layers)
        if not lasting or tuple(sorted(lasting)) != self.layers:
            raise ValueError("'layers' must be the sorted layers of the adapters, without 'early_layers'")
        if self.layers[-1] >= self.layer_count or len(self.layer_scores) != self.layer_count:
            raise ValueError(
                "'layers' or 'layer_scores' do not fit 'layer_count'; expected indices below it and one score per layer"
            )
        return self

    def check_model(self, model: ModelIdentity) -> None:
        """Check that the plan was made for ``model``.

        Raises:
            PlanError: the fingerprints differ. The message names both models.
        """
        if not self.model.is_same_model(model):
            raise PlanError(
                f"the plan was made for {self.model}, but this model is {model}{self.model.difference(model)}; "
                "make a plan for this model with 'aletheia probe' and 'aletheia plan'"
            )

    def check_tokenizer(self, tokenizer: TokenizerIdentity | None) -> None:
        """Check that ``tokenizer`` is the one of the probe; None, for an unknown tokenizer, passes.

        Raises:
            PlanError: vocabularies or chat templates differ. The message names both tokenizers.
        """
        if self.tokenizer and (difference := self.tokenizer.difference(tokenizer)):
            raise PlanError(
                f"the plan was made with the tokenizer {self.tokenizer}, but these rows come from {tokenizer}: their "
                f"{difference} differ; use that tokenizer, or make a plan with this one"
            )

    def lora_config(self, model: "nn.Module") -> "LoraConfig":
        """The PEFT configuration of this plan, for ``SFTTrainer(peft_config=...)`` or ``get_peft_model``.

        It names every module and every stack of experts in full; :func:`aletheia.adapt` uses the same configuration.
        Another library's training loop does not freeze the early layers: it trains them to the end.

        Args:
            model: the base model that the plan was made for; it is left as it is.

        Raises:
            PlanError: the plan belongs to another model, was edited so that it no longer fits, or asks for dropout
                where PEFT supports none.
        """
        # imported here: plans are read and drawn without torch, and the modules that know PEFT are on a higher floor
        config: LoraConfig = import_module("aletheia.adapters.adapt").config_of(self, model)
        return config


def layer_ranges(layers: Iterable[int]) -> str:
    """Layer indices for people, neighbours joined: ``0-2, 8, 15-29``."""
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)


def check_dropout(dropout: float, parameters: Iterable[str]) -> None:
    """Check that no dropout is asked for where PEFT has none: on weights adapted as parameters, as in experts.

    Args:
        dropout: the dropout of the adapters' inputs.
        parameters: full names of the weights that PEFT adapts as parameters.

    Raises:
        PlanError: there are such ``parameters``, and ``dropout`` is not 0.
    """
    names = sorted(parameters)
    if dropout and names:
        leaves = ", ".join(sorted({leaf(name) for name in names}))
        raise PlanError(
            f"`dropout` is {dropout:g}, but PEFT supports none for weights it adapts as parameters, such as experts "
            f"({len(names)} in the plan, first {names[0]}); expected 0, or `target_modules` without {leaves}"
        )


def leaf(name: str) -> str:
    """The last part of a module's full name, such as q_proj, which ``target_modules`` refers to."""
    return name.removesuffix(".weight").rpartition(".")[2]
