"""Tiny random models of several families and a byte-level tokenizer: structure without downloads."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 259  # 256 bytes and three special tokens
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
    """The config of a tiny model of a family."""
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
    raise ValueError(family)


FAMILIES = ("llama", "qwen2", "phi3", "gpt_neox", "gpt2")


def make_model(family: str = "llama", layers: int = 4, seed: int = 0):
    """A tiny random model; the same weights for a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(make_config(family, layers))
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
