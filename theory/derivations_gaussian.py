"""Norms that normal entries alone decide: of a matrix, of a norm's Jacobian, and of the steepest of many tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import sympy as sp  # pyright: ignore[reportMissingTypeStubs]

from theory.derivation import Derivation, Step, line, register_derivation
from theory.derivations_expressions import ChiSquareAbove, MaxOver, Norm, Transposed, Values, array, entry
from theory.derivations_numeric import Array, Rng, column_jacobian, layer_norm, opnorm, rms_norm
from theory.random_matrix import TRACY_WIDOM_MEAN
from theory.sources import Source
from theory.statements import find
from theory.symbols import symbol

_sp: Any = sp

MARCHENKO = Source(key="davidson2001local", label="the edge of the Marchenko-Pastur law")
OFFSET = Source(key="johnstone2001largest", label="theorem 1.1")
OWN = Source(key="spikecheck", label="calculus")
PAPER = Source(key="takase2025spike", label="used for eq. (15)")

sigma, m, n, d, s, sigma_x = (symbol(name) for name in ("sigma", "rows", "columns", "d", "s", "sigma_x"))
W = array("W")
mean = entry("E|W|", r"\mathbb{E} \| W \|")
G, height = entry("G"), entry("z")
edge, bend = entry("z_edge", "z_{edge}"), entry("z''")
ROWS, COLUMNS, DRAWS = 64, 96, 300


def _one_matrix(rng: Rng) -> Values:
    """A large matrix in units of its entries' std, and its resolvent a fifth beyond the edge."""
    rows, columns = 300, 400
    drawn = rng.normal(0, 1, (rows, columns))
    squares = np.zeros(columns)
    squares[:rows] = np.linalg.svd(drawn, compute_uv=False) ** 2
    z = 1.2 * float(squares.max())
    return {m: rows, n: columns, W: drawn, height: z, G: float(np.sum(1 / (z - squares)))}


def _at_edge(rng: Rng) -> Values:
    """The least height by search, its bend by a second difference."""
    from theory.derivations_offsets import least

    rows, columns = (int(count) for count in rng.integers(20, 200, 2))
    found = least(lambda g: columns / g + rows / (1 - g), 1e-3, 1 - 1e-3)
    second = (found.above - 2 * found.height + found.below) / found.step**2
    return {m: rows, n: columns, edge: found.height, bend: second}


def _many(rng: Rng) -> Values:
    """Mean norm over draws, with the edge and the bend in units of the entries' std."""
    std, roots = 0.3, ROWS**0.5 + COLUMNS**0.5
    norms = [opnorm(rng.normal(0, std, (ROWS, COLUMNS))) for _ in range(DRAWS)]
    second = 2 * roots**3 * (ROWS**-0.5 + COLUMNS**-0.5)
    return {m: ROWS, n: COLUMNS, sigma: std, edge: roots**2, bend: second, mean: float(np.mean(norms))}


def _edge_steps() -> tuple[Step, ...]:
    roots = _sp.sqrt(m) + _sp.sqrt(n)
    at = _sp.sqrt(n) / roots
    return (
        line(
            Norm(W) ** 2,
            "=",
            Norm(Transposed(W) * W),
            "|A|^2 = |A'A|",
            "The largest of the eigenvalues of W'W, n of them.",
            source=OWN,
            sample=_one_matrix,
        ),
        line(
            height,
            "~=",
            n / G + m / (1 - G),
            "Marchenko-Pastur law",
            "W in units of sigma: a row added to W changes the trace G by a rank of one, and m of them add up.",
            source=MARCHENKO,
            sample=_one_matrix,
            tolerance=0.01,
            accuracy="within 1 % for one draw of 300 x 400 and z a fifth beyond the edge",
        ),
        line(
            edge,
            "=",
            roots**2,
            "edge of the spectrum",
            "The least z over G, at G = sqrt(n)/(sqrt(m) + sqrt(n)).",
            source=OWN,
            sample=_at_edge,
            proof=lambda: n / at + m / (1 - at) - roots**2,
        ),
    )


@register_derivation
def gaussian_opnorm_estimate() -> Derivation:
    """The paper's norm of a Gaussian matrix."""
    statement = find("gaussian-opnorm-estimate")
    conclusion = line(
        mean,
        "~",
        statement.expression,
        "infinite width",
        "The edge itself, times sigma^2, under the root; the largest singular value stays below it on average.",
        source=PAPER,
        sample=_many,
        tolerance=0.05,
        accuracy="within 5 % at 64 rows, 3 % of which is the offset that gaussian-opnorm-sharp has",
    )
    return Derivation(
        name="gaussian-opnorm-estimate",
        title="The norm of a Gaussian matrix, as the paper estimates it",
        steps=(*_edge_steps(), conclusion),
        statement=statement.name,
        assumptions=statement.assumptions,
    )


