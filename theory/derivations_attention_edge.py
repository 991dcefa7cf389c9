"""Attention's norms at initialisation: free independence over matrices of tokens, and the outlier of an uneven row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import sympy as sp  # pyright: ignore[reportMissingTypeStubs]

from theory.attention_simulation import plain_attention, simulated_norms
from theory.derivation import Derivation, line, register_derivation
from theory.derivations_expressions import Norm, Transposed, Values, array, entry
from theory.derivations_numeric import Array, Rng, jacobian, layer_norm, opnorm, random_attention
from theory.sources import Source
from theory.statements import find
from theory.symbols import symbol

_sp: Any = sp

SEMICIRCULAR = Source(key="helton2007operator", label="operator-valued semicircular elements")
STRONG = Source(key="haagerup2005application", label="convergence of the norm")
OWN = Source(key="spikecheck", label="linear algebra")
TOKENS = 3

d, s, T, c_VO = symbol("d"), symbol("s"), symbol("n_tokens"), symbol("c_VO")
I = array("I")  # noqa: E741  the identity's letter
_WHOLE = array("dx'/dx", r"\frac{\partial x'}{\partial x}")
_SUM = array("I + C_T (x) W_O W_V / s", r"I + C_T \otimes W_O W_V / s")
A, Y, G, H, P, R, U, V = (array(name) for name in ("A", "Y", "G", "H", "P", "R", "U", "V"))
height = entry("z_0")
_inverse = {
    name: array(f"({text})^-1", rf"({text})^{{-1}}")
    for name, text in {"G": "G", "H": "H", "Y": "Y", "P": "z_0 I - P", "R": "z_0 I - R"}.items()
}


def _causal_mean(n_tokens: int) -> Array:
    return np.tril(np.ones((n_tokens, n_tokens))) / np.arange(1, n_tokens + 1)[:, None]


def _half_layer(rng: Rng) -> Values:
    """A pre-norm attention half-layer of 4 heads at logit variance 0.01, over 3 tokens of width 96 and std 0.7."""
    width, heads, std = 96, 4, 0.7
    layer = random_attention(
        rng, n_tokens=TOKENS, d=width, heads=heads, kv_heads=heads, d_head=width // heads, rope=False
    )
    zero = np.zeros((heads, width // heads))
    layer = replace(layer, b_Q=zero, b_K=zero, b_V=zero, W_Q=layer.W_Q * 0.1**0.5, W_K=layer.W_K * 0.1**0.5)
    x = std * layer_norm(rng.normal(0, 1, (width, TOKENS))).T

    def half(x: Array) -> Array:
        return x + layer(layer_norm(x.T).T)

    kron = np.kron(_causal_mean(TOKENS), layer.W_O @ layer.W_V.reshape(width, width)) / std
    return {
        **{d: width, T: TOKENS, s: std, c_VO: 1.0, _WHOLE: jacobian(half, x)},
        _SUM: np.eye(TOKENS * width) + kron,
    }


def _resolvents(rng: Rng) -> Values:
    """Mean resolvent blocks of I + A (x) M on its two sides, a tenth beyond the norm, and what the equations name."""
    width, mixing = 192, 0.6 * _causal_mean(TOKENS)
    M = rng.normal(0, 1, (width, width)) @ rng.normal(0, 1, (width, width)) / width
    whole = np.eye(TOKENS * width) + np.kron(mixing, M)
    z = 1.1 * opnorm(whole)

    def blocks(square: Array) -> Array:
        full = z * np.linalg.inv(z**2 * np.eye(len(square)) - square)
        return np.einsum("tiui->tu", full.reshape(TOKENS, width, TOKENS, width)) / width

    one, inv = np.eye(TOKENS), np.linalg.inv
    left, right = blocks(whole @ whole.T), blocks(whole.T @ whole)
    through = mixing.T @ left @ mixing
    values, outputs = inv(inv(right) - through), inv(inv(through) - right)
    return {
        **{I: one, A: mixing, height: z, G: left, H: right, Y: through, U: values, V: outputs},
        **{P: mixing @ values @ mixing.T, R: outputs},
        **{_inverse["G"]: inv(left), _inverse["H"]: inv(right), _inverse["Y"]: inv(through)},
        **{_inverse["P"]: inv(z * one - mixing @ values @ mixing.T), _inverse["R"]: inv(z * one - outputs)},
    }


@register_derivation
def attention_half_layer_sharp() -> Derivation:
    """The norm of an attention half-layer's Jacobian."""
    statement = find("attention-half-layer-sharp")
    large = "within 5 % at width 192, where a mean over coordinates varies by 1 %"
    flat = line(
        Norm(_WHOLE),
        "~=",
        Norm(_SUM),
        "uniform softmax",
        "Small logits make every row the running mean, and the norm's projector takes out one direction of many.",
        source=OWN,
        sample=_half_layer,
        tolerance=0.05,
        accuracy="within 5 % at logit variance 0.01",
    )
    through = line(
        Y,
        "=",
        Transposed(A) * G * A,
        "definition",
        "A = sqrt(c_V c_O)/s C_T. G and H, T by T, are the mean over coordinates of the resolvent of I + A (x) W_O W_V "
        "on its two sides, at z_0 beyond the norm.",
        source=OWN,
        sample=_resolvents,
    )
    seen = line(
        P,
        "=",
        A * U * Transposed(A),
        "definition",
        "U is the inverse of H^-1 - Y, and R that of Y^-1 - H: W_O and W_V each averaged over at given values between "
        "them.",
        source=OWN,
        sample=_resolvents,
    )
    out = line(
        _inverse["G"],
        "~=",
        height * I - P - _inverse["R"],
        "free independence over T by T matrices",
        "A normal matrix on the outside of a product acts as a semicircular element whose covariance maps matrices of "
        "tokens to such.",
        source=SEMICIRCULAR,
        sample=_resolvents,
        tolerance=0.05,
        accuracy=large,
    )
    back = line(
        _inverse["H"],
        "~=",
        height * I - R - _inverse["P"],
        "free independence over T by T matrices",
        "The same for the other side.",
        source=SEMICIRCULAR,
        sample=_resolvents,
        tolerance=0.05,
        accuracy=large,
    )
    conclusion = line(
        Norm(_WHOLE),
        "~=",
        statement.expression,
        "edge and Tracy-Widom offset",
        "Positive solutions exist exactly beyond the norm's limit: the least z_0 on their branch. The offset is that "
        "of 2 d T points with the edge's curvature.",
        source=STRONG,
        sample=_half_layer,
        tolerance=0.13,
        accuracy="within 13 % for one draw at d = 96, T = 3, whose norm varies by 4 %",
    )
    return Derivation(
        name="attention-half-layer-sharp",
        title="The attention half-layer at initialisation, the norm itself",
        steps=(flat, through, seen, out, back, conclusion),
        statement="attention-half-layer-sharp",
        assumptions=statement.assumptions,
    )


