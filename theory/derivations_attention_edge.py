"""Attention's norms at initialisation: free independence over matrices of tokens, and the outlier of an uneven row."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import sympy as sp  # pyright: ignore[reportMissingTypeStubs]

from theory.attention_outliers import strongest_rows
from theory.attention_simulation import SimulatedAttention
from theory.derivation import Derivation, line, register_derivation
from theory.derivations_expressions import Norm, Transposed, Values, array, entry
from theory.derivations_heads_edge import (
    CAUSAL_HALF,
    EVEN,
    HALF,
    MEAN_HALF,
    MEAN_OF_DRAWS,
    STD,
    grouped,
    many_draws,
    one_draw,
    ratio,
    running_mean,
)
from theory.derivations_numeric import Array, Rng, layer_norm, opnorm
from theory.sources import Source
from theory.statements import find
from theory.symbols import symbol

_sp: Any = sp

SEMICIRCULAR = Source(key="helton2007operator", label="operator-valued semicircular elements")
STRONG = Source(key="haagerup2005application", label="convergence of the norm")
OWN = Source(key="spikecheck", label="linear algebra")
TOKENS = 3
WIDE, INNER, COPIES = 128, 192, 6  # of the resolvents

d, T, c_VO = symbol("d"), symbol("n_tokens"), symbol("c_VO")
n_heads, d_head, group = symbol("n_heads"), symbol("d_head"), symbol("kv_group")
I = array("I")  # noqa: E741  the identity's letter
A, Y, G, H, P, R, U, V = (array(name) for name in ("A", "Y", "G", "H", "P", "R", "U", "V"))
height = entry("z_0")
_inverse = {
    name: array(f"({text})^-1", rf"({text})^{{-1}}")
    for name, text in {"G": "G", "H": "H", "Y": "Y", "P": "z_0 I - P", "R": "z_0 I - R"}.items()
}


def _resolvents(rng: Rng) -> Values:
    """Mean resolvent blocks of I + A (x) M on its two sides, beyond the norm, and what the equations name.

    A mean over draws of matrices, as over their coordinates.
    """
    mixing, share = 0.6 * running_mean(TOKENS), INNER / WIDE
    one, inv, z = np.eye(TOKENS), np.linalg.inv, 0.0
    left, right = np.zeros((TOKENS, TOKENS)), np.zeros((TOKENS, TOKENS))

    def blocks(square: Array) -> Array:
        full = z * inv(z**2 * np.eye(len(square)) - square)
        return np.einsum("tiui->tu", full.reshape(TOKENS, WIDE, TOKENS, WIDE)) / WIDE

    for _ in range(COPIES):
        M = rng.normal(0, 1, (WIDE, INNER)) @ rng.normal(0, 1, (INNER, WIDE)) / WIDE
        whole = np.eye(TOKENS * WIDE) + np.kron(mixing, M)
        z = z or 1.15 * opnorm(whole)
        left, right = left + blocks(whole @ whole.T) / COPIES, right + blocks(whole.T @ whole) / COPIES
    through = mixing.T @ left @ mixing
    values, outputs = inv(inv(right) - through), share * inv(inv(through) - right)
    seen = share * mixing @ values @ mixing.T
    return {
        **{I: one, A: mixing, height: z, G: left, H: right, Y: through, U: values, P: seen, R: outputs},
        **{_inverse["G"]: inv(left), _inverse["H"]: inv(right), _inverse["Y"]: inv(through)},
        **{_inverse["P"]: inv(z * one - seen), _inverse["R"]: inv(z * one - outputs)},
        **{d: WIDE, n_heads: 6, d_head: 64, group: 2},
    }


@register_derivation
def attention_half_layer_sharp() -> Derivation:
    """The norm of an attention half-layer's Jacobian."""
    statement = find("attention-half-layer-sharp")
    large = f"within 2 % for a mean of {COPIES} draws at width {WIDE}, which varies by 0.5 %"
    flat = line(
        Norm(HALF),
        "~=",
        Norm(CAUSAL_HALF),
        "uniform softmax",
        "Small logits make every row the running mean, and the norm's projector takes out one direction of many. W_O "
        "has the columns of heads that share a value added, as in attention-sharp.",
        source=OWN,
        sample=partial(one_draw, causal=True, std=STD),
        tolerance=0.02,
        accuracy=f"within 2 % {EVEN}, where the same weights are on both sides",
    )
    through = line(
        Y,
        "=",
        Transposed(A) * G * A,
        "definition",
        "A = sqrt(c_V c_O d/k)/s C_T with k = n_h d_h/g. G and H, T by T, are the mean over coordinates of the "
        "resolvent of I + A (x) W_O W_V on its two sides, at z_0 beyond the norm.",
        source=OWN,
        sample=_resolvents,
    )
    seen = line(
        P,
        "=",
        ratio * A * U * Transposed(A),
        "definition",
        "U is the inverse of H^-1 - Y, and R that of Y^-1 - H times k/d: W_O and W_V each averaged over at given "
        "values between them, of which there are k.",
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
        tolerance=0.02,
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
        tolerance=0.02,
        accuracy=large,
    )
    conclusion = line(
        MEAN_HALF,
        "~=",
        statement.expression,
        "edge and Tracy-Widom offset",
        "Positive solutions exist exactly beyond the norm's limit: the least z_0 on their branch. The offset is that "
        "of 2 d T points with the edge's curvature.",
        source=STRONG,
        sample=partial(many_draws, causal=True, std=STD),
        tolerance=0.025,
        accuracy=MEAN_OF_DRAWS,
    )
    return Derivation(
        name="attention-half-layer-sharp",
        title="The attention half-layer at initialisation, the norm itself",
        steps=(flat, through, seen, out, back, conclusion),
        statement="attention-half-layer-sharp",
        assumptions=statement.assumptions,
    )


