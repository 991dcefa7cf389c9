"""Bounds over the depth: the rigorous one against explicit Jacobians, the paper's against its parts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from empirics.model import Transformer, build, sinusoidal_table
from empirics.probes import PlainAttention, gradient_profile
from empirics.spectral import explicit_jacobian
from theory.architecture import EMBEDDINGS, Architecture, preset
from theory.attention import attention_estimate
from theory.evaluate import closed_form
from theory.feedforward import ffn_estimate
from theory.growth import gradient_growth, growth_closed_form
from theory.random_matrix import cesaro_opnorm
from theory.stack import _after, _Reach, log_product, paper_bound, rigorous_bound
from theory.statements import residual

TOKENS = 6
ROUNDING = 1 + 1e-9  # float64 sums of at most some ten thousand terms


def small(**changes: Any) -> Architecture:
    sizes = {"d_model": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "d_head": 4, "d_ffn": 32, "vocab_size": 40}
    return replace(preset("tiny"), context=TOKENS, **(sizes | changes))


NETWORKS: dict[str, Architecture] = {
    **{name: small().with_embedding(name) for name in EMBEDDINGS},
    "xavier": small().with_init("xavier").with_embedding("scaled-embed"),
    "gelu": small(activation="gelu"),
    "squared": small(activation="relu-squared").with_embedding("embed-ln"),
    "squared-gated": small(activation="relu-squared", gated=True).with_embedding("scaled-embed"),
    "gated": small(activation="silu", gated=True, norm="rmsnorm").with_embedding("scaled-embed"),
    "grouped": small(n_kv_heads=2).with_embedding("embed-ln"),
    "learned": small(positions="learned", biases=True),
    "experts": small(n_experts=4, gated=True, activation="silu").with_embedding("scaled-embed"),
    "experts, all gates": small(n_experts=3, gates_renormalised=False).with_init("xavier"),
}


def half_layers(model: Transformer, tokens: torch.Tensor) -> list[torch.Tensor]:
    """I + J of every half-layer, over the whole sequence, explicitly."""
    places: list[torch.Tensor] = []
    model(tokens, places)
    found: list[torch.Tensor] = []
    for n, layer in enumerate(model.layers):
        attention, x, middle = PlainAttention(layer.attention), places[2 * n].detach(), places[2 * n + 1].detach()
        for branch, at in (
            (lambda v, layer=layer, attention=attention: attention(layer.attention_norm(v)), x),
            (layer.feedforward_branch, middle),
        ):
            jacobian = explicit_jacobian(branch, at)
            found.append(jacobian + torch.eye(jacobian.shape[0]).double())
    return found


def opnorm(matrix: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, ord=2))


@pytest.mark.parametrize("name", NETWORKS)
def test_rigorous_bound_is_one(name: str) -> None:
    architecture = NETWORKS[name]
    bound = rigorous_bound(architecture, TOKENS)
    limits = [1 + branch for pair in zip(bound.attention, bound.feedforward, strict=True) for branch in pair]
    for seed in range(3):
        model = build(architecture, seed=seed, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        tokens, targets = (torch.randint(1, 40, (1, TOKENS), generator=generator) for _ in range(2))
        halves = half_layers(model, tokens)
        for half, limit in zip(halves, limits, strict=True):
            assert opnorm(half) <= limit * ROUNDING
        # From each place to the last: the norm of the product of Jacobians, and the measured gradients below it.
        rest = torch.eye(halves[0].shape[0]).double()
        products = [opnorm(rest)] + [opnorm(rest := rest @ half) for half in reversed(halves)]
        for true, log10 in zip(reversed(products), bound.log10_profile, strict=True):
            assert math.log10(true) <= log10 + 1e-9
        _, gradient = gradient_profile(model, tokens, targets)
        for norm, true in zip(gradient, reversed(products), strict=True):
            assert norm / gradient[-1] <= true * ROUNDING


SCALED = small().with_embedding("scaled-embed")
LAYOUTS: dict[str, Architecture] = {
    "post-ln": replace(SCALED, block="post-ln", final_norm=False),
    "post-ln, loud": replace(SCALED, block="post-ln", embedding_multiplier=30.0, shortcut_multiplier=2.0),
    "post-ln, LayerNorm scaling": replace(SCALED, block="post-ln", norm_depth_scaling=True, shortcut_multiplier=3.0),
    "peri-ln": replace(SCALED, block="peri-ln"),
    "peri-ln, large eps": replace(SCALED, block="peri-ln", eps=0.1),
    "branch-ln": replace(SCALED, block="branch-ln", norm="rmsnorm"),
    "parallel": replace(SCALED, parallel=True),
    "multipliers": replace(SCALED, residual_multiplier=0.3, shortcut_multiplier=1.5),
    "LayerNorm scaling": replace(SCALED, norm_depth_scaling=True),
    "own stds a layer, truncated": SCALED.with_init("mitchell"),
    "uniform weights": SCALED.with_init("torch"),
    "sinusoidal, truncated": replace(SCALED.with_init("truncated"), positions="sinusoidal"),
    "logit scale": replace(SCALED, attention_scale=2.0),
    "window": replace(SCALED, window=2, global_every=2, n_layers=3),
    "ALiBi": replace(SCALED, positions="alibi"),
    "QK-norm": replace(SCALED, qk_norm="head", eps=0.01),
    "QK-norm of all heads, grouped": replace(SCALED, qk_norm="full", n_kv_heads=2, norm="rmsnorm"),
    "soft-cap": replace(SCALED, attention_softcap=0.5, attention_scale=4.0),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_rigorous_bound_in_every_layout(name: str) -> None:
    """The product of the updates' explicit Jacobians, from each place to the last, and the measured gradient below."""
    architecture = LAYOUTS[name]
    bound = rigorous_bound(architecture, TOKENS)
    for seed in range(2):
        model = build(architecture, seed=seed, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        tokens, targets = (torch.randint(1, 40, (1, TOKENS), generator=generator) for _ in range(2))
        places: list[torch.Tensor] = []
        model(tokens, places)
        updates = [update for layer in model.layers for update in layer.updates]
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no batching rule
            jacobians = [explicit_jacobian(f, x.detach()) for f, x in zip(updates, places, strict=False)]
        rest = torch.eye(jacobians[0].shape[0]).double()
        products = [1.0] + [opnorm(rest := rest @ jacobian) for jacobian in reversed(jacobians)]
        for true, log10 in zip(reversed(products), bound.log10_profile, strict=True):
            assert math.log10(true) <= log10 + 1e-9
        _, gradient = gradient_profile(model, tokens, targets)
        for norm, true in zip(gradient, reversed(products), strict=True):
            assert norm / gradient[-1] <= true * ROUNDING
        # The truth is no smaller than the growth that is predicted; `test_stack_controls` is the bound's control.
        assert products[-1] > gradient_growth(architecture, TOKENS).value / 10


def test_what_has_no_rigorous_product_says_so() -> None:
    bound = rigorous_bound(replace(SCALED, block="branch-ln", activation="relu-squared"), TOKENS)
    assert math.isinf(bound.log10_product)
    assert "no rigorous product" in bound.assumptions[0]


def test_a_product_without_the_attention_halves_is_no_bound() -> None:
    """Control: with the feed-forward halves silenced, all growth is attention's, and dropping it must show."""
    architecture = NETWORKS["vanilla"]
    model = build(architecture, seed=0, dtype=torch.float64)
    for layer in model.layers:
        torch.nn.init.zeros_(layer.feedforward.leave.weight)
    tokens = torch.arange(1, TOKENS + 1)[None]
    _, gradient = gradient_profile(model, tokens, tokens.flip(1))
    assert gradient[0] / gradient[-1] > 1.01  # the truncated product is exactly 1


@pytest.mark.parametrize("name", NETWORKS)
def test_the_networks_grow_as_predicted(name: str) -> None:
    """By a tenth of the sharp prediction at least, which is of wider ones."""
    architecture = NETWORKS[name]
    model = build(architecture, seed=0, dtype=torch.float64)
    tokens = torch.randint(1, 40, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    _, gradient = gradient_profile(model, tokens, tokens.flip(1))
    assert gradient[0] / gradient[-1] > gradient_growth(architecture, TOKENS).value / 10


def test_loud_embeddings_leave_the_bound_near_one() -> None:
    """Far above the branches, at a width where the smallest embedding is not lost to the chi-square's tail."""
    loud = small(d_model=256, d_head=64, d_ffn=1024, embedding_multiplier=1e6)
    assert rigorous_bound(loud, TOKENS).log10_product < 0.01


def test_without_eps_the_stream_may_vanish() -> None:
    bound = rigorous_bound(small(eps=0.0), TOKENS)
    assert math.isinf(bound.log10_product)
    assert "eps" in bound.assumptions[0]


def test_paper_bound_is_made_of_the_statements() -> None:
    """Hand-written for one layer: eq. (15) and eq. (20) at the recursion's standard deviations."""
    architecture = small(n_layers=1)
    growth = gradient_growth(architecture, TOKENS)
    stds, (x, middle, _) = architecture.stds, growth.residual_std
    scale_x, scale_middle = math.hypot(x, architecture.eps**0.5), math.hypot(middle, architecture.eps**0.5)
    heads = float(cesaro_opnorm(TOKENS)) * stds.value * 2 * math.sqrt(16)
    attention = 2 * math.sqrt(16) * heads * stds.output / scale_x
    feedforward = stds.ffn_in * stds.ffn_out * (math.sqrt(16) + math.sqrt(32)) ** 2 / scale_middle
    bound = paper_bound(architecture, TOKENS)
    assert bound.attention[0] == pytest.approx(attention, rel=1e-12)
    assert bound.feedforward[0] == pytest.approx(feedforward, rel=1e-12)
    assert bound.log10_product == pytest.approx(math.log10((1 + attention) * (1 + feedforward)), rel=1e-12)


def test_paper_bound_at_equal_stds_is_a_repeated_statement() -> None:
    """residual(attention).then(residual(feed-forward)).repeat(N), where every half-layer sees one std."""
    architecture, depth = small(n_layers=5, eps=0.0), 5
    measured = gradient_growth(architecture, TOKENS)
    even = replace(measured, residual_std=(0.7,) * (2 * depth + 1))
    stds = architecture.stds
    values = {
        "sigma_O": stds.output,
        "sigma_x": 0.7,
        "d": 16,
        "J_Z": float(cesaro_opnorm(TOKENS)) * stds.value * 2 * math.sqrt(16),
        "sigma_1": stds.ffn_in,
        "sigma_2": stds.ffn_out,
        "sigma_xp": 0.7,
        "d_ffn": 32,
    }
    layer = residual(attention_estimate()).then(residual(ffn_estimate())).repeat(depth)
    assert layer.kind == "estimate"
    bound = paper_bound(architecture, TOKENS, even)
    assert bound.log10_product == pytest.approx(math.log10(float(layer.evaluate(values))), rel=1e-12)


def test_repetition_is_a_product_in_logs() -> None:
    values = {"sigma_1": 0.02, "sigma_2": 0.003, "sigma_xp": 0.5, "d": 64.0, "d_ffn": 256.0}
    branch = float(ffn_estimate().evaluate(values))
    repeated = float(residual(ffn_estimate()).repeat(24).evaluate(values))
    assert log_product([branch] * 24)[0] == pytest.approx(math.log(repeated), rel=1e-12)


def test_ten_thousand_layers_do_not_overflow() -> None:
    logs = log_product(np.full(20_000, 1e6))
    assert np.isfinite(logs).all()
    assert logs[0] == pytest.approx(20_000 * math.log1p(1e6), rel=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_ten_thousand_real_layers_do_not_overflow(name: str) -> None:
    """The product itself, some 10^100000, is far beyond a double; its profile falls from the first place to 0."""
    deep = rigorous_bound(replace(NETWORKS[name], n_layers=10_000), TOKENS)
    profile = np.array(deep.log10_profile)
    assert np.isfinite(profile).all()
    assert np.isfinite([*deep.attention, *deep.feedforward]).all()
    assert (np.diff(profile) < 0).all()
    assert profile[-1] == 0
    assert profile[0] > 400  # a double ends at 308


def test_without_embeddings_or_eps_there_is_nothing_to_divide_by() -> None:
    with pytest.raises(ValueError, match="use eps=1e-5"):
        gradient_growth(small(eps=0.0, embedding_multiplier=0.0), TOKENS)


def test_a_million_configurations_at_once() -> None:
    widths, depths = np.logspace(1, 6, 1000), np.logspace(0, 5, 1000)
    growth, excess = closed_form(widths[:, None], depths[None, :], "vanilla", 1024)
    assert growth.shape == excess.shape == (1000, 1000)
    assert np.isfinite(growth).all()
    assert np.isfinite(excess).all()
    # The paper's depth scaling divides the output matrices by sqrt(2N): N cancels from the growth.
    assert np.ptp(growth, axis=1) == pytest.approx(0, abs=1e-12 * growth.max())


@pytest.mark.parametrize("treatment", EMBEDDINGS)
def test_the_vectorised_closed_form_is_the_scalar_one(treatment: Any) -> None:
    widths, depths = np.array([64, 256, 1024]), np.array([4, 24])
    growth, _ = closed_form(widths[:, None], depths[None, :], treatment, 64)
    for i, d in enumerate(widths.tolist()):
        for j, n in enumerate(depths.tolist()):
            one = replace(preset("tiny"), d_model=d, d_ffn=4 * d, d_head=d // 2, n_layers=n).with_embedding(treatment)
            assert growth[i, j] == pytest.approx(growth_closed_form(one, 64), rel=1e-12)


@pytest.mark.parametrize("layer", [0, 3])
def test_what_is_known_of_a_scaled_post_norm_is_true(layer: int) -> None:
    """A stream that nothing was added to leaves the norm with length sqrt(d) over the root of its layer's number."""
    a = replace(SCALED, block="post-ln", norm_depth_scaling=True, eps=1e-12)
    after: list[float] = []
    found = _after(a, layer, _Reach(5.0, 5.0), 0.0, after)
    length = math.sqrt(a.d_model / (layer + 1))
    assert found.low <= length * ROUNDING
    assert found.low == pytest.approx(length, rel=1e-9)  # control: without the root it would be twice that
    assert after[0] == pytest.approx(length / 5.0, rel=1e-9)


@pytest.mark.parametrize("d", [1, 3, 8])
def test_sinusoidal_positions_are_no_longer_than_assumed(d: int) -> None:
    table = sinusoidal_table(600, d, torch.device("cpu"), torch.float64)
    longest = float(table.norm(dim=1).max())
    assert longest <= math.sqrt((d + 1) // 2) * ROUNDING
    assert longest > math.sqrt((d + 1) // 2) * 0.95  # control


@pytest.mark.parametrize("changes", [{"eps": 0.0}, {"shortcut_multiplier": 0.0}])
def test_of_no_branch_the_product_is_the_shortcuts(changes: dict[str, float]) -> None:
    """1, or of nothing at all 0; no eps is needed where nothing is added."""
    silent = small(residual_multiplier=0.0, **changes)
    expected = 0.0 if silent.shortcut_multiplier else -math.inf
    assert rigorous_bound(silent, TOKENS).log10_product == expected
    assert rigorous_bound(replace(silent, eps=0.0).with_init("zero-output"), TOKENS).log10_product == expected
    assert math.isinf(rigorous_bound(small(eps=0.0), TOKENS).log10_product)
