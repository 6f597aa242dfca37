"""The anatomy of a model as plain data: what plans and reports need to know without loading torch."""

import re
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

BETWEEN_SOURCES = " + "  # separates the files in the name of a data set
FEW = 4  # names shown in one note
Role = Literal["attention", "mlp", "expert", "shared_expert", "router"]
ATTENTION_NAMES = re.compile(r"attn|attention|query|[qkvo]_proj|qkv|wqkv", re.IGNORECASE)


def role_of(inside: str) -> Role:
    """Role of a weight, from its path inside the layer list, e.g. ``3.self_attn.q_proj``."""
    leaf = inside.rsplit(".", 1)[-1]
    if "router" in inside or leaf in ("gate", "shared_expert_gate"):
        return "router"
    if "shared_expert" in inside:
        return "shared_expert"
    if "expert" in inside:
        return "expert"
    return "attention" if ATTENTION_NAMES.search(inside) else "mlp"


class Module(BaseModel):
    """One weight inside a decoder layer that LoRA can adapt: a matrix, or a stack of like matrices, one per expert.

    ``name`` is the full path in the model, e.g. ``model.layers.3.self_attn.q_proj``. For a stack it is the path of the
    parameter, e.g. ``model.layers.3.mlp.experts.down_proj``, and ``fused`` is set. Sizes are those of one matrix:
    ``y = x W`` maps ``in_features`` to ``out_features``, however the weight is stored or quantized. A token passes
    through ``active_experts`` of the ``experts``. ``refused`` is set where LoRA cannot adapt the weight: then it counts
    only in the costs of its layer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    layer: int
    role: Role
    in_features: int
    out_features: int
    fused: bool = False
    experts: int = Field(default=1, ge=1)
    active_experts: int = Field(default=1, ge=1)
    refused: bool = False

    @property
    def is_target(self) -> bool:
        """Whether uniform LoRA adapts it: LoRA can, and it is not a router."""
        return not self.refused and self.role != "router"

    @property
    def parameters(self) -> int:
        """Number of elements of the weight."""
        return self.in_features * self.out_features * self.experts

    @property
    def flops_per_token(self) -> int:
        """FLOPs of the forward matrix products for one token, 2 per multiply-add."""
        return 2 * self.in_features * self.out_features * self.active_experts

    @property
    def features_per_token(self) -> int:
        """Elements of the matrix's inputs and outputs for one token: the size of its activations."""
        return (self.in_features + self.out_features) * self.active_experts

    def lora_parameters(self, rank: int) -> int:
        """Trainable parameters of a rank-``rank`` adapter: A is rank x in, B is out x rank, for each expert."""
        return rank * (self.in_features + self.out_features) * self.experts

    def lora_flops_per_token(self, rank: int) -> int:
        """FLOPs of the two low-rank products for one token, forward."""
        return 2 * rank * self.features_per_token


class LeftOut(BaseModel):
    """Weights of the same name that LoRA leaves as they are: name inside the layer, layers, and reason."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    layers: tuple[int, ...]
    reason: str


class SharedWeight(BaseModel):
    """Matrices of the same name in several layers that share one weight, as in Zamba's shared blocks."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    layers: tuple[int, ...]


