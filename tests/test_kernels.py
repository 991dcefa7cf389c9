"""Activation kernels against Gaussian quadrature and sampling in two dimensions, and against their own derivative."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from helpers.integrals import expectations
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import dblquad

from empirics.model import ACTIVATIONS
from theory.architecture import Activation
from theory.kernels import (
    SERIES_ERROR,
    SERIES_KNEE,
    SMOOTH_END,
    activation_function,
    activation_kernel,
    activation_slope,
    erf_kernel,
)

SERIES = ("gelu-tanh", "silu")
EVERY = get_args(Activation)


def kernel(activation: Any, q: float, q_other: float, covariance: float) -> tuple[float, float]:
    pair = activation_kernel(activation, np.array([q]), np.array([q_other]), np.array([covariance]))
    return float(pair.kappa[0]), float(pair.slope[0])


def network_pair(activation: str, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """F and F' as the network computes them: PyTorch's function, its slope by automatic differentiation."""
    x = torch.from_numpy(z).requires_grad_()
    value = ACTIVATIONS[activation](x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    return value.detach().numpy(), slope.numpy()


def integral(activation: str, q: float, q_other: float, rho: float, nodes: int = 12) -> list[float]:
    """E[F(z) F(z')] and E[F'(z) F'(z')] of the network's function."""
    functions = (lambda z: network_pair(activation, z)[0], lambda z: network_pair(activation, z)[1])
    return expectations(functions, q, q_other, rho, nodes)


def stated(activation: str, *variances: float) -> tuple[float, float]:
    """Error of (kappa, slope) that the module states, over the geometric mean of the diagonal's entries."""
    if activation not in SERIES:
        return (1e-12, 1e-11)  # rounding: the large variances cancel up to a thousand times
    return SERIES_ERROR[int(max(variances) > SERIES_KNEE)]


def errors(activation: str, q: float, q_other: float, rho: float) -> list[float]:
    """Errors of (kappa, slope), over the geometric mean of the diagonal's entries."""
    found = kernel(activation, q, q_other, rho * math.sqrt(q * q_other))
    expected, own, other = (
        integral(activation, *at) for at in ((q, q_other, rho), (q, q, 1.0), (q_other, q_other, 1.0))
    )
    return [abs(f - e) / math.sqrt(a * b) for f, e, a, b in zip(found, expected, own, other, strict=True)]


