"""The sub-layers of an architecture, as they act on Gram matrices at initialisation."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from theory.architecture import Architecture
from theory.gram_maps import AttentionMap, AttentionModel, FeedForwardMap, alibi_slopes, rotation_correlation
from theory.grams import Blocks, Gram, causal
from theory.logits import attention_logits
from theory.routing import Routing


def attention_map(
    architecture: Architecture, blocks: Blocks, layer: int, model: AttentionModel = "expanded"
) -> AttentionMap:
    """Attention of one layer, as it acts on Gram matrices over `blocks`."""
    a = architecture
    slopes = alibi_slopes(a.n_heads) if a.positions == "alibi" else (0.0,)
    window = a.window_at(layer)
    stds, base, logits = a.layer_stds(layer), a.rope_base_at(layer), attention_logits(a, layer)
    return AttentionMap(
        value=value_gain(a, layer),
        logits=logits.variance,
        averagings=tuple(causal(blocks, window=window, slope=slope) for slope in slopes),
        rotation=None if base is None else _rotation(a, base, a.rope_slowing(layer), tuple(blocks.sizes.tolist())),
        qk_eps=None if a.qk_norm == "none" else a.eps / max(a.d_model * stds.query * stds.key, 1e-300),
        query_gain=logits.queries,
        key_gain=logits.keys,
        capped=logits.capped,
        model=model,
    )


def feedforward_map(architecture: Architecture, layer: int) -> FeedForwardMap:
    """The feed-forward sub-layer of one layer, as it acts on Gram matrices."""
    a, stds = architecture, architecture.layer_stds(layer)
    return FeedForwardMap(
        activation=a.activation,
        enter=stds.ffn_in**2 * a.d_model,
        gate=stds.ffn_gate**2 * a.d_model if a.gated else None,
        leave=stds.ffn_out**2 * a.d_ffn,
        routing=routing(a, layer) if a.n_experts else None,
    )


def routing(architecture: Architecture, layer: int) -> Routing:
    """The router of one layer."""
    a = architecture
    return Routing(
        experts=a.n_experts,
        chosen=a.experts_per_token,
        gain=a.layer_stds(layer).router ** 2 * a.d_model,
        renormalised=a.gates_renormalised,
    )


@lru_cache(maxsize=32)
def _rotation(architecture: Architecture, base: float, slowing: tuple[float, ...], sizes: tuple[float, ...]) -> Gram:
    a, size = architecture, np.array(sizes)
    distances = Blocks(size, np.concatenate([[0.0], np.cumsum(size)[:-1]])).distances()
    return rotation_correlation(a.d_head, a.rope_width, base, distances, slowing)


def value_gain(architecture: Architecture, layer: int) -> float:
    """c_V c_O: variance gain of the value and output matrices together."""
    stds, heads = architecture.layer_stds(layer), architecture.n_heads * architecture.d_head
    return architecture.d_model * stds.value**2 * heads * stds.output**2
