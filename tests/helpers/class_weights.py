"""Weights of published classes (transformers) under this project's names and in its layout."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from theory.architecture import Architecture

# In a layer, by class; three names are a fused matrix. `gate_proj` is the factor that goes through the activation.
LLAMA = {
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.output",
    "self_attn.q_norm": "attention.query_norm",
    "self_attn.k_norm": "attention.key_norm",
    "mlp.gate_proj": "feedforward.enter",
    "mlp.up_proj": "feedforward.gate",
    "mlp.down_proj": "feedforward.leave",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "feedforward_norm",
}
GPT2 = {
    "attn.c_attn": ("attention.query", "attention.key", "attention.value"),
    "attn.c_proj": "attention.output",
    "mlp.c_fc": "feedforward.enter",
    "mlp.c_proj": "feedforward.leave",
    "ln_1": "attention_norm",
    "ln_2": "feedforward_norm",
}
NEOX = {
    "attention.query_key_value": ("attention.query", "attention.key", "attention.value"),
    "attention.dense": "attention.output",
    "mlp.dense_h_to_4h": "feedforward.enter",
    "mlp.dense_4h_to_h": "feedforward.leave",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "feedforward_norm",
}
IN_A_LAYER: dict[str, Mapping[str, str | tuple[str, ...]]] = {
    "llama": LLAMA,
    "qwen3": LLAMA,
    "mixtral": LLAMA | {"mlp.gate": "feedforward.router"},
    "olmoe": LLAMA | {"mlp.gate": "feedforward.router"},
    "gemma": LLAMA,
    "granite": LLAMA,
    "cohere": LLAMA,
    "arcee": LLAMA | {"mlp.up_proj": "feedforward.enter"},
    "olmo2": LLAMA
    | {"post_attention_layernorm": "attention_out_norm", "post_feedforward_layernorm": "feedforward_out_norm"},
    "gemma2": LLAMA
    | {
        "post_attention_layernorm": "attention_out_norm",
        "pre_feedforward_layernorm": "feedforward_norm",
        "post_feedforward_layernorm": "feedforward_out_norm",
    },
    "gpt2": GPT2,
    "openai-gpt": GPT2 | {"ln_1": "attention_out_norm", "ln_2": "feedforward_out_norm"},
    "gpt_neox": NEOX,
    "bloom": NEOX
    | {
        "self_attention.query_key_value": ("attention.query", "attention.key", "attention.value"),
        "self_attention.dense": "attention.output",
    },
    "mpt": {
        "attn.Wqkv": ("attention.query", "attention.key", "attention.value"),
        "attn.out_proj": "attention.output",
        "ffn.up_proj": "feedforward.enter",
        "ffn.down_proj": "feedforward.leave",
        "norm_1": "attention_norm",
        "norm_2": "feedforward_norm",
    },
    "ctrl": {
        "multi_head_attention.Wq": "attention.query",
        "multi_head_attention.Wk": "attention.key",
        "multi_head_attention.Wv": "attention.value",
        "multi_head_attention.dense": "attention.output",
        "ffn.0": "feedforward.enter",
        "ffn.2": "feedforward.leave",
        "layernorm1": "attention_norm",
        "layernorm2": "feedforward_norm",
    },
}
OUTSIDE = {
    "tokens": ("wte", "embed_tokens", "embed_in", "word_embeddings", "tokens_embed", "w"),
    "positions": ("wpe", "positions_embed"),
    "embedding_norm": ("word_embeddings_layernorm",),
    "norm": ("ln_f", "norm", "norm_f", "final_layer_norm", "layernorm"),
    "head": ("lm_head",),
}


def renamed(kind: str, a: Architecture, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights or gradients of a class under this project's names and in its layout; a linear map."""
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        stem, suffix = name.rsplit(".", 1)
        inside = re.search(r"\.(\d+)\.(.+)$", stem)
        if inside is None:
            last = stem.split(".")[-1]
            (ours,) = (ours for ours, theirs in OUTSIDE.items() if last in theirs)
            found[f"{ours}.{suffix}"] = value
            continue
        if kind in ("gpt2", "openai-gpt"):
            value = value.mT if value.ndim == 2 else value  # these keep matrices as (inputs, outputs)
        if inside[2].endswith("experts"):  # (E, outputs, inputs), the activation's matrix and the gate's fused
            fields, values = {"gate_up_proj": ("enter", "gate"), "down_proj": ("leave",)}[suffix], value.unbind()
            for e, matrix in enumerate(values):
                for ours, part in zip(fields, matrix.chunk(len(fields)), strict=True):
                    found[f"layers.{inside[1]}.feedforward.experts.{e}.{ours}.weight"] = part
            continue
        names = IN_A_LAYER[kind][inside[2]]
        if isinstance(names, str):
            if kind == "cohere" and names in ("attention.query", "attention.key"):
                # Neighbours turn together there; here it is coordinates half a head apart.
                value = value.unflatten(0, (-1, a.d_head // 2, 2)).transpose(1, 2).flatten(0, 2)
            names, parts = (names,), (value,)
        elif kind in ("gpt_neox", "bloom"):  # a head's query, key and value are next to each other
            parts = (part.flatten(0, 1) for part in value.unflatten(0, (a.n_heads, 3, a.d_head)).unbind(1))
        else:
            parts = value.chunk(3)
        found |= {f"layers.{inside[1]}.{ours}.{suffix}": part for ours, part in zip(names, parts, strict=True)}
    return in_pairs(found, a) if kind == "ctrl" else found


def in_pairs(tensors: dict[str, Tensor], a: Architecture) -> dict[str, Tensor]:
    """The residual stream's coordinates in another order: sines and cosines in turn, not one half each."""
    order = torch.arange(a.d_model).view(2, -1).T.flatten()
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        writes = any(part in name for part in ("output", "leave", "norm"))
        reads = not writes and value.ndim == 2
        found[name] = value[order] if writes else value[:, order] if reads else value
    return found
