"""External truths: numbers and formulas that others found, against this project's code and against simulation.

Every test names its source by key; the last one checks that the key is in `theory.sources`.
"""

from __future__ import annotations

import math
import re
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from helpers.integrals import expectations
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import airy
from scipy.stats import chi2, truncnorm

from theory.activations import moments
from theory.evaluate import paper_stds
from theory.initialisation import INITS, truncated_std
from theory.kernels import activation_kernel, erf_kernel
from theory.random_matrix import TRACY_WIDOM_MEAN, TRACY_WIDOM_VARIANCE, cesaro_opnorm, feedforward_edge
from theory.sources import REFERENCES
from theory.statements import find

GOLDEN = (1 + math.sqrt(5)) / 2
VARIANCES = st.floats(-3, 2).map(lambda e: 10**e)
CORRELATIONS = st.floats(-0.999, 0.999)


def kernel(activation: Any, q: float, rho: float) -> tuple[float, float]:
    """(kappa, slope) at equal variances."""
    kappa, slope = activation_kernel(activation, np.array(q), np.array(q), np.array(rho * q))
    return float(kappa), float(slope)


# Moments of activations -----------------------------------------------------------------------------------------------


@given(q=VARIANCES, rho=CORRELATIONS)
def test_relu_moments(q: float, rho: float) -> None:
    """Mean, variance, covariance, and the gradient's variance and covariance behind a ReLU.

    Derived again: polar coordinates turn E[max(z,0) max(z',0)] into an integral over the sector where both are
    positive, of angle pi - arccos(rho); the gradient is kept where z > 0, half the time.
    Source: kedia2024stable, ReLU.
    """
    mean = math.sqrt(q / (2 * math.pi))
    variance = q * (math.pi - 1) / (2 * math.pi)
    covariance = q * (math.pi * rho + math.sqrt(1 - rho**2) - rho * math.acos(rho) - 1) / (2 * math.pi)
    gradient = Fraction(1, 2), 0.25 + math.asin(rho) / (2 * math.pi)

    found, (kappa, slope) = moments("relu", np.array(q)), kernel("relu", q, rho)
    assert float(found.mean) == pytest.approx(mean, rel=1e-14)
    assert float(found.mean_square) - mean**2 == pytest.approx(variance, rel=1e-13)
    assert kappa - mean**2 == pytest.approx(covariance, abs=1e-13 * q)
    assert float(found.mean_square_slope) == gradient[0]
    assert slope == pytest.approx(gradient[1], abs=1e-13)


@given(q=VARIANCES, rho=CORRELATIONS)
def test_gelu_moments(q: float, rho: float) -> None:
    """The same five behind a GELU, in a = q/(1 + q), which is the correlation of two normals of that regression.

    Derived again: Phi(z) is the probability that a further normal is below z, which makes E[Phi(z) Phi(z')] an
    orthant probability of correlation rho a; factors z are removed by integrating by parts.
    Source: kedia2024stable, GELU.
    """
    a = q / (1 + q)
    squared = (1 + q) ** 2 - (rho * q) ** 2
    mean = math.sqrt(q * a / (2 * math.pi))
    variance = q / (2 * math.pi) * (math.pi - a - math.acos(a) + 2 * a * math.sqrt((1 - a) / (1 + a)))
    product = (
        q / 4 * (rho + 2 / math.pi * rho * math.asin(rho * a))
        + q**2 / (2 * math.pi) * (q * (1 - rho**2) + 1 + rho**2) / ((1 + q) * math.sqrt(squared))
    )  # fmt: skip
    gradient_variance = 0.5 + (a * (5 * q + 3) / (1 + 2 * q) ** 1.5 - math.acos(a)) / (2 * math.pi)
    bracket = rho * a * ((q + 1) * (2 * q + 3) - 2 * (rho * q) ** 2) / squared**1.5
    gradient_covariance = 0.5 + (bracket - math.acos(rho * a)) / (2 * math.pi)

    found, (kappa, slope) = moments("gelu", np.array(q)), kernel("gelu", q, rho)
    assert float(found.mean) == pytest.approx(mean, rel=1e-13)
    assert float(found.mean_square) - mean**2 == pytest.approx(variance, rel=1e-11)  # the difference cancels
    assert kappa == pytest.approx(product, abs=1e-12 * q)
    assert float(found.mean_square_slope) == pytest.approx(gradient_variance, rel=1e-12)
    assert slope == pytest.approx(gradient_covariance, abs=1e-12)
    assert slope != pytest.approx(gradient_covariance + 1e-9, abs=1e-12)  # control


