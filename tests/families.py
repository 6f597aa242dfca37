"""Tiny configs of families beyond tests/tiny.py: state spaces, hybrids, mixtures and vision-language wrappers."""

from transformers import AutoConfig

VOCABULARY = 259  # 256 bytes and three special tokens
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 258,
    "eos_token_id": 257,
}
BARE = {"vocab_size": VOCABULARY, "bos_token_id": 258, "eos_token_id": 257}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4}
TOWER |= {"image_size": 28, "patch_size": 14}
QWEN_TOWER = {"depth": 6, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}

STATE_SPACE = {  # a layer carries a state along the tokens; some have attention or an MLP in other layers, or beside it
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    "falcon_h1": {"mamba_d_ssm": 32, **MAMBA, "mamba_n_heads": 4},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp", "mamba"],
        **{"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16},
    },
    "jamba": {
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        **{"num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    },
    "bamba": {"attn_layer_indices": [1, 3], **MAMBA},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba", "hybrid"],
        **{"attention_head_dim": 16, "mamba_d_state": 8, "mamba_dt_rank": 4, "n_mamba_heads": 2},
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "num_hidden_layers": 6,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba", "hybrid"],
        **{"mamba_d_state": 8, "mamba_headdim": 8, "mamba_ngroups": 1, "chunk_size": 16, "num_mem_blocks": 1},
        **{"adapter_rank": 4, "use_mamba_kernels": False, "use_shared_attention_adapter": False},
    },
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 64},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_experts": 4, "num_dense_layers": 1, **EXPERTS},
    "rwkv": {**BARE, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 4, "rescale_every": 0},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 2,
        **{**MAMBA, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32},
    },
    "qwen3_next": {"num_experts": 4, **EXPERTS, "shared_expert_intermediate_size": 16, **DELTA},
    "qwen3_5_text": DELTA,
    "minimax": {"num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 16},
    "olmo_hybrid": {},
    "xlstm": {**BARE, "hidden_size": 32, "num_blocks": 4, "num_heads": 4, "chunk_size": 16},
}
OTHERS = {  # attention alone
    "cohere2": {"sliding_window": 16},
    "exaone4": {},
    "glm4": {},
    "glm4_moe": {"n_routed_experts": 4, **EXPERTS, "first_k_dense_replace": 1},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "helium": {},
    "jetmoe": {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mpt": {**BARE, "d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 512},
    "nemotron": {},
    "openai-gpt": {  # a layer returns a list
        **BARE,
        **{"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 512, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        "resid_pdrop": 0.0,
    },
    "opt": {
        **BARE,
        **{"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "dropout": 0.0},
        **{"word_embed_proj_dim": 32, "max_position_embeddings": 512, "pad_token_id": 0},
    },
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
    "smollm3": {},
    "starcoder2": {},
}
WRAPPERS = {  # a language model beside a vision tower
    "mistral3": {"text_config": {"model_type": "mistral"}, "vision_config": {"model_type": "pixtral", **TOWER}},
    "llava": {
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model", **TOWER},
        "image_token_index": 200,
    },
    "llava_onevision": {
        "text_config": {"model_type": "qwen2"},
        "vision_config": {"model_type": "siglip_vision_model", **TOWER},
        "image_token_index": 200,
    },
    "qwen2_vl": {
        "text_config": {"rope_parameters": MROPE},
        "vision_config": {"depth": 6, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 14},
    },
    "qwen2_5_vl": {"text_config": {"rope_parameters": MROPE}, "vision_config": QWEN_TOWER},
    "qwen3_vl": {
        "text_config": {"rope_parameters": MROPE},
        "vision_config": {**QWEN_TOWER, "deepstack_visual_indexes": [1, 2]},
    },
    "qwen3_5": {"text_config": {"rope_parameters": MROPE, **DELTA}, "vision_config": QWEN_TOWER},
    "gemma3": {"text_config": {"sliding_window": 16}, "vision_config": TOWER, "mm_tokens_per_image": 4},
    "idefics3": {
        **{"text_config": {"model_type": "llama"}, "vision_config": TOWER},
        **{"scale_factor": 2, "image_token_id": 200},
    },
    "smolvlm": {
        **{"text_config": {"model_type": "llama"}, "vision_config": TOWER},
        **{"scale_factor": 2, "image_token_id": 200},
    },
    "llama4": {
        "text_config": {"intermediate_size_mlp": 48, "num_local_experts": 4},
        "vision_config": {**TOWER, "vision_output_dim": 32},
    },
    "internvl": {
        "text_config": {"model_type": "qwen2"},
        "vision_config": {**TOWER, "image_size": [28, 28], "patch_size": [14, 14]},
    },
    "lfm2_vl": {"text_config": {"layer_types": ["conv", "full_attention"] * 2}, "vision_config": TOWER},
    "aya_vision": {"text_config": {"model_type": "cohere2", "sliding_window": 16}, "vision_config": TOWER},
}

UNSTORED = ("zamba", "zamba2")  # upper layers read the embedding, too: no prefix cache
SHARED = ("zamba", "zamba2")  # layers share weights
OFTEN = (  # tried in every test run, the others in the slow ones
    *STATE_SPACE,
    *("granitemoe", "jetmoe", "mpt", "opt", "mistral3", "qwen2_5_vl", "gemma3", "llava", "smolvlm", "llama4"),
)
RARELY = tuple(family for family in (*OTHERS, *WRAPPERS) if family not in OFTEN)
BESIDE_AN_IMAGE = {  # of vision-language models that are refused
    "paligemma": {
        **{"text_config": {"model_type": "gemma"}, "vision_config": {**TOWER, "projection_dim": 32}},
        "projection_dim": 32,
    },
    "mllama": {
        "text_config": {"cross_attention_layers": [1, 3]},
        "vision_config": {**TOWER, "num_global_layers": 1, "vision_output_dim": 32, "intermediate_layers_indices": [0]},
    },
}


def config_of(family: str):
    """The config of a tiny model of one of these families."""
    own = (STATE_SPACE | OTHERS | WRAPPERS | BESIDE_AN_IMAGE)[family]
    if "text_config" in own:
        own = own | {"text_config": SIZES | own["text_config"]}
    elif not own.keys() >= BARE.keys():
        own = SIZES | own
    return AutoConfig.for_model(family, **own)