@register_derivation
def gaussian_opnorm_sharp() -> Derivation:
    """The mean norm of a Gaussian matrix with its offset."""
    statement = find("gaussian-opnorm-sharp")
    roots = _sp.sqrt(m) + _sp.sqrt(n)
    curve = 2 * roots**3 * (1 / _sp.sqrt(m) + 1 / _sp.sqrt(n))
    at = _sp.sqrt(n) / roots
    bends = line(
        bend,
        "=",
        curve,
        "second derivative",
        "Of z in G, at the edge: 2n/G^3 + 2m/(1 - G)^3.",
        source=OWN,
        sample=_at_edge,
        tolerance=1e-4,
        accuracy="the left side is a second difference",
        proof=lambda: 2 * n / at**3 + 2 * m / (1 - at) ** 3 - curve,
    )
    offset = line(
        mean,
        "~=",
        sigma * _sp.sqrt(edge + TRACY_WIDOM_MEAN * (bend / 2) ** _sp.Rational(1, 3)),
        "Tracy-Widom offset",
        "Near a square-root edge the largest eigenvalue lies so much below it on average: the law's mean is -1.2065.",
        source=OFFSET,
        sample=_many,
        tolerance=0.012,
        accuracy=f"within 1.2 % for the mean of {DRAWS} draws of {ROWS} x {COLUMNS}, known to 0.1 %: the next order",
    )
    conclusion = line(
        mean,
        "~=",
        statement.expression,
        "half-integer centring",
        "The next order: the same with m - 1/2 and n - 1/2 for m and n.",
        source=OFFSET,
        sample=_many,
        tolerance=0.005,
        accuracy=f"within 0.5 % for the mean of {DRAWS} draws of {ROWS} x {COLUMNS}, known to 0.1 %",
    )
    return Derivation(
        name="gaussian-opnorm-sharp",
        title="The norm of a Gaussian matrix, itself",
        steps=(*_edge_steps(), bends, offset, conclusion),
        statement=statement.name,
        assumptions=statement.assumptions,
    )


I, one, u = array("I"), array("ones", r"\mathbf{1}"), array("u")  # noqa: E741  the identity's letter
_LN = array("dLN/dx", r"\frac{\partial \mathrm{LN}}{\partial x}")


def _normal_token(rng: Rng) -> Values:
    width, std = 512, 0.7
    point = rng.normal(0, std, (width, 1))
    return {
        **{d: width, s: float(np.std(point)), sigma_x: std, I: np.eye(width), one: np.ones((width, 1))},
        **{u: layer_norm(point), _LN: column_jacobian(layer_norm, point)},
    }


@register_derivation
def norm_jacobian_estimate() -> Derivation:
    """The paper's norm of LayerNorm's Jacobian."""
    statement = find("norm-jacobian-estimate")
    exact = line(
        _LN,
        "=",
        (I - one * Transposed(one) / d - u * Transposed(u) / d) / s,
        "LayerNorm Jacobian",
        "As in layernorm, without gain and eps.",
        source=OWN,
        sample=_normal_token,
    )
    projector = line(
        Norm(_LN),
        "=",
        1 / s,
        "projector",
        "The bracket takes out two orthogonal directions, and keeps d - 2.",
        source=OWN,
        sample=_normal_token,
    )
    conclusion = line(
        Norm(_LN),
        "~",
        statement.expression,
        "law of large numbers",
        "s^2 is the mean of d squares of std sigma_x; variance-suffices bounds how far it is from its mean.",
        source=statement.source,
        sample=_normal_token,
        tolerance=0.13,
        accuracy="within 13 % for one token of width 512: four times 1/sqrt(2 d)",
    )
    return Derivation(
        name="norm-jacobian-estimate",
        title="LayerNorm's Jacobian, as the paper estimates it",
        steps=(exact, projector, conclusion),
        statement=statement.name,
        assumptions=statement.assumptions,
    )


rms_x, z = symbol("rms_x"), array("z")
_RMS = array("dnorm/dx", r"\frac{\partial \mathrm{norm}}{\partial x}")


def _normal_token_rms(rng: Rng) -> Values:
    width, std = 512, 0.7
    point = rng.normal(0, std, (width, 1))
    return {
        **{d: width, s: float(np.sqrt(np.mean(point**2))), rms_x: std, I: np.eye(width)},
        **{z: rms_norm(point), _RMS: column_jacobian(rms_norm, point)},
    }


