"""Chains for the feed-forward sub-layer beside the paper's: bounds from real slopes or from a gate's weights, and the
gate's estimate."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import sympy as sp  # pyright: ignore[reportMissingTypeStubs]

from theory.activations import lipschitz
from theory.derivation import Derivation, line, register_derivation, substitution
from theory.derivations_expressions import MaxOver, Norm, Values, array, entry
from theory.derivations_numeric import ACTIVATIONS, STEP, Array, Rng, column_jacobian, layer_norm, opnorm
from theory.kernels import activation_kernel
from theory.sources import Source
from theory.statements import find
from theory.symbols import symbol

_sp: Any = sp

SHARED = Source(key="spikecheck", label="slopes shared between the two matrices")
FROM_WEIGHTS = Source(key="spikecheck", label="ffn-gated-upper and the activation's largest slope")

W_1, W_2, D, u = array("W_1"), array("W_2"), array("D"), array("u")
root, signs = array("|D|^(1/2)", r"|D|^{1/2}"), array("sgn D", r"\mathrm{sgn}\, D")
stacked = array("[W_1; W_3]", r"\left[ W_1; W_3 \right]")
_FFN = array("dFFN/du", r"\frac{\partial \mathrm{FFN}}{\partial u}")
open_1, open_2 = symbol("open_1"), symbol("open_2")
unit, z_1i, z_3i = entry("i"), entry("z_1i", "z_{1i}", signed=True), entry("z_3i", "z_{3i}", signed=True)
norm_2, norm_13, gate_slope, L, R = (symbol(name) for name in ("opnorm_2", "opnorm_13", "gate_slope", "lipschitz", "R"))


def _slopes(F: Any, z: Array) -> Array:
    return np.imag(F(z + 1j * STEP)) / STEP


def _plain(rng: Rng, *, aligned: bool = False) -> Values:
    """A plain feed-forward at two tokens, the first of which is looked at; aligned: no activation, and W_2 = W_1'."""
    F = ACTIVATIONS["identity" if aligned else str(rng.choice(["relu", "gelu", "silu"]))]
    first, bias = rng.normal(0, 1, (12, 5)), rng.normal(0, 1, (12, 1))
    second = first.T if aligned else rng.normal(0, 1, (5, 12))
    points = [rng.normal(0, 1, (5, 1)) for _ in range(2)]
    diagonals = [np.diag(_slopes(F, first @ point + bias)[:, 0]) for point in points]
    roots = [np.sqrt(np.abs(slopes)) for slopes in diagonals]
    return {
        **{W_1: first, W_2: second, D: diagonals[0], root: roots[0], signs: np.sign(diagonals[0])},
        **{open_1: max(opnorm(one @ first) for one in roots), open_2: max(opnorm(second @ one) for one in roots)},
        _FFN: column_jacobian(lambda x: second @ F(first @ x + bias), points[0]),
    }


def _aligned(rng: Rng) -> Values:
    return _plain(rng, aligned=True)


@register_derivation
def ffn_upper_aposteriori() -> Derivation:
    """The feed-forward sub-layer's Jacobian with the slopes that its units really have."""
    own = partial(line, source=SHARED, sample=_plain)
    chain = own(_FFN, "=", W_2 * D * W_1, "chain rule", "D is diagonal with the slopes F'(z) at one token.")
    split = own(
        D, "=", root * signs * root, "square roots",
        "Entry by entry; the sign is that of the slope, which GELU and SiLU have below 0 too.",
    )  # fmt: skip
    product = own(
        Norm(_FFN), "<=", Norm(W_2 * root) * Norm(signs) * Norm(root * W_1), "sub-multiplicativity",
        "W_2 |D|^(1/2), the signs, |D|^(1/2) W_1: a unit that is closed is left out on both sides.",
        tight=_aligned,
    )  # fmt: skip
    one = own(Norm(signs), "<=", _sp.Integer(1), "diagonal matrix", "Entries 1, 0 and -1.", tight=_aligned)
    leaving = own(
        Norm(W_2 * root), "<=", open_2, "definition", "The letter is the largest over tokens.", tight=_aligned
    )
    entering = own(Norm(root * W_1), "<=", open_1, "definition", "Likewise.", tight=_aligned)
    conclusion = substitution(
        *(product, one, leaving, entering),
        source=SHARED,
        explanation="With half of 4d normal units open it is (1 + sqrt 2)^2 = 5.83 sigma_1 sigma_2 d, where ffn-upper "
        "has 9 and the norm is 3.33.",
        sample=_plain,
        tight=_aligned,
    )
    return Derivation(
        name="ffn-upper-aposteriori",
        title="Feed-forward sub-layer, a true bound from its real slopes",
        steps=(chain, split, product, one, leaving, entering, conclusion),
        statement="ffn-upper-aposteriori",
        assumptions=("feed-forward without a gate", "slopes known"),
    )