def test_moments_in_a_simulation() -> None:
    """Sampled through PyTorch's own functions and automatic differentiation: within four standard errors.

    Source: kedia2024stable, whose authors check their formulas the same way.
    """
    generator, n, q, rho = torch.Generator().manual_seed(0), 400_000, 1.7, 0.6
    z = torch.randn(2, n, generator=generator, dtype=torch.float64)
    x = math.sqrt(q) * torch.stack([z[0], rho * z[0] + math.sqrt(1 - rho**2) * z[1]])
    for name, function in (("relu", torch.relu), ("gelu", torch.nn.functional.gelu)):
        x = x.detach().requires_grad_()
        value = function(x)
        (slope,) = torch.autograd.grad(value.sum(), x)
        expected, (kappa, backward) = moments(name, np.array(q)), kernel(name, q, rho)  # type: ignore[arg-type]
        for samples, truth in (
            (value[0], float(expected.mean)),
            (value[0] ** 2, float(expected.mean_square)),
            (slope[0] ** 2, float(expected.mean_square_slope)),
            (value[0] * value[1], kappa),
            (slope[0] * slope[1], backward),
        ):
            error = float(samples.detach().std()) / math.sqrt(n)
            assert abs(float(samples.detach().mean()) - truth) <= 4 * error
            assert abs(float(samples.detach().mean()) - 1.05 * truth) > 4 * error  # control


# Kernels in closed form -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("order", "activation", "factor"), [(1, "relu", 1), (2, "relu-squared", 4)])
@given(q=VARIANCES, q_other=VARIANCES, rho=CORRELATIONS)
def test_arc_cosine_kernels(order: int, activation: Any, factor: int, q: float, q_other: float, rho: float) -> None:
    """J_n from its definition, (-1)^n sin^(2n+1) (d/dt / sin)^n ((pi - t)/sin t), written out for n = 0, 1, 2.

    Cho and Saul's kernel has a factor 2; E[F F'] is half of it.
    Source: cho2009kernel, eq. (4) to (8).
    """
    t = math.acos(rho)
    angular = (
        math.pi - t,
        math.sin(t) + (math.pi - t) * math.cos(t),
        3 * math.sin(t) * math.cos(t) + (math.pi - t) * (1 + 2 * math.cos(t) ** 2),
    )
    size = math.sqrt(q * q_other)
    pair = activation_kernel(activation, np.array(q), np.array(q_other), np.array(rho * size))
    assert float(pair.kappa) == pytest.approx(size**order * angular[order] / (2 * math.pi), abs=1e-12 * size**order)
    expected = factor * size ** (order - 1) * angular[order - 1] / (2 * math.pi)
    assert float(pair.slope) == pytest.approx(expected, abs=1e-12 * size ** (order - 1))


@given(q=VARIANCES, q_other=VARIANCES, rho=CORRELATIONS)
def test_error_function_kernel(q: float, q_other: float, rho: float) -> None:
    """Source: williams1997infinite, eq. (11)."""
    c = rho * math.sqrt(q * q_other)
    product = (1 + 2 * q) * (1 + 2 * q_other)
    pair = erf_kernel(np.array(q), np.array(q_other), np.array(c))
    assert float(pair.kappa) == pytest.approx(2 / math.pi * math.asin(2 * c / math.sqrt(product)), abs=1e-13)
    assert float(pair.slope) == pytest.approx(4 / math.pi / math.sqrt(product - 4 * c * c), rel=1e-10)


@pytest.mark.parametrize(("q", "q_other", "rho"), [(0.2, 5.0, 0.7), (1.0, 1.0, -0.9), (40.0, 3.0, 0.99)])
def test_gelu_kernel_at_unequal_variances(q: float, q_other: float, rho: float) -> None:
    """Source: tsuchida2021avoiding, whose kernel has a closed form for any two variances; here by integration."""
    functions = (lambda z: torch.nn.functional.gelu(torch.from_numpy(z)).numpy(),)
    (expected,) = expectations(functions, q, q_other, rho)
    pair = activation_kernel("gelu", np.array(q), np.array(q_other), np.array(rho * math.sqrt(q * q_other)))
    assert float(pair.kappa) == pytest.approx(expected, rel=1e-12)


