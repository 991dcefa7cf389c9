"""The same function as the published classes (transformers), with the same weights: logits and every gradient.

The classes work in float32 in places (normalisations, softmaxes, rotary angles) whatever their weights are. Here
these places are widened to float64, so that nothing but the function itself can differ; unwidened they are held
against the network in float32.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.class_weights import renamed
from helpers.weights import architecture, generator
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from empirics.model import Transformer
from theory.architecture import Architecture

os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCAB, LENGTH, BATCH = 37, 12, 2


class InFloat64(TorchFunctionMode):
    """Every conversion to float32, and every tensor made as float32, is float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


# --- the cases ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A class at a size: its config, the architecture that it is, and descriptions that are nearly it but wrong."""

    kind: str
    config: dict[str, Any]
    ours: dict[str, Any]
    wrong: tuple[dict[str, Any], ...]
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def architecture(self) -> Architecture:
        sizes = {
            "d_model": 30, "n_layers": 2, "n_heads": 6, "n_kv_heads": 6, "d_head": 5, "d_ffn": 44,
            "vocab_size": VOCAB, "context": 16,
        }  # fmt: skip
        return architecture(**(sizes | self.sizes | self.ours))


def llama_like(
    kind: str, ours: dict[str, Any], *wrong: dict[str, Any], n_layers: int = 2, n_kv_heads: int = 2, **config: Any
) -> Case:
    """Grouped heads that are wider than the model's share."""
    common = {
        "hidden_size": 30, "intermediate_size": 44, "num_hidden_layers": n_layers, "num_attention_heads": 6,
        "num_key_value_heads": n_kv_heads, "head_dim": 8, "rms_norm_eps": 1e-3, "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    }  # fmt: skip
    return Case(
        kind,
        common | config,
        {"activation": "silu", "gated": True, "norm": "rmsnorm", "positions": "rope", "rope_base": 500.0, "eps": 1e-3}
        | ours,
        ({"rope_base": 10_000.0}, {"eps": 1e-5}, *wrong),
        {"n_layers": n_layers, "n_kv_heads": n_kv_heads, "d_head": 8},
    )


def gpt_neox(parallel: bool) -> Case:
    return Case(
        "gpt_neox",
        {
            "hidden_size": 36, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 6,
            "use_parallel_residual": parallel, "layer_norm_eps": 1e-3, "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.7},
        },
        {
            "positions": "rope", "rope_fraction": 0.7, "rope_base": 500.0, "parallel": parallel, "activation": "gelu",
            "biases": True, "eps": 1e-3,
        },
        ({"parallel": not parallel}, {"rope_fraction": 1.0}, {"rope_fraction": 0.35}, {"activation": "gelu-tanh"}),
        {"d_model": 36, "d_head": 6},
    )  # fmt: skip


CASES: dict[str, Case] = {
    "gpt2": Case(
        "gpt2",
        {
            "n_positions": 16, "n_embd": 30, "n_layer": 2, "n_head": 6, "n_inner": 44, "resid_pdrop": 0.0,
            "embd_pdrop": 0.0, "attn_pdrop": 0.0, "layer_norm_epsilon": 1e-3,
        },
        {"positions": "learned", "activation": "gelu-tanh", "biases": True, "tied": True, "eps": 1e-3},
        ({"activation": "gelu"}, {"eps": 1e-5}, {"attention_scale": 1.0}),
    ),
    "openai-gpt": Case(  # the first GPT: post-ln, and no norm at the end
        "openai-gpt",
        {
            "n_positions": 16, "n_embd": 30, "n_layer": 2, "n_head": 6, "afn": "gelu", "resid_pdrop": 0.0,
            "embd_pdrop": 0.0, "attn_pdrop": 0.0, "layer_norm_epsilon": 1e-3,
        },
        {
            "positions": "learned", "activation": "gelu-tanh", "biases": True, "tied": True, "eps": 1e-3,
            "block": "post-ln", "final_norm": False,
        },
        ({"block": "branch-ln"}, {"shortcut_multiplier": 1.1}, {"norm_depth_scaling": True}),
        {"d_ffn": 120},
    ),
    "ctrl": Case(  # sinusoidal positions under embeddings times sqrt(d)
        "ctrl",
        {
            "n_positions": 16, "n_embd": 30, "n_layer": 2, "n_head": 6, "dff": 44, "resid_pdrop": 0.0,
            "embd_pdrop": 0.0, "layer_norm_epsilon": 1e-6,
        },
        {
            "positions": "sinusoidal", "activation": "relu", "biases": True, "tied": True, "eps": 1e-6,
            "embedding_multiplier": math.sqrt(30),
        },
        ({"positions": "none"}, {"embedding_multiplier": 1.0}),
    ),
    **{f"llama {k}": llama_like("llama", {}, n_kv_heads=k) for k in (1, 3, 6)},
    "llama biases": llama_like("llama", {"biases": True, "tied": True}, attention_bias=True, mlp_bias=True,
                               tie_word_embeddings=True),
    "granite": llama_like(
        "granite",
        {
            "embedding_multiplier": 3.0, "residual_multiplier": 0.22, "attention_scale": 0.2, "logit_multiplier": 0.125,
        },
        {"residual_multiplier": 1.0}, {"attention_scale": None}, {"embedding_multiplier": 1.0}, {"logit_multiplier": 8},
        embedding_multiplier=3.0, residual_multiplier=0.22, attention_multiplier=0.2, logits_scaling=8.0,
    ),
    "arcee": llama_like("arcee", {"gated": False, "activation": "relu-squared"}, {"activation": "relu"}),
    "qwen3": llama_like("qwen3", {"qk_norm": "head"}, {"attention_scale": 1.0}),
    "mixtral": llama_like(
        "mixtral", {"n_experts": 4}, {"experts_per_token": 1}, {"gates_renormalised": False}, num_local_experts=4
    ),
    "olmoe": llama_like(
        "olmoe",
        {
            "d_model": 36, "d_head": 6, "qk_norm": "full", "n_experts": 5, "experts_per_token": 3,
            "gates_renormalised": False,
        },
        {"experts_per_token": 2}, {"gates_renormalised": True},
        n_kv_heads=6, num_experts=5, num_experts_per_tok=3, hidden_size=36, head_dim=6,
    ),
    "olmo2": llama_like("olmo2", {"block": "branch-ln", "qk_norm": "full"}, {"block": "post-ln"}),
    "gemma": llama_like(
        "gemma",
        {"activation": "gelu-tanh", "embedding_multiplier": math.sqrt(30), "tied": True},
        {"activation": "gelu"}, {"embedding_multiplier": 1.0},
        hidden_activation="gelu_pytorch_tanh", hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True,
    ),
    "gemma2": llama_like(
        "gemma2",
        {
            "block": "peri-ln", "activation": "gelu-tanh", "embedding_multiplier": math.sqrt(30), "tied": True,
            "window": 5, "global_every": 2, "attention_softcap": 2.0, "logit_softcap": 3.0,
            "attention_scale": 1 / math.sqrt(11),
        },
        {"window": 4}, {"window": 0}, {"global_every": 0}, {"global_every": 3}, {"attention_softcap": 0.0},
        {"logit_softcap": 0.0}, {"attention_scale": None},
        n_layers=3, hidden_activation="gelu_pytorch_tanh", tie_word_embeddings=True, sliding_window=5,
        attn_logit_softcapping=2.0, final_logit_softcapping=3.0, query_pre_attn_scalar=11,
    ),
    "cohere": Case(
        "cohere",
        {
            "hidden_size": 36, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 6,
            "num_key_value_heads": 3, "layer_norm_eps": 1e-3, "max_position_embeddings": 16, "logit_scale": 0.25,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
        {
            "positions": "rope", "rope_base": 500.0, "parallel": True, "shared_norm": True, "gated": True,
            "activation": "silu", "tied": True, "logit_multiplier": 0.25, "eps": 1e-3,
        },
        ({"logit_multiplier": 1.0}, {"rope_base": 10_000.0}, {"residual_multiplier": 0.9}),
        {"d_model": 36, "d_head": 6, "n_kv_heads": 3},
    ),
    "llama, all frequencies divided": llama_like(
        "llama", {"rope_stretch": 4.0}, {"rope_stretch": 1.0}, {"rope_stretch": 3.9},
        rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    ),
    "llama, slow frequencies divided": llama_like(
        "llama",
        {"rope_stretch": 8.0, "rope_original": 20, "rope_low": 0.5, "rope_high": 3.0},
        {"rope_stretch": 1.0}, {"rope_original": 0}, {"rope_original": 21}, {"rope_low": 0.6}, {"rope_high": 4.0},
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 0.5, "high_freq_factor": 3.0,
            "original_max_position_embeddings": 20,
        },
    ),
    "gpt_neox parallel": gpt_neox(True),
    "gpt_neox serial": gpt_neox(False),
    "bloom": Case(  # ALiBi with six heads, and normalised embeddings
        "bloom",
        {"hidden_size": 30, "n_layer": 2, "n_head": 6, "layer_norm_epsilon": 1e-3},
        {
            "positions": "alibi", "activation": "gelu-tanh", "biases": True, "tied": True, "embedding_norm": True,
            "eps": 1e-3,
        },
        ({"positions": "none"}, {"window": 11}, {"activation": "gelu"}),
        {"d_ffn": 120},
    ),
    **{
        f"mpt {heads}": Case(
            "mpt",
            {"d_model": 7 * heads, "n_heads": heads, "n_layers": 2, "max_seq_len": 16, "layer_norm_epsilon": 1e-3},
            {"positions": "alibi", "activation": "gelu", "tied": True, "eps": 1e-3},
            ({"positions": "none"}, {"activation": "gelu-tanh"}),
            {"d_model": 7 * heads, "d_head": 7, "d_ffn": 28 * heads, "n_heads": heads, "n_kv_heads": heads},
        )
        for heads in (4, 5)
    },
}  # fmt: skip


# --- the comparison -------------------------------------------------------------------------------------------------


def real(case: Case, dtype: torch.dtype) -> Any:
    """The class with weights off their initial values, by enough to make attention uneven; gains and biases too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        case.kind, vocab_size=VOCAB, pad_token_id=None, bos_token_id=0, eos_token_id=0, **case.config
    )
    torch.manual_seed(0)  # the class draws from the global generator
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **eager).eval()
    g = generator(1)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=g).to(parameter)
    if case.kind == "ctrl":
        nn.init.zeros_(model.lm_head.bias)  # the one bias that no `Architecture` has
    return model


def loaded(case: Case, weights: dict[str, Tensor], dtype: torch.dtype, **changes: Any) -> Transformer:
    """The network that `Architecture` describes, with the class's weights."""
    a = replace(case.architecture, **changes)
    state = renamed(case.kind, case.architecture, weights)
    if case.kind in ("gemma", "gemma2"):  # gains are kept less 1
        state = {name: value + 1 if "norm" in name else value for name, value in state.items()}
    if a.tied:
        state["head.weight"] = state["tokens.weight"]
    model = Transformer(a).to(dtype)
    model.load_state_dict(state)
    return model


def parameters(model: Any) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if name != "lm_head.bias"}


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if name != "lm_head.bias"}


