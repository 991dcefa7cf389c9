"""Rigorous chains about one token: LayerNorm, softmax and the plain feed-forward sub-layer."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import sympy as sp  # pyright: ignore[reportMissingTypeStubs]

from theory.derivation import Derivation, Step, register_derivation, substitution
from theory.derivations_expressions import Norm, Transposed, Values, array
from theory.derivations_numeric import ACTIVATIONS, Array, Rng, column_jacobian, jacobian, layer_norm, opnorm
from theory.derivations_numeric import softmax as softmax_of
from theory.sources import Source
from theory.symbols import symbol

_sp: Any = sp

OWN = Source(key="spikecheck", label="linear algebra")
XIONG = Source(key="xiong2020layernorm", label="lemma 3")
POPOVICIU = Source(key="popoviciu1935", label="variance inequality")

d, s, eps = symbol("d"), symbol("s"), symbol("eps")
I = array("I")  # noqa: E741  the identity's letter
one = array("ones", r"\mathbf{1}")
x, z, H, A = array("x"), array("z"), array("H"), array("A")
u, beta = array("u"), array("beta", r"\beta")
gamma = array("diag(gamma)", r"\mathrm{diag}(\gamma)")
_LN = array("dLN/dx", r"\frac{\partial \mathrm{LN}}{\partial x}")


@cache
def layer_norm_proof(width: int = 4) -> Any:
    """Sympy's Jacobian of z = (x - mean)/sqrt(var + eps) less (I - 11'/d - zz'/d)/s, for symbolic x and eps."""
    entries = _sp.Matrix(_sp.symbols(f"x_1:{width + 1}", real=True))
    mean = sum(entries) / _sp.Integer(width)
    variance = sum((entry - mean) ** 2 for entry in entries) / _sp.Integer(width)
    normaliser = _sp.sqrt(variance + eps)
    normalised = (entries - mean * _sp.ones(width, 1)) / normaliser
    ones = _sp.ones(width, width) / _sp.Integer(width)
    claimed = (_sp.eye(width) - ones - normalised * normalised.T / _sp.Integer(width)) / normaliser
    return (normalised.jacobian(entries) - claimed).applyfunc(_sp.simplify)


def _layer_norm(rng: Rng, *, unit_gain: bool = False) -> Values:
    """A random input of LayerNorm with gain and bias, eps comparable to the variance."""
    width, epsilon = 6, float(rng.uniform(0.01, 1))
    point = rng.normal(0.3, rng.uniform(0.2, 2), (width, 1))
    gain = np.ones(width) if unit_gain else rng.normal(0, 1, width)
    bias = rng.normal(0, 1, (width, 1))

    def function(x: Array) -> Array:
        return gain[:, None] * layer_norm(x, epsilon) + bias

    normaliser = float(np.sqrt(np.var(point) + epsilon))
    J = column_jacobian(function, point)
    return {
        **{d: width, s: normaliser, eps: epsilon, symbol("gain"): float(np.max(np.abs(gain)))},
        **{I: np.eye(width), one: np.ones((width, 1)), x: point, z: layer_norm(point, epsilon), u: function(point)},
        **{H: np.eye(width) - 1 / width, beta: bias, gamma: np.diag(gain), _LN: J},
        A: normaliser * column_jacobian(lambda x: layer_norm(x, epsilon), point),
    }


