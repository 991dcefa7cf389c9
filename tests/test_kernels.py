"""Activation kernels against Gaussian quadrature and sampling in two dimensions, and against their own derivative."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from empirics.model import ACTIVATIONS
from theory.architecture import Activation
from theory.kernels import activation_function, activation_kernel, activation_slope

SMOOTH = ("gelu", "gelu-tanh", "silu")
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


def quadrature(activation: str, q: float, q_other: float, covariance: float, nodes: int = 80) -> tuple[float, float]:
    """E[F(z) F(z')] and E[F'(z) F'(z')] on a two-dimensional Gauss-Hermite grid."""
    x, weight = np.polynomial.hermite.hermgauss(nodes)
    x, weight = x * math.sqrt(2), weight / math.sqrt(math.pi)
    rho = covariance / math.sqrt(q * q_other)
    first = math.sqrt(q) * np.broadcast_to(x[:, None], (nodes, nodes))
    second = math.sqrt(q_other) * (rho * x[:, None] + math.sqrt(max(0.0, 1 - rho**2)) * x[None, :])
    (f, slope), (f_other, slope_other) = (network_pair(activation, np.ascontiguousarray(z)) for z in (first, second))
    both = np.outer(weight, weight)
    return float(np.sum(both * f * f_other)), float(np.sum(both * slope * slope_other))


@pytest.mark.parametrize("activation", EVERY)
def test_function_and_slope_are_the_networks(activation: Any) -> None:
    z = np.linspace(-9, 9, 1000)  # 0 is not among them: a kink has no slope
    value, slope = network_pair(activation, z)
    np.testing.assert_allclose(activation_function(activation, z), value, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(activation_slope(activation, z), slope, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("activation", [*SMOOTH, "identity"])
@given(
    q=st.floats(0.01, 2.0), q_other=st.floats(0.01, 2.0), rho=st.floats(-1, 1),
)  # fmt: skip
def test_smooth_kernels_are_the_double_integral(activation: Any, q: float, q_other: float, rho: float) -> None:
    """To 1e-6: the 80-node rule's own error for functions with poles or steep parts a few units off the axis."""
    covariance = rho * math.sqrt(q * q_other)
    kappa, slope = kernel(activation, q, q_other, covariance)
    expected, expected_slope = quadrature(activation, q, q_other, covariance)
    scale = math.sqrt(quadrature(activation, q, q, q)[0] * quadrature(activation, q_other, q_other, q_other)[0])
    assert kappa == pytest.approx(expected, abs=1e-6 * scale)
    assert slope == pytest.approx(expected_slope, abs=1e-5)


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
