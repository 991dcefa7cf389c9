"""The decoder classes of transformers whose feed-forwards are experts behind a router.

As in `theory.hf_llama`, one function a class. The router's matrix is drawn like all others, no token is dropped, and
what balances the experts is a term of the loss that these functions do not see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from theory.architecture import Architecture
from theory.hf_reader import Reader, UnknownArchitecture
from theory.hf_shared import gated, read_rope, require_unclipped


def mixtral(reader: Reader) -> Architecture:
    """Gates are a softmax over the chosen experts."""
    base = gated(
        reader, "mixtral", d_ffn=14336, n_kv_heads=8, vocab_size=32000, context=131072,
        eps=reader.number("rms_norm_eps", 1e-5), rope=read_rope(reader, base=1e6),
    )  # fmt: skip
    jitter = reader.number("router_jitter_noise", 0.0)
    if jitter:
        raise UnknownArchitecture(f"router_jitter_noise is {jitter:g}; predictions cover routers without noise")
    window = reader.optional_integer("sliding_window", None) or 0
    return _routed(reader, replace(base, window=window), "num_local_experts", experts=8, chosen=2, renormalised=True)


def olmoe(reader: Reader) -> Architecture:
    """Queries and keys normalised over all their heads at once; gates are a softmax over all experts."""
    base = gated(
        reader, "olmoe", d_ffn=2048, vocab_size=50304, context=4096, eps=reader.number("rms_norm_eps", 1e-5), pad=1
    )
    require_unclipped(reader, base)
    base = replace(base, qk_norm="full", biases=reader.flag("attention_bias", False))
    return _routed(reader, base, "num_experts", experts=64, chosen=8)


def qwen3_moe(reader: Reader) -> Architecture:
    """Experts in every layer alone; gates are a softmax over all experts."""
    base = gated(
        reader, "qwen3_moe", d_ffn=768, hidden="moe_intermediate_size", n_kv_heads=4, vocab_size=151936, context=32768
    )
    step = reader.integer("decoder_sparse_step", 1)
    if step != 1 or reader.data.get("mlp_only_layers"):
        raise UnknownArchitecture("some layers have a single feed-forward; predictions cover experts in all or none")
    window = 0
    if reader.flag("use_sliding_window", False):
        window = reader.optional_integer("sliding_window", 4096) or 0
    base = replace(base, qk_norm="head", window=window, biases=reader.flag("attention_bias", False))
    return _routed(reader, base, "num_local_experts", experts=128, chosen=8)


def _routed(
    reader: Reader, base: Architecture, key: str, *, experts: int, chosen: int, renormalised: bool | None = None
) -> Architecture:
    """`base` with experts; `renormalised` None: the config says it, and by default they are not."""
    if renormalised is None:
        renormalised = reader.flag("norm_topk_prob", False)
    return replace(
        base,
        n_experts=reader.integer(key, experts),
        experts_per_token=reader.integer("num_experts_per_tok", chosen),
        gates_renormalised=renormalised,
    )


EXPERT_CLASSES: dict[str, Callable[[Reader], Architecture]] = {
    function.__name__: function for function in (mixtral, olmoe, qwen3_moe)
}
ALIASES = {
    "mixtral": {"num_local_experts": "num_experts"},
    "olmoe": {"num_experts": "num_local_experts"},
    "qwen3_moe": {"num_local_experts": "num_experts"},
}
