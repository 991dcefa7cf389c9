"""The decoder classes of transformers in LLaMA's line: gated feed-forwards (but for two), grouped keys, RoPE.

One function a class, named as its `model_type`: what its config says and what it does by itself, read off
transformers 5. There every class draws all its matrices from N(0, initializer_range^2), untruncated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from theory.architecture import Activation, Architecture
from theory.hf_reader import Reader, UnknownArchitecture
from theory.hf_shared import (
    Rope,
    Scaling,
    either,
    gated,
    read_layer_types,
    read_nope,
    read_rope,
    read_scaling,
    require_unclipped,
    rope_base,
)


def llama(reader: Reader) -> Architecture:
    base = gated(reader, "llama", d_ffn=11008, vocab_size=32000, context=2048)
    return replace(base, biases=either(reader, "attention_bias", "mlp_bias"))


def mistral(reader: Reader) -> Architecture:
    base = gated(reader, "mistral", d_ffn=14336, n_kv_heads=8, vocab_size=32000, context=131072)
    return replace(base, window=reader.optional_integer("sliding_window", 4096) or 0)


def qwen2(reader: Reader) -> Architecture:
    return replace(_qwen(reader, "qwen2"), biases=True)


def qwen3(reader: Reader) -> Architecture:
    return replace(_qwen(reader, "qwen3", d_head=128), qk_norm="head", biases=reader.flag("attention_bias", False))


def gemma(reader: Reader) -> Architecture:
    """Embeddings times sqrt(d_model). Gains are stored less 1: they start at 1, as everywhere."""
    legacy: dict[str, Activation] = {"gelu": "gelu-tanh"}  # what the first published configs meant by it
    activation = reader.activation("hidden_act", "gelu_pytorch_tanh", also=legacy)
    return _gemma(reader, "gemma", activation, d_ffn=24576, n_kv_heads=16, vocab_size=256000, context=8192)


def gemma2(reader: Reader) -> Architecture:
    activation = reader.activation("hidden_activation", "gelu_pytorch_tanh")
    base = _gemma(reader, "gemma2", activation, d_ffn=9216, n_kv_heads=4, vocab_size=256000, context=8192)
    window = reader.optional_integer("sliding_window", 4096) or 0
    return replace(
        read_layer_types(reader, base.n_layers, window, every=2).of(base),
        block="peri-ln",
        attention_scale=1 / math.sqrt(reader.number("query_pre_attn_scalar", 256, positive=True)),
        attention_softcap=reader.optional_number("attn_logit_softcapping", 50.0) or 0.0,
        logit_softcap=reader.optional_number("final_logit_softcapping", 30.0) or 0.0,
    )


def gemma3_text(reader: Reader) -> Architecture:
    """Layers with a window have their own rotary base; the class keeps an attention soft-cap and never applies it."""
    activation = reader.activation("hidden_activation", "gelu_pytorch_tanh")
    tables = reader.table("rope_parameters")
    sliding, full = tables.table("sliding_attention"), tables.table("full_attention")
    local = rope_base(reader, sliding, "rope_local_base_freq", 1e4)
    whole = rope_base(reader, full, "rope_theta", 1e6)
    if read_scaling(sliding) != Scaling():
        raise UnknownArchitecture(
            f"{sliding.place}rope_type slows a window's frequencies; predictions cover the others'"
        )
    older = reader.table("rope_scaling")  # of the layers that see all
    scaling = read_scaling(older if older.data else full)
    base = _gemma(
        reader, "gemma3_text", activation, d_ffn=9216, n_kv_heads=4, vocab_size=262208, context=131072,
        rope=Rope(1.0, whole, scaling),
    )  # fmt: skip
    window = reader.optional_integer("sliding_window", 4096) or 0
    every = 6 if reader.has("layer_types") else reader.integer("sliding_window_pattern", 6)
    windows = read_layer_types(reader, base.n_layers, window, every=every)
    reader.ignored("attn_logit_softcapping", None)
    return replace(
        windows.of(base),
        block="peri-ln",
        qk_norm="head",
        window_rope_base=local if windows.window else None,
        attention_scale=1 / math.sqrt(reader.number("query_pre_attn_scalar", 256, positive=True)),
        logit_softcap=reader.optional_number("final_logit_softcapping", None) or 0.0,
    )


def olmo(reader: Reader) -> Architecture:
    """LayerNorm without gain or bias; its eps is not in the config."""
    base = gated(reader, "olmo", d_ffn=11008, vocab_size=50304, context=2048, eps=1e-5, pad=1)
    require_unclipped(reader, base)
    return replace(base, norm="layernorm", biases=reader.flag("attention_bias", False))


def olmo2(reader: Reader) -> Architecture:
    """A norm after each sub-layer and none before; queries and keys normalised over all their heads at once."""
    eps = reader.number("rms_norm_eps", 1e-5)
    base = gated(reader, "olmo2", d_ffn=11008, vocab_size=50304, context=2048, eps=eps, pad=1)
    return replace(base, block="branch-ln", qk_norm="full", biases=reader.flag("attention_bias", False))


def granite(reader: Reader) -> Architecture:
    """Its attention multiplier, 1 unless given, takes the place of 1/sqrt(d_head)."""
    base = gated(reader, "granite", d_ffn=11008, vocab_size=32000, context=2048)
    return replace(
        base,
        biases=either(reader, "attention_bias", "mlp_bias"),
        embedding_multiplier=reader.number("embedding_multiplier", 1.0),
        residual_multiplier=reader.number("residual_multiplier", 1.0),
        attention_scale=reader.number("attention_multiplier", 1.0),
        logit_multiplier=1 / reader.number("logits_scaling", 1.0, positive=True),
    )


def phi(reader: Reader) -> Architecture:
    base = gated(
        reader, "phi", d_ffn=8192, vocab_size=51200, context=2048, rope=read_rope(reader, fraction=0.5),
        activation=reader.activation("hidden_act", "gelu_new"), eps=reader.number("layer_norm_eps", 1e-5),
    )  # fmt: skip
    qk_norm = "head" if reader.flag("qk_layernorm", False) else "none"
    return replace(
        base, norm="layernorm", gated=False, parallel=True, shared_norm=True, qk_norm=qk_norm, biases=True
    )  # fmt: skip


def phi3(reader: Reader) -> Architecture:
    eps, rope = reader.number("rms_norm_eps", 1e-5), read_rope(reader, fraction=1.0)
    base = gated(reader, "phi3", d_ffn=8192, vocab_size=32064, context=4096, eps=eps, rope=rope, pad=32000)
    return replace(base, window=reader.optional_integer("sliding_window", None) or 0)


def cohere(reader: Reader) -> Architecture:
    base = gated(
        reader, "cohere", d_ffn=22528, vocab_size=256000, context=8192, eps=reader.number("layer_norm_eps", 1e-5),
        rope=read_rope(reader, base=500_000.0), pad=0, tied=True,
    )  # fmt: skip
    return replace(
        base,
        norm="layernorm",
        parallel=True,
        shared_norm=True,
        qk_norm="head" if reader.flag("use_qk_norm", False) else "none",
        biases=reader.flag("attention_bias", False),
        logit_multiplier=reader.number("logit_scale", 0.0625),
    )


def starcoder2(reader: Reader) -> Architecture:
    base = gated(
        reader, "starcoder2", d_ffn=12288, n_kv_heads=2, vocab_size=49152, context=4096, tied=True,
        activation=reader.activation("hidden_act", "gelu_pytorch_tanh"), eps=reader.number("norm_epsilon", 1e-5),
        spread=reader.spread(default=0.018042),
    )  # fmt: skip
    window = reader.optional_integer("sliding_window", None) or 0
    return replace(base, norm="layernorm", gated=False, window=window, biases=reader.flag("use_bias", True))


def stablelm(reader: Reader) -> Architecture:
    base = gated(
        reader, "stablelm", d_ffn=6912, n_kv_heads=32, vocab_size=50304, context=4096,
        eps=reader.number("layer_norm_eps", 1e-5), rope=read_rope(reader, fraction=0.25),
    )  # fmt: skip
    parallel = reader.flag("use_parallel_residual", False)
    return replace(
        base,
        norm="layernorm",
        parallel=parallel,
        shared_norm=parallel,
        qk_norm="head" if reader.flag("qk_layernorm", False) else "none",
        biases=reader.flag("use_qkv_bias", False),
    )


def smollm3(reader: Reader) -> Architecture:
    """No rotary positions in every fourth layer."""
    base = gated(
        reader, "smollm3", d_ffn=11008, n_kv_heads=4, vocab_size=128256, context=32768, pad=128004, tied=True,
        rope=read_rope(reader, base=2_000_000.0),
    )  # fmt: skip
    every = read_nope(reader, base.n_layers, default=4)
    window = reader.optional_integer("sliding_window", None) or 0
    if reader.flag("use_sliding_window", False) and window and not reader.has("layer_types"):
        raise UnknownArchitecture("use_sliding_window is true; predictions cover windows in all layers but every k-th")
    return replace(
        read_layer_types(reader, base.n_layers, window, every=None).of(base),
        positions="none" if every == 1 else "rope",
        nope_every=0 if every == 1 else every,
        biases=either(reader, "attention_bias", "mlp_bias"),
    )


def _qwen(reader: Reader, name: str, *, d_head: int | None = None) -> Architecture:
    """No window, unless `use_sliding_window`: then in the layers from `max_window_layers` on."""
    base = gated(reader, name, d_ffn=22016, n_kv_heads=32, d_head=d_head, vocab_size=151936, context=32768)
    window = 0
    if reader.flag("use_sliding_window", False):
        window = reader.optional_integer("sliding_window", 4096) or 0
    if window and not reader.has("layer_types"):
        full = reader.integer("max_window_layers", 28, lowest=0)
        if 0 < full < base.n_layers:
            raise UnknownArchitecture(f"max_window_layers is {full} of {base.n_layers}; predictions cover all or none")
        return replace(base, window=0 if full else window)
    return read_layer_types(reader, base.n_layers, window, every=None).of(base)


def _gemma(
    reader: Reader,
    name: str,
    activation: Activation,
    *,
    d_ffn: int,
    n_kv_heads: int,
    vocab_size: int,
    context: int,
    rope: Rope | None = None,
) -> Architecture:
    """What Gemma 1 to 3 share."""
    reader.expect("use_bidirectional_attention", False, "causal attention")
    base = gated(
        reader,
        name,
        d_ffn=d_ffn,
        n_kv_heads=n_kv_heads,
        d_head=256,
        vocab_size=vocab_size,
        context=context,
        tied=True,
        pad=0,
        activation=activation,
        rope=rope,
    )
    biases = reader.flag("attention_bias", False)
    return replace(base, embedding_multiplier=math.sqrt(base.d_model), biases=biases)


LLAMA_CLASSES: dict[str, Callable[[Reader], Architecture]] = {
    function.__name__: function
    for function in (
        llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3_text, olmo, olmo2, granite, phi, phi3, cohere,
        starcoder2, stablelm, smollm3,
    )
}  # fmt: skip
