"""Finite width: how much a token's mean square scatters, and what that does to the gradient through Post-LN's norms."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import sympy as sp  # pyright: ignore[reportMissingTypeStubs]

from theory.derivation import Derivation, line, register_derivation
from theory.derivations_expressions import Values, entry
from theory.derivations_numeric import Array, Rng, chi_square_mean
from theory.growth_domain import MAX_SCATTER, MAX_STREAM_SCATTER
from theory.sources import Source
from theory.symbols import symbol

_sp: Any = sp

OWN = Source(key="spikecheck", label="fluctuations at finite width")

d, m = symbol("d"), symbol("d_ffn")
a, a_A, a_F, kappa = entry("a"), entry("a_A"), entry("a_F"), entry("kappa_4", r"\kappa_4")
n, values = entry("n"), entry("Var(mean z^2)", r"\mathrm{Var}(\overline{z^2})")
chi, chi_relu = entry("chi"), entry("chi^relu", r"\chi^{\mathrm{relu}}")
product, pulled = entry("h.W_2'v", r"h \cdot W_2^\top v", signed=True), entry("f.v", r"f \cdot v", signed=True)
along = entry("along h", r"\mathbb{E}[\,\| D \hat h \|^2\,] / \| D \|^2")
normed = entry("E[|Du|^2/|h|^2] - 1", r"\mathbb{E}[\| D u \|^2 / \| h \|^2] - 1")
normed_values = entry("E[|u|^2/|z|^2]", r"\mathbb{E}[\| u \|^2 / \| z \|^2]")
less = entry("1 - E[|Du|^2/s^2]", r"1 - \mathbb{E}[\| D u \|^2 / s^2]")
kappa_gated, kappa_relu = entry("kappa_4'", r"\kappa_4'"), entry("kappa_4^relu", r"\kappa_4^{\mathrm{relu}}")
hidden = entry("Var(mean h^2)", r"\mathrm{Var}(\overline{h^2})")
given = entry("Var(|x+f|^2/d | h)", r"\mathrm{Var}(\|x + f\|^2/d \mid h)")
total, v = entry("Var(|x+f|^2/d)", r"\mathrm{Var}(\|x + f\|^2/d)"), entry("v")
excess = entry("E[s^2] E[1/s^2] - 1", r"\mathbb{E}[s^2]\,\mathbb{E}[1/s^2] - 1")
first_norm = entry("(E[s^2] E[1/s^2])_1", r"\left( \mathbb{E}[s^2]\,\mathbb{E}[1/s^2] \right)_1")
mean_square = entry("E[mean(f)^2]", r"\mathbb{E}[\bar f^2]")
layer_excess = entry("E[1/s^2] - 1", r"\mathbb{E}[1/s^2] - 1")
cosine = entry("E cos^2(x,x+f)", r"\mathbb{E}\cos^2(x, x + f)")
lost = entry("E cos^2(g,x)", r"\mathbb{E}\cos^2(g, x)")

WIDTH, UNITS, DRAWS = 64, 128, 40_000
# Relative standard error of a variance, or a mean square, of DRAWS normal numbers: 0.7 %.
SAMPLED = f"mean of {DRAWS} draws"


def _update(rng: Rng, *, width: int = WIDTH) -> tuple[Array, Array, float]:
    """A token x of mean square 1 - a and no mean, and draws of a ReLU branch f of mean square a, over its weights."""
    share = float(rng.uniform(0.3, 0.7))
    x = rng.normal(0, 1, width)
    x -= x.mean()
    x *= np.sqrt((1 - share) / np.mean(x * x))
    units = np.maximum(rng.normal(0, 1, (DRAWS, UNITS)), 0)
    # The rows of W_2 are independent and normal, so given h the entries of W_2 h are, of variance |h|^2 sigma_2^2.
    lengths = np.sqrt(2 * share / UNITS) * np.linalg.norm(units, axis=1, keepdims=True)
    return x, lengths * rng.normal(0, 1, (DRAWS, width)), share


def _moments(rng: Rng) -> Values:
    """Fourth moments over squared second ones of a ReLU, a GELU-like unit and that unit behind a gate; their mean's."""
    nodes = np.linspace(-12, 12, 4801)  # trapezoids, the kink on a node
    weights = np.exp(-nodes * nodes / 2)
    weights = weights / weights.sum()

    def kurtosis(values: Array, mass: Array) -> float:
        return float(np.sum(values**4 * mass) / np.sum(values**2 * mass) ** 2)

    slope = float(rng.uniform(0.5, 3))
    unit = nodes / (1 + np.exp(-slope * nodes))
    few = nodes[::20], weights[::20] / weights[::20].sum()
    both = unit[:, None] * few[0]
    drawn = np.maximum(rng.normal(0, 1, (200_000, 8)), 0)
    squares = np.mean(drawn**2, axis=1)
    return {
        **{kappa: kurtosis(unit, weights), kappa_relu: kurtosis(np.maximum(nodes, 0), weights)},
        **{kappa_gated: kurtosis(both, weights[:, None] * few[1])},
        **{hidden: float(np.var(squares) / np.mean(squares) ** 2), m: 8},
    }


