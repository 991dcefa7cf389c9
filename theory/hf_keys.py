"""The keys that files of transformers hold, as data: those of each class's default configuration, and older ones.

With them a key that no class has is told from one that is known and changes nothing at the start: token ids, dropout,
numbers of the generation, how the file was written. The defaults are those of transformers 5.
"""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# In every class's configuration.
EVERY = _words(
    """
    _name_or_path architectures bos_token_id chunk_size_feed_forward dtype eos_token_id id2label
    is_encoder_decoder label2id model_type output_attentions output_hidden_states pad_token_id problem_type
    return_dict tie_word_embeddings transformers_version use_cache vocab_size
    """
)
# In every class's of LLaMA's line.
LINE = _words(
    """
    attention_dropout hidden_size initializer_range intermediate_size max_position_embeddings
    num_attention_heads num_hidden_layers num_key_value_heads rope_parameters
    """
)
# What is left of each class's.
_GPT = {
    "gpt2": """
        activation_function add_cross_attention attn_pdrop embd_pdrop initializer_range layer_norm_epsilon
        n_embd n_head n_inner n_layer n_positions reorder_and_upcast_attn resid_pdrop
        scale_attn_by_inverse_layer_idx scale_attn_weights summary_activation summary_first_dropout
        summary_proj_to_labels summary_type summary_use_proj
    """,
    "gptj": """
        activation_function attn_pdrop embd_pdrop initializer_range layer_norm_epsilon n_embd n_head n_inner
        n_layer n_positions resid_pdrop rotary_dim
    """,
    "gpt_neo": """
        activation_function attention_dropout attention_layers attention_types classifier_dropout
        embed_dropout hidden_size initializer_range intermediate_size layer_norm_epsilon
        max_position_embeddings num_heads num_layers resid_dropout window_size
    """,
    "gpt_neox": """
        attention_bias attention_dropout classifier_dropout hidden_act hidden_dropout hidden_size
        initializer_range intermediate_size is_decoder layer_norm_eps max_position_embeddings
        num_attention_heads num_hidden_layers rope_parameters use_parallel_residual
    """,
    "opt": """
        _remove_final_layer_norm activation_function attention_dropout do_layer_norm_before dropout
        enable_bias ffn_dim hidden_size init_std layer_norm_elementwise_affine layerdrop
        max_position_embeddings num_attention_heads num_hidden_layers word_embed_proj_dim
    """,
    "bloom": """
        apply_residual_connection_post_layernorm attention_dropout hidden_dropout hidden_size
        initializer_range layer_norm_epsilon n_head n_layer pretraining_tp slow_but_exact
    """,
    "falcon": """
        activation alibi attention_dropout bias ffn_hidden_size hidden_dropout hidden_size initializer_range
        layer_norm_epsilon max_position_embeddings multi_query new_decoder_architecture num_attention_heads
        num_hidden_layers num_kv_heads num_ln_in_parallel_attn parallel_attn rope_parameters
    """,
    "mpt": """
        attn_config d_model emb_pdrop embedding_fraction expansion_ratio init_device initializer_range
        layer_norm_epsilon learned_pos_emb logit_scale max_seq_len n_heads n_layers no_bias norm_type
        resid_pdrop
    """,
}
_LLAMA = {
    "llama": "attention_bias head_dim hidden_act mlp_bias pretraining_tp rms_norm_eps",
    "mistral": "head_dim hidden_act rms_norm_eps sliding_window",
    "qwen2": "hidden_act layer_types max_window_layers rms_norm_eps sliding_window use_sliding_window",
    "qwen3": """
        attention_bias head_dim hidden_act layer_types max_window_layers rms_norm_eps sliding_window
        use_sliding_window
    """,
    "gemma": "attention_bias head_dim hidden_act rms_norm_eps use_bidirectional_attention",
    "gemma2": """
        attention_bias attn_logit_softcapping final_logit_softcapping head_dim hidden_activation layer_types
        query_pre_attn_scalar rms_norm_eps sliding_window use_bidirectional_attention
    """,
    "gemma3_text": """
        _sliding_window_pattern attention_bias attn_logit_softcapping final_logit_softcapping head_dim
        hidden_activation layer_types query_pre_attn_scalar rms_norm_eps sliding_window
        use_bidirectional_attention
    """,
    "olmo": "attention_bias clip_qkv hidden_act",
    "olmo2": "attention_bias hidden_act rms_norm_eps",
    "granite": """
        attention_bias attention_multiplier embedding_multiplier hidden_act logits_scaling mlp_bias
        residual_multiplier rms_norm_eps
    """,
    "phi": "embd_pdrop hidden_act layer_norm_eps qk_layernorm resid_pdrop",
    "phi3": "embd_pdrop hidden_act original_max_position_embeddings resid_pdrop rms_norm_eps sliding_window",
    "cohere": "attention_bias hidden_act layer_norm_eps logit_scale use_qk_norm",
    "starcoder2": "embedding_dropout hidden_act norm_epsilon residual_dropout sliding_window use_bias",
    "stablelm": "hidden_act hidden_dropout layer_norm_eps qk_layernorm use_parallel_residual use_qkv_bias",
    "smollm3": """
        attention_bias hidden_act layer_types mlp_bias no_rope_layer_interval no_rope_layers rms_norm_eps
        sliding_window use_sliding_window
    """,
    "mixtral": """
        head_dim hidden_act num_experts_per_tok num_local_experts output_router_logits rms_norm_eps
        router_aux_loss_coef router_jitter_noise sliding_window
    """,
    "olmoe": """
        attention_bias clip_qkv hidden_act norm_topk_prob num_experts num_experts_per_tok output_router_logits
        rms_norm_eps router_aux_loss_coef
    """,
    "qwen3_moe": """
        attention_bias decoder_sparse_step hidden_act mlp_only_layers moe_intermediate_size norm_topk_prob
        num_experts_per_tok num_local_experts output_router_logits rms_norm_eps router_aux_loss_coef
        sliding_window use_sliding_window
    """,
}
# Written by older versions, or beside the class's: generation, tasks, quantization, kernels.
HARMLESS = _words(
    """
    _attn_implementation _commit_hash activation_dropout add_cross_attention attention_softmax_in_fp32
    attn_implementation auto_map bad_words_ids begin_suppress_tokens bias_dropout_fusion cache_implementation
    cls_token_id cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing is_decoder length_penalty mask_token_id masked_softmax_fusion
    max_length max_new_tokens min_length n_ctx no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences offset_alibi output_scores prefix pretraining_tp pruned_heads quantization_config
    remove_invalid_values repetition_penalty return_dict_in_generate sep_token_id skip_bias_add
    skip_bias_add_qkv suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tokenizer_class tokenizer_name top_k top_p torch_dtype torchscript typical_p unk_token_id use_bfloat16
    use_return_dict verbose
    """
)
# Older names of keys that are read.
OLDER = _words(
    """
    attention_layers partial_rotary_factor rope_local_base_freq rope_scaling rope_theta rotary_emb_base
    rotary_pct sliding_window_pattern
    """
)
# In tables: of rotary positions, and of MPT's attention.
TABLES = EVERY | _words(
    """
    alibi alibi_bias_max attention_factor attn_impl attn_pdrop attn_type attn_uses_sequence_id beta_fast
    beta_slow clip_qkv factor high_freq_factor long_factor low_freq_factor original_max_position_embeddings
    partial_rotary_factor prefix_lm qk_ln rope_theta rope_type short_factor softmax_scale truncate type
    """
)
KEYS: dict[str, frozenset[str]] = {
    **{kind: EVERY | _words(own) for kind, own in _GPT.items()},
    **{kind: EVERY | LINE | _words(own) for kind, own in _LLAMA.items()},
}
