"""What is read from a config, against the class of transformers that it is the config of: built, run and looked into.

The logits of the class are compared with those of `helpers.reference`, which computes what an `Architecture` says
with the class's own weights: norms and their places, positions, windows, scales, soft-caps and multipliers at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from theory.architecture import Architecture
from theory.hf_config import CLASSES, KNOWN, UnknownArchitecture, parse_config
from theory.initialisation import Init
from theory.kernels import activation_function

transformers = pytest.importorskip("transformers")

from helpers import reference  # noqa: E402  (after the skip: they import transformers)
from helpers.real_classes import FIRST_TOKEN, REAL, TINY, blocks, build  # noqa: E402

# The classes compute in float32 (of unit 6e-8), and here some 50 sums after each other of up to 52 terms.
TOLERANCE = 2.0**-15
LENGTH = 12

FULL, SLIDING = "full_attention", "sliding_attention"
# The first pair turns 2.5 times in 16 tokens, the second a quarter: one is between, the others are slow.
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
ALTERNATE = {"sliding_window": 5, "layer_types": [FULL, SLIDING, FULL, SLIDING]}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "gpt2": [
        {"n_inner": None},
        {"scale_attn_weights": False},
        {"tie_word_embeddings": False},
        {"activation_function": "relu"},
        {"layer_norm_epsilon": 0.1},
    ],
    "gptj": [{"rotary_dim": 8}, {"tie_word_embeddings": True}, {"n_inner": 40}, {"activation_function": "relu2"}],
    "gpt_neo": [
        {"attention_types": [[["local"], 4]]},
        {"attention_types": [[["global"], 4]]},
        {"attention_types": [[["local"], 1], [["local", "global"], 1], [["local"], 1]]},
        {"attention_types": [[["local", "global"], 2]], "window_size": 3},
        {"intermediate_size": 40},
    ],
    "gpt_neox": [
        {"use_parallel_residual": False},
        {"rotary_pct": 0.5, "rotary_emb_base": 100},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0}},
        {"attention_bias": False},
    ],
    "opt": [
        {"do_layer_norm_before": False},
        {"_remove_final_layer_norm": True},
        {"enable_bias": False},
        {"layer_norm_elementwise_affine": False},
        {"pad_token_id": None},
        {"init_std": 0.02, "initializer_range": 0.2},
    ],
    "bloom": [{"hidden_size": 32, "n_head": 4}, {"tie_word_embeddings": False}, {"pad_token_id": 3}],
    "falcon": [
        {"multi_query": False},
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        {"parallel_attn": False},
        {"parallel_attn": False, "multi_query": False, "bias": True},
        {"rope_theta": 50.0, "activation": "relu"},
    ],
    "mpt": [
        {"attn_config": {"softmax_scale": 0.7}},
        {"attn_config": {"alibi": False, "qk_ln": True, "clip_qkv": 100.0}, "expansion_ratio": 2, "no_bias": False},
        {"d_model": 32, "n_heads": 4},
    ],
    "llama": [
        {"tie_word_embeddings": True, "pad_token_id": 7},
        {"head_dim": 10},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"rope_theta": 100.0},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": LLAMA3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 70.0, "partial_rotary_factor": 0.5}},
        {"num_key_value_heads": None},
    ],
    "mistral": [{"sliding_window": None}, {"head_dim": 10, "sliding_window": 2}, {"rope_theta": 9.0}],
    "qwen2": [
        {"sliding_window": 5},
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 4},
        {"use_sliding_window": True, **ALTERNATE},
        {"tie_word_embeddings": True},
    ],
    "qwen3": [{"attention_bias": True}, {"use_sliding_window": True, **ALTERNATE}, {"rms_norm_eps": 0.1}],
    "gemma": [{"hidden_act": "gelu"}, {"hidden_act": "relu"}, {"pad_token_id": None}, {"tie_word_embeddings": False}],
    "gemma2": [
        {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0},
        ALTERNATE,
        {"layer_types": [FULL] * 4},
        {"layer_types": [SLIDING] * 4, "attention_bias": True},
        {"layer_types": [SLIDING, SLIDING, FULL, SLIDING]},
    ],
    "gemma3_text": [
        {"sliding_window_pattern": 3},
        {"sliding_window_pattern": 7},
        {"rope_theta": 500.0, "rope_local_base_freq": 20.0, "sliding_window_pattern": 2},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 2},
        {"rope_parameters": {FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 50.0}}},
        {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0},
        {"layer_types": [FULL] * 6, "rope_theta": 50.0},
    ],
    "olmo": [{"clip_qkv": 30.0}, {"tie_word_embeddings": True}, {"attention_bias": True}, {"pad_token_id": None}],
    "olmo2": [{"num_key_value_heads": 4}, {"rms_norm_eps": 0.1}, {"tie_word_embeddings": True}],
    "granite": [
        {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0, "logits_scaling": 1.0},
        {"embedding_multiplier": 5, "residual_multiplier": 0.22, "attention_multiplier": 0.1, "logits_scaling": 16},
        {"mlp_bias": True},
    ],
    "phi": [{"qk_layernorm": True}, {"partial_rotary_factor": 1.0}, {"num_key_value_heads": 4}, {"rope_theta": 50.0}],
    "phi3": [{"sliding_window": 5}, {"partial_rotary_factor": 0.5}, {"pad_token_id": 3}, {"rope_theta": 50.0}],
    "cohere": [{"use_qk_norm": True}, {"logit_scale": 0.5}, {"rope_theta": 100.0}, {"attention_bias": True}],
    "starcoder2": [{"sliding_window": 5}, {"use_bias": False}, {"tie_word_embeddings": False}],
    "stablelm": [
        {"use_parallel_residual": True},
        {"qk_layernorm": True},
        {"use_qkv_bias": True},
        {"partial_rotary_factor": 0.5, "rope_theta": 50.0},
    ],
    "smollm3": [
        {"no_rope_layer_interval": 2},
        {"no_rope_layer_interval": 1},
        {"no_rope_layer_interval": 5},
        {"no_rope_layers": [1, 1, 0, 1]},
        {"sliding_window": 5, "use_sliding_window": True, "layer_types": [SLIDING, FULL, SLIDING, FULL]},
        {"attention_bias": True, "pad_token_id": 3},
    ],
    "mixtral": [{"sliding_window": 5}, {"num_experts_per_tok": 1}, {"num_experts_per_tok": 5}, {"rope_theta": 9.0}],
    "olmoe": [{"norm_topk_prob": True}, {"num_experts_per_tok": 6}, {"attention_bias": True}, {"clip_qkv": 30.0}],
    "qwen3_moe": [
        {"norm_topk_prob": True},
        {"use_sliding_window": True, "sliding_window": 5},
        {"mlp_only_layers": []},
        {"attention_bias": True},
    ],
}
CASES = pytest.mark.parametrize(
    "config",
    [
        pytest.param(json.dumps(TINY[kind] | change), id=f"{kind} {json.dumps(change)}")
        for kind in TINY
        for change in [{}, *VARIANTS[kind]]
    ],
)
KINDS = pytest.mark.parametrize("kind", TINY)


def test_every_known_class_is_held_to_the_real_one() -> None:
    assert CLASSES.keys() == TINY.keys() == REAL.keys() == VARIANTS.keys() == set(KNOWN.split(", "))


# --- what the class computes ----------------------------------------------------------------------------------------


@cache
def tiny(config: str) -> tuple[Any, Architecture]:
    """The class, and what is read from its config (as JSON)."""
    return build(json.loads(config)), parse_config(json.loads(config)).architecture


@CASES
def test_the_class_computes_what_is_read(config: str) -> None:
    """And the same is read from the file, from what the class makes of it, and from what it would save."""
    model, read = tiny(config)
    written = model.config.to_dict()
    saved = json.loads(model.config.to_json_string())
    tokens = torch.randint(FIRST_TOKEN, read.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        real = model(input_ids=tokens, use_cache=False).logits.double()
    weights = reference.weights(model, read)
    for architecture in {read, parse_config(written).architecture, parse_config(saved).architecture}:
        assert disagreement(real, reference.logits(architecture, weights, tokens)) < TOLERANCE
    # Control: with any one setting that matters here read differently, it would not.
    for change, other in wrong_readings(read):
        assert disagreement(real, reference.logits(other, weights, tokens)) > 30 * TOLERANCE, change


def disagreement(real: Tensor, ours: Tensor) -> float:
    """Largest difference of the logits, in units of their standard deviation."""
    return float((real - ours).abs().max() / real.std())


def wrong_readings(a: Architecture) -> Iterator[tuple[str, Architecture]]:
    """`a` with one setting changed, for each that is at work in it."""

    def with_(**changes: Any) -> tuple[str, Architecture]:
        return str(changes), replace(a, **changes)

    if a.block == "pre-ln":
        yield with_(parallel=not a.parallel, shared_norm=False)
    if not a.parallel:
        yield with_(block="peri-ln" if a.block != "peri-ln" else "branch-ln")
    if a.block != "post-ln":  # there a second norm changes nothing
        yield with_(final_norm=not a.final_norm)
    yield with_(embedding_norm=not a.embedding_norm)
    yield with_(norm="rmsnorm" if a.norm == "layernorm" else "layernorm")
    yield with_(activation="silu" if a.activation == "relu" else "relu")
    if a.n_experts > 1:
        yield with_(experts_per_token=a.experts_per_token + (1 if a.experts_per_token < a.n_experts else -1))
        if a.experts_per_token < a.n_experts:  # over all of them both softmaxes are one
            yield with_(gates_renormalised=not a.gates_renormalised)
    yield with_(qk_norm="none" if a.qk_norm != "none" else "head")
    if a.n_heads > 1 and a.qk_norm != "none":
        yield with_(qk_norm="head" if a.qk_norm == "full" else "full")
    yield with_(attention_scale=1.1 * a.logit_scale)
    yield with_(residual_multiplier=1.1 * a.residual_multiplier)
    yield with_(logit_multiplier=1.1 * a.logit_multiplier)
    if not a.embedding_norm:
        yield with_(embedding_multiplier=1.1 * a.embedding_multiplier)
    for cap in ("attention_softcap", "logit_softcap"):
        yield with_(**{cap: 0.0 if getattr(a, cap) else 1.0})
    yield with_(positions="none" if a.positions != "none" else "rope")
    if a.positions == "rope":
        bases = {a.rope_base_at(layer) for layer in range(a.n_layers)}
        if a.rope_base in bases:
            yield with_(rope_base=2 * a.rope_base)
        if a.rope_base in bases:
            yield with_(rope_stretch=1.3 * a.rope_stretch)
        if a.rope_original:
            yield from (with_(rope_original=0), with_(rope_low=1.3 * a.rope_low), with_(rope_high=2 * a.rope_high))
        if a.window_rope_base is not None:
            yield with_(window_rope_base=2 * a.window_rope_base)
        if a.rope_width % 4 == 0:
            yield with_(rope_fraction=a.rope_fraction / 2)
        yield with_(nope_every=0 if a.nope_every else 3)
    if a.window:
        yield with_(window=a.window - 1)
        yield with_(window=a.window + 1)
        yield with_(window=0)
    else:
        yield with_(window=5)
    if a.global_every and any(a.window_at(layer) == 0 for layer in range(a.n_layers)):
        yield with_(global_every=0)
        yield with_(global_first=not a.global_first)


def test_falcon_divides_alibis_slopes() -> None:
    """Why its `alibi` is unknown: the class does not compute what `positions='alibi'` says."""
    model = build(TINY["falcon"] | {"alibi": True})
    plain = replace(parse_config(TINY["falcon"]).architecture, positions="alibi")
    tokens = torch.arange(FIRST_TOKEN, FIRST_TOKEN + LENGTH)[None]
    with torch.no_grad():
        real = model(input_ids=tokens, use_cache=False).logits.double()
    assert disagreement(real, reference.logits(plain, reference.weights(model, plain), tokens)) > 30 * TOLERANCE
    with pytest.raises(UnknownArchitecture, match="alibi is true"):
        parse_config(TINY["falcon"] | {"alibi": True})


# --- what it is made of ---------------------------------------------------------------------------------------------


@CASES
def test_the_class_is_made_of_what_is_read(config: str) -> None:
    model, a = tiny(config)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert a.tied == (table is head)
    assert a.padding_row == bool((table.detach() == 0).all(dim=1).any())
    matrices = {name: p for name, p in model.named_parameters() if reference.matrices_in(name)}
    extra = 2 * a.d_model if a.name == "opt" else 0  # two positions that no token has
    assert a.n_weights == sum(p.numel() for p in matrices.values()) - extra
    gains = {id(p) for module in model.modules() if is_norm(module) for p in module.parameters()}
    biases = {name: p for name, p in model.named_parameters() if name not in matrices and id(p) not in gains}
    assert all(name.endswith("bias") and not p.any() for name, p in biases.items())
    assert a.biases == any(name.startswith(prefix(model)) for name in biases)


@CASES
def test_norms_are_as_read(config: str) -> None:
    """Their number, and each one's output on a small input with a mean: its kind, its eps, its gain of 1."""
    model, a = tiny(config)
    norms = {name: module for name, module in model.named_modules() if is_norm(module)}
    queries = {name for name in norms if ".q_" in name or ".k_" in name}
    assert bool(queries) == (a.qk_norm != "none")
    a_layer = {"pre-ln": 1 if a.shared_norm else 2, "post-ln": 2, "branch-ln": 2, "peri-ln": 4}[a.block]
    assert len(norms) - len(queries) == a.n_layers * a_layer + a.final_norm + a.embedding_norm
    generator = torch.Generator().manual_seed(2)
    for name, norm in norms.items():
        weight = getattr(norm, "weight", None)
        shape = (a.d_model,) if weight is None else tuple(weight.shape)
        x = 0.3 * math.sqrt(a.eps) * (1 + torch.randn(3, *shape, generator=generator))
        with torch.no_grad():
            out = norm(x).double()
        x = x.double()
        assert torch.allclose(out, reference.normalised(a, x), atol=1e-5), name
        assert not torch.allclose(out, reference.normalised(replace(a, eps=1.1 * a.eps), x), atol=1e-5), name


