"""Norms of a decoder's blocks, whose functions are found by perturbation, against those called by their names."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from helpers.known_decoders import OURS, some_batch

from empirics.block_norms import block_norms
from empirics.model import build as build_own
from empirics.monitor import StabilityMonitor
from empirics.probes import layer_norms
from empirics.spectral import NormEstimate

SUBLAYERS = ("attention", "J_Z", "feedforward", "attention_branch", "feedforward_branch")


@pytest.mark.parametrize("name", ["pre-ln", "peri-ln", "branch-ln", "post-ln", "parallel", "experts", "multipliers"])
def test_norms_of_blocks_are_those_of_the_probes(name: str) -> None:
    """Found by perturbation, against the same norms of the same sub-layers called by their names."""
    architecture = OURS[name].with_init("xavier")
    model = build_own(architecture, seed=0)
    tokens = some_batch()[:1]
    norms = block_norms(model, StabilityMonitor(model).anatomy, tokens)
    for row, expected in zip(norms.layers, layer_norms(model, tokens), strict=True):
        halves = {"attention_half", "feedforward_half"}
        assert row.keys() == {"layer", *SUBLAYERS} | halves
        for key in row.keys() & expected.keys() - (halves if name == "parallel" else set()):
            found = row[key]
            assert isinstance(found, NormEstimate), found
            assert found.value == pytest.approx(expected[key], rel=2e-3), key  # either is known to 1e-3
            assert found.kind == "lower estimate"
        for half in halves if name == "parallel" else ():
            assert row[half] == "its sub-layers are parallel: the layer is one update"
    assert isinstance(norms.stack, NormEstimate)
    assert all(p.requires_grad for p in model.parameters())