@register_derivation
def layernorm() -> Derivation:
    """LayerNorm's Jacobian and its norm."""
    centring = Step(
        left=z,
        right=H * x / s,
        relation="=",
        rule="definition",
        source=XIONG,
        explanation="H = I - 11'/d takes the mean off.",
        sample=_layer_norm,
    )
    normaliser = Step(
        left=s**2,
        right=Norm(H * x) ** 2 / d + eps,
        relation="=",
        rule="definition",
        source=XIONG,
        explanation="The variance is the mean square of the centred entries.",
        sample=_layer_norm,
    )
    affine = Step(
        left=u,
        right=gamma * z + beta,
        relation="=",
        rule="definition",
        source=XIONG,
        explanation="Gain and bias; the bias does not reach the Jacobian.",
        sample=_layer_norm,
    )
    exact = Step(
        left=_LN,
        right=gamma * (I - one * Transposed(one) / d - z * Transposed(z) / d) / s,
        relation="=",
        rule="LayerNorm Jacobian",
        source=XIONG,
        explanation="Product rule on H x / s with ds/dx = z'/d; sympy proves the bracket at d = 4 for any x and eps.",
        sample=_layer_norm,
        proof=layer_norm_proof,
    )
    bracket = Step(
        left=A,
        right=I - one * Transposed(one) / d - z * Transposed(z) / d,
        relation="=",
        rule="definition",
        source=OWN,
        explanation="A is the bracket, a symmetric matrix.",
        sample=_layer_norm,
    )
    mean = Step(
        left=A * one,
        right=0 * one,
        relation="=",
        rule="eigenvector",
        source=OWN,
        explanation="1'1 = d and z'1 = 0: a shift of all entries changes nothing.",
        sample=_layer_norm,
    )
    radius = Step(
        left=A * z,
        right=eps / s**2 * z,
        relation="=",
        rule="eigenvector",
        source=OWN,
        explanation="z'z = d var/s^2 = d (1 - eps/s^2): a change of scale passes only through eps.",
        sample=_layer_norm,
    )
    norm = Step(
        left=Norm(A),
        right=_sp.Integer(1),
        relation="=",
        rule="spectral theorem",
        source=OWN,
        explanation="The other d - 2 eigenvalues are 1, and eps/s^2 <= 1; hence d >= 3.",
        sample=_layer_norm,
    )
    gain = Step(
        left=Norm(_LN),
        right=symbol("gain") * Norm(A) / s,
        relation="<=",
        rule="sub-multiplicativity",
        source=OWN,
        explanation="A diagonal matrix's norm is its largest entry; equality for unit gain.",
        sample=_layer_norm,
        tight=lambda rng: _layer_norm(rng, unit_gain=True),
    )
    conclusion = substitution(
        *(gain, norm),
        source=XIONG,
        explanation="At unit gain the norm is 1/s exactly, whatever eps.",
        sample=_layer_norm,
        tight=lambda rng: _layer_norm(rng, unit_gain=True),
    )
    return Derivation(
        name="layernorm",
        title="The LayerNorm Jacobian and its norm",
        steps=(centring, normaliser, affine, exact, bracket, mean, radius, norm, gain, conclusion),
        statement="norm-jacobian-upper",
        assumptions=("s > 0", "d >= 3 for equality at unit gain"),
    )


p, v = array("p"), array("v")
_P = array("diag(p)", r"\mathrm{diag}(p)")
_SOFT = array("J")
_VARIANCE = _sp.Function("Var")


@cache
def softmax_proof(n: int = 3) -> Any:
    """Sympy's Jacobian of the softmax of n logits less diag(p) - pp'."""
    logits = _sp.Matrix(_sp.symbols(f"l_1:{n + 1}", real=True))
    weights = logits.applyfunc(_sp.exp)
    probabilities = weights / sum(weights)
    return probabilities.jacobian(logits) - (_sp.diag(*probabilities) - probabilities * probabilities.T)


def _softmax(rng: Rng, *, two_equal: bool = False) -> Values:
    """Random logits; v is the Jacobian's top unit eigenvector."""
    logits = np.zeros((2, 1)) if two_equal else rng.normal(0, rng.uniform(0.1, 3), (int(rng.integers(2, 7)), 1))
    probabilities = softmax_of(logits.T).T
    J = jacobian(lambda logits: softmax_of(logits.T).T, logits)
    top = np.linalg.eigh(J)[1][:, -1:]

    def variance(v: Array) -> float:
        return float(np.sum(probabilities * (v - np.sum(probabilities * v)) ** 2))

    return {
        **{p: probabilities, _P: np.diag(probabilities[:, 0]), _SOFT: J, v: top},
        symbol("value_range"): float(np.ptp(top)),
        _VARIANCE: variance,
    }


def _two_equal(rng: Rng) -> Values:
    return _softmax(rng, two_equal=True)