def prefix(model: Any) -> str:
    """What the names of the layers' parameters begin with."""
    layers = blocks(model)
    return next(name for name, module in model.named_modules() if module is layers) + "."


def is_norm(module: nn.Module) -> bool:
    """A normalisation itself, not a list of them."""
    return "Norm" in type(module).__name__ and not any(True for _ in module.children())


@KINDS
def test_the_activation_is_as_read(kind: str) -> None:
    block, a = blocks(build(TINY[kind]))[0], parse_config(TINY[kind]).architecture
    names = ("act", "act_fn", "activation_fn", "gelu_impl")
    act = next(module for name, module in block.named_modules() if name.split(".")[-1] in names)
    z = torch.linspace(-4, 4, 33, dtype=torch.float64)
    # BLOOM writes sqrt(2/pi) with 8 digits.
    assert act(z).numpy() == pytest.approx(activation_function(a.activation, z.numpy()), abs=1e-8)


# --- how it starts --------------------------------------------------------------------------------------------------


@cache
def real(kind: str) -> Any:
    return build(REAL[kind])


@KINDS
def test_every_matrix_starts_as_the_class_starts_it(kind: str) -> None:
    """Tensor by tensor: the relative standard error of a standard deviation over n normal entries is 1/sqrt(2n)."""
    a, seen = parse_config(REAL[kind]).architecture, set[str]()
    for name, entries in drawn(real(kind), a):
        expected = reference.std_of(a.layer_stds(reference.layer_of(name)), name)
        assert float(entries.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * entries.numel())), name
        assert abs(float(entries.mean())) < 5 * expected / math.sqrt(entries.numel()), name
        seen |= set(reference.matrices_in(name))
    absent = {"position"} if a.positions != "learned" else set[str]()
    absent |= ({"ffn_gate"} if not a.gated else set()) | ({"head"} if a.tied else set())
    absent |= {"router"} if not a.n_experts else set()
    assert seen == set(a.stds._fields) - absent


