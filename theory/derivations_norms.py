"""Chains about the normalisations: RMSNorm, what a gain does, and the exact backward variance gain."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import sympy as sp  # pyright: ignore[reportMissingTypeStubs]

from theory.derivation import Derivation, line, register_derivation, substitution
from theory.derivations_expressions import Norm, Transposed, Values, array, entry
from theory.derivations_numeric import STEP, Rng, chi_square_mean, column_jacobian, layer_norm, rms_norm
from theory.sources import Source
from theory.symbols import symbol

_sp: Any = sp

OWN = Source(key="spikecheck", label="linear algebra")
COURANT = Source(key="horn2012matrix", label="theorem 4.2.6, Courant-Fischer")

d, s, eps, sigma = symbol("d"), symbol("s"), symbol("eps"), symbol("sigma_x")
gain = symbol("gain")
I = array("I")  # noqa: E741  the identity's letter
x, z, u, A, g, H = array("x"), array("z"), array("u"), array("A"), array("g"), array("H")
gamma = array("diag(gamma)", r"\mathrm{diag}(\gamma)")
kept = array("Pi", r"\Pi")
_NORM = array("dnorm/dx", r"\frac{\partial \mathrm{norm}}{\partial x}")
gamma_2, gamma_3 = entry("gamma_(2)", r"|\gamma|_{(2)}"), entry("gamma_(3)", r"|\gamma|_{(3)}")


@cache
def rms_norm_proof(width: int = 4) -> Any:
    """Sympy's Jacobian of z = x/sqrt(mean x^2 + eps) less (I - zz'/d)/r, for symbolic x and eps."""
    entries = _sp.Matrix(_sp.symbols(f"x_1:{width + 1}", real=True))
    normaliser = _sp.sqrt(sum(entry**2 for entry in entries) / _sp.Integer(width) + eps)
    normalised = entries / normaliser
    claimed = (_sp.eye(width) - normalised * normalised.T / _sp.Integer(width)) / normaliser
    return (normalised.jacobian(entries) - claimed).applyfunc(_sp.simplify)


def _sample(rng: Rng, *, centred: bool = False, unit_gain: bool = False, epsilon: float | None = None) -> Values:
    """A random token, gain and eps; centred: LayerNorm, else RMSNorm."""
    width = 6
    epsilon = float(rng.uniform(0.01, 1)) if epsilon is None else epsilon
    point = rng.normal(0.3, rng.uniform(0.2, 2), (width, 1))
    scales = np.ones(width) if unit_gain else rng.normal(0, 1, width)
    norm = layer_norm if centred else rms_norm
    normalised = norm(point, epsilon)
    square = float(np.var(point) if centred else np.mean(point**2)) + epsilon
    removed = np.hstack([normalised, np.ones((width, 1))]) if centred else normalised
    basis = np.linalg.qr(removed)[0]
    largest = np.sort(np.abs(scales))[::-1]
    direction = rng.normal(0, 1, (width, 1))
    return {
        **{d: width, s: square**0.5, eps: epsilon, gain: largest[0], gamma_2: largest[1], gamma_3: largest[2]},
        **{I: np.eye(width), x: point, z: normalised, u: scales[:, None] * normalised, gamma: np.diag(scales)},
        **{kept: np.eye(width) - basis @ basis.T, g: direction, H: np.eye(width) - 1 / width},
        A: square**0.5 * column_jacobian(lambda x: norm(x, epsilon), point),
        _NORM: column_jacobian(lambda x: scales[:, None] * norm(x, epsilon), point),
    }


def _unit(rng: Rng) -> Values:
    return _sample(rng, unit_gain=True)


@register_derivation
def rmsnorm() -> Derivation:
    """RMSNorm's Jacobian and its norm."""
    own = partial(line, source=OWN, sample=_sample)
    affine = own(u, "=", gamma * x / s, "definition", "The mean is not taken off; s is the root mean square.")
    normaliser = own(s**2, "=", Norm(x) ** 2 / d + eps, "definition", "s^2 = mean x^2 + eps.")
    scaled = own(z, "=", x / s, "definition", "The token before the gain.")
    exact = own(
        _NORM,
        "=",
        gamma * (I - z * Transposed(z) / d) / s,
        "RMSNorm Jacobian",
        "Product rule with ds/dx = z'/d; sympy proves the bracket at d = 4 for any x and eps.",
        proof=rms_norm_proof,
    )
    bracket = own(A, "=", I - z * Transposed(z) / d, "definition", "A is the bracket, a symmetric matrix.")
    radius = own(A * z, "=", eps / s**2 * z, "eigenvector", "z'z = d (1 - eps/s^2); the mean's direction stays.")
    norm = own(Norm(A), "=", _sp.Integer(1), "spectral theorem", "The other d - 1 eigenvalues are 1; hence d >= 2.")
    product = own(
        Norm(_NORM),
        "<=",
        gain * Norm(A) / s,
        "sub-multiplicativity",
        "A diagonal matrix's norm is its largest entry; equality for unit gain.",
        tight=_unit,
    )
    conclusion = substitution(
        *(product, norm),
        source=OWN,
        explanation="The same formula as LayerNorm's, with the root mean square for the standard deviation.",
        sample=_sample,
        tight=_unit,
    )
    return Derivation(
        name="rmsnorm",
        title="The RMSNorm Jacobian and its norm",
        steps=(affine, normaliser, scaled, exact, bracket, radius, norm, product, conclusion),
        statement="norm-jacobian-upper",
        assumptions=("s > 0", "d >= 2 for equality at unit gain"),
    )