@register_derivation
def rmsnorm_jacobian_estimate() -> Derivation:
    """The same of RMSNorm's Jacobian."""
    statement = find("rmsnorm-jacobian-estimate")
    own = partial(line, sample=_normal_token_rms)
    exact = own(
        _RMS, "=", (I - z * Transposed(z) / d) / s, "RMSNorm Jacobian", "As in rmsnorm, without gain and eps.",
        source=OWN,
    )  # fmt: skip
    projector = own(
        Norm(_RMS), "=", 1 / s, "projector", "The bracket takes out one direction, and keeps d - 1.", source=OWN
    )
    conclusion = own(
        Norm(_RMS),
        "~",
        statement.expression,
        "law of large numbers",
        "s^2 is the mean of d squares of root mean square r_x.",
        source=statement.source,
        tolerance=0.13,
        accuracy="within 13 % for one token of width 512: four times 1/sqrt(2 d)",
    )
    return Derivation(
        name="rmsnorm-jacobian-estimate",
        title="RMSNorm's Jacobian, as the paper's argument estimates it",
        steps=(exact, projector, conclusion),
        statement=statement.name,
        assumptions=statement.assumptions,
    )


c, mu, rows, eps, sigma_e, T = (
    symbol(name) for name in ("embedding_gradient", "multiplier", "position_rows", "eps", "sigma_e", "n_tokens")
)
t, s_t = entry("t"), entry("s_t", "s_t")
J_E, mean_J = array("J_E", "J_E"), entry("E|J_E|", r"\mathbb{E} \| J_E \|")
least_square, share = entry("x"), entry("P(chi_min >= x)", r"P(\chi_{min} \geq x)")
LENGTH = 6


def _distinct(rng: Rng, width: int = 5) -> Values:
    """A normalised embedding of distinct tokens with positions, and its Jacobian in both tables."""
    gradient, factor, floor = 0.4, 1.5, 0.05
    tokens, places = rng.normal(0, 0.7, (2, LENGTH, width))
    before = factor * tokens + places
    blocks: list[Array] = [column_jacobian(lambda x: layer_norm(x, floor), row[:, None]) for row in before]
    norm = np.zeros((LENGTH * width, LENGTH * width))
    for place, block in enumerate(blocks):
        norm[place * width : (place + 1) * width, place * width : (place + 1) * width] = block
    return {
        **{c: gradient, mu: factor, rows: 1.0, J_E: gradient * np.hstack([factor * norm, norm])},
        t: [{s_t: float(np.sqrt(np.var(row) + floor))} for row in before],
    }


def _smallest(rng: Rng) -> Values:
    """How often the smallest of T chi-squares of 63 degrees is above a value."""
    from scipy.stats import chi2  # pyright: ignore[reportMissingTypeStubs]

    found = np.min(rng.chisquare(63, (20000, LENGTH)), axis=1)
    above = float(np.mean(found >= 48.0))
    return {d: 64, T: LENGTH, least_square: 48.0, share: above, ChiSquareAbove: lambda degrees, x: chi2.sf(x, degrees)}


def _embeddings(rng: Rng) -> Values:
    """Mean norm of 300 embeddings at width 64."""
    width, std, floor, gradient, factor = 64, 0.7, 0.01, 0.4, 1.5
    slopes = [np.max((np.var(rng.normal(0, std, (LENGTH, width)), axis=1) + floor) ** -0.5) for _ in range(300)]
    return {
        **{c: gradient, mu: factor, rows: 1.0, sigma_e: std, eps: floor, d: width, T: LENGTH},
        mean_J: gradient * (factor**2 + 1) ** 0.5 * float(np.mean(slopes)),
    }


@register_derivation
def embedding_sharp() -> Derivation:
    """The normalised embedding at initialisation."""
    statement = find("embedding-sharp")
    steepest = line(
        Norm(J_E),
        "=",
        c * _sp.sqrt(mu**2 + rows) * MaxOver(1 / s_t, t),
        "block-diagonal matrix",
        "As in embedding-upper-aposteriori: no token twice, so each place reads rows of its own, mu times a token's "
        "and its position's; the norm's Jacobian at a place is a projector over s_t.",
        source=OWN,
        sample=_distinct,
    )
    smallest = line(
        share,
        "~=",
        ChiSquareAbove(d - 1, least_square) ** T,
        "order statistics",
        "d s_t^2 less eps, over sigma_e^2, is a chi-square of d - 1 degrees; the smallest of T is above x if all are.",
        source=OWN,
        sample=_smallest,
        tolerance=0.05,
        accuracy="within 5 % for 20000 draws, known to 1 %",
    )
    conclusion = line(
        mean_J,
        "~=",
        statement.expression,
        "mean over the law",
        "Of (sigma_e^2 x/d + eps)^(-1/2) under that law, by its quantiles.",
        source=statement.source,
        sample=_embeddings,
        tolerance=0.02,
        accuracy="within 2 % for the mean of 300 draws, known to 0.3 %",
    )
    return Derivation(
        name="embedding-sharp",
        title="The normalised embedding at initialisation, the norm itself",
        steps=(steepest, smallest, conclusion),
        statement=statement.name,
        assumptions=statement.assumptions,
    )
