"""The Scores file: what a probe measured, with everything needed to judge or repeat it. Torch-free."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from aletheia.anatomy.schema import Anatomy, DataIdentity, ModelIdentity
from aletheia.files import Artifact


class ProbeSettings(BaseModel):
    """How the scores were measured; sizes are counted over all probe batches."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    score: str
    batches: int
    batch_size: int
    seed: int | None
    dtype: str
    device: str
    tokens: int = Field(description="tokens that are not padding")
    labelled_tokens: int = Field(description="tokens that count in the loss")
    mean_loss: FiniteFloat = Field(description="mean over the batches of the loss, nats per labelled token")
    seconds: float


class Scores(Artifact):
    """Importance per decoder layer and per module.

    ``layers[i]`` is the sum over probe batches and over the parameters of layer ``i`` of the Frobenius norm of
    the loss gradient [arXiv:2604.15351]; ``modules`` holds the share of each adaptable weight matrix by full
    name. A layer's score also counts its norms and biases, so it is a little more than the sum of its modules.
    """

    FORMAT: ClassVar[str] = "aletheia-scores"

    model: ModelIdentity
    data: DataIdentity | None
    probe: ProbeSettings
    packages: dict[str, str]
    layers: tuple[FiniteFloat, ...]
    modules: dict[str, FiniteFloat]
    anatomy: Anatomy
