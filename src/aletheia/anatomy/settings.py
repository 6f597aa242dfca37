"""How a model is loaded. No torch."""

from typing import ClassVar, Literal

from pydantic import ByteSize, model_validator

from aletheia.settings import GIVEN, LOADING, Settings, option

Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]


class LoadSettings(Settings):
    """Which model, and in which form."""

    SECTION: ClassVar[str] = "model"
    model: str = option(
        ...,
        "Hub id such as Qwen/Qwen2.5-0.5B-Instruct, model folder, .gguf file, or an adapter folder to train further.",
        GIVEN,
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "auto",
        "Number format of the weights. auto: bfloat16 where the hardware computes in it, else float16 on a GPU and "
        "float32 on a CPU.",
        LOADING,
    )
    quantize: Literal["nf4", "int8"] | None = option(
        None,
        "Quantize the base model while loading, as QLoRA does: nf4 (4 bits) or int8 (8 bits). Needs bitsandbytes. "
        "(default: as the model is stored)",
        LOADING,
    )
    attention: Attention | None = option(
        None, "How attention is computed: transformers' attn_implementation. (default: transformers chooses)", LOADING
    )
    stream: bool | None = option(
        None,
        "Read the weights layer by layer, for a model that does not fit in memory; then only the upper layers are "
        "trained. (default: where the weights take over half of the memory)",
        LOADING,
    )
    trust_remote_code: bool = option(
        False, "Run Python code that comes with the model. Read it first: it can do whatever you can do.", LOADING
    )
    allow_pickle: bool = option(
        False,
        "Also read weights from pickle files (.bin, .pt). A pickle can carry harmful code; .safetensors cannot.",
        LOADING,
    )
    fresh: bool = option(
        False,
        "If MODEL is an adapter folder: merge that adapter into its base and train a new one, instead of training "
        "it further.",
        LOADING,
    )
    max_memory: ByteSize | None = option(
        None,
        "Most memory to use, such as 6GB or 500MiB; with less memory fewer layers are trained. (default: 90 % of a "
        "GPU's memory, 80 % of the machine's)",
        LOADING,
    )
    base: str | None = option(
        None,
        "If MODEL is an adapter folder: its base model, a folder or hub id. (default: the one that the adapter names)",
        LOADING,
    )

    @model_validator(mode="after")
    def _consistent(self) -> "LoadSettings":
        if self.stream and self.quantize:
            raise ValueError(
                "`stream` and `quantize` are both given; expected one of them; to stream 4-bit weights, give a model "
                "that is stored quantized"
            )
        return self