def _units(rng: Rng) -> Values:
    return {**_moments(rng), kappa: 6.0}


def _given(rng: Rng) -> Values:
    """Var of |x + f|^2/d for normal f of mean square a: along x by quadrature, of the others that of a chi-square."""
    share, width = float(rng.uniform(0.1, 1)), int(rng.integers(4, 200))
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    along = (np.sqrt((1 - share) * width) + np.sqrt(share) * nodes) ** 2
    weights = weights / weights.sum()
    radial = float(along**2 @ weights - (along @ weights) ** 2)
    across = share**2 * chi_square_mean(lambda q: (q - (width - 1)) ** 2, width - 1)
    return {given: (radial + across) / width**2, a: share, d: width}


def _values(rng: Rng) -> Values:
    degrees = int(rng.integers(2, 100))
    return {values: chi_square_mean(lambda q: (q / degrees - 1) ** 2, degrees), n: degrees}


def _scatter(rng: Rng) -> Values:
    """A ReLU branch, and one of 24 values of the same size beside it."""
    x, f, share = _update(rng)
    z = rng.normal(0, 1, (DRAWS, 24))
    other = np.sqrt(share / 24) * np.linalg.norm(z, axis=1, keepdims=True) * rng.normal(0, 1, f.shape)
    squares = np.mean((x + f + other) ** 2, axis=1)
    whole = 1 + share  # of which the shares are parts
    shares = {a: 2 * share / whole, a_A: share / whole, a_F: share / whole}
    return {total: float(np.var(squares)) / whole**2, **shares, kappa: 6.0, m: UNITS, n: 24, d: WIDTH}


def _transposed(rng: Rng) -> Values:
    W, h, v = rng.normal(0, 1, (6, 9)), rng.normal(0, 1, 9), rng.normal(0, 1, 6)
    return {product: float(h @ (W.T @ v)), pulled: float((W @ h) @ v)}


def _hidden(rng: Rng) -> Values:
    """ReLU units h with slopes D; the mean over u, isotropic but for what it has lost along h, is taken by hand."""
    h = np.maximum(rng.normal(0, 1, (DRAWS, 64)), 0)
    slopes, squares = (h > 0).astype(np.float64), h * h
    length, share = squares.sum(1), float(rng.uniform(0.3, 0.7))
    parallel, whole = (slopes * squares).sum(1) / length, slopes.sum(1)
    s_squared = 1 - share + share * length / length.mean()
    passed = np.mean((whole - share * parallel) / s_squared) / whole.mean() / np.mean(1 / s_squared)
    return {
        **{chi: 2.0, kappa: 6.0, m: 64, a: share, along: float(np.mean(parallel)) / float(whole.mean())},
        **{normed: float(np.mean((whole - parallel) / length) * length.mean() / whole.mean()) - 1},
        **{chi_relu: float(np.mean(slopes * squares) / np.mean(slopes) / np.mean(squares)), less: 1 - float(passed)},
    }


def _normal_values(rng: Rng) -> Values:
    degrees = int(rng.integers(5, 100))
    return {normed_values: (degrees - 1) * chi_square_mean(lambda q: 1 / q, degrees), n: degrees}


def _norm(rng: Rng) -> Values:
    """The norm after the update, without and with its mean, and two directions of the gradient."""
    x, f, share = _update(rng)
    y = x + f
    rms, std = np.mean(y * y, axis=1), np.var(y, axis=1)
    spread = float(np.var(rms) / np.mean(rms) ** 2)
    above = y - y.mean(axis=1, keepdims=True)
    above /= np.linalg.norm(above, axis=1, keepdims=True)
    g = rng.normal(0, 1, y.shape)
    g -= g.mean(axis=1, keepdims=True)
    g -= above * np.sum(above * g, axis=1, keepdims=True)
    along = x / np.linalg.norm(x)
    degrees = WIDTH - 1
    return {
        **{excess: float(np.mean(rms) * np.mean(1 / rms)) - 1, v: spread, mean_square: float(np.mean(f.mean(1) ** 2))},
        **{layer_excess: float(np.mean(1 / std)) - 1, a: share, d: WIDTH},
        **{cosine: float(np.mean((y @ along) ** 2 / np.sum(y * y, axis=1)))},
        lost: float(np.mean((g @ along) ** 2 / np.sum(g * g, axis=1))),
        first_norm: chi_square_mean(lambda q: q / WIDTH, degrees) * chi_square_mean(lambda q: WIDTH / q, degrees),
    }