# Normalisation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [5, 8, 64])
@pytest.mark.parametrize(("norm", "lost"), [("layernorm", 2), ("rmsnorm", 1)])
def test_backward_gain_of_a_normalisation(d: int, norm: str, lost: int) -> None:
    """E|J'g|^2 / E|g|^2 is (d-2)/(d-3)/sigma^2 for LayerNorm and (d-1)/(d-2)/sigma^2 for RMSNorm, at a normal token.

    J has d - lost singular values 1/s, and d s^2/sigma^2 is chi-square with d - lost + 1 degrees of freedom, whose
    inverse has mean 1/(d - lost - 1). Simulated with PyTorch's own modules in float64, eps = 0.
    Source: kedia2024stable has the limit 1/sigma^2 of a large width; spikecheck for the rest.
    """
    sigma, draws, degrees = 1.3, 20_000, d - lost + 1
    gain = (d - lost) / (d - lost - 1) / sigma**2
    inverse = quad(lambda x: chi2.pdf(x, degrees) / x, 0, np.inf, epsabs=0, epsrel=1e-10)[0]
    assert (d - lost) * inverse / sigma**2 == pytest.approx(gain, rel=1e-8)

    generator = torch.Generator().manual_seed(d)
    module = (torch.nn.LayerNorm if norm == "layernorm" else torch.nn.RMSNorm)(d, eps=0.0, dtype=torch.float64)
    x = (sigma * torch.randn(draws, d, generator=generator, dtype=torch.float64)).requires_grad_()
    above = torch.randn(draws, d, generator=generator, dtype=torch.float64)
    (below,) = torch.autograd.grad((module(x) * above).sum(), x)
    ratios = below.square().sum(dim=1) / d  # E|g|^2 = d
    # At d = 5 the variance of 1/s^2 is infinite for LayerNorm: no standard error there.
    if degrees > 4:
        error = float(ratios.std()) / math.sqrt(draws)
        assert abs(float(ratios.mean()) - gain) <= 4 * error
        assert abs(float(ratios.mean()) - 1.2 * gain) > 4 * error  # control
    assert float(ratios.median()) < gain  # skewed: the mean is above the median


# Random matrices ------------------------------------------------------------------------------------------------------


def tracy_widom(s: np.ndarray, nodes: int = 60, reach: float = 18.0) -> np.ndarray:
    """F_1(s) = det(1 - B_s) with B_s(x, y) = Ai(x + y + s) on the half-line, by a Gauss-Legendre rule."""
    x, weight = np.polynomial.legendre.leggauss(nodes)
    x, root = reach * (x + 1) / 2, np.sqrt(reach * weight / 2)
    values = airy(x[:, None] + x[None, :] + s[:, None, None])[0]
    return np.linalg.det(np.eye(nodes) - root[:, None] * values * root[None, :])


def test_tracy_widom_moments() -> None:
    """Mean -1.2065335745820 and variance 1.607781034581 for real matrices, from a Fredholm determinant.

    By parts, E S = high - int F and E S^2 = high^2 - int 2 s F, where F is 0 at the low end and 1 at the high one.
    Source: bornemann2010numerical, table of moments; ferrari2005determinantal for the determinant.
    """
    low, high = -9.0, 14.0
    node, weight = np.polynomial.legendre.leggauss(100)
    s, weight = (low + high + (high - low) * node) / 2, (high - low) / 2 * weight
    law = tracy_widom(s)
    ends = tracy_widom(np.array([low, high]))
    assert ends == pytest.approx([0, 1], abs=1e-12)
    mean = high - float(weight @ law)
    variance = high**2 - float(weight @ (2 * s * law)) - mean**2
    assert mean == pytest.approx(-1.2065335745820, abs=1e-10)
    assert variance == pytest.approx(1.607781034581, abs=1e-10)
    assert mean == pytest.approx(TRACY_WIDOM_MEAN, abs=1e-10)
    assert variance == pytest.approx(TRACY_WIDOM_VARIANCE, abs=1e-9)
    assert mean != pytest.approx(-1.7710868074, abs=0.1)  # control: the law of complex matrices (beta = 2)