class Kept(BaseModel):
    """What backward keeps besides the inputs and outputs of matrices, to predict the memory of training.

    Attributes:
        norms: per layer, elements that its norms keep for a token, in the model's dtype.
        wide_norms: the same in float32.
        states: per layer, elements that its state spaces keep for a token, in the model's dtype. In files of an earlier
            release, ``norms`` counts them.
        wide_states: the same in float32.
        chunk: tokens to whose multiple state spaces pad a row; 0 without them.
        activation: elements that an MLP's activation keeps besides its input, per element of its output.
        wide_activation: the same in float32.
        largest_state: elements for a token of the largest float32 tensor that a state space keeps.
        heads: number of attention heads.
        square_copies: how many scores attention keeps per pair of tokens and head; 0 except for ``eager``.
        window: tokens that some layers see, if not all; 0 without a window.
        plain_products: whether PEFT's own code computes some adapters: those of quantized weights and Conv1D.
        logit_copies: copies of the logits in memory at once; more than 1 where the model caps or scales them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    norms: tuple[float, ...]
    wide_norms: tuple[float, ...]
    states: tuple[float, ...] = ()
    wide_states: tuple[float, ...] = ()
    chunk: int = 0
    activation: float = 0.0
    wide_activation: float = 0.0
    largest_state: float = 0.0
    heads: int = 0
    square_copies: int = 0
    window: int = 0
    plain_products: bool = False
    logit_copies: int = 1


class Anatomy(BaseModel):
    """Decoder layers and their modules, plus the sizes around them.

    ``attention_width`` is heads x head size, the width of the two attention products. ``left_out`` names the weights
    that LoRA cannot adapt, matrices among the ``modules`` included. For ``shared`` weights each layer's module has its
    own adapter. ``kept`` is None in files of an earlier release.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    model_type: str
    layer_count: int
    layer_path: str
    hidden_size: int
    vocab_size: int
    attention_width: int
    parameters: int
    embedding_parameters: int
    layer_parameters: tuple[int, ...]
    modules: tuple[Module, ...]
    left_out: tuple[LeftOut, ...] = ()
    shared: tuple[SharedWeight, ...] = ()
    kept: Kept | None = None

    def in_layer(self, index: int) -> tuple[Module, ...]:
        """The modules of one decoder layer, in the model's order."""
        return tuple(module for module in self.modules if module.layer == index)

    def adaptable(self, routers: bool = False) -> tuple[Module, ...]:
        """The weights that a plan may adapt: all that LoRA can adapt, routers only with ``routers``."""
        return tuple(module for module in self.modules if module.is_target or (routers and not module.refused))

    @property
    def notes(self) -> list[str]:
        """One line for each unusual thing: weights that LoRA leaves as they are, and weights that layers share."""
        by_reason: dict[str, list[str]] = {}
        for weights in self.left_out:
            by_reason.setdefault(weights.reason, []).append(weights.name)
        reasons = "; ".join(f"{_few(names)} ({reason})" for reason, names in by_reason.items())
        lines = [f"not adapted: {reasons}"] if reasons else []
        by_layers: dict[tuple[int, ...], list[str]] = {}
        for weight in self.shared:
            by_layers.setdefault(weight.layers, []).append(weight.name)
        for layers, names in by_layers.items():
            where = ", ".join(map(str, layers))
            lines.append(f"layers {where} share the weights of {_few(names)}; each has its own adapters")
        return lines

    @property
    def head_flops_per_token(self) -> int:
        """Forward FLOPs of the LM head for one token."""
        return 2 * self.hidden_size * self.vocab_size


def _few(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:FEW]) + (f" and {len(names) - FEW} more" if len(names) > FEW else "")


class ModelIdentity(BaseModel):
    """Which model an artefact belongs to: the name is for people, the fingerprints decide.

    ``weights`` samples the matrices; it is None where they are quantized, since that changes them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    fingerprint: str
    weights: str | None = None

    def is_same_model(self, other: "ModelIdentity") -> bool:
        """Whether both fingerprints agree; that of the matrices counts only where both sides have it."""
        known = self.weights is not None and other.weights is not None
        return self.fingerprint == other.fingerprint and (not known or self.weights == other.weights)

    def difference(self, other: "ModelIdentity") -> str:
        """For the end of a message: the digests of the matrices, where only these differ; else empty."""
        if self.fingerprint != other.fingerprint or not self.weights or not other.weights:
            return ""
        return f", with other weights ({self.weights[:12]}, {other.weights[:12]})"

    def __str__(self) -> str:
        """``name (first 12 digits of the fingerprint)``."""
        return f"{self.name} ({self.fingerprint[:12]})"


class TokenizerIdentity(BaseModel):
    """Which tokenizer an artefact belongs to: the name is for people, two sha256 decide.

    ``chat_template`` is None where none is used.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    vocabulary: str
    chat_template: str | None

    def difference(self, other: "TokenizerIdentity | None") -> str | None:
        """What makes tokens differ, ``vocabularies`` or ``chat templates``; None if nothing does, or if unknown.

        A chat template counts only where both use one.
        """
        if other is None:
            return None
        if self.vocabulary != other.vocabulary:
            return "vocabularies"
        both = self.chat_template is not None and other.chat_template is not None
        return "chat templates" if both and self.chat_template != other.chat_template else None

    def without_template(self) -> "TokenizerIdentity":
        """The same identity without its chat template."""
        return self.model_copy(update={"chat_template": None})

    def __str__(self) -> str:
        """``name (vocabulary 0123456789ab, chat template 0123456789ab)``."""
        template = f", chat template {self.chat_template[:12]}" if self.chat_template else ""
        return f"{self.name} (vocabulary {self.vocabulary[:12]}{template})"


class DataIdentity(BaseModel):
    """Which data set an artefact was made from. ``form`` is the row form, such as ``question, answer``.

    For several files read as one data set ``name`` holds them all; see :attr:`sources`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    fingerprint: str
    form: str
    rows: int

    @property
    def sources(self) -> tuple[str, ...]:
        """The files or hub data sets that were read one after another."""
        return tuple(self.name.split(BETWEEN_SOURCES))
