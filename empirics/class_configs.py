"""Small configs of the decoder classes of transformers, whose growth a prediction can be held to.

Sizes are odd on purpose: a head width, a feed-forward or a group that is taken for another would show.
"""

from __future__ import annotations

from typing import Any

VOCABULARY = 500


def llama_sizes(d: int, layers: int, heads: int, ffn: int, kv: int | None = None) -> dict[str, Any]:
    sizes = {
        "hidden_size": d, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": ffn,
        "max_position_embeddings": 64,
    }  # fmt: skip
    return sizes if kv is None else sizes | {"num_key_value_heads": kv}


def gpt_sizes(d: int, layers: int, heads: int) -> dict[str, Any]:
    return {"n_embd": d, "n_layer": layers, "n_head": heads, "n_positions": 64}


_REAL: dict[str, dict[str, Any]] = {
    "gpt2": gpt_sizes(252, 6, 6) | {"n_inner": 900},
    "gptj": gpt_sizes(240, 6, 5) | {"rotary_dim": 20},
    "gpt_neo": {
        "hidden_size": 248, "num_layers": 6, "num_heads": 8, "intermediate_size": 700, "window_size": 20,
        "attention_types": [[["global", "local"], 3]], "max_position_embeddings": 64,
    },
    "gpt_neox": llama_sizes(264, 6, 11, 1000),
    "opt": {
        "hidden_size": 252, "num_hidden_layers": 6, "num_attention_heads": 6, "ffn_dim": 900,
        "max_position_embeddings": 64,
    },
    "bloom": {"hidden_size": 256, "n_layer": 6, "n_head": 8},
    "falcon": {"hidden_size": 252, "num_hidden_layers": 6, "num_attention_heads": 7, "ffn_hidden_size": 900},
    "mpt": {"d_model": 240, "n_layers": 6, "n_heads": 6, "max_seq_len": 64},
    "llama": llama_sizes(252, 6, 6, 680, 3),
    "mistral": llama_sizes(252, 6, 6, 680, 2) | {"sliding_window": 20},
    "qwen2": llama_sizes(240, 6, 6, 660, 2),
    "qwen3": llama_sizes(240, 6, 6, 660, 3) | {"head_dim": 48},
    "gemma": llama_sizes(252, 6, 6, 900, 1) | {"head_dim": 48},
    "gemma2": llama_sizes(252, 6, 6, 900, 3) | {"head_dim": 48, "sliding_window": 20},
    "gemma3_text": llama_sizes(252, 6, 6, 900, 3) | {"head_dim": 48, "sliding_window": 20},
    "olmo": llama_sizes(252, 6, 6, 680),
    "olmo2": llama_sizes(252, 6, 6, 680),
    "granite": llama_sizes(252, 6, 6, 680, 2) | {
        "embedding_multiplier": 12, "residual_multiplier": 0.22, "attention_multiplier": 1 / 42, "logits_scaling": 8,
    },
    "phi": llama_sizes(240, 6, 6, 960),
    "phi3": llama_sizes(252, 6, 6, 680, 3) | {"pad_token_id": None},
    "cohere": llama_sizes(252, 6, 6, 680, 3),
    "starcoder2": llama_sizes(252, 6, 6, 1000, 2),
    "stablelm": llama_sizes(240, 6, 6, 660, 3),
    "smollm3": llama_sizes(252, 6, 6, 680, 3) | {"pad_token_id": None},
    "mixtral": llama_sizes(252, 6, 6, 400, 3),
    "olmoe": llama_sizes(252, 6, 6, 200) | {"num_experts": 16, "num_experts_per_tok": 4},
    "qwen3_moe": llama_sizes(240, 6, 6, 660, 3) | {
        "head_dim": 48, "moe_intermediate_size": 200, "num_experts": 12, "num_experts_per_tok": 3,
    },
}  # fmt: skip
REAL = {kind: {"model_type": kind, "vocab_size": VOCABULARY} | config for kind, config in _REAL.items()}


# Other layouts that the same classes have, and settings that no prediction covers.
VARIANTS = {
    "opt, post-ln": REAL["opt"] | {"do_layer_norm_before": False},
    "falcon, serial": REAL["falcon"] | {"parallel_attn": False},
    "gpt_neox, serial": REAL["gpt_neox"] | {"use_parallel_residual": False},
    "stablelm, parallel": REAL["stablelm"] | {"use_parallel_residual": True},
    "qwen2, tied": REAL["qwen2"] | {"tie_word_embeddings": True},
    "llama, initializer_range 0.06": REAL["llama"] | {"initializer_range": 0.06},
    "llama, initializer_range 0.2": REAL["llama"] | {"initializer_range": 0.2},
    "llama, llama3 frequencies": REAL["llama"] | {
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "gpt2, tanh": REAL["gpt2"] | {"activation_function": "tanh"},
}  # fmt: skip


def deeper(kind: str, layers: int) -> dict[str, Any]:
    """A class's config with another number of layers."""
    depth = "n_layer" if "n_layer" in REAL[kind] else "num_hidden_layers"
    return REAL[kind] | {depth: layers}


# One class of each layout, deeper: an error of a layer would grow with their number.
DEEPER = {
    f"{kind}, {layers} layers": deeper(kind, layers)
    for layers in (12, 24)
    for kind in ("gpt2", "gpt_neox", "llama", "qwen3", "gemma2", "olmo2", "starcoder2")
}
CASES: dict[str, dict[str, Any]] = REAL | VARIANTS | DEEPER