a, d_head = symbol("logit_variance"), symbol("d_head")
S = array("S_t", "S_t")
_ROW, _LOGITS = array("dA_t/dl", r"\frac{\partial A_t}{\partial \ell_t}"), array("l_t", r"\ell_t")
values_of = array("W_O [v_1, ..., v_T]", r"W_O [v_1, \dots, v_T]")
_change = array("(dA_t/dl) (dl_t/du)", r"\frac{\partial A_t}{\partial \ell_t} \frac{\partial \ell_t}{\partial u}")
_mean_norm = entry("E|J_u|", r"\mathbb{E} \| J_u \|")


def _softmax_row(rng: Rng) -> Values:
    """One row's output as a function of its logits."""
    values, logits = rng.normal(0, 1, (6, 4)), rng.normal(0, 1, (4, 1))

    def weights(l: Array) -> Array:  # noqa: E741  the logits' letter
        grown = np.exp(l)
        return grown / np.sum(grown)

    p = weights(logits)
    step = 1e-20
    columns = [values @ np.imag(weights(logits + 1j * step * np.eye(4)[:, [j]])) / step for j in range(4)]
    return {_ROW: np.concatenate(columns, axis=1), values_of: values, S: np.diag(p[:, 0]) - p @ p.T}


def _even_pair(rng: Rng) -> Values:
    """A row of two equal tokens at width 768, one head of 192: its change through query and keys."""
    width, head, variance = 768, 192, 1.7
    q_std = variance**0.25 * width**-0.5
    W_Q, W_K = rng.normal(0, q_std, (2, head, width))
    W_V, W_O = rng.normal(0, width**-0.5, (head, width)), rng.normal(0, head**-0.5 / 2, (width, head))
    u = layer_norm(rng.normal(0, 1, (width, 2)))
    through_query = (W_K @ u).T @ W_Q / np.sqrt(head)  # dl_2/du_2
    through_key = (W_Q @ u[:, 1]) @ W_K / np.sqrt(head)  # dl_2j/du_j, the same for each j
    slopes = np.concatenate([through_query, np.kron(np.eye(2), through_key)], axis=1)
    jacobian_of_row = np.array([[0.25, -0.25], [-0.25, 0.25]])
    change = W_O @ W_V @ u @ jacobian_of_row @ slopes
    return {_change: change, a: variance, d_head: head, c_VO: 1.0}


