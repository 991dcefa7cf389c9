"""Edges of the identity plus a random matrix, and of layers whose largest units decide, against draws and limits."""

from __future__ import annotations

import math

import numpy as np
import pytest

from theory.residual_edges import CONVERGED, STEP, attention_residual_opnorm, mixing_edge, residual_edge
from theory.statements import catalogue, find
from theory.unit_edges import DRAWS, FEWEST, LARGEST, _larger, largest_units, relu_squared_opnorm

ONE = np.array([1.0])
SHEAR = np.array([[0.1, 1.0], [0.0, 0.1]])  # far from normal
RUNNING_MEAN = np.tril(np.ones((4, 4))) / np.arange(1, 5)[:, None]


def drawn_norms(mixing: np.ndarray, d: int, draws: int) -> np.ndarray:
    """|I + A (x) W_O W_V| by SVD of the whole matrix."""
    rng = np.random.default_rng(1)
    norms: list[float] = []
    for _ in range(draws):
        branch = rng.standard_normal((d, d)) @ rng.standard_normal((d, d)) / d
        norms.append(float(np.linalg.norm(np.eye(len(mixing) * d) + np.kron(mixing, branch), 2)))
    return np.array(norms)


@pytest.mark.parametrize(("strength", "ratio"), [(0.02, 1.0), (0.5, 1.0), (4.0, 1.0), (0.5, 0.25), (0.5, 4.0)])
def test_one_token_is_the_scalar_edge(strength: float, ratio: float) -> None:
    whole, scalar = mixing_edge(np.array([[strength]]), ratio), residual_edge(ONE, ONE, ratio, strength)
    assert whole.limit == pytest.approx(scalar.limit, rel=1e-9)
    assert whole.curvature == pytest.approx(scalar.curvature, rel=2e-3)  # a second difference at steps of 1 %


def test_tokens_that_do_not_mix_are_the_strongest_of_them() -> None:
    whole, scalar = mixing_edge(np.diag([0.2, 0.5, 0.3])), residual_edge(ONE, ONE, 1.0, 0.5)
    assert whole.limit == pytest.approx(scalar.limit, rel=1e-9)
    assert whole.opnorm(256) == pytest.approx(scalar.opnorm(256), rel=1e-4)


def test_a_sign_or_a_rotation_of_tokens_changes_nothing() -> None:
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0]
    same = [mixing_edge(matrix).limit for matrix in (RUNNING_MEAN, -RUNNING_MEAN, turn @ RUNNING_MEAN @ turn.T)]
    assert same == pytest.approx([same[0]] * 3, rel=1e-8)


def test_strong_branches_have_the_norm_of_the_branch_alone() -> None:
    strength = 1e4
    limit = float(np.linalg.norm(RUNNING_MEAN, 2)) * math.sqrt(27) / 2
    assert mixing_edge(strength * RUNNING_MEAN).limit / strength == pytest.approx(limit, rel=1e-4)


@pytest.mark.parametrize(
    "mixing", [0.3 * RUNNING_MEAN, 2 * RUNNING_MEAN, SHEAR, RUNNING_MEAN @ np.diag([2.0, 0.7, 0.5, 0.2])]
)
def test_against_draws(mixing: np.ndarray) -> None:
    d, draws = 96, 16
    norms = drawn_norms(mixing, d, draws)
    error = float(norms.std(ddof=1)) / math.sqrt(draws)
    edge = mixing_edge(mixing)
    assert abs(edge.opnorm(d) - norms.mean()) <= 4 * error + 0.005 * edge.limit  # d is not infinite
    assert norms.mean() < edge.limit