@register_derivation
def norm_gain() -> Derivation:
    """What a gain does to the norm of the Jacobian: interlacing."""
    sample = partial(_sample, centred=True)
    unit = partial(_sample, centred=True, unit_gain=True)
    no_eps = partial(_sample, centred=True, epsilon=0.0)
    own = partial(line, source=OWN, sample=sample)
    factor = own(_NORM, "=", gamma * A / s, "LayerNorm Jacobian", "See the derivations layernorm and rmsnorm.")
    fixed = own(A * kept, "=", kept, "eigenvector", "Pi projects onto the d - 2 directions that A keeps.")
    restricted = own(
        Norm(gamma * kept),
        "<=",
        s * Norm(_NORM),
        "sub-multiplicativity",
        "J Pi = diag(gamma) Pi / s, and a projection's norm is 1; equality at eps = 0.",
        tight=no_eps,
    )
    interlaced = line(
        gamma_3,
        "<=",
        Norm(gamma * kept),
        "Courant-Fischer",
        "The d - 2 directions share a unit vector with the span of the three largest gains' axes.",
        source=COURANT,
        sample=sample,
        tight=unit,
    )
    lower = substitution(
        *(interlaced, restricted),
        source=COURANT,
        explanation="Two large gains can hide in the removed directions, the third cannot.",
        sample=sample,
        tight=unit,
    )
    upper = own(Norm(_NORM), "<=", gain / s, "sub-multiplicativity", "The largest gain, as |A| = 1.", tight=unit)
    root_mean_square = line(
        gamma_2,
        "<=",
        s * Norm(_NORM),
        "Courant-Fischer",
        "RMSNorm removes one direction alone, so the second largest gain is certain.",
        source=COURANT,
        sample=_sample,
        tight=_unit,
    )
    return Derivation(
        name="norm-gain",
        title="A normalisation's gain: interlacing",
        steps=(factor, fixed, restricted, interlaced, lower, root_mean_square, upper),
        assumptions=("s > 0", "d >= 3", "steps 1 to 5 for LayerNorm, 6 for RMSNorm, 7 for both"),
    )


def _zeros(rng: Rng) -> Values:
    """A token of zeros through an RMSNorm of unit gain: nothing is left of the normaliser but eps."""
    width, epsilon = 6, float(rng.uniform(0.01, 1))
    point = np.zeros((width, 1))
    return {
        **{s: epsilon**0.5, eps: epsilon, gain: 1.0, x: point, d: width},
        _NORM: column_jacobian(lambda x: rms_norm(x, epsilon), point),
    }