a = symbol("logit_variance")
S = array("S_t", "S_t")
_ROW, _LOGITS = array("dA_t/dl", r"\frac{\partial A_t}{\partial \ell_t}"), array("l_t", r"\ell_t")
values_of = array("W_O [v_1, ..., v_T]", r"W_O [v_1, \dots, v_T]")
_mean_norm = entry("E|J_u|", r"\mathbb{E} \| J_u \|")
_rms_change = entry(
    "rms |(dA_t/dl) (dl_t/du)|",
    r"\mathrm{rms} \left\| \frac{\partial A_t}{\partial \ell_t} \frac{\partial \ell_t}{\partial u} \right\|",
)
_theta = entry("E max_{h,t} theta", r"\mathbb{E} \max_{h,t} \theta")
_law = entry("E max_{h,t} f", r"\mathbb{E} \max_{h,t} f")
PAIRS, ROWS, UNEVEN_DRAWS, LAW = 600, 1000, 96, 40_000


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
    """Rows of two equal tokens, 3 heads of 64 at width 128: their change through query and keys, over draws."""
    width, heads, head, variance = 128, 3, 64, 1.7
    q_std, out_std = variance**0.25 * width**-0.5, (heads * head) ** -0.5
    jacobian_of_row = np.array([[0.25, -0.25], [-0.25, 0.25]])
    squares: list[float] = []
    for _ in range(PAIRS):
        W_Q, W_K = rng.normal(0, q_std, (2, head, width))
        W_V, W_O = rng.normal(0, width**-0.5, (head, width)), rng.normal(0, out_std, (width, head))
        u = layer_norm(rng.normal(0, 1, (width, 2)))
        through_query = (W_K @ u).T @ W_Q / np.sqrt(head)  # dl_2/du_2
        through_key = (W_Q @ u[:, 1]) @ W_K / np.sqrt(head)  # dl_2j/du_j, the same for each j
        slopes = np.concatenate([through_query, np.kron(np.eye(2), through_key)], axis=1)
        # Of rank one, so that the sum of squares is the norm's.
        squares.append(float(np.sum((W_O @ (W_V @ u) @ jacobian_of_row @ slopes) ** 2)))
    return {_rms_change: float(np.mean(squares)) ** 0.5, a: variance, d: width, n_heads: heads, c_VO: 1.0}


def _strengths(drawn: SimulatedAttention) -> Array:
    """(heads, T) of 2 |S_t| |W_O v_t| sqrt((|W_K' q_t|^2 + |W_Q' k_t|^2) / (4 d_h)) of a draw."""
    rows = drawn.p[..., None] * np.eye(drawn.p.shape[-1]) - drawn.p[..., None] * drawn.p[..., None, :]
    share = drawn.architecture.n_heads // drawn.architecture.n_kv_heads
    written = np.sum((drawn.value @ drawn.weights["output"]) ** 2, axis=-1)
    asked = np.sum((drawn.query @ np.repeat(drawn.weights["key"], share, axis=0)) ** 2, axis=-1)
    seen = np.sum((drawn.right @ drawn.weights["query"]) ** 2, axis=-1)
    return 2 * np.linalg.norm(rows, 2, axis=(-2, -1)) * np.sqrt(written * (asked + seen) / 4 / drawn.query.shape[-1])