@pytest.mark.parametrize("n_tokens", [1, 2, 16, pytest.param(128, marks=pytest.mark.slow)])
def test_weak_branches_to_strong_ones(n_tokens: int) -> None:
    """At least 1, increasing, and linear at weak branches, where the edge is that of the symmetric part."""
    strengths = np.logspace(-12, 1, 14)
    norms = attention_residual_opnorm(strengths**2, 1.0, 256, 1.0, n_tokens)
    assert np.all(np.diff([1.0, *norms]) > 0)
    slopes = (norms - 1) / strengths
    # Of a norm near 1, and of the second difference that the finite width takes.
    rounding = 4 * np.finfo(float).eps / strengths + CONVERGED / STEP**2
    assert np.all(np.abs(slopes / slopes[6] - 1)[:9] <= strengths[:9] + rounding[:9])
    assert slopes[-1] > 1.2 * slopes[0]  # control: strong branches are not linear
    assert attention_residual_opnorm(0.0, 1.0, 256, 1.0, n_tokens) == 1


def test_the_weakest_branch_is_the_largest_eigenvalue_of_its_symmetric_part() -> None:
    d, draws = 96, 16
    rng, found = np.random.default_rng(2), list[float]()
    for _ in range(draws):
        whole = np.kron(RUNNING_MEAN, rng.standard_normal((d, d)) @ rng.standard_normal((d, d)) / d)
        found.append(float(np.linalg.eigvalsh((whole + whole.T) / 2)[-1]))
    slope = (mixing_edge(1e-6 * RUNNING_MEAN).opnorm(d) - 1) / 1e-6
    assert abs(slope / np.mean(found) - 1) <= 0.01 + 4 * float(np.std(found)) / math.sqrt(draws) / np.mean(found)
    minimum = math.sqrt(5) - 2  # of (1/2 + w / (1 - w)) / sqrt(w)
    scalar = (residual_edge(ONE, ONE, 1.0, 1e-6).limit - 1) / 1e-6
    assert scalar == pytest.approx((1 / 2 + minimum / (1 - minimum)) / math.sqrt(minimum), rel=1e-5)


@pytest.mark.parametrize("name", ["half-layer-sharp-relu", "half-layer-sharp-gelu", "half-layer-sharp-gated-silu"])
def test_feedforward_half_layers_without_a_branch(name: str) -> None:
    values = {"sigma_1": 0.1, "sigma_2": 0.1, "sigma_3": 0.1, "s": 0.3, "d": 64, "d_ffn": 256}
    for nothing in ({"sigma_2": 0.0}, {"sigma_1": 0.0, "sigma_3": 0.0}):
        assert float(find(name).evaluate(values | nothing)) == 1
    norms = [float(find(name).evaluate(values | {"sigma_2": sigma})) for sigma in np.logspace(-13, 0, 8)]
    assert np.all(np.diff([1.0, *norms]) > 0)
    slopes = [(norm - 1) / sigma for norm, sigma in zip(norms, np.logspace(-13, 0, 8), strict=True)]
    assert slopes[2] == pytest.approx(slopes[3], rel=1e-3)


def test_what_has_no_edge_is_refused() -> None:
    for mixing in (math.inf, math.nan):
        with pytest.raises(ValueError, match="not finite"):
            mixing_edge(np.array([[mixing]]))
    with pytest.raises(ValueError, match="no edge of"):
        residual_edge(ONE, ONE, 1.0, math.nan).opnorm(64)
    for name in ("attention-half-layer-sharp", "attention-uneven-sharp"):
        sizes = {"c_VO": 0.7, "s": 1.0, "d": 256, "n_heads": 4, "d_head": 64, "n_tokens": 0, "logit_variance": 1.0}
        sizes |= {"kv_group": 1}
        with pytest.raises(ValueError, match="n_tokens=0 leaves no token"):
            find(name).evaluate(sizes)


def test_a_scalar_with_the_norm_of_the_mixing_is_no_substitute() -> None:
    """Control: the same singular values without the angles are 3.5 % off where A is far from normal."""
    scalar = residual_edge(ONE, ONE, 1.0, float(np.linalg.norm(SHEAR, 2)))
    assert scalar.limit > 1.03 * mixing_edge(SHEAR).limit