@register_derivation
def softmax() -> Derivation:
    """The Jacobian of one softmax row."""
    omega, spread = symbol("value_range"), Norm(v)
    jacobian_step = Step(
        left=_SOFT,
        right=_P - p * Transposed(p),
        relation="=",
        rule="quotient rule",
        source=OWN,
        explanation="Proved by sympy for three logits.",
        sample=_softmax,
        proof=softmax_proof,
    )
    form = Step(
        left=Norm(_SOFT),
        right=Transposed(v) * _SOFT * v,
        relation="=",
        rule="spectral theorem",
        source=OWN,
        explanation="J is symmetric and positive semi-definite; v is a unit eigenvector of its largest eigenvalue.",
        sample=_softmax,
    )
    variance = Step(
        left=Transposed(v) * _SOFT * v,
        right=_VARIANCE(v),
        relation="=",
        rule="definition",
        source=OWN,
        explanation="v'Jv = sum p_i v_i^2 - (sum p_i v_i)^2, the variance of v under p.",
        sample=_softmax,
    )
    popoviciu = Step(
        left=_VARIANCE(v),
        right=omega**2 / 4,
        relation="<=",
        rule="Popoviciu's inequality",
        source=POPOVICIU,
        explanation="omega = max v - min v; the variance is largest with half the weight on either end.",
        sample=_softmax,
        tight=_two_equal,
    )
    width = Step(
        left=omega,
        right=_sp.sqrt(2) * spread,
        relation="<=",
        rule="Cauchy-Schwarz",
        source=OWN,
        explanation="(v_i - v_j)^2 <= 2 (v_i^2 + v_j^2).",
        sample=_softmax,
        tight=_two_equal,
    )
    unit = Step(
        left=spread,
        right=_sp.Integer(1),
        relation="=",
        rule="definition",
        source=OWN,
        explanation="v is a unit vector.",
        sample=_softmax,
    )
    conclusion = substitution(
        *(form, variance, popoviciu, width, unit),
        source=POPOVICIU,
        explanation="Attained by two equal logits.",
        sample=_softmax,
        tight=_two_equal,
    )
    return Derivation(
        name="softmax",
        title="The Jacobian of a softmax row",
        steps=(jacobian_step, form, variance, popoviciu, width, unit, conclusion),
        statement="softmax-jacobian",
    )


W_1, W_2, D = array("W_1"), array("W_2"), array("D")
_FFN = array("dFFN/du", r"\frac{\partial \mathrm{FFN}}{\partial u}")


def _feedforward(rng: Rng, *, aligned: bool = False) -> Values:
    """A random plain feed-forward sub-layer with biases; aligned: identity activation and W_2 = W_1'."""
    from theory.activations import lipschitz

    name: Any = "identity" if aligned else rng.choice(["relu", "gelu", "silu"])
    first, bias = rng.normal(0, 1, (12, 5)), rng.normal(0, 1, (12, 1))
    second = first.T if aligned else rng.normal(0, 1, (5, 12))
    point, F = rng.normal(0, 1, (5, 1)), ACTIVATIONS[name]
    preactivation = first @ point + bias
    return {
        **{W_1: first, W_2: second, D: np.diag(np.diagonal(jacobian(F, preactivation)))},
        **{symbol("opnorm_1"): opnorm(first), symbol("opnorm_2"): opnorm(second), symbol("lipschitz"): lipschitz(name)},
        _FFN: column_jacobian(lambda u: second @ F(first @ u + bias), point),
    }


@register_derivation
def ffn_upper() -> Derivation:
    """The feed-forward sub-layer's Jacobian for any activation with a bounded slope."""
    chain = Step(
        left=_FFN,
        right=W_2 * D * W_1,
        relation="=",
        rule="chain rule",
        source=OWN,
        explanation="D is diagonal with the slopes F'(z), z the pre-activations; biases only move z.",
        sample=_feedforward,
    )
    product = Step(
        left=Norm(_FFN),
        right=symbol("opnorm_2") * Norm(D) * symbol("opnorm_1"),
        relation="<=",
        rule="sub-multiplicativity",
        source=OWN,
        explanation="Three factors.",
        sample=_feedforward,
        tight=lambda rng: _feedforward(rng, aligned=True),
    )
    slope = Step(
        left=Norm(D),
        right=symbol("lipschitz"),
        relation="<=",
        rule="largest slope",
        source=OWN,
        explanation="L = sup |F'|: 1 for ReLU and identity, 1.1289... for GELU, 1.0998... for SiLU.",
        sample=_feedforward,
        tight=lambda rng: _feedforward(rng, aligned=True),
    )
    conclusion = substitution(
        *(product, slope),
        source=OWN,
        explanation="Attained by the identity with W_2 = W_1'.",
        sample=_feedforward,
        tight=lambda rng: _feedforward(rng, aligned=True),
    )
    return Derivation(
        name="ffn-upper",
        title="Feed-forward sub-layer, a true bound",
        steps=(chain, product, slope, conclusion),
        statement="ffn-upper",
        assumptions=("feed-forward without a gate",),
    )