def batch() -> tuple[Tensor, Tensor]:
    tokens, targets = torch.randint(0, VOCAB, (2, BATCH, LENGTH), generator=generator(2))
    return tokens, targets


def gap(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest entry."""
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_the_classes(name: str) -> None:
    case = CASES[name]
    tokens, targets = batch()
    with InFloat64():
        theirs = real(case, torch.float64)
        expected = theirs(input_ids=tokens, use_cache=False).logits
    assert expected.dtype == torch.float64
    ours = loaded(case, parameters(theirs), torch.float64)
    computed = ours(tokens)
    assert gap(computed, expected) < 1e-8
    assert float(expected.detach().std()) > 0.1, "the comparison is of nothing"

    F.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    F.cross_entropy(computed.flatten(0, 1), targets.flatten()).backward()
    wanted = renamed(case.kind, case.architecture, gradients(theirs))
    found = gradients(ours)
    assert set(found) == set(wanted)
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for parameter, gradient in wanted.items():
        # A key's bias cancels in the softmax where nothing turns: its gradient is rounding.
        if not (parameter.endswith("key.bias") and float(gradient.abs().max()) < 1e-12 * largest):
            assert gap(found[parameter], gradient) < 1e-8, parameter


@pytest.mark.parametrize("name", CASES)
def test_the_class_as_it_is_in_float32(name: str) -> None:
    case = CASES[name]
    tokens, _ = batch()
    with torch.no_grad():
        theirs = real(case, torch.float32)
        expected = theirs(input_ids=tokens, use_cache=False).logits
        computed = loaded(case, parameters(theirs), torch.float32)(tokens)
    assert gap(computed, expected) < 2e-5  # a few layers of sums of a few dozen terms, each 6e-8 off


@pytest.mark.parametrize(
    ("name", "wrong"), [(name, wrong) for name, case in CASES.items() for wrong in case.wrong], ids=str
)
def test_one_wrong_option_shows(name: str, wrong: dict[str, Any]) -> None:
    """Control: with the same weights, a description that is wrong in one option is far outside the tolerance."""
    case = CASES[name]
    tokens, _ = batch()
    with InFloat64(), torch.no_grad():
        theirs = real(case, torch.float64)
        expected = theirs(input_ids=tokens, use_cache=False).logits
    with torch.no_grad():
        computed = loaded(case, parameters(theirs), torch.float64, **wrong)(tokens)
    assert gap(computed, expected) > 1e-5
