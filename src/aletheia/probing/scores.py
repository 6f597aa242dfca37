"""The Scores file: what a probe measured, with everything needed to judge or repeat it. Torch-free."""

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from aletheia.anatomy.schema import Anatomy, DataIdentity, ModelIdentity, TokenizerIdentity
from aletheia.files import Artifact
from aletheia.probing.timings import Timings

Score = Annotated[FiniteFloat, Field(ge=0)]


class ProbeSettings(BaseModel):
    """How the scores were measured; counts are over all probe batches."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    score: str
    batches: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    seed: int | None
    dtype: str
    device: str
    tokens: int = Field(ge=1, description="tokens that are not padding")
    labelled_tokens: int = Field(description="tokens that count in the loss")
    mean_loss: FiniteFloat = Field(description="mean loss over the batches, in nats per labelled token")
    seconds: float


class WeightBytes(BaseModel):
    """Bytes of the weights as loaded: each layer, the embedding, and everything else outside the layers.

    ``outside`` is the head with its norm. ``embedding`` is 0 if the head shares its weight.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    layers: tuple[int, ...]
    outside: int
    embedding: int = 0


class ExpertScores(BaseModel):
    """One stack of experts in the probe, expert by expert.

    ``norms`` are gradient norms summed over the batches; None for an expert that no token reached, which the probe
    cannot score. ``tokens`` counts the tokens routed to each expert; None if the routing could not be seen.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    norms: tuple[Score | None, ...]
    tokens: tuple[int, ...] | None = None


class Scores(Artifact):
    """Importance per decoder layer and per module.

    ``layers[i]`` is the Frobenius norm of the loss gradient, summed over the probe batches and the parameters of layer
    ``i`` [arXiv:2604.15351]. ``modules`` has the part of each adaptable weight by full name, None for an expert's
    module that no token reached. A layer's score also counts norms and biases, so it is a little more than the sum of
    its modules. ``experts`` has the experts of each fused stack. ``timings``, if measured, turn the plan's predictions
    into seconds. ``weight_bytes`` lets a plan keep to a memory limit.
    """

    FORMAT: ClassVar[str] = "aletheia-scores"

    model: ModelIdentity
    data: DataIdentity | None
    tokenizer: TokenizerIdentity | None = None
    probe: ProbeSettings
    packages: dict[str, str]
    layers: tuple[Score, ...] = Field(min_length=1)
    modules: dict[str, Score | None]
    experts: dict[str, ExpertScores] = Field(default_factory=dict)
    anatomy: Anatomy
    timings: Timings | None = None
    weight_bytes: WeightBytes | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "Scores":
        if len(self.layers) != self.anatomy.layer_count:
            raise ValueError(f"{len(self.layers)} layer scores for {self.anatomy.layer_count} layers")
        if self.timings is not None and len(self.timings.layers) != self.anatomy.layer_count:
            raise ValueError(f"{len(self.timings.layers)} timed layers for {self.anatomy.layer_count} layers")
        if self.modules.keys() != {module.name for module in self.anatomy.modules}:
            raise ValueError("'modules' and the modules of 'anatomy' have different names")
        return self