def _relu_squared(z: Array) -> Array:
    return ACTIVATIONS["relu"](z) ** 2


def _gated(rng: Rng, *, one_unit: bool = False) -> Values:
    """A gated feed-forward without biases; one_unit: no activation, and a token along both input weights."""
    name: Any = "identity" if one_unit else str(rng.choice(["relu", "gelu", "silu", "relu-squared"]))
    F, (width, hidden) = ACTIVATIONS.get(name, _relu_squared), (2, 1) if one_unit else (5, 12)
    first, third = rng.normal(0, 1, (hidden, width)), rng.normal(0, 1, (hidden, width))
    second, point = rng.normal(0, 1, (width, hidden)), rng.normal(0, 1, (width, 1))
    if one_unit:
        first = third = np.array([[1.0, 0.0]])
        point = np.array([[3.0], [0.0]])
    length = float(np.linalg.norm(point))
    z_1, z_3, both = first @ point, third @ point, np.vstack([first, third])
    return {
        **{u: point, stacked: both, norm_2: opnorm(second), norm_13: opnorm(both)},
        **{
            R: length,
            L: lipschitz(name, opnorm(first) * length),
            gate_slope: float(np.max(np.hypot(_slopes(F, z_1) * z_3, F(z_1)))),
        },
        unit: [{z_1i: float(a), z_3i: float(b)} for a, b in zip(z_1[:, 0], z_3[:, 0], strict=True)],
        _FFN: column_jacobian(lambda x: second @ (F(first @ x) * (third @ x)), point),
    }


def _one_unit(rng: Rng) -> Values:
    return _gated(rng, one_unit=True)


@register_derivation
def ffn_gated_upper_apriori() -> Derivation:
    """The gated feed-forward sub-layer's Jacobian for any token of a length."""
    own = partial(line, source=FROM_WEIGHTS, sample=_gated, tight=_one_unit)
    largest = MaxOver(_sp.sqrt(z_1i**2 + z_3i**2), unit)
    gated = own(Norm(_FFN), "<=", norm_2 * norm_13 * gate_slope, "ffn-gated-upper", "See the derivation of that name.")
    slopes = own(
        gate_slope, "<=", L * largest, "largest slope",
        "L is the largest slope over the arguments that can occur, |z| <= |W_1| R: for squared ReLU 2 |W_1| R. So "
        "|F'(z) z_3| <= L |z_3|; and |F(z)| <= L |z|, as F(0) = 0.",
    )  # fmt: skip
    entries = own(largest, "<=", Norm(stacked * u), "entries of a column", "Without biases z_1 on z_3 is [W_1; W_3] u.")
    length = own(Norm(stacked * u), "<=", norm_13 * R, "sub-multiplicativity", "u is at most R long.")
    conclusion = substitution(
        *(gated, slopes, entries, length),
        source=FROM_WEIGHTS,
        explanation="The square is the product's: both factors grow with the weights. Attained by one unit of two "
        "equal input weights, without an activation.",
        sample=_gated,
        tight=_one_unit,
    )
    return Derivation(
        name="ffn-gated-upper-apriori",
        title="Gated feed-forward sub-layer, a true bound from its weights",
        steps=(gated, slopes, entries, length, conclusion),
        statement="ffn-gated-upper-apriori",
        assumptions=("no biases", "F(0) = 0", "L the largest slope over |z| <= |W_1| R"),
    )


GATE = Source(key="spikecheck", label="eq. (15) of takase2025spike with a gate")
EQ_15 = Source(key="takase2025spike", label="eq. (15)")
d, d_ffn, sigma_1, sigma_2, sigma_3, sigma_xp = (
    symbol(name) for name in ("d", "d_ffn", "sigma_1", "sigma_2", "sigma_3", "sigma_xp")
)
slope_square, value_square = symbol("slope_square"), symbol("value_square")
inner, mean_square = array("G"), entry("mean G_ij^2", r"\overline{G_{ij}^2}")
_LN_XP = array("dLN/dx'", r"\frac{\partial \mathrm{LN}}{\partial x'}")
# With many more units than the width the unequal rows weigh least; a norm is then off by sqrt(d/d_ffn) of itself.
WIDE = f"within 14 % at d_ffn = 256 d = {256 * 32}, where rows of unequal size hardly matter"