def limit_of_ratios(sequence: Any) -> float:
    """Edge of a law with density like a square root there: ratios of moments approach it as 1 - 3/(2k)."""
    k = 4000
    ratio = Fraction(sequence(k + 1)) / Fraction(sequence(k))
    return float(ratio) * (1 + 1.5 / (k + 1))


def test_edge_of_the_product_of_two_square_matrices() -> None:
    """Largest singular value sqrt(27/4): squared, the law's moments are the Fuss-Catalan numbers (3k choose k)/(2k+1).

    Source: penson2011product.
    """
    edge = limit_of_ratios(lambda k: Fraction(math.comb(3 * k, k), 2 * k + 1))
    assert edge == pytest.approx(27 / 4, rel=1e-6)
    assert feedforward_edge("identity", 1.0, 1.0).limit == pytest.approx(27 / 4, rel=1e-9)


def test_marchenko_pastur_edge() -> None:
    """(1 + sqrt(m/n))^2: the estimate's square over sigma^2 n, and the largest squared singular value of a sample.

    The moments are sums of Narayana numbers N(k, r) c^r.
    Source: marchenko1967distribution.
    """
    c = 4.0

    def moment(k: int) -> int:
        return sum(math.comb(k, r) * math.comb(k, r - 1) // k * int(c) ** r for r in range(1, k + 1))

    k = 1000
    edge = float(Fraction(moment(k + 1), moment(k))) * (1 + 1.5 / (k + 1))
    assert edge == pytest.approx((1 + math.sqrt(c)) ** 2, rel=1e-5)
    estimate = find("gaussian-opnorm-estimate").evaluate({"sigma": 0.1, "rows": 800.0, "columns": 200.0})
    assert float(estimate) ** 2 / (0.01 * 200) == pytest.approx((1 + math.sqrt(c)) ** 2, rel=1e-12)
    matrix = np.random.default_rng(0).standard_normal((800, 200))
    largest = np.linalg.norm(matrix, 2) ** 2 / 200
    assert largest == pytest.approx((1 + math.sqrt(c)) ** 2, rel=0.06)  # fluctuations of order 200^(-2/3), 3 %


def test_edges_of_a_feedforward_layer() -> None:
    """Width ratio 4: 4.4037 for the identity, and golden ratio^(5/2) = 3.3302 for ReLU.

    The edge is the minimum of (1 + t)/sqrt(w), t = 4 p w/(1 - w) with a share p of slopes 1. For the identity the
    derivative vanishes at 3w^2 + 6w = 1, w = 2/sqrt(3) - 1; for ReLU (p = 1/2) at w^2 + 4w = 1, w = sqrt(5) - 2, the
    golden ratio's inverse cube, where (1 + w)/(1 - w) is the golden ratio.
    Source: pennington2017resurrecting for the method; spikecheck for the roots.
    """
    w = 2 / math.sqrt(3) - 1
    identity = (1 + 3 * w) / (1 - w) / math.sqrt(w)
    for name, exact, decimals in (("identity", identity, 4.4037), ("relu", GOLDEN**2.5, 3.3302)):
        edge = math.sqrt(feedforward_edge(name, 4.0, 1.0).limit)  # type: ignore[arg-type]
        assert edge == pytest.approx(exact, rel=1e-9)
        assert edge == pytest.approx(decimals, abs=5e-5)
    # The paper's constant (1 + sqrt 4)^2 = 9 is 2.0 and 2.7 times loose.
    assert 9 / identity == pytest.approx(2.04, abs=0.01)
    assert pytest.approx(2.70, abs=0.01) == 9 / GOLDEN**2.5

    d, generator = 256, np.random.default_rng(1)
    for name, share in (("identity", 1.0), ("relu", 0.5)):
        slopes = (generator.uniform(size=4 * d) < share).astype(float)
        first, second = generator.standard_normal((4 * d, d)), generator.standard_normal((d, 4 * d))
        norm = np.linalg.norm(second @ (slopes[:, None] * first), 2) / d
        predicted = find(f"ffn-sharp-{name}")
        value = float(predicted.evaluate({"sigma_1": 1.0, "sigma_2": 1.0, "d": float(d), "d_ffn": 4.0 * d})) / d
        assert predicted.target is not None
        assert norm == pytest.approx(value, rel=2 * predicted.target)  # one draw: its own fluctuation is about 1 %
        assert norm != pytest.approx(9, rel=0.4)  # control


@pytest.mark.parametrize(("n_tokens", "decimals"), [(1, 1.0), (64, 1.598), (1024, 1.749)])
def test_cesaro_norm(n_tokens: int, decimals: float) -> None:
    """The causal averaging matrix by a dense singular value decomposition; rising, and below Hardy's 2.

    Source: hardy1920.
    """
    matrix = np.tril(np.ones((n_tokens, n_tokens))) / np.arange(1, n_tokens + 1)[:, None]
    norm = float(np.linalg.norm(matrix, 2))
    rounding = 2.0**-49 * max(n_tokens, 8) ** 2  # twice the margin for entries of size T^2 in the inverse
    assert float(cesaro_opnorm(n_tokens)) == pytest.approx(norm, rel=rounding)
    assert norm == pytest.approx(decimals, abs=6e-4)


def test_cesaro_norm_rises_below_two() -> None:
    """Source: hardy1920; 1.774 at 2048 tokens."""
    values = [float(cesaro_opnorm(2**k)) for k in range(15)]
    assert values[11] == pytest.approx(1.774, abs=6e-4)
    assert np.all(np.diff(values) > 0)
    assert max(values) < 2
    assert max(values) > 1.8  # control: no smaller round number would do


def test_softmax_variance_inequality() -> None:
    """A variance is at most a quarter of the squared range: the softmax Jacobian's norm is at most 1/2, attained.

    Source: popoviciu1935.
    """
    bound = float(find("softmax-jacobian").evaluate({}))
    assert bound == 0.5
    generator = np.random.default_rng(0)
    for n in (2, 3, 10):
        for scale in (0.0, 0.1, 1.0, 10.0):
            logits = scale * generator.standard_normal(n)
            p = np.exp(logits - logits.max())
            p /= p.sum()
            assert np.linalg.norm(np.diag(p) - np.outer(p, p), 2) <= bound * (1 + 1e-14)
    even = np.full(2, 0.5)
    assert np.linalg.norm(np.diag(even) - np.outer(even, even), 2) == pytest.approx(bound, rel=1e-14)


# Initialisations ------------------------------------------------------------------------------------------------------


def test_truncated_normal_factor() -> None:
    """A standard normal cut at two deviations keeps 0.87962566103423978 of its deviation; at three, 0.98658.

    Source: jax2018, the constant of its variance scaling.
    """
    assert truncated_std(2.0) == pytest.approx(0.87962566103423978, rel=1e-14)
    for cutoff in (0.5, 2.0, 3.0):
        assert truncated_std(cutoff) == pytest.approx(float(truncnorm.std(-cutoff, cutoff)), rel=1e-11)
    assert truncated_std(3.0) == pytest.approx(0.98658, abs=1e-5)
    generator = torch.Generator().manual_seed(0)
    sample = torch.nn.init.trunc_normal_(torch.empty(400_000, dtype=torch.float64), a=-2, b=2, generator=generator)
    error = truncated_std(2.0) / math.sqrt(2 * sample.numel())  # of a standard deviation, and more for light tails
    assert abs(float(sample.std()) - truncated_std(2.0)) <= 4 * error
    assert abs(float(sample.std()) - 0.9) > 4 * error  # control


def test_small_init_of_a_published_run() -> None:
    """sqrt(2/(5 d)) at the 104B model's width of 11600, as its authors print it.

    Source: bigscience2021lessons; nguyen2019transformers for the rule.
    """
    small = INITS["small"]
    found = small.std(small.hidden, d_model=11600, fan_in=11600, fan_out=11600)
    assert found == pytest.approx(0.00587220219514703, abs=1e-17)  # one unit of the last digit printed
    assert float(paper_stds(np.array(11600.0), np.array(64.0))["base"]) == pytest.approx(found, rel=1e-15)


def test_every_source_is_known() -> None:
    """Each test here names at least one key of the table of references."""
    module = sys.modules[__name__]
    for name, test in vars(module).items():
        if not name.startswith("test_") or name == "test_every_source_is_known":
            continue
        original = getattr(getattr(test, "hypothesis", None), "inner_test", test)
        cited = re.search(r"Source: (.*)", original.__doc__ or "", re.DOTALL)
        assert cited, name
        keys = re.findall(r"\b[a-z]+\d{4}[a-z]*\b", cited[1])
        assert keys, name
        assert set(keys) <= set(REFERENCES), name