def _strongest(rng: Rng) -> Values:
    """Mean over draws of the strongest row, by its vectors, beside that of chi-squares and normal logits."""
    width, heads, shared, head, tokens, variance = 64, 4, 2, 16, 6, 2.0
    drawn = grouped(width, heads, shared, head, tokens, variance)
    found = [float(_strengths(SimulatedAttention(drawn, tokens, rng)).max()) for _ in range(ROWS)]
    law = float(strongest_rows(width, heads, head, tokens, variance, shared).mean())
    return {_theta: float(np.mean(found)), _law: law, a: variance, d: width, n_heads: heads, c_VO: 1.0}


def _uneven(rng: Rng) -> Values:
    """Mean norm of draws at width 512, 2 heads of 64 that share a key and a value, 2 tokens.

    A draw varies by a fifth, nearly all of it with the size of the strongest head's change, of rank one, through its
    second row. That size is taken from each draw, and its mean from its law, of which many draws cost nothing: the
    mean norm is known as what is left varies, by 4 % a draw.
    """
    width, heads, shared, head, variance = 512, 2, 2, 64, 2.0
    architecture = grouped(width, heads, shared, head, 2, variance)
    norms, sizes = list[float](), list[float]()
    for _ in range(UNEVEN_DRAWS):
        drawn = SimulatedAttention(architecture, 2, rng)
        keys, queries = np.repeat(drawn.weights["key"], shared, axis=0), drawn.weights["query"]
        apart = [(part[:, :1] - part[:, 1:]) for part in (drawn.value, drawn.right)]
        asked = 2 * np.sum((drawn.query[:, 1:] @ keys) ** 2, axis=(1, 2)) + np.sum(
            (apart[1] @ queries) ** 2, axis=(1, 2)
        )
        written = np.sum((apart[0] @ drawn.weights["output"]) ** 2, axis=(1, 2))
        sizes.append(float(np.max(np.prod(drawn.p[:, 1], axis=1) * np.sqrt(written * asked / head))))
        norms.append(drawn.norm(rng))
    logits = np.sqrt(2 * variance) * rng.normal(0, 1, (LAW, heads))
    short, long = (rng.chisquare(count, (3, LAW, heads)) / count for count in (head, width))
    short[:2, :, 1::2] = short[:2, :, ::2]  # a pair has one value and one key
    value, key, query = short * long
    whole = np.sqrt(2 * variance * width / heads) / 2 / np.cosh(logits / 2) ** 2 * np.sqrt(value * (query + key) / 2)
    expected = float(np.mean(whole.max(axis=1)))
    return {
        **{_mean_norm: float(np.mean(norms)) * expected / float(np.mean(sizes)), c_VO: 1.0, d: width, n_heads: heads},
        **{d_head: head, group: shared, T: 2, a: variance},
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
        _rms_change,
        "~=",
        _sp.sqrt(2 * a * c_VO * d / n_heads) / 2,
        "orthogonal directions at large width",
        "Values of different tokens are nearly orthogonal, and so is what their logits see: a query's 2 directions in "
        "token t, and one in each token through its key. Each has |W_O v| |W_K' q| / sqrt(d_h), c_V c_O a d/n_h in "
        "the mean square, so that S_t acts twice side by side: sqrt(2) |S_t|, here of two equal tokens.",
        source=OWN,
        sample=_even_pair,
        tolerance=0.025,
        accuracy=f"within 2.5 % for the mean square of {PAIRS} draws at heads of 64, five standard errors",
    )
    strongest = line(
        _theta,
        "~=",
        _sp.sqrt(2 * a * c_VO * d / n_heads) / 2 * _law,
        "mean of a maximum",
        "Over rows and heads, with lengths that are chi-squares of d_h times such of d, one value and key for a "
        "group's heads, and |S_t| of independent normal logits.",
        source=OWN,
        sample=_strongest,
        tolerance=0.025,
        accuracy=f"within 2.5 % for the mean of {ROWS} draws at heads of 16, where a length's square varies by a third",
    )
    conclusion = line(
        _mean_norm,
        "~=",
        statement.expression,
        "mean outlier of an operator-valued law",
        "x = W_O v is in the value term too, as C_T (x) (W_O v)(W_V' v)'. With both of finite rank, 1 is the largest "
        "eigenvalue of G (C_T H C_T' + theta^2 g e_t e_t'), G and H as in attention-half-layer-sharp without the "
        "identity. theta is the line above, of the strongest row and head.",
        source=SEMICIRCULAR,
        sample=_uneven,
        tolerance=0.025,
        accuracy=f"within 2.5 % for the mean of {UNEVEN_DRAWS} draws of two tokens, known to 0.4 %; the target is for "
        "more rows, which strengthen each other",
    )
    return Derivation(
        name="attention-uneven-sharp",
        title="Attention at uneven rows, the norm itself",
        steps=(row, change, strongest, conclusion),
        statement="attention-uneven-sharp",
        assumptions=statement.assumptions,
    )
