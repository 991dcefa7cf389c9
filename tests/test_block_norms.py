"""Norms of a decoder's blocks, found by perturbation, against the probes' and against whole Jacobians."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from helpers.known_decoders import OURS, real, some_batch

from empirics.anatomy import capture
from empirics.block_norms import block_norms
from empirics.model import build as build_own
from empirics.monitor import StabilityMonitor
from empirics.probes import layer_norms
from empirics.running import first_tensor, replaced


@pytest.mark.parametrize("name", ["pre-ln", "peri-ln", "branch-ln", "post-ln", "parallel", "experts", "multipliers"])
def test_norms_of_blocks_are_those_of_the_probes(name: str) -> None:
    """Found by perturbation, against the same norms of the same sub-layers called by their names."""
    architecture = OURS[name].with_init("xavier")
    model = build_own(architecture, seed=0)
    tokens = some_batch()[:1]
    rows = block_norms(model, StabilityMonitor(model).anatomy, tokens)
    for row, expected in zip(rows, layer_norms(model, tokens), strict=True):
        halves = {"attention_half", "feedforward_half"} & row.keys()
        wanted = {"parallel": set(), "post-ln": {"attention_half"}, "multipliers": {"attention_half"}}
        assert halves == wanted.get(name, {"attention_half", "feedforward_half"})
        for key in halves | ({"layer"} if name == "parallel" else set()):
            assert row[key].value == pytest.approx(expected[key], rel=2e-3)  # either is known to 1e-3
            assert row[key].kind == "lower estimate"
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "bloom", "falcon", "gemma2"])
def test_norms_of_a_real_block_are_those_of_its_jacobian(kind: str) -> None:
    """The whole Jacobian of the block, called with the arguments that the model calls it with."""
    model = copy.deepcopy(real(kind)).double()
    found = StabilityMonitor(model).anatomy
    tokens = torch.arange(2, 7)[None]
    (row, *_), block = block_norms(model, found, tokens), capture(model, found.blocks, tokens)[0]

    def layer(x: Tensor) -> Tensor:
        args, kwargs = replaced(block.args, block.kwargs, block.x, x)
        return first_tensor((block.module(*args, **kwargs),))  # type: ignore[return-value]

    jacobian = torch.autograd.functional.jacobian(layer, block.x).reshape(5 * 64, -1)  # type: ignore[union-attr]
    assert row["layer"].value == pytest.approx(float(torch.linalg.matrix_norm(jacobian, ord=2)), rel=2e-3)
