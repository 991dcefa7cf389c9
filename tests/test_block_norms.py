"""Norms of a decoder's blocks, whose functions are found by perturbation, against those called by their names."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")

from helpers.decoders import NanoGPT
from helpers.known_decoders import OURS, some_batch
from helpers.norms import NORMS, Doubled, probed

from empirics import block_norms as norms_module
from empirics.block_norms import block_norms, require_derivative
from empirics.model import build as build_own
from empirics.monitor import StabilityMonitor
from empirics.probes import layer_norms
from empirics.registry import Unavailable
from empirics.spectral import Function, NormEstimate, lanczos_opnorm

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


# --- an estimate held to differences ------------------------------------------------------------------------------


def held(dtype: torch.dtype, change: Function, factor: float = 1.0) -> str:
    """What is said of a matrix's norm, times a factor, where the values are those of the matrix changed."""
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(40, 40, generator=g, dtype=torch.float64).to(dtype)
    x = torch.randn(40, generator=g, dtype=torch.float64).to(dtype)
    found = lanczos_opnorm(lambda y: factor * (matrix @ y), x, tolerance=1e-3)
    along = found.direction
    try:
        require_derivative(lambda y: matrix @ y + change(along @ (y - x) / x.norm()), x, found)
    except Unavailable as refused:
        return str(refused)
    return ""


def jump(at: float) -> Function:
    """As of a token that changes its expert, at a distance relative to the point."""
    return lambda t: 10.0 * (t > at)


def bend(sharpness: float) -> Function:
    """Flat in the point."""
    return lambda t: 0.3 * (sharpness * t).tanh() ** 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("change", [jump(3e-4), jump(3e-5), bend(500.0), bend(5000.0)])
def test_differences_are_taken_where_the_function_is_smooth(
    dtype: torch.dtype, change: Function, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert held(dtype, change) == ""
    for wrong in (2.0, 1.25, 0.75):  # and no step makes a wrong derivative right
        assert "its derivative is not that of its values" in held(dtype, change, wrong), wrong
    monkeypatch.setattr(norms_module, "STEPS", norms_module.STEPS[:1])  # control: the longest step alone does not do
    assert "its derivative is not that of its values" in held(dtype, change)


def test_a_norm_that_is_nothing_is_held_to_rounding() -> None:
    x = torch.randn(40, generator=torch.Generator().manual_seed(0))
    none = lanczos_opnorm(lambda y: 0 * y, x)
    require_derivative(lambda y: (y + 1) - y - 1, x, none)
    with pytest.raises(Unavailable):
        require_derivative(lambda y: 0.1 * y, x, none)


def test_layers_that_have_a_norm_keep_it() -> None:
    torch.manual_seed(0)
    model = NanoGPT(n_layers=3).eval()
    expected = probed(model, NORMS).probes
    kept = model.transformer["h"][1].forward
    model.transformer["h"][1].forward = lambda x: Doubled.apply(kept(x))
    record = probed(model, f"{NORMS},half_layer_product,stack_jacobian")
    found = record.probes["layer_jacobian"]
    assert found.labels == expected["layer_jacobian"].labels == ("layer 0", "layer 1", "layer 2")
    assert math.isnan(found.values[1])
    assert found.values[::2] == expected["layer_jacobian"].values[::2]
    assert record.left_out["layer_jacobian"].startswith("layer 1: its derivative is not that of its values")
    assert record.left_out["stack_jacobian"].startswith("its derivative is not that of its values")
    assert record.left_out["half_layer_product"] == "a half-layer has no norm; see half_layer_jacobian"
    assert "layer_jacobian: left out; layer 1: " in str(record)
    assert "nan" not in str(record)
    assert record.row()["probes"]["layer_jacobian"]["values"][1] is None
    assert "attention_jacobian" not in record.left_out
