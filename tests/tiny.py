"""Tiny random models of several families and a byte-level tokenizer: structure without downloads."""

import json
import re

import torch
from families import BESIDE_AN_IMAGE, OTHERS, STATE_SPACE, VOCABULARY, WRAPPERS, config_of
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BloomConfig,
    CohereConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    Phi3Config,
    PhimoeConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    StableLmConfig,
)

from aletheia.files import sealed_json

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 258,
    "eos_token_id": 257,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_head": 4, "n_inner": 48, "bos_token_id": 258, "eos_token_id": 257}


def make_config(family: str, layers: int = 4):
    """The config of a tiny model of a family; ``layers`` counts for those of this file alone."""
    if family in (STATE_SPACE | OTHERS | WRAPPERS | BESIDE_AN_IMAGE):
        return config_of(family)
    match family:
        case "llama":
            return LlamaConfig(**COMMON, num_hidden_layers=layers, num_key_value_heads=2, tie_word_embeddings=True)
        case "qwen2":  # biases on q, k and v
            return Qwen2Config(**COMMON, num_hidden_layers=layers, num_key_value_heads=2)
        case "phi3":  # fused qkv and gate-up
            return Phi3Config(**COMMON, num_hidden_layers=layers, num_key_value_heads=2)
        case "gpt_neox":  # biases everywhere, LayerNorm
            return GPTNeoXConfig(**COMMON, num_hidden_layers=layers)
        case "gpt2":  # Conv1D: weights stored as in x out
            return GPT2Config(**GPT2, n_layer=layers, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
        case "qwen3":  # norms on q and k
            return Qwen3Config(**COMMON, num_hidden_layers=layers, num_key_value_heads=2, head_dim=8)
        case "mistral":
            return MistralConfig(**COMMON, num_hidden_layers=layers, num_key_value_heads=2, sliding_window=16)
        case "gemma2":  # soft-capped logits, scaled embedding, every second layer sees a window
            soft_capping = {"final_logit_softcapping": 1.5, "attn_logit_softcapping": 5.0, "sliding_window": 16}
            return Gemma2Config(**COMMON, **soft_capping, num_hidden_layers=layers, num_key_value_heads=2, head_dim=8)
        case "gemma3_text":
            window = {"sliding_window": 16, "sliding_window_pattern": 2}
            return Gemma3TextConfig(**COMMON, **window, num_hidden_layers=layers, num_key_value_heads=2, head_dim=8)
        case "granite":  # scales logits, attention, residuals and embedding
            scales = {"logits_scaling": 3.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0}
            return GraniteConfig(**COMMON, **scales, num_hidden_layers=layers, num_key_value_heads=2)
        case "cohere":  # scales logits, attention beside the MLP
            return CohereConfig(**COMMON, logit_scale=0.3, num_hidden_layers=layers, num_key_value_heads=2)
        case "olmo2":
            return Olmo2Config(**COMMON, num_hidden_layers=layers, num_key_value_heads=2)
        case "olmo3":  # the model asks each layer's attention for its type
            return Olmo3Config(**COMMON, num_hidden_layers=layers, num_key_value_heads=2, sliding_window=16)
        case "stablelm":
            return StableLmConfig(**COMMON, num_hidden_layers=layers, num_key_value_heads=2)
        case "falcon":
            return FalconConfig(**without("intermediate_size"), num_hidden_layers=layers, new_decoder_architecture=True)
        case "bloom":  # layers return tuples
            return BloomConfig(**without("intermediate_size"), n_layer=layers, n_head=4)
        case "gptj":
            return GPTJConfig(**GPT2, n_layer=layers, rotary_dim=4, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
        case "qwen3_moe":  # fused experts
            experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
            return Qwen3MoeConfig(**COMMON, **experts, num_hidden_layers=layers, num_key_value_heads=2)
        case "mixtral":
            experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
            return MixtralConfig(**COMMON, **experts, num_hidden_layers=layers, num_key_value_heads=2)
        case "qwen2_moe":  # a shared expert with a gate of its own; layer 0 is dense
            experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
            shared = {"shared_expert_intermediate_size": 24, "mlp_only_layers": [0]}
            return Qwen2MoeConfig(**COMMON, **experts, **shared, num_hidden_layers=layers, num_key_value_heads=2)
        case "olmoe":
            experts = {"num_experts": 4, "num_experts_per_tok": 2}
            return OlmoeConfig(**COMMON, **experts, num_hidden_layers=layers, num_key_value_heads=2)
        case "phimoe":  # the router is a Linear that returns a tuple
            experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.0}
            experts["input_jitter_noise"] = 0.0
            return PhimoeConfig(**COMMON, **experts, num_hidden_layers=layers, num_key_value_heads=2)
        case "gpt_oss":  # experts stored as in x out, with biases
            experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 16}
            return GptOssConfig(**COMMON, **experts, num_hidden_layers=layers, num_key_value_heads=2)
        case "deepseek_v3":  # latent attention, shared experts, layer 0 is dense
            experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 2}
            latent = {"kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "head_dim": 4}
            others = {"n_shared_experts": 1, "topk_group": 1, "first_k_dense_replace": 1, "v_head_dim": 8}
            settings = experts | latent | others | {"num_key_value_heads": 4}
            return DeepseekV3Config(**COMMON, **settings, num_hidden_layers=layers)
    raise ValueError(family)


def without(name: str):
    """The common settings less one."""
    return {key: value for key, value in COMMON.items() if key != name}


FAMILIES = ("llama", "qwen2", "phi3", "gpt_neox", "gpt2")
MORE_FAMILIES = (
    *("qwen3", "mistral", "gemma2", "gemma3_text", "granite", "cohere", "olmo2", "olmo3", "stablelm", "falcon"),
    *("bloom", "gptj", "qwen3_moe"),
    *("mixtral", "qwen2_moe", "olmoe", "phimoe", "gpt_oss", "deepseek_v3"),
)
MIXTURES = MORE_FAMILIES[-7:]


def make_model(family: str = "llama", layers: int = 4, seed: int = 0, **shape):
    """A tiny random model; the same weights for a seed. ``shape`` holds fields of its config that are to be others."""
    config = make_config(family, layers)
    config = type(config).from_dict(config.to_dict() | shape) if shape else config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kind = AutoModelForImageTextToText if family in (WRAPPERS | BESIDE_AN_IMAGE) else AutoModelForCausalLM
        model = kind.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():  # biases start at 0 and norms at 1: make them real
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=0.0 if "bias" in name else 1.0, std=0.1)
    return model.eval()


def make_tokenizer(chat_template: str | None = CHATML, bos: bool = False, eos: bool = True):
    """Byte-level: one token per byte, so every text survives and lengths can be counted by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: at for at, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<s>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>" if eos else None)
    fast.chat_template = chat_template
    return fast


def edited(path, **changes):
    """Change a sealed file of ours as a person does who takes out the line of its seal."""
    found = json.loads(path.read_text()) | changes
    del found["sha256"]
    path.write_text(json.dumps(found, indent=2))


def resealed(path, **changes):
    """Change a file of ours and seal it anew, as if it had been written so."""
    found = json.loads(path.read_text()) | changes
    head = {name: found.pop(name) for name in ("format", "version")}
    del found["sha256"]
    path.write_text(sealed_json(found, head))


def as_flags(message: str) -> str:
    """A message of the library in the words of the command line."""
    return re.sub(r"`(\w+)`", lambda found: "--" + found[1].replace("_", "-"), message)