def _wide(rng: Rng, *, aligned: bool = False) -> Values:
    """A gated branch with many units; aligned: W_2 reads the direction in which the inner matrix is largest."""
    width, hidden, stds = 32, 256 * 32, (0.9, 1.3, 0.7)
    name: Any = str(rng.choice(["identity", "relu", "gelu", "silu"]))
    F, variance = ACTIVATIONS[name], np.array(stds[0] ** 2)
    first, third = (rng.normal(0, std / width**0.5, (hidden, width)) for std in (stds[0], stds[2]))
    second, point = rng.normal(0, stds[1], (width, hidden)), rng.normal(0, rng.uniform(0.2, 2), (width, 1))
    token, before = layer_norm(point), column_jacobian(layer_norm, point)
    z_1, z_3 = first @ token, third @ token
    gate = _slopes(F, z_1) * z_3 * first + F(z_1) * third
    if aligned:
        largest = [np.linalg.svd(matrix, full_matrices=False) for matrix in (gate @ before, second)]
        ours, reads = largest[0][0][:, :1], largest[1][2][:1].T
        second = second - 2 * (second @ (reads - ours)) @ (reads - ours).T / np.sum((reads - ours) ** 2)  # reflected
    value, slope = activation_kernel(name, variance, variance, variance)
    return {
        **{d: width, d_ffn: hidden, sigma_1: stds[0] / width**0.5, sigma_2: stds[1], sigma_3: stds[2] / width**0.5},
        **{sigma_xp: float(np.std(point)), slope_square: float(slope), value_square: float(value)},
        **{W_2: second, inner: gate, mean_square: float(np.mean(gate**2)), norm_2: opnorm(second), _LN_XP: before},
        _FFN: column_jacobian(lambda x: second @ (F(first @ x) * (third @ x)), token),
    }


def _aligned_gate(rng: Rng) -> Values:
    return _wide(rng, aligned=True)


@register_derivation
def ffn_gated_estimate() -> Derivation:
    """Eq. (15) with a gate."""
    statement = find("ffn-gated-estimate")
    own = partial(line, source=GATE, sample=_wide)
    exact = own(
        _FFN, "=", W_2 * inner, "product rule", "G = diag(F'(z_1) z_3) W_1 + diag(F(z_1)) W_3; see ffn-gated-upper."
    )
    product = own(
        Norm(_FFN * _LN_XP), "<=", norm_2 * Norm(inner * _LN_XP), "sub-multiplicativity",
        "Independent matrices reach about half of it at d_ffn = 4d.", tight=_aligned_gate,
    )  # fmt: skip
    entries = own(
        mean_square, "~", sigma_3**2 * (slope_square * sigma_1**2 * d + value_square), "law of large numbers",
        "The factors are independent: E[F'^2] E[z_3^2] sigma_1^2 + E[F^2] sigma_3^2, with E[z_3^2] = sigma_3^2 d.",
        tolerance=0.14, accuracy=WIDE,
    )  # fmt: skip
    gaussian = own(
        Norm(inner * _LN_XP), "~", _sp.sqrt(mean_square) * (_sp.sqrt(d) + _sp.sqrt(d_ffn)) / sigma_xp,
        "Gaussian norm estimate",
        "G taken as normal with equal entries. It is not: at d_ffn = 4d its unequal rows make the norm 20 to 60 % "
        "larger. u, on which G depends, is what the LayerNorm projects out.",
        tolerance=0.14, accuracy=WIDE,
    )  # fmt: skip
    leaving = own(
        norm_2, "~", sigma_2 * (_sp.sqrt(d) + _sp.sqrt(d_ffn)), "Gaussian norm estimate", "As in ffn.",
        tolerance=0.1, accuracy="within 10 %: Tracy-Widom offset and fluctuation, johnstone2001largest",
    )  # fmt: skip
    conclusion = substitution(
        *(product, gaussian, entries, leaving),
        source=EQ_15,
        explanation="The paper's argument with the gate's entries for those of W_1.",
        sample=_wide,
        tight=_aligned_gate,
        tolerance=0.14,
        accuracy=f"exceeded by at most 14 % at d_ffn = 256 d = {256 * 32}",
    )
    return Derivation(
        name="ffn-gated-estimate",
        title="Gated feed-forward branch, eq. (15) carried over",
        steps=(exact, product, entries, gaussian, leaving, conclusion),
        statement=statement.name,
        assumptions=(*statement.assumptions, "eps far below the variance", "unit gain"),
    )