@register_derivation
def norm_jacobian_upper_apriori() -> Derivation:
    """A normalisation's Jacobian for any token at all."""
    upper = line(
        Norm(_NORM), "<=", gain / s, "norm-jacobian-upper", "See the derivations layernorm and rmsnorm.",
        source=OWN, sample=_sample, tight=_unit,
    )  # fmt: skip
    steepest = line(
        1 / s, "<=", 1 / _sp.sqrt(eps), "least value", "s^2 is a mean of squares plus eps, so at least eps.",
        source=OWN, sample=_sample, tight=_zeros,
    )  # fmt: skip
    conclusion = substitution(
        *(upper, steepest),
        source=Source(key="spikecheck", label="norm-jacobian-upper at the smallest normaliser"),
        explanation="Attained by a token of zeros. Normalised streams stay far below: at eps = 1e-5 it is 316.",
        sample=_sample,
        tight=_zeros,
    )
    return Derivation(
        name="norm-jacobian-upper-apriori",
        title="A normalisation's Jacobian, from its gain and eps alone",
        steps=(upper, steepest, conclusion),
        statement="norm-jacobian-upper-apriori",
        assumptions=("eps > 0",),
    )


inner_gain = symbol("inner_gain")
inverse = entry("1/|J|", r"1/\| J \|")


def _inner(rng: Rng, *, unit_gain: bool = False) -> Values:
    """LayerNorm or RMSNorm, with the gain that interlacing leaves."""
    centred = bool(rng.random() < 0.5)
    values = _sample(rng, centred=centred, unit_gain=unit_gain)
    left = values[gamma_3 if centred else gamma_2]
    return {**values, inner_gain: left, inverse: 1 / np.linalg.norm(values[_NORM], 2)}


@register_derivation
def norm_jacobian_lower() -> Derivation:
    """The least that a normalisation's Jacobian can be."""
    tight = partial(_inner, unit_gain=True)
    kept_gain = line(
        inner_gain,
        "<=",
        s * Norm(_NORM),
        "Courant-Fischer",
        "LayerNorm removes two directions and RMSNorm one: the next largest gain is certain (see norm-gain).",
        source=COURANT,
        sample=_inner,
        tight=tight,
    )
    conclusion = line(
        inverse,
        "<=",
        s / inner_gain,
        "reciprocals",
        "Both sides of the line above are positive.",
        source=OWN,
        sample=_inner,
        tight=tight,
    )
    return Derivation(
        name="norm-jacobian-lower",
        title="A normalisation's Jacobian from below",
        steps=(kept_gain, conclusion),
        statement="norm-jacobian-lower",
        assumptions=("s > 0", "the k-th largest gain is not zero"),
    )


chi_square_inverse = entry("E[1/chi^2_{d-1}]", r"\mathbb{E}[1/\chi^2_{d-1}]")
inverse_square = entry("E[1/s^2]", r"\mathbb{E}[1/s^2]")
over_directions = entry("E_g |J'g|^2/|g|^2", r"\mathbb{E}_g \frac{\| J^{\top} g \|^2}{\| g \|^2}")
over_all = entry("E |J'g|^2/|g|^2", r"\mathbb{E} \frac{\| J^{\top} g \|^2}{\| g \|^2}")
over_all_rms = entry("E |J_R'g|^2/|g|^2", r"\mathbb{E} \frac{\| J_R^{\top} g \|^2}{\| g \|^2}")
DRAWS, GAIN_WIDTH = 20_000, 24
SAMPLED = (
    f"exact; sampled: mean of {DRAWS} normal tokens at d = {GAIN_WIDTH}, where one has a standard deviation of 33 %, "
    "so within four standard errors of 0.24 %"
)


@cache
def inverse_chi_square_proof() -> Any:
    """Sympy's integral of the chi-square density over x, n degrees, less 1/(n - 2)."""
    over, place = _sp.Symbol("over", positive=True), _sp.Symbol("x", positive=True)
    n = over + 2  # the integral exists for n > 2
    density = place ** (n / 2 - 1) * _sp.exp(-place / 2) / (2 ** (n / 2) * _sp.gamma(n / 2))
    return _sp.gammasimp(_sp.integrate(density / place, (place, 0, _sp.oo)) - 1 / (n - 2))