def _uneven(rng: Rng) -> Values:
    """Mean norm of 24 draws at width 256, heads of 64, 8 tokens, logit variance 2."""
    attention = plain_attention(256, 4, 64, 8, 2.0)
    return {
        **{_mean_norm: float(simulated_norms(attention, 8, draws=24).mean())},
        **{c_VO: 1.0, d: 256, symbol("n_heads"): 4, d_head: 64, T: 8, a: 2.0},
    }


@register_derivation
def attention_uneven_sharp() -> Derivation:
    """The attention sub-layer's Jacobian norm where softmax rows are uneven."""
    statement = find("attention-uneven-sharp")
    row = line(
        _ROW,
        "=",
        values_of * S,
        "softmax Jacobian",
        "S_t = diag(p_t) - p_t p_t' of norm at most 1/2, attained where two tokens share the row.",
        source=Source(key="popoviciu1935", label="variance inequality"),
        sample=_softmax_row,
    )
    change = line(
        Norm(_change),
        "~=",
        _sp.sqrt(2 * d_head * a * c_VO) / 2,
        "orthogonal directions at large width",
        "Values of different tokens are nearly orthogonal, and so is what their logits see: a query's 2 directions in "
        "token t, and one in each token through its key. Each has |v| |q| |k| / sqrt(d_head), so that S_t acts twice "
        "side by side: sqrt(2) |S_t|.",
        source=OWN,
        sample=_even_pair,
        tolerance=0.19,
        accuracy="within 19 % for one draw at heads of 192, where the sizes vary by 7 %",
    )
    conclusion = line(
        _mean_norm,
        "~=",
        statement.expression,
        "outlier of an operator-valued law",
        "x = W_O v is in the value term too, as C_T (x) (W_O v)(W_V' v)'. With both of finite rank, 1 is the largest "
        "eigenvalue of G (C_T H C_T' + theta^2 g e_t e_t'), G and H as in attention-half-layer-sharp without the "
        "identity. theta is the line above times twice |S_t| and the vectors' sizes, of the strongest row and head.",
        source=SEMICIRCULAR,
        sample=_uneven,
        tolerance=0.15,
        accuracy="within 15 % for the mean of 24 draws at heads of 64",
    )
    return Derivation(
        name="attention-uneven-sharp",
        title="Attention at uneven rows, the norm itself",
        steps=(row, change, conclusion),
        statement="attention-uneven-sharp",
        assumptions=statement.assumptions,
    )
