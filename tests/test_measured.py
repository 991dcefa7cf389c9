"""What a decoder is, as measured by perturbing its forward pass: real classes and hand-written decoders."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from helpers.decoders import NanoGPT, Titan
from helpers.known_decoders import KINDS, TRUTH, real
from helpers.real_classes import blocks
from helpers.real_classes import build as build_real

from empirics.anatomy import find_blocks
from empirics.model import build
from empirics.monitor import check, describe
from theory.architecture import preset


@KINDS
def test_the_architecture_is_measured(kind: str) -> None:
    truth, seen = TRUTH[kind], describe(real(kind))
    assert (seen.n_layers, seen.d_model) == (len(blocks(real(kind))), 64)
    assert (seen.block, seen.parallel, seen.tied) == (truth.block, truth.middle is None, truth.tied)
    assert seen.embedding_norm == (truth.embedding is None)
    assert seen.embedding_multiplier == (None if truth.embedding is None else pytest.approx(truth.embedding, rel=1e-3))
    assert seen.shortcut_multiplier == pytest.approx(1, rel=1e-3)
    assert seen.residual_multiplier == pytest.approx(truth.residual, rel=1e-3)


# Ending of a parameter's name -> role; several names of one role for several classes.
NAMES = {
    "query_key_value": ("query_key_value", "c_attn", "Wqkv", "qkv_proj"),
    "query": ("q_proj", "wq"), "key": ("k_proj", "wk"), "value": ("v_proj", "wv"),
    "output": ("o_proj", "out_proj", "attn.c_proj", "attention.dense", "self_attn.dense", "wo"),
    "ffn_in_gate": ("gate_up_proj",), "ffn_gate": ("up_proj", "w3"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bloom", "phi3", "llama", "qwen3", "gemma2", "phi"])
def test_matrices_are_told_apart_by_what_they_do(kind: str) -> None:
    """Each scaled by a factor of its own, so that one taken for another would show."""
    model = copy.deepcopy(real(kind))
    expected: dict[str, float] = {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            path = name.removesuffix(".weight")
            role = next((r for r, ends in NAMES.items() if path.endswith(ends)), None)
            if role and p.ndim == 2 and ".1." in name:
                p.mul_(1.5 + 0.5 * len(expected))
                expected[role] = math.sqrt(float(p.double().square().mean()))
    assert len(expected) >= 2
    stds = describe(model).stds
    for role, std in expected.items():
        assert stds[role][1] == pytest.approx(std, rel=1e-3), role


@pytest.mark.parametrize("gated", [False, True])
def test_experts_have_the_roles_of_one_feed_forward(gated: bool) -> None:
    a = replace(preset("tiny"), n_layers=2, n_experts=3, gated=gated, d_ffn=80)
    model = build(a, seed=0)
    feedforward = model.layers[1].feedforward
    with torch.no_grad():
        for expert in feedforward.experts:
            expert.leave.weight.mul_(2)
        feedforward.router.weight.mul_(3)
    stds = describe(model).stds
    enter = {"ffn_in_gate" if gated else "ffn_in"}
    assert stds.keys() == {"embedding", "query", "key", "value", "output", "router", "ffn_out", "head"} | enter
    pooled = torch.stack([expert.leave.weight.detach() for expert in feedforward.experts]).square().mean().sqrt()
    assert stds["ffn_out"][1] == pytest.approx(float(pooled), rel=1e-6)
    assert stds["router"][1] == pytest.approx(
        float(feedforward.router.weight.detach().square().mean().sqrt()), rel=1e-6
    )
    # As wide within as without, entrance and exit have one shape, and neither is named.
    square = describe(build(replace(a, d_ffn=a.d_model), seed=0)).stds
    assert not square.keys() & {"ffn_in", "ffn_in_gate", "ffn_out"}


def test_what_mixes_tokens_without_being_attention_has_no_roles() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 50}
    stds = describe(build_real({"model_type": "mamba"} | sizes)).stds
    assert "mixer.in_proj.weight" in stds
    assert not stds.keys() & {"query_key_value", "output"}


# --- hand-written decoders ------------------------------------------------------------------------------------------


def test_a_nanogpt() -> None:
    torch.manual_seed(0)
    seen = describe(NanoGPT())
    assert (seen.block, seen.parallel, seen.tied, seen.embedding_multiplier) == (
        "pre-ln",
        False,
        True,
        pytest.approx(1),
    )
    assert set(seen.stds) == {"embedding", "query_key_value", "output", "ffn_in", "ffn_out"}
    answer = check(NanoGPT())
    assert (answer.verdict, answer.reasons) == (
        "unknown",
        ("the module has no config to predict from; give check(module, architecture=...)",),
    )


def test_a_titan() -> None:
    torch.manual_seed(0)
    model = Titan()
    seen = describe(model)
    assert (seen.block, seen.parallel, seen.tied, seen.embedding_multiplier) == (
        "pre-ln",
        False,
        False,
        pytest.approx(1),
    )
    # Layer by layer: the second feed-forward matrix shrinks with the depth.
    layer = model.layers["1"]
    parts = {"ffn_out": layer.feed_forward.w2, "ffn_gate": layer.feed_forward.w3, "value": layer.attention.wv}
    for role, part in parts.items():
        assert seen.stds[role][1] == pytest.approx(float(part.weight.detach().square().mean().sqrt()), rel=1e-4)


def test_the_blocks_are_the_heaviest_list() -> None:
    model = real("mixtral")
    assert list(find_blocks(model)) == list(model.model.layers)