@KINDS
def test_every_matrix_is_drawn_from_the_distribution_that_is_read(kind: str) -> None:
    """By the fourth moment: 3 for a normal, 2.8 cut at 3 standard deviations, 1.8 for a uniform."""
    a = parse_config(REAL[kind]).architecture
    assert a.init.distribution == "normal"
    for name, entries in drawn(real(kind), a):
        assert abs(kurtosis(entries) - 3) < 5 * math.sqrt(24 / entries.numel()), name


@KINDS
def test_a_cut_would_show(kind: str) -> None:
    """Control, on as many entries as the class's largest matrix has."""
    size = max(entries.numel() for _, entries in drawn(real(kind), parse_config(REAL[kind]).architecture))
    cut = nn.init.trunc_normal_(torch.empty(size), a=-3.0, b=3.0, generator=torch.Generator().manual_seed(0))
    assert abs(kurtosis(cut) - 3) > 5 * math.sqrt(24 / size)


def kurtosis(entries: Tensor) -> float:
    square = ((entries - entries.mean()) / entries.std()).square()
    return float(square.square().mean())


def drawn(model: Any, a: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Each matrix's entries, without the padding token's row."""
    for name, parameter in model.named_parameters():
        if reference.matrices_in(name):
            matrix = parameter.detach()
            yield name, matrix[matrix.abs().amax(dim=-1) > 0] if a.padding_row else matrix


@KINDS
def test_another_spread_is_read(kind: str) -> None:
    """Control of the above: the tiny ones are drawn with 0.25, and a depth-scaled reading of them would show."""
    model, a = build(TINY[kind]), parse_config(TINY[kind]).architecture
    wrong = replace(a, init=replace(a.init, depth_scaled=not a.init.depth_scaled))
    for name, entries in drawn(model, a):
        std, allowed = float(entries.std()), 5 / math.sqrt(2 * entries.numel())
        layer = reference.layer_of(name)
        assert std == pytest.approx(reference.std_of(a.layer_stds(layer), name), rel=allowed)
        if reference.matrices_in(name)[0] in ("output", "ffn_out"):
            assert std != pytest.approx(reference.std_of(wrong.layer_stds(layer), name), rel=allowed)


def test_only_gpt2_shrinks_its_writers() -> None:
    inits: dict[str, Init] = {kind: parse_config(config).architecture.init for kind, config in REAL.items()}
    assert {kind for kind, init in inits.items() if init.depth_scaled} == {"gpt2"}
