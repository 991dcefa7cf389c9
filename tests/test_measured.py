"""What a decoder is, as measured by perturbing its forward pass: real classes and hand-written decoders."""

from __future__ import annotations

import copy
import math

import pytest
import torch

pytest.importorskip("transformers")

from helpers.decoders import NanoGPT, Titan
from helpers.known_decoders import KINDS, TRUTH, real
from helpers.real_classes import blocks

from empirics.anatomy import find_blocks
from empirics.monitor import check, describe


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
