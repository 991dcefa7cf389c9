"""Decoders of which it is known what they are: real classes of transformers, and our own network's variants."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from helpers.decoders import NanoGPT
from helpers.real_classes import build
from theory.architecture import Architecture, preset


class Truth(NamedTuple):
    """What a class is known to be: its block, its multipliers, and which child holds the stream in mid-layer."""

    config: dict[str, Any]
    middle: str | None  # None in a parallel block
    block: str = "pre-ln"
    embedding: float | None = 1.0  # None where it is normalised
    residual: float = 1.0
    tied: bool = False


def _llama(**more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
    return sizes | {"num_key_value_heads": 2, "max_position_embeddings": 64} | more


_GPT = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}
_OPT = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_dim": 96,
    "max_position_embeddings": 64,
}
_OPT |= {"word_embed_proj_dim": 64}
AFTER = "post_attention_layernorm"
TRUTH: dict[str, Truth] = {
    "gpt2": Truth(_GPT, "ln_2", tied=True),
    "gpt_neo": Truth(
        {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "window_size": 5, "max_position_embeddings": 64,
         "attention_types": [[["global", "local"], 1]]}, "ln_2", tied=True,
    ),
    "gpt_neox": Truth(_llama(), None),
    "gptj": Truth(_GPT | {"rotary_dim": 8}, None),
    "opt": Truth(_OPT, "final_layer_norm", tied=True),
    "opt post": Truth(_OPT | {"do_layer_norm_before": False}, "self_attn_layer_norm!", block="post-ln", tied=True),
    "bloom": Truth({"hidden_size": 64, "n_layer": 3, "n_head": 4}, AFTER, embedding=None, tied=True),
    "falcon": Truth({"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}, None, tied=True),
    "falcon serial": Truth(
        {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "parallel_attn": False}, AFTER, tied=True
    ),
    "mpt": Truth({"d_model": 64, "n_layers": 3, "n_heads": 4, "max_seq_len": 64}, "norm_2", tied=True),
    "phi": Truth(_llama(), None),
    "phi3": Truth(_llama(pad_token_id=None), AFTER),
    "llama": Truth(_llama(), AFTER),
    "mistral": Truth(_llama(sliding_window=5), AFTER),
    "mixtral": Truth(_llama(num_local_experts=4), AFTER),
    "qwen2": Truth(_llama(), AFTER),
    "qwen3": Truth(_llama(head_dim=24), AFTER),
    "gemma": Truth(_llama(head_dim=24), AFTER, embedding=8.0, tied=True),
    "gemma2": Truth(_llama(head_dim=24), "pre_feedforward_layernorm", block="peri-ln", embedding=8.0, tied=True),
    "gemma3_text": Truth(_llama(head_dim=24), "pre_feedforward_layernorm", block="peri-ln", embedding=8.0, tied=True),
    "olmo": Truth(_llama(), AFTER),
    "olmo2": Truth(_llama(), "mlp", block="branch-ln"),
    "cohere": Truth(_llama(), None, tied=True),
    "granite": Truth(_llama(embedding_multiplier=12, residual_multiplier=0.22), AFTER, embedding=12.0, residual=0.22),
    "starcoder2": Truth(_llama(), AFTER, tied=True),
    "stablelm": Truth(_llama(), AFTER),
    "stablelm parallel": Truth(_llama(use_parallel_residual=True), None),
    "smollm3": Truth(_llama(pad_token_id=None), AFTER, tied=True),
}  # fmt: skip
KINDS = pytest.mark.parametrize("kind", TRUTH)


@cache
def real(kind: str) -> Any:
    return build({"model_type": kind.split()[0], "vocab_size": 50} | TRUTH[kind].config)


def some_batch(seed: int = 0) -> Tensor:
    return torch.randint(2, 50, (2, 12), generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Of each of the models here."""
    if isinstance(model, NanoGPT):
        return model(tokens, tokens.roll(-1, 1))[1]
    answer = model(tokens)
    return nn.functional.cross_entropy(getattr(answer, "logits", answer).flatten(0, 1), tokens.roll(-1, 1).flatten())


# --- our own transformer ------------------------------------------------------------------------------------------

TINY = replace(preset("tiny"), n_layers=2)
OURS: dict[str, Architecture] = {
    "pre-ln": TINY,
    "scaled": TINY.with_embedding("scaled-embed"),
    "normalised": TINY.with_embedding("embed-ln"),
    "detached": TINY.with_embedding("embed-detach"),
    "parallel": replace(TINY, parallel=True),
    "parallel, one norm": replace(TINY, parallel=True, shared_norm=True),
    "post-ln": replace(TINY, block="post-ln", final_norm=False),
    "deepnorm": replace(TINY, block="post-ln", shortcut_multiplier=2.0, final_norm=False),
    "peri-ln": replace(TINY, block="peri-ln"),
    "branch-ln": replace(TINY, block="branch-ln", norm="rmsnorm", qk_norm="full"),
    "multipliers": replace(TINY, residual_multiplier=0.3, shortcut_multiplier=1.2),
    "gated, grouped": replace(TINY, gated=True, activation="silu", n_kv_heads=1),
    "experts": replace(TINY, n_experts=4),
    "learned, tied, biases": replace(TINY, positions="learned", tied=True, biases=True),
    "sinusoidal": replace(TINY, positions="sinusoidal"),
    "alibi": replace(TINY, positions="alibi"),
    "window, soft-cap": replace(TINY, window=3, attention_softcap=2.0),
}