@register_derivation
def update_scatter() -> Derivation:
    """How much a token's mean square scatters after an update of the stream."""
    own = partial(line, source=OWN)
    kink = own(
        kappa_relu,
        "=",
        _sp.Integer(6),
        "normal moments",
        "kappa_4 = E[h^4]/E[h^2]^2 of a hidden unit h: of ReLU (3/2)/(1/2)^2; 3 of the identity.",
        sample=_moments,
    )
    gate = own(
        kappa_gated,
        "=",
        3 * kappa,
        "independence",
        "A gated unit F(z) z' has E[z'^4] = 3 E[z'^2]^2 more: the two matrices are independent.",
        sample=_moments,
    )
    units = own(
        hidden,
        "=",
        (kappa - 1) / m,
        "mean of independent units",
        "Relative variance of |h|^2/m over W_1: the units are independent at a token of fixed length.",
        sample=_units,
        tolerance=0.04,
        accuracy="exact; sampled: the variance over 200000 draws of 8 units, four standard errors of 1 %",
    )
    inside = own(
        values,
        "=",
        2 / n,
        "variance of a chi-square",
        "Attention's W_O reads values z that W_V makes: normal, n = n_kv d_head of them where heads read alike.",
        sample=_values,
    )
    normal = own(
        given,
        "=",
        4 * a * (1 - a) / d + 2 * a**2 / d,
        "variance of a quadratic form",
        "x of mean square 1 - a, f = W_2 h normal given h, of mean square a: |x|^2 + 2 x.f + |f|^2, whose last two "
        "parts are uncorrelated, with variances 4 |x|^2 a and 2 d a^2.",
        sample=_given,
    )
    folded = own(
        given,
        "=",
        2 * (1 - (1 - a) ** 2) / d,
        "rearranged",
        "Of a token that is all branch, a = 1, it is a chi-square's 2/d.",
        sample=_given,
        proof=lambda: normal.right - 2 * (1 - (1 - a) ** 2) / d,
    )
    scatter = own(
        total,
        "~=",
        2 * (1 - (1 - a) ** 2) / d + 2 * a_A**2 / n + a_F**2 * (kappa - 1) / m,
        "law of total variance",
        "The mean square of a branch goes with |z|^2/n and |h|^2/m, a_A and a_F their shares of the whole; what the "
        "fluctuations have in common is of order 1/(d d_ffn). Conventions of `growth` hold the sum over the updates "
        f"against {MAX_SCATTER:g}, and what has added up in the stream against {MAX_STREAM_SCATTER:g}.",
        sample=_scatter,
        tolerance=0.06,
        accuracy=f"within 6 % at d = {WIDTH} and {UNITS} units: {SAMPLED} have 1 %, the rest is of order kappa_4/d_ffn",
    )
    return Derivation(
        name="update-scatter",
        title="How much a token's mean square scatters after an update",
        steps=(kink, gate, units, inside, normal, folded, scatter),
        assumptions=(
            "a norm has fixed the token's own mean square, 1 - a of the whole; branches have the shares a = a_A + a_F "
            "and are normal given the values and hidden units",
            "independent normal weights",
        ),
    )


