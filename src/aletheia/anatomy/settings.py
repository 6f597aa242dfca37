"""How a model is loaded. No torch."""

from typing import ClassVar, Literal

from pydantic import ByteSize, model_validator

from aletheia.settings import Settings, option

GROUP = "Model"

Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]


class LoadSettings(Settings):
    """Which model, and in which form."""

    SECTION: ClassVar[str] = "model"
    model: str = option(..., "Hub id, local folder or .gguf file.", GROUP)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "auto", "Number format; auto takes what the device is fast in.", GROUP
    )
    quantize: Literal["nf4", "int8"] | None = option(None, "Quantize the base while loading, for QLoRA.", GROUP)
    attention: Attention | None = option(None, "How attention is computed; transformers chooses by default.", GROUP)
    stream: bool | None = option(
        None, "Read the weights layer by layer (by default where they take over half the memory).", GROUP
    )
    trust_remote_code: bool = option(
        False, "Run code that comes with the model. Read it first: it can do whatever you can.", GROUP
    )
    allow_pickle: bool = option(
        False, "Read weights from pickles (.bin, .pt), which can be made to do harm; safetensors cannot.", GROUP
    )
    fresh: bool = option(
        False, "MODEL is an adapter folder: merge it into its base and adapt that, instead of going on with it.", GROUP
    )
    base: str | None = option(
        None, "MODEL is an adapter folder: where its base model lies now (by default where the adapter says).", GROUP
    )
    max_memory: ByteSize | None = option(None, "Memory that may be used, such as 6GB (by default what is free).", GROUP)

    @model_validator(mode="after")
    def _consistent(self) -> "LoadSettings":
        if self.stream and self.quantize:
            raise ValueError(
                "`stream` and `quantize` are both given; expected a checkpoint that is quantized to stream from"
            )
        return self
