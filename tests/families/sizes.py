"""The small sizes of :mod:`families.tiny` by config key, and what single types need beyond them: data, no code.

All widths differ where they may, so that a tensor's shape says what its dimensions are.
"""

from __future__ import annotations

from typing import Any, Final

LAYERS, HIDDEN, NEURONS, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 4, 48, 40, 4, 2, 12, 264
# Grouped matmul wants widths in steps of 4 (fp32) or 8 (bf16).
EXPERTS, TOP_K, EXPERT_NEURONS, SHARED_NEURONS, POSITIONS, WINDOW = 8, 2, 24, 32, 128, 8


def _by_key(*groups: tuple[Any, str]) -> dict[str, Any]:
    return {key: size for size, keys in groups for key in keys.split()}


SIZES: Final = _by_key(
    (LAYERS, "num_hidden_layers num_layers n_layer n_layers decoder_layers num_decoder_layers num_blocks"),
    (HIDDEN, "hidden_size d_model n_embd emb_dim embedding_dim embedding_size word_embed_proj_dim lru_width"),
    (HIDDEN, "input_embedding_size output_embedding_size attention_hidden_size"),
    (NEURONS, "intermediate_size n_inner ffn_dim decoder_ffn_dim ffn_hidden_size dim_ff dff d_inner feed_forward_size"),
    (NEURONS, "dense_intermediate_size intermediate_size_mlp"),
    (HEADS, "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads"),
    (HEADS, "num_decoder_attention_heads swa_num_attention_heads"),
    (KV_HEADS, "num_key_value_heads num_kv_heads swa_num_key_value_heads"),
    (HEAD_DIM, "head_dim d_head dim_head kv_channels swa_head_dim attention_head_size query_pre_attn_scalar"),
    (VOCABULARY, "vocab_size decoder_vocab_size unpadded_vocab_size vocab_size_per_layer_input"),
    (POSITIONS, "max_position_embeddings n_positions n_ctx context_length model_max_length max_seq_len"),
    (POSITIONS // 2, "original_max_position_embeddings max_target_positions"),
    # Shorter than a sample of 16 tokens, so that windowed layers really differ.
    (WINDOW, "sliding_window window_size sliding_window_size attention_window_size local_attention"),
    (WINDOW, "attention_chunk_size keep_window_size floor_scale log_scaling_n_floor index_topk"),
    # Special tokens; the texts of the tests begin at 4.
    (0, "pad_token_id"),
    (1, "bos_token_id cls_token_id decoder_start_token_id"),
    (2, "eos_token_id sep_token_id eod_token_id forced_eos_token_id"),
    (3, "mask_token_id"),
    # Of pictures: after the bytes that the tests' tokenizer knows.
    (260, "image_token_id image_token_index audio_token_id"),
    (261, "video_token_id"),
    (262, "vision_start_token_id boi_token_id boi_token_index boa_token_id"),
    (263, "vision_end_token_id eoi_token_id eoi_token_index eoa_token_id eoa_token_index"),
    # Experts: how many, how many a token, their width, that of the experts that every token takes (whose number is the
    # type's own), dense layers before them.
    (EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (TOP_K, "num_experts_per_tok num_experts_per_token moe_k moe_topk top_k_experts"),
    (EXPERT_NEURONS, "moe_intermediate_size expert_ffn_hidden_size"),
    (SHARED_NEURONS, "shared_expert_intermediate_size shared_experts_intermediate_size shared_intermediate_size"),
    (SHARED_NEURONS, "moe_shared_expert_intermediate_size"),
    (1, "n_group topk_group num_expert_group"),  # any set of experts may go; more groups are a change that a test makes
    (LAYERS // 2, "first_k_dense_replace num_dense_layers moe_layer_start_index"),
    (2, "zero_expert_num interleave_moe_layer_step"),
    (0, "num_nextn_predict_layers"),
    (8, "router_hidden_size"),
    # Multi-head latent attention and its indexer; linear attention; state spaces.
    (16, "kv_lora_rank"),
    (20, "q_lora_rank"),
    (8, "qk_nope_head_dim index_head_dim o_lora_rank linear_key_head_dim linear_value_head_dim linear_head_dim"),
    (4, "qk_rope_head_dim rotary_dim"),
    (12, "v_head_dim qk_head_dim"),
    (2, "index_n_heads linear_num_key_heads linear_num_heads o_groups"),
    (4, "linear_num_value_heads"),
    (8, "state_size ssm_state_size mamba_d_state"),
    (4, "time_step_rank mamba_dt_rank mamba_n_heads mamba_num_heads n_mamba_heads"),
    (24, "mamba_d_head mamba_head_dim mamba_headdim"),
    (96, "mamba_d_ssm"),
    (1, "n_groups mamba_n_groups"),
    (16, "chunk_size mamba_chunk_size"),
    # Low ranks and other small things of one or two types.
    (4, "gated_norm_rank adapter_rank laurel_rank d_rel hc_lowrank"),
    (8, "hidden_size_per_layer_input ple_embed_dim"),
    (64, "rel_extent"),
    (12, "pronunciation_embed_dim shape_embed_dim"),
    (30, "pronunciation_vocab_size shape_vocab_size"),
    (2, "num_layers_per_stack num_hashes no_rope_layer_interval"),
    (LAYERS, "encoder_layers num_encoder_layers"),  # the decoder's cache is made as long as the encoder
    (HEADS, "encoder_attention_heads num_encoder_attention_heads"),
    (NEURONS, "encoder_ffn_dim"),
    (32, "max_source_positions"),
    (0, "num_kv_shared_layers"),
    (4, "index_block_size"),
    (1, "index_topk_blocks index_local_blocks"),
    (True, "is_decoder"),  # BERT and its kin look ahead without it
)

# Vision and audio towers, which no test looks into.
TOWER_SIZES: Final = _by_key(
    (1, "num_hidden_layers depth num_blocks num_global_layers"),
    (16, "hidden_size embed_dim projection_dim output_channels vision_output_dim projector_input_dim"),
    (16, "projector_output_dim nemo_conv_channels ext_pw_out_channel depthwise_separable_out_channel"),
    (24, "intermediate_size mlp_dim"),
    (2, "num_attention_heads num_heads attention_heads num_key_value_heads"),
    (8, "head_dim"),
    (HIDDEN, "out_hidden_size"),
    (28, "image_size crop_size"),
    (14, "patch_size"),
    (4, "num_position_embeddings"),
    (32, "max_source_positions vocab_size"),
    ([0], "fullatt_block_indexes deepstack_visual_indexes global_attn_indexes intermediate_layers_indices"),
)

_MLA: Final = {"num_key_value_heads": HEADS, "head_dim": 4}  # a key per head; head_dim is the rotary part's
_FULL_AND_WINDOWED: Final = {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"] * 2}
_DENSE_FIRST: Final = {"mlp_layer_types": ["dense", "dense", "sparse", "sparse"]}
_SLIDING_AND_FULL: Final = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_CONV_AND_FULL: Final = {"layer_types": ["conv", "full_attention"] * 2}
_ROTARY: Final = {"rope_type": "default", "rope_theta": 10000.0}
_QWEN_VL: Final = {"text_config": {"rope_parameters": {**_ROTARY, "mrope_section": [2, 2, 2]}}}  # halves of head_dim
_GEMMA4: Final = {"global_head_dim": 2 * HEAD_DIM}  # wider heads in full layers, as in the real ones: per_layer_config
_SHARED_BLOCK: Final = {  # attends over the hidden state and the embedding side by side, twice as wide
    **{"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HEAD_DIM, "num_key_value_heads": HEADS},
}
_BLT_PART: Final = {
    **{"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": NEURONS, "head_dim": HEAD_DIM},
    **{"num_attention_heads": HEADS, "num_key_value_heads": HEADS},
}

CHANGES: Final[dict[str, dict[str, Any]]] = {
    **dict.fromkeys(("axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32"), _MLA),
    **dict.fromkeys(("glm4_moe_lite", "kimi_linear", "minicpm3", "youtu"), _MLA),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3"), _FULL_AND_WINDOWED),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), _QWEN_VL),
    **dict.fromkeys(("cohere2_moe", "inkling_text"), _DENSE_FIRST),
    **dict.fromkeys(("laguna", "ministral"), _SLIDING_AND_FULL),
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        **{"use_cache": False, "encoder_hash_byte_group_vocab": 100},  # its cache asks for a key that the config lacks
        **{"patcher_config": _BLT_PART, "global_config": {**_BLT_PART, "num_hidden_layers": LAYERS}},
        **{"encoder_config": {**_BLT_PART, "hidden_size_global": HIDDEN}},
        **{"decoder_config": {**_BLT_PART, "hidden_size_global": HIDDEN}},
    },
    "cohere_compass_text": {  # without an entry for each kind of layer its rotary embedding fails
        **_SLIDING_AND_FULL,
        "rope_parameters": {"sliding_attention": _ROTARY, "full_attention": _ROTARY},
    },
    "dbrx": {
        # rope_theta is read, and no key of a default config.
        "attn_config": {"kv_n_heads": KV_HEADS, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {
            **{"hidden_size": HIDDEN, "ffn_hidden_size": EXPERT_NEURONS, "moe_num_experts": EXPERTS},
            **{"moe_top_k": TOP_K},
        },
    },
    "dots1": {**_FULL_AND_WINDOWED, "n_shared_experts": 1},  # None by default, which the class cannot take
    "dots3_note": {
        "vision_config": {"pyramid_num_routed": [-1], "adapter_in_dim": 16, "adapter_out_dim": HIDDEN},  # a dense layer
        "audio_config": {"adapter_input_size": 16, "adapter_out_dim": HIDDEN, "downsample_hidden_size": 16},
    },
    "dots3_note_text": {
        **{"num_key_value_heads": HEADS, "swa_num_attention_heads": HEADS, "swa_num_key_value_heads": HEADS},
        **{"swa_q_lora_rank": 20, "swa_kv_lora_rank": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": HEAD_DIM},
        **{"swa_head_dim": HEAD_DIM},
    },
    "emu3": {
        "vocabulary_map": {"<image>": 260},
        "vq_config": {"base_channels": 32, "codebook_size": 32, "channel_multiplier": [1], "num_res_blocks": 1},
    },
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n_text": {"activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0]},  # as in the real ones; else none is sparse
    "gemma4": {
        "vision_config": {
            **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
            **{"num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "position_embedding_size": 8},
        }
    },
    "gemma4_text": {**_GEMMA4, "enable_moe_block": True},  # experts beside the MLP, as in 26B-A4B
    "gemma4_unified_text": _GEMMA4,
    "glm_moe_dsa": {**_MLA, "indexer_types": ["full", "shared"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hrm_text": {"num_hidden_layers": 16},  # 2 x (3 + 1) cycles through a stack of two
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 2},  # of four: Mamba, Mamba + experts, attention, as the 2nd
    "lfm2": {**_CONV_AND_FULL, "block_multiple_of": 8},  # its width is two thirds of the key, rounded up
    "lfm2_moe": _CONV_AND_FULL,
    "longcat_flash": {**_MLA, "num_layers": 2, "num_hidden_layers": 4},  # a layer attends twice
    "mamba2": {"num_heads": 8},  # times head_dim is twice the hidden size
    "mellum": {**_SLIDING_AND_FULL, **_DENSE_FIRST},
    "minimax": {"block_size": 8},  # of linear attention: two in a sample
    "minimax_m3_vl_text": {**_DENSE_FIRST, "layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "mllama": {"text_config": {"cross_attention_layers": [1, 3]}},
    "qwen2_vl": {**_QWEN_VL, "vision_config": {"hidden_size": HIDDEN}},  # here the tower's output
    "qwen4_exp_text": {
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8},
        **{"indexer_compress_ratio": 2, "hc_count": 2, "ngram_vocab_size_base": 500, "heads_per_ngram": 2},
        **{"make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 4},
    },
    "reformer": {"attn_layers": ["local", "lsh"] * 2, "axial_pos_embds_dim": [16, 32], "axial_pos_shape": [8, 16]},
    "stablelm": {"rope_parameters": {**_ROTARY, "partial_rotary_factor": 0.5}},  # a quarter of 12 is odd
    # Its config rounds the widths of keys and values up to 64, its class does not.
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": _SHARED_BLOCK,
    "zamba2": _SHARED_BLOCK,
    "zaya": {"layer_types": ["hybrid_sliding", "hybrid"] * 2, "num_experts_per_tok": 1},  # the class knows no other
}

_ASSISTANT: Final = "drafts for another model: takes the states of that one, not tokens"
_MUSIC: Final = "its causal class reads the decoder's config, and the type's own config has none of its keys"
CANNOT_BUILD: Final[dict[str, str]] = {
    "gemma3n": "its vision tower needs timm; gemma3n_text is its text part",
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
    "musicgen": _MUSIC,
    "musicgen_melody": _MUSIC,
}