@register_derivation
def post_norm_gain() -> Derivation:
    """What Post-LN's norms do to the gradient at finite width."""
    own = partial(line, source=OWN, sample=_norm)
    first = own(
        first_norm,
        "=",
        (d - 1) / (d - 3),
        "mean of an inverse chi-square",
        "The first norm reads a normal token: s^2 is a chi-square of d - 1 degrees (RMSNorm: d, d/(d - 2)), see "
        "norm-backward-gain. Over the whole mean square, 1, of which the mean takes 1/d, it is d/(d - 3).",
    )
    later = own(
        excess,
        "~=",
        v,
        "second order in the fluctuation",
        "E[1/s^2] over 1/E[s^2]: 1/(1 + e) is 1 - e + e^2 in the mean. A norm before has fixed the token's own scale, "
        "so that the branches alone scatter: v is that of update-scatter.",
        tolerance=0.15,
        accuracy=f"within 15 % at d = {WIDTH}: v itself, 2 to 6 %, is what is left out, and its skewness",
    )
    centred = own(
        mean_square,
        "=",
        a / d,
        "mean of independent entries",
        "LayerNorm takes the mean off: of the token that a norm has centred there is none, of the branches 1/d.",
        tolerance=0.04,
        accuracy=f"exact; sampled: {SAMPLED}, four standard errors of 1 %",
    )
    layer = own(
        layer_excess,
        "~=",
        v + a / d,
        "product of the two lines",
        "Over the whole mean square, 1, before LayerNorm. RMSNorm has v alone.",
        tolerance=0.15,
        accuracy=f"within 15 % at d = {WIDTH}, as the line above it",
    )
    aligned = own(
        cosine,
        "~=",
        1 - a,
        "law of large numbers",
        "The branch is orthogonal to the token but for 1/d: what is left of it in the sum is its share.",
        tolerance=0.05,
        accuracy=f"within 5 % at d = {WIDTH}: of order 1/d",
    )
    shortcut = own(
        lost,
        "~=",
        a / d,
        "projection",
        "A gradient that has come through the norm above has lost that norm's direction; of the direction of the norm "
        "below, 1 - a of the square of it, there is the rest to lose, and the mean is gone already. A branch's "
        "gradient has lost neither and keeps (d - 2)/d (RMSNorm: (d - 1)/d).",
        tolerance=0.08,
        accuracy=f"within 8 % at d = {WIDTH}: 2/d from the directions that are gone, and {SAMPLED}",
    )
    return Derivation(
        name="post-norm-gain",
        title="What Post-LN's norms do to the gradient at finite width",
        steps=(first, later, centred, layer, aligned, shortcut),
        assumptions=(
            "shares a of a whole mean square of 1, as in update-scatter",
            "the gradient has no preferred axis but for what norms took",
            "eps = 0, unit gain",
        ),
    )


@register_derivation
def output_norm_gain() -> Derivation:
    """What a norm over a narrow branch, or one below which it is a part, does to the branch's gradient."""
    own = partial(line, source=OWN)
    first_order = "of first order in 1/m, at m = 64; sampled: mean of 40000 draws"
    transposed = own(
        product,
        "=",
        pulled,
        "transposition",
        "The norm of f = W_2 h takes out of the gradient v what is along f: 0 here, and u = W_2'v has nothing along h.",
        sample=_transposed,
    )
    overlap = own(
        chi_relu,
        "=",
        _sp.Integer(2),
        "normal moments",
        "chi = E[h^2 D^2]/(E[h^2] E[D^2]) of a hidden unit and its slope: of ReLU (1/2)/(1/4); 1 of the identity.",
        sample=_hidden,
        tolerance=0.02,
        accuracy="exact; sampled: mean of 40000 draws",
    )
    parallel = own(
        along,
        "~=",
        chi / m,
        "law of large numbers",
        "What a u of m equal parts loses of |D u|^2 with the direction of h: sum h^2 D^2/|h|^2 of sum D^2.",
        sample=_hidden,
        tolerance=0.05,
        accuracy=first_order,
    )
    whole = own(
        normed,
        "~=",
        (kappa - 2 * chi) / m,
        "second order in the fluctuation",
        "Over the means of |D u|^2, |u|^2 = m, and of |h|^2. 1/|h|^2 adds its variance, (kappa - 1)/m; its covariance "
        "with the slopes takes (chi - 1)/m; and the direction chi/m. Over d independent numbers there is, besides, the "
        "gain of norm-backward-gain.",
        sample=_hidden,
        tolerance=0.2,
        accuracy=f"within 20 %: {first_order}",
    )
    normal = own(
        normed_values,
        "=",
        (n - 1) / (n - 2),
        "mean of an inverse chi-square",
        "Attention's values have no slopes: one of n directions is lost, and 1/|z|^2 is that of n normal numbers.",
        sample=_normal_values,
    )
    below = own(
        less,
        "~=",
        a * (2 * chi - 1) / m,
        "product of the two lines",
        "Below a Post-LN norm the branch is the part a of what is normalised: over E|D u|^2 E[1/s^2], a of the "
        "direction, chi/m, and a of the covariance, (chi - 1)/m. Of values a/n.",
        sample=_hidden,
        tolerance=0.15,
        accuracy=f"within 15 %: {first_order}",
    )
    return Derivation(
        name="output-norm-gain",
        title="What a norm over narrow branches does to their gradient",
        steps=(transposed, overlap, parallel, whole, normal, below),
        assumptions=("independent normal weights", "the gradient has no preferred axis but for what norms took"),
    )