@pytest.mark.parametrize("units", [64, 1000])
def test_largest_units_are_order_statistics(units: int) -> None:
    """Means of Beta laws: the k-th largest of n uniform draws has mean (n + 1 - k)/(n + 1)."""
    drawn = largest_units(units)
    assert drawn.shape == (DRAWS, LARGEST)
    assert np.all(np.diff(drawn, axis=1) < 0)
    rank = np.arange(1, LARGEST + 1)
    expected = (units + 1 - rank) / (units + 1)
    spread = np.sqrt(rank * expected / ((units + 1) * (units + 2)))
    assert np.all(np.abs(drawn.mean(0) - expected) <= 4 * spread / math.sqrt(DRAWS))
    assert drawn[:, 0].std() == pytest.approx(spread[0], rel=0.05)


def test_larger_of_two_normal_variables() -> None:
    assert _larger((1.0, 0.3), (1.0, 0.4)) == pytest.approx(1 + 0.5 / math.sqrt(2 * math.pi), rel=1e-12)
    assert _larger((9.0, 0.3), (1.0, 0.4)) == pytest.approx(9, rel=1e-12)
    left, right = np.random.default_rng(0).standard_normal((2, 100_000)) * [[0.3], [0.2]] + [[1.0], [1.1]]
    assert _larger((1.0, 0.3), (1.1, 0.2)) == pytest.approx(float(np.maximum(left, right).mean()), abs=4 * 0.25 / 300)


def test_squared_relu_against_independent_draws() -> None:
    """Rows of W_1 drawn, their pre-activation with them; the input's own column in and out."""
    d, units, draws = 128, 512, 120
    rng, norms, without = np.random.default_rng(0), list[float](), list[float]()
    for _ in range(draws):
        first, second = rng.standard_normal((units, d)), rng.standard_normal((d, units))
        first *= (2 * np.maximum(first[:, 0], 0))[:, None]  # the input is the first axis, of length sqrt(d)
        jacobian = second @ first / d
        norms.append(float(np.linalg.norm(jacobian, 2)))
        without.append(float(np.linalg.norm(jacobian[:, 1:], 2)))
    error = float(np.std(norms)) / math.sqrt(draws)
    predicted = relu_squared_opnorm(d, units)
    assert abs(predicted - np.mean(norms)) <= 3.5 * error
    assert np.mean(norms) > 1.02 * np.mean(without)  # control: without the column it is another number


def test_too_few_units_are_refused() -> None:
    with pytest.raises(ValueError, match=f"use {FEWEST} or more"):
        relu_squared_opnorm(256, FEWEST - 1)


FEEDFORWARD = [name for name in catalogue() if name.startswith(("ffn-sharp-", "half-layer-sharp-"))]
SIZES = {"sigma_1": 0.05, "sigma_2": 0.05, "sigma_3": 0.05, "s": 0.3, "d": 256, "d_ffn": 1024}


@pytest.mark.parametrize("name", FEEDFORWARD)
def test_few_units_are_outside_and_none_is_no_width(name: str) -> None:
    statement = find(name)
    fewest = int(statement.domain["d_ffn"][0])
    assert f"d_ffn >= {fewest}" in statement.assumptions
    assert statement.outside(SIZES | {"d_ffn": fewest}) == ()
    assert statement.outside(SIZES | {"d_ffn": fewest - 1}) == (f"d_ffn={fewest - 1} is not within {fewest} to inf",)
    assert statement.predict(SIZES | {"d_ffn": 8}).value is None
    for none in ({"d": 0}, {"d_ffn": 0}, {"d": 0, "d_ffn": 0}, {"d": math.nan}):
        with pytest.raises(ValueError, match=r"^d(_ffn)?=(0|nan) is no width; use at least 1$"):
            statement.evaluate(SIZES | none)


@pytest.mark.parametrize(("sigma_1", "sigma_3"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (1e-200, 0.5)])
def test_a_gated_branch_without_one_of_its_matrices_is_zero(sigma_1: float, sigma_3: float) -> None:
    values = {"sigma_1": sigma_1, "sigma_2": 0.1, "sigma_3": sigma_3, "d": 256, "d_ffn": 256, "s": 1.0}
    assert find("ffn-sharp-gated-silu").evaluate(values) == 0
    assert find("half-layer-sharp-gated-silu").evaluate(values) == 1
