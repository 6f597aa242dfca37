"""Which kind of model a config describes, and which transformers class builds it: decided before any weight is read.

Aletheia fine-tunes decoders that predict the next token of a text. Of a vision-language model it adapts only the
language model. All other kinds are refused by name.
"""

from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
)

from aletheia.errors import ModelError

EXPECTED = "expected a decoder that predicts the next token of a text, such as Llama, Qwen or Mistral"
# config keys of a language model with layers that read the image, or states other than the hidden states
CROSS_ATTENTION = ("cross_attention_layers", "cross_layer_interval")
SEE_AHEAD = ("paligemma",)  # even without an image, every token counts as prompt, and prompts are not masked


def model_class(name: str, config: PretrainedConfig) -> Any:
    """``AutoModelForCausalLM``, or ``AutoModelForImageTextToText`` for a vision-language model.

    Args:
        name: MODEL, for the error.
        config: the config of MODEL.

    Raises:
        ModelError: the config describes an encoder, an encoder-decoder, or a model of something other than text.
    """
    kind = str(config.model_type)
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):  # custom code names its class itself
        return AutoModelForCausalLM
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder model ({kind}); {EXPECTED}")
    if "diffusion" in kind:
        raise ModelError(f"{name} is a diffusion model ({kind}); {EXPECTED}")
    try:
        text = config.get_text_config()
    except ValueError as error:
        raise ModelError(f"{name} holds several language models ({kind}); {EXPECTED}") from error
    if is_wrapper(config):
        if any(getattr(text, mark, None) for mark in CROSS_ATTENTION):
            raise ModelError(
                f"{name} is a vision-language model ({kind}) with layers that read only the image; expected one whose "
                "language model is a plain decoder, or a text model"
            )
        if kind in SEE_AHEAD:
            raise ModelError(
                f"{name} is a vision-language model ({kind}) whose tokens see later tokens even in text-only rows; "
                "expected one whose language model is a plain decoder, or a text model"
            )
        return AutoModelForImageTextToText
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and getattr(config, "vision_config", None) is not None:
        raise ModelError(
            f"{name} is a vision-language model ({kind}) without a separate language model; expected one that has "
            "one, or a text model"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{name} ({kind}) is not a causal language model; {EXPECTED}")
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise ModelError(f"{name} is an encoder ({kind}), whose positions see the tokens after them; {EXPECTED}")
    if getattr(text, "use_bidirectional_attention", None) is True:
        raise ModelError(f"{name} has bidirectional attention ({kind}): it is an encoder; {EXPECTED}")
    return AutoModelForCausalLM


def class_name(config: PretrainedConfig) -> str:
    """The name of the class that loads a model of this config."""
    return (AutoModelForImageTextToText if is_wrapper(config) else AutoModelForCausalLM).__name__


def is_wrapper(config: PretrainedConfig) -> bool:
    """Whether this is the config of a vision-language model: a language model and a vision tower."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and config.get_text_config() is not config