@pytest.mark.parametrize("activation", EVERY)
def test_function_and_slope_are_the_networks(activation: Any) -> None:
    z = np.linspace(-9, 9, 1000)  # 0 is not among them: a kink has no slope
    value, slope = network_pair(activation, z)
    np.testing.assert_allclose(activation_function(activation, z), value, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(activation_slope(activation, z), slope, rtol=1e-11, atol=1e-14)


def test_the_integral_itself() -> None:
    """Against exact moments, against more nodes, and against an adaptive rule."""
    for q, q_other, rho in ((1e-6, 300.0, 0.3), (2.0, 0.5, -0.999), (1e3, 1e3, 0.9)):
        c = rho * math.sqrt(q * q_other)
        found = expectations((lambda z: z, np.square), q, q_other, rho)
        assert found == pytest.approx([c, q * q_other + 2 * c * c], rel=1e-13)
        assert integral("silu", q, q_other, rho) == pytest.approx(integral("silu", q, q_other, rho, 20), rel=1e-12)

    def weighted(y: float, x: float) -> float:
        z = torch.tensor([x, 0.4 * x + math.sqrt(0.84) * y], dtype=torch.float64)
        return float(torch.nn.functional.gelu(z).prod()) * math.exp(-(x * x + y * y) / 2) / (2 * math.pi)

    adaptive = dblquad(weighted, -8, 8, -8, 8, epsabs=1e-7, epsrel=1e-7)[0]
    assert integral("gelu", 1.0, 1.0, 0.4)[0] == pytest.approx(adaptive, abs=1e-7)


@pytest.mark.parametrize("activation", EVERY)
def test_kernels_are_the_double_integral(activation: Any) -> None:
    """At random variances from 1e-8 to 1e3, equal and unequal, and correlations as near 1 as 1e-6."""
    generator = np.random.default_rng(4)
    for case in range(16):
        q, q_other = 10.0 ** generator.uniform(-8, 3, 2)
        q_other = q if case % 2 else q_other
        rho = float(np.sign(generator.uniform(-0.5, 1)) * (1 - 10.0 ** generator.uniform(-6, 0)))
        for error, limit in zip(errors(activation, q, q_other, rho), stated(activation, q, q_other), strict=True):
            assert error <= limit, (q, q_other, rho)


@pytest.mark.parametrize("activation", EVERY)
@pytest.mark.parametrize("rho", [-1.0, 1.0])
def test_kernels_at_perfect_correlation(activation: Any, rho: float) -> None:
    """Where a series converges slowest. The stated errors are not ten times too large either."""
    largest = {False: np.zeros(2), True: np.zeros(2)}
    for q in [*np.logspace(-8, 3, 89).tolist(), SERIES_KNEE, 60.0]:
        beyond = q > SERIES_KNEE
        found = np.array(errors(activation, q, q, rho))
        assert np.all(found <= stated(activation, q)), q
        largest[beyond] = np.maximum(largest[beyond], found)
    if activation == "gelu-tanh" and rho == 1:
        assert np.all(largest[False] > np.array(SERIES_ERROR[0]) / 10)
    if activation == "silu" and rho == 1:
        assert np.all(largest[True] > np.array(SERIES_ERROR[1]) / 10)


def test_a_plain_series_fails_where_the_mixture_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: at a standard deviation of 30 sixty-four Hermite terms alone miss the slope by some per cent."""
    assert errors("silu", 900.0, 900.0, 1.0)[1] < SERIES_ERROR[1][1]
    monkeypatch.setattr("theory.kernels._MIXTURES", {"silu": ()})
    monkeypatch.setattr("theory.kernels._grid", _fine_grid)
    assert errors("silu", 900.0, 900.0, 1.0)[1] > 0.01


def _fine_grid(_: float) -> tuple[np.ndarray, np.ndarray]:
    """Hermite polynomials with weights on 12 standard deviations, fine enough for a kink."""
    nodes = np.linspace(-12, 12, 24_001)
    rows = [np.exp(-nodes * nodes / 2) / math.sqrt(2 * math.pi) * (nodes[1] - nodes[0])]
    rows.append(nodes * rows[0])
    for n in range(1, 63):
        rows.append((nodes * rows[n] - math.sqrt(n) * rows[n - 1]) / math.sqrt(n + 1))
    return nodes, np.array(rows)


@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize(
    ("q", "q_other", "rho"), [(1, 1, 0), (1, 1, 0.5), (0.3, 2, -0.7), (1, 4, 0.95), (1, 1, 1), (2, 0.5, -1)]
)
def test_closed_forms_against_samples(activation: Any, q: float, q_other: float, rho: float) -> None:
    generator = np.random.default_rng(0)
    n = 400_000
    z = generator.standard_normal(n)
    other = rho * z + math.sqrt(1 - rho**2) * generator.standard_normal(n)
    (f, slope), (f_other, slope_other) = (
        network_pair(activation, s * v) for s, v in ((q**0.5, z), (q_other**0.5, other))
    )
    kappa, kappa_slope = kernel(activation, q, q_other, rho * math.sqrt(q * q_other))
    for samples, computed in ((f * f_other, kappa), (slope * slope_other, kappa_slope)):
        standard_error = float(samples.std()) / math.sqrt(n)
        assert abs(float(samples.mean()) - computed) <= 4 * standard_error + 1e-12
        if computed != 0:  # control: a tenth off is seen
            assert abs(float(samples.mean()) - 1.1 * computed) > 4 * standard_error + 1e-12


def test_relu_closed_form_against_exact_values() -> None:
    """Equal, uncorrelated and opposite: q/2, q/(2 pi), 0; slopes 1/2, 1/4, 0."""
    for covariance, kappa, slope in ((3.0, 1.5, 0.5), (0.0, 1.5 / math.pi, 0.25), (-3.0, 0.0, 0.0)):
        assert kernel("relu", 3.0, 3.0, covariance) == pytest.approx((kappa, slope), abs=1e-12)


@pytest.mark.parametrize("activation", EVERY)
@pytest.mark.parametrize(("q", "q_other"), [(0.4, 0.4), (0.1, 1.5)])
def test_slope_is_the_derivative_in_the_covariance(activation: Any, q: float, q_other: float) -> None:
    """Central differences of step h: the error is h^2 times a third derivative of order one, and rounding 1e-16/h."""
    h = 1e-4
    for rho in (-0.9, -0.3, 0.0, 0.4, 0.9):
        c = rho * math.sqrt(q * q_other)
        numeric = (kernel(activation, q, q_other, c + h)[0] - kernel(activation, q, q_other, c - h)[0]) / (2 * h)
        assert kernel(activation, q, q_other, c)[1] == pytest.approx(numeric, abs=1e-5)


@pytest.mark.parametrize("activation", EVERY)
@given(
    q=st.floats(-8, 3), q_other=st.floats(-8, 3), rho=st.floats(-0.95, 0.95),
)  # fmt: skip
def test_price_over_every_variance(activation: Any, q: float, q_other: float, rho: float) -> None:
    """The slope is the derivative: a fourth-order difference of step h in rho, off by h^4 and by rounding over h."""
    q, q_other = 10**q, 10**q_other
    norm, h = math.sqrt(q * q_other), 3e-3
    around = [kernel(activation, q, q_other, (rho + k * h) * norm)[0] for k in (-2, -1, 1, 2)]
    numeric = (around[0] - 8 * around[1] + 8 * around[2] - around[3]) / (12 * h * norm)
    slope = kernel(activation, q, q_other, rho * norm)[1]
    own, other = kernel(activation, q, q, q), kernel(activation, q_other, q_other, q_other)
    scale = math.sqrt(own[1] * other[1])
    rounding = 1e-15 * math.sqrt(own[0] * other[0]) / (h * norm)
    assert abs(slope - numeric) <= 1e-5 * scale + rounding
    assert abs(1.1 * slope - numeric) > 1e-5 * scale + rounding or slope < 1e-3 * scale  # control


@st.composite
def grams(draw: st.DrawFn) -> np.ndarray:
    """Covariances of six normal variables of very different sizes, some of them equal or opposite."""
    generator = np.random.default_rng(draw(st.integers(0, 10_000)))
    directions = generator.standard_normal((6, draw(st.integers(1, 6))))
    directions[1], directions[3] = directions[0], -directions[2]
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    size = 10.0 ** generator.uniform(-4, 1.5, 6)
    size[1] = size[0]
    gram = np.outer(size, size) * np.clip(directions @ directions.T, -1, 1)
    np.fill_diagonal(gram, size**2)
    gram[0, 1] = gram[1, 0] = gram[0, 0]  # equal to the last bit, as for a repeated token
    return gram


def smallest(matrix: np.ndarray) -> float:
    """Smallest eigenvalue of a symmetric matrix scaled to unit diagonal."""
    scale = np.sqrt(np.diagonal(matrix))
    return float(np.linalg.eigvalsh(matrix / np.outer(scale, scale))[0])


@pytest.mark.parametrize("activation", EVERY)
@given(gram=grams())
def test_kernel_matrices_are_positive(activation: Any, gram: np.ndarray) -> None:
    """E[F F'] and E[F' F'] are Gram matrices: no eigenvalue is negative by more than six entries' errors."""
    q = np.diagonal(gram)
    pair = activation_kernel(activation, q[:, None], q[None, :], gram)
    # A step's slope moves by 1e-8 with the rounding of a correlation near 1.
    errors = np.maximum(stated(activation, float(q.max())), (1e-12, 1e-7))
    for matrix, error in zip(pair, errors, strict=True):
        np.testing.assert_allclose(matrix, matrix.T, rtol=1e-12, atol=1e-300)
        assert smallest(matrix) >= -6 * error
        # Control: of two equal variables, a diagonal short of a tenth leaves no Gram matrix.
        np.fill_diagonal(broken := matrix.copy(), 0.9 * np.diagonal(matrix))
        assert smallest(broken) < -6 * error


@given(q=st.floats(1e-8, 1e3))
def test_the_diagonal_is_exact(q: float) -> None:
    """c = q = q' gives a correlation of 1 to the last bit: ReLU's slope is 1/2, not 1/2 - 1e-9."""
    assert kernel("relu", q, q, q) == (pytest.approx(q / 2, rel=1e-15), 0.5)
    assert kernel("relu-squared", q, q, q) == pytest.approx((1.5 * q * q, 2 * q), rel=1e-14)


def test_error_function_by_its_integral_and_through_gelu() -> None:
    """Its slope is the derivative; GELU's E[Phi Phi'] is (1 + E[erf erf'])/4 with z/sqrt(2)."""
    for q, q_other, rho in ((0.3, 2.0, 0.8), (50.0, 1e-4, -0.5), (400.0, 400.0, 0.999)):
        functions = (lambda z: 1 - np.vectorize(math.erfc)(z), lambda z: 2 / math.sqrt(math.pi) * np.exp(-z * z))
        expected = expectations(functions, q, q_other, rho, nodes=20)
        pair = erf_kernel(*(np.array(x) for x in (q, q_other, rho * math.sqrt(q * q_other))))
        assert [float(x) for x in pair] == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("activation", EVERY)
def test_kernel_is_symmetric_vectorised_and_bounded(activation: Any) -> None:
    generator = np.random.default_rng(1)
    q = generator.uniform(0.05, 2, 7)
    covariance = generator.uniform(-1, 1, (7, 7)) * np.sqrt(np.outer(q, q))
    pair = activation_kernel(activation, q[:, None], q[None, :], covariance)
    transposed = activation_kernel(activation, q[:, None], q[None, :], covariance.T)
    swapped = activation_kernel(activation, q[None, :], q[:, None], covariance)
    np.testing.assert_allclose(swapped.kappa, pair.kappa, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(transposed.kappa.T, pair.kappa, rtol=1e-8, atol=1e-9)
    for i, j in ((0, 1), (3, 3), (6, 2)):
        assert kernel(activation, q[i], q[j], covariance[i, j]) == pytest.approx(
            (pair.kappa[i, j], pair.slope[i, j]), rel=1e-8, abs=1e-9
        )  # a series is cut where every entry of the array has converged: 1e-9 of its scale
    own = activation_kernel(activation, q, q, q).kappa
    assert np.all(np.abs(pair.kappa) <= np.sqrt(np.outer(own, own)) * (1 + 1e-9))  # Cauchy-Schwarz


def test_zero_variance() -> None:
    for activation in EVERY:
        pair = activation_kernel(activation, np.zeros(1), np.ones(1), np.zeros(1))
        assert pair.kappa[0] == pytest.approx(0, abs=1e-15)
        assert np.isfinite(pair.slope[0])


@pytest.mark.parametrize("activation", ["gelu", "gelu-tanh", "silu"])
def test_beyond_the_last_variance_they_are_homogeneous(activation: Any) -> None:
    """Of degree 1 as ReLU is, whose kernel they have where both variances are large, but for 1/sqrt(q)."""
    for large in (1e9, 1e27, 1e60):
        for rho in (-1.0, -0.3, 0.3, 1.0):
            found, limit = (
                activation_kernel(name, np.array(large), np.array(large), np.array(rho * large))
                for name in (activation, "relu")
            )
            assert found.kappa / large == pytest.approx(limit.kappa / large, abs=1e-3)
            assert found.slope == pytest.approx(limit.slope, abs=1e-3)
        one, other = (
            activation_kernel(activation, np.array(q), np.array(0.5), np.array(0.7 * np.sqrt(q * 0.5)))
            for q in (SMOOTH_END, large)
        )
        assert other.kappa == pytest.approx(one.kappa * np.sqrt(large / SMOOTH_END), rel=1e-12)
        assert other.slope == pytest.approx(one.slope, rel=1e-12)
