"""Measured step times, which turn the cost model's operations into seconds on this machine. Torch-free."""

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat


class LayerTiming(BaseModel):
    """Seconds that one decoder layer takes for one batch, derived from whole steps.

    ``forward`` and ``backward`` (activations only) are for the frozen layer. Adapters on all its matrices add
    ``adapter_fixed + adapter_per_parameter x trainable parameters``, optimizer step included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    forward: FiniteFloat = Field(ge=0)
    backward: FiniteFloat = Field(ge=0)
    adapter_fixed: FiniteFloat = Field(ge=0)
    adapter_per_parameter: FiniteFloat = Field(ge=0)


class Timings(BaseModel):
    """Measured parts of a training step; all seconds are for one batch of ``batch_size`` rows, as a run makes them.

    ``tokens`` includes padding and filler. ``head`` covers the LM head and the loss over labelled tokens, forward and
    backward, and all that does not depend on the plan (embedding, masks, positions, the loop around steps).
    ``computed_by`` names the ways in which these steps are computed, such as packed rows or recorded layers; files of
    earlier releases name none. ``baseline`` is a whole step of uniform LoRA of rank ``baseline_rank`` in plain PEFT and
    transformers. Its batch is of rows drawn at random, and holds ``random_padding`` times the tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    device: str
    dtype: str
    threads: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    tokens: FiniteFloat = Field(gt=0)
    random_padding: FiniteFloat = Field(ge=1)
    layers: tuple[LayerTiming, ...] = Field(min_length=1)
    head: FiniteFloat = Field(ge=0)
    baseline: FiniteFloat = Field(gt=0)
    baseline_rank: int = Field(ge=1)
    computed_by: tuple[str, ...] = ()
    seconds: FiniteFloat = Field(ge=0, description="duration of the calibration")