def _gains(rng: Rng) -> Values:
    """Means over normal tokens; the inverse chi-square's mean by quadrature."""
    width, std = GAIN_WIDTH, float(rng.uniform(0.2, 2))
    tokens, directions = rng.normal(0, std, (width, DRAWS)), rng.normal(0, 1, (width, DRAWS))
    at_one = column_jacobian(layer_norm, tokens[:, :1])
    squares: dict[Any, float] = {}
    for letter, norm in ((over_all, layer_norm), (over_all_rms, rms_norm)):
        # The Jacobian is symmetric at unit gain, so the backward pass is a directional derivative.
        back = np.imag(norm(tokens + 1j * STEP * directions)) / STEP
        squares[letter] = float(np.sum(back**2) / np.sum(directions**2))
    return squares | {
        **{
            d: width,
            sigma: std,
            s: float(np.std(tokens[:, 0])),
            chi_square_inverse: chi_square_mean(lambda q: 1 / q, width - 1),
        },
        **{over_directions: float(np.sum(at_one**2)) / width},
        inverse_square: float(np.mean(1 / np.var(tokens, axis=0))),
    }


@register_derivation
def norm_backward_gain() -> Derivation:
    """How much variance a normalisation's backward pass keeps, exactly at finite width."""
    own = partial(line, source=OWN, sample=_gains)
    sampled = partial(own, tolerance=0.01, accuracy=SAMPLED)
    passes = line(
        Norm(Transposed(_NORM) * g) ** 2,
        "=",
        (Norm(H * g) ** 2 - (Transposed(z) * g) ** 2 / d) / s**2,
        "LayerNorm Jacobian",
        "At unit gain and eps = 0 the Jacobian is a projection over s, which removes 1 and z.",
        source=OWN,
        sample=partial(_sample, centred=True, unit_gain=True, epsilon=0.0),
    )
    trace = own(
        over_directions,
        "=",
        (d - 2) / (d * s**2),
        "trace of a projection",
        "The mean over directions g of |J'g|^2/|g|^2 is tr(JJ')/d, and d - 2 eigenvalues are 1/s^2.",
    )
    chi = sampled(
        inverse_square,
        "=",
        d / sigma**2 * chi_square_inverse,
        "distribution of the variance",
        "For a normal token d s^2/sigma^2 is chi-square with d - 1 degrees, independent of the direction z.",
    )
    inverse = own(
        chi_square_inverse,
        "=",
        1 / (d - 3),
        "mean of an inverse chi-square",
        "E[1/chi^2_n] = 1/(n - 2), by sympy's integral of the density.",
        proof=inverse_chi_square_proof,
    )
    conclusion = sampled(
        over_all,
        "=",
        (d - 2) / (d - 3) / sigma**2,
        "product of the last three lines",
        "s and z are independent, so the means multiply: (d-2)/d times d/(d-3). Above 1/sigma^2 at any finite width.",
        proof=lambda: (
            trace.right * s**2 * chi.right.subs(chi_square_inverse, inverse.right) - (d - 2) / (d - 3) / sigma**2
        ),
    )
    root_mean_square = sampled(
        over_all_rms,
        "=",
        (d - 1) / (d - 2) / sigma**2,
        "the same with one direction less",
        "RMSNorm removes z alone, and d r^2/sigma^2 has d degrees: (d-1)/d times d/(d-2).",
    )
    return Derivation(
        name="norm-backward-gain",
        title="A normalisation's backward variance gain, exact at finite width",
        steps=(passes, trace, chi, inverse, conclusion, root_mean_square),
        assumptions=(
            "the token has independent normal entries of std sigma_x: true of embeddings, not of a stream whose norm "
            "an earlier normalisation has fixed, for which the gain is (d-2)/d (RMSNorm: (d-1)/d) over its mean square",
            "the gradient's direction is independent of the token and has no preferred axis",
            "eps = 0, unit gain, d >= 4 (RMSNorm d >= 3)",
        ),
    )
