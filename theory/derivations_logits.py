"""Attention whose logits are not q.k / sqrt(d_h): QK-norm and soft-capping.

Whatever the logit l_tj(q_t, k_j), moving u_j changes A_t through the values, through the keys and (j = t only) through
the query: p_tj (v_j - o_t) is what a softmax row does with a change of l_tj.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import sympy as sp  # pyright: ignore[reportMissingTypeStubs]

from theory.derivation import Derivation, Step, line, register_derivation
from theory.derivations_expressions import Norm, SumOver, Transposed, Values, array, entry
from theory.derivations_numeric import STEP, Array, Rng, column_jacobian, jacobian, layer_norm, rms_norm, softmax
from theory.sources import Source
from theory.symbols import symbol

_sp: Any = sp

QK = Source(key="henry2020qknorm", label="query-key normalisation")
CAP = Source(key="gemma2024gemma2", label="logit soft-capping")

T, d_head, D = symbol("n_tokens"), symbol("d_head"), symbol("logit_spread")
h, i = entry("h"), entry("i")
p_tj, p_ti, delta = entry("p_tj", "p_{tj}"), entry("p_ti", "p_{ti}"), entry("delta_tj", r"\delta_{tj}")
W_Oh, W_Vh, W_Kh, W_Qh = (array(f"W_{letter}^h", f"W_{letter}^h") for letter in "OVKQ")
v_j, v_i, o_t = array("v_j"), array("v_i"), array("o_t")
q_t, k_j, k_i = array("q_t"), array("k_j"), array("k_i")
q_hat, k_hat, k_hat_i = array("qhat_t", r"\hat q_t"), array("khat_j", r"\hat k_j"), array("khat_i", r"\hat k_i")
N_q, N_k = array("N_q"), array("N_k")
c, slope_j, slope_i = entry("c"), entry("l'_tj", r"\ell'_{tj}"), entry("l'_ti", r"\ell'_{ti}")
logit, _NORM_K = entry("l_tj", r"\ell_{tj}", signed=True), entry("r_j")
block = array("dA_t/du_j", r"\frac{\partial A_t}{\partial u_j}")
I = array("I")  # noqa: E741  the identity's letter

DOT, QK_NORM, SOFT_CAP, LINEAR_BIAS = "dot", "qk-norm", "soft-cap", "alibi"


def _attention(rng: Rng, *, kind: str = DOT, scale: float = 1.0) -> Values:
    """Two causal heads of width 3 on 4 tokens of width 5, and everything the block Jacobian speaks of."""
    n, width, heads, size = 4, 5, 2, 3
    W_Q, W_K, W_V = (rng.normal(0, scale / np.sqrt(width), (heads, size, width)) for _ in range(3))
    W_O = rng.normal(0, 1, (width, heads, size))
    u = rng.normal(0, 1, (n, width))
    visible = np.tril(np.ones((n, n), dtype=bool))
    cap, slopes = float(rng.uniform(0.5, 3)), np.array([0.5, 1.5])
    distance = np.arange(n)[:, None] - np.arange(n)

    def normed(x: Array) -> Array:
        return rms_norm(x.T).T if kind == QK_NORM else x

    def logits(u: Array, head: int) -> Array:
        found = normed(u @ W_Q[head].T) @ normed(u @ W_K[head].T).T / np.sqrt(size)
        if kind == SOFT_CAP:
            found = cap * np.tanh(found / cap)
        return found - slopes[head] * distance if kind == LINEAR_BIAS else found

    def function(u: Array) -> Array:
        return sum(softmax(logits(u, e), visible) @ (u @ W_V[e].T) @ W_O[:, e].T for e in range(heads))  # type: ignore[return-value]

    t, j = sorted(int(place) for place in rng.integers(0, n, 2))[::-1]
    by_head: list[Values] = []
    for e in range(heads):
        P, values, keys, query = softmax(logits(u, e), visible), u @ W_V[e].T, u @ W_K[e].T, (u @ W_Q[e].T)[t][:, None]
        plain = keys @ query[:, 0] / np.sqrt(size)
        over_row = [
            {p_ti: P[t, other], v_i: values[other][:, None], k_i: keys[other][:, None],
             k_hat_i: rms_norm(keys[other][:, None]), slope_i: _slope(plain[other], cap)}
            for other in range(t + 1)
        ]  # fmt: skip
        by_head.append(
            {
                **{p_tj: P[t, j], W_Oh: W_O[:, e], W_Vh: W_V[e], W_Kh: W_K[e], W_Qh: W_Q[e], i: over_row},
                **{v_j: values[j][:, None], o_t: (P[t] @ values)[:, None], q_t: query, k_j: keys[j][:, None]},
                **{q_hat: rms_norm(query), k_hat: rms_norm(keys[j][:, None]), slope_j: _slope(plain[j], cap)},
                **{N_q: column_jacobian(rms_norm, query), N_k: column_jacobian(rms_norm, keys[j][:, None])},
            }
        )
    some = by_head[0]
    every = [logits(u, e)[s, : s + 1] for e in range(heads) for s in range(n)]
    return {
        **some,
        **{h: by_head, d_head: size, T: n, delta: float(t == j), I: np.eye(size), c: cap},
        logit: float(some[k_j][:, 0] @ some[q_t][:, 0]) / float(np.sqrt(size)),
        block: jacobian(function, u).reshape(n, width, n, width)[t, :, j],
        D: max(float(np.ptp(row)) for row in every),
        _NORM_K: float(np.sqrt(np.mean(some[k_j] ** 2))),
    }


def _slope(logit: float, cap: float) -> float:
    """d (c tanh(l/c)) / dl, by a complex step."""
    return float(np.imag(cap * np.tanh((logit + 1j * STEP) / cap))) / STEP


def block_jacobian(kind: str, to_key: Any, over_row: Any, rule: str, source: Source, explanation: str) -> Step:
    """dA_t/du_j with a logit's derivatives by its key (a row) and by its query (summed over the softmax row)."""
    inner = p_tj * (W_Vh + (v_j - o_t) * to_key) + delta * SumOver(over_row, i) * W_Qh
    sample = partial(_attention, kind=kind)
    return line(block, "=", SumOver(W_Oh * inner, h), rule, explanation, source=source, sample=sample)


@register_derivation
def qk_norm() -> Derivation:
    """Query-key normalisation."""
    sample = partial(_attention, kind=QK_NORM)
    own = partial(line, source=QK, sample=sample)
    root = _sp.sqrt(d_head)
    norm = own(
        N_k,
        "=",
        (I - k_hat * Transposed(k_hat) / d_head) / _NORM_K,
        "RMSNorm Jacobian",
        "khat = k/r, r its root mean square (see rmsnorm); eps = 0, unit gain. LayerNorm takes the mean off too.",
    )
    jacobian_step = block_jacobian(
        QK_NORM,
        Transposed(q_hat) * N_k * W_Kh / root,
        p_ti * (v_i - o_t) * Transposed(k_hat_i) * N_q / root,
        "product rule",
        QK,
        "The logit is qhat.khat / sqrt(d_h); N_k and N_q are the norms' Jacobians at k_j and q_t.",
    )
    spread = own(
        D,
        "<=",
        2 * root,
        "Cauchy-Schwarz",
        "|qhat| = |khat| = sqrt(d_h), so a logit lies in [-sqrt d_h, sqrt d_h] whatever the weights; gains multiply.",
        tight=_opposite_keys,
    )
    reach = own(
        Norm(Transposed(q_hat) * N_k * W_Kh) / root,
        "<=",
        Norm(W_Kh) / _NORM_K,
        "sub-multiplicativity",
        "|N_k| = 1/r_j: large keys are felt less, and a scale of W_K cancels.",
        tight=partial(_aligned_key, kind=QK_NORM),
    )
    variance = line(
        _MEAN_SQUARE,
        "=",
        _sp.Integer(1),
        "isotropy",
        "For a direction khat without preferred axis E[khat khat'] = I, so E[(qhat.khat)^2] = |qhat|^2 = d_h: "
        "the logit variance is 1 at any initialisation.",
        source=QK,
        sample=_logit_variance,
        tolerance=0.02,
        accuracy="exact; mean of 40000 draws, four standard errors of at most 0.5 %",
    )
    backward = line(
        _KEY_GAIN,
        "=",
        (d_head - 1) / (d_head - 2),
        "inverse chi-square",
        "N_k takes one of d_h directions of qhat, and a normal key's 1/r_j^2 has mean d_h/(d_h - 2) over that of "
        "r_j^2 (see norm-backward-gain).",
        source=QK,
        sample=_key_gain,
        tolerance=0.02,
        accuracy="exact for d_h > 2; mean of 40000 draws, four standard errors of at most 0.5 %",
    )
    centred = line(
        _MEAN_SQUARE_LN,
        "=",
        1 + (d_head - 1) / ((w_q - 1) * (w - 1)),
        "isotropy orthogonal to 1",
        "LayerNorm over w_q coordinates of a query and w of a key, a head's or all heads' at once, of which keys may "
        "have fewer: E[khat_i khat_j] is w/(w - 1) times (1 at i = j) - 1/w; its product with the queries', summed "
        "over a head's coordinates, is this times d_h.",
        source=QK,
        sample=_logit_variance_ln,
        tolerance=0.02,
        accuracy="exact; mean of 200000 draws, four standard errors of at most 0.5 %",
    )
    backward_centred = line(
        _KEY_GAIN_LN,
        "=",
        (w - 2) / (w - 3),
        "inverse chi-square",
        "For w = w_q = d_h: N_k takes two directions, 1 being no part of qhat, so that 1 - 1/(w - 1) of |qhat|^2 is "
        "left; and a normal key's 1/s_j^2 has mean w/(w - 3). For all heads' at once it is this but for terms of order "
        "d_h/(w w_q), and for a query the same with w_q for w.",
        source=QK,
        sample=_key_gain_ln,
        tolerance=0.02,
        accuracy="exact for w = d_h > 3; mean of 200000 draws, four standard errors of at most 0.5 %",
    )
    return Derivation(
        name="qk-norm",
        title="Attention with QK-norm",
        steps=(norm, jacobian_step, spread, reach, variance, backward, centred, backward_centred),
        assumptions=(
            "RMSNorm (the last two lines: LayerNorm) on queries and keys, unit gain, eps = 0 (the source: length 1 "
            "and a learned factor)",
            "no biases, no RoPE (which is a rotation)",
        ),
    )


_KEY_GAIN = entry("E|N_k qhat|^2 E[k_i^2]/d_h", r"\mathbb{E}\|N_k \hat q\|^2\, \mathbb{E}[k_i^2]/d_h")
_MEAN_SQUARE = entry("E[(qhat.khat)^2]/d_h", r"\mathbb{E}[(\hat q \cdot \hat k)^2]/d_h")
w, w_q = entry("w"), entry("w_q")
_KEY_GAIN_LN = entry(
    "E|N_k qhat|^2 E[k_i^2]/E[(qhat.khat)^2]_LN",
    r"\frac{\mathbb{E}\|N_k \hat q\|^2\, \mathbb{E}[k_i^2]}{\mathbb{E}[(\hat q \cdot \hat k)^2]_{LN}}",
)
_MEAN_SQUARE_LN = entry("E[(qhat.khat)^2]_LN/d_h", r"\mathbb{E}[(\hat q \cdot \hat k)^2]_{LN}/d_h")


def _logit_variance(rng: Rng) -> Values:
    size = 8
    query, keys = rms_norm(rng.normal(0, 3, (size, 1))), rms_norm(rng.normal(0, 0.2, (size, 40_000)))
    return {_MEAN_SQUARE: float(np.mean((query.T @ keys) ** 2)) / size}


def _key_gain(rng: Rng) -> Values:
    size, std = 8, 0.2
    query, keys = rms_norm(rng.normal(0, 1, (size, 40_000))), rng.normal(0, std, (size, 40_000))
    along = np.mean(query * rms_norm(keys), axis=0)
    gains = (1 - along**2) / np.mean(keys**2, axis=0)
    return {_KEY_GAIN: float(np.mean(gains)) * std**2, d_head: size}


def _logit_variance_ln(rng: Rng) -> Values:
    """Heads of 4: of three queries normalised together, and of two keys."""
    size, queries, keys = 4, 12, 8
    query, key = (layer_norm(rng.normal(0, std, (width, 200_000)))[:size] for width, std in ((queries, 3), (keys, 0.2)))
    products = float(np.mean(np.sum(query * key, axis=0) ** 2))
    return {_MEAN_SQUARE_LN: products / size, d_head: size, w_q: queries, w: keys}


def _key_gain_ln(rng: Rng) -> Values:
    size, std = 8, 0.2
    query, keys = layer_norm(rng.normal(0, 1, (size, 200_000))), rng.normal(0, std, (size, 200_000))
    # The Jacobian is symmetric at unit gain: its product with qhat is a directional derivative.
    passed = np.imag(layer_norm(keys + 1j * STEP * query)) / STEP
    products = float(np.mean(np.sum(query * layer_norm(keys), axis=0) ** 2))
    return {_KEY_GAIN_LN: float(np.mean(np.sum(passed**2, axis=0))) * std**2 / products, w: size}


def _opposite_keys(rng: Rng) -> Values:
    """A query along one key and against another."""
    query = rms_norm(rng.normal(0, 1, (4, 1)))
    return {D: float(np.ptp([query.T @ rms_norm(sign * query) / 2.0 for sign in (1, -1)])), d_head: 4}


def _aligned_key(rng: Rng, *, kind: str) -> Values:
    """A query orthogonal to the key, along W_K's largest singular vector, and a key of root mean square 1."""
    values = _attention(rng, kind=kind)
    left = np.linalg.svd(values[W_Kh])[0] * np.sqrt(3)
    return {**values, q_hat: left[:, :1], N_k: column_jacobian(rms_norm, left[:, 1:2]), _NORM_K: 1.0}


@register_derivation
def soft_cap() -> Derivation:
    """Logit soft-capping: l -> c tanh(l/c)."""
    own = partial(line, source=CAP, sample=partial(_attention, kind=SOFT_CAP))
    root = _sp.sqrt(d_head)
    plain = own(logit, "=", Transposed(k_j) * q_t / root, "definition", "The logit before the cap.")
    slope = own(
        slope_j,
        "=",
        1 - _sp.tanh(logit / c) ** 2,
        "derivative of tanh",
        "The slope of c tanh(l/c).",
    )
    bounded = own(slope_j, "<=", _sp.Integer(1), "square", "Attained at l = 0: small logits pass.", tight=_small_logit)
    jacobian_step = block_jacobian(
        SOFT_CAP,
        slope_j * Transposed(q_t) * W_Kh / root,
        p_ti * slope_i * (v_i - o_t) * Transposed(k_i) / root,
        "chain rule",
        CAP,
        "Every place where the logit's derivative stood is multiplied by its slope.",
    )
    spread = own(
        D,
        "<=",
        2 * c,
        "range of tanh",
        "A capped logit lies in [-c, c], so e^D <= e^(2c) whatever the weights.",
        tight=_saturated,
    )
    backward = own(
        _MEAN_SLOPE**2,
        "<=",
        _SQUARE_SLOPE,
        "Jensen",
        "What two rows share of a gradient has the mean slope twice, to first order in their logits' covariance; what "
        "a logit passes by itself has the square's mean, which a saturated cap makes the larger without limit. "
        "softmax-moments has both where the softmax has its weight.",
        sample=_slopes,
        tight=partial(_slopes, largest=1e-3),
    )
    return Derivation(
        name="soft-cap",
        title="Attention with soft-capped logits",
        steps=(plain, slope, bounded, jacobian_step, spread, backward),
        assumptions=("c > 0", "no biases, no RoPE"),
    )


_MEAN_SLOPE = entry("E[l']", r"\mathbb{E}[\ell']")
_SQUARE_SLOPE = entry("E[l'^2]", r"\mathbb{E}[\ell'^2]")


def _slopes(rng: Rng, *, largest: float = 10.0) -> Values:
    """Over normal logits of up to this standard deviation over the cap."""
    slopes = 1 / np.cosh(rng.uniform(0, largest) * rng.normal(0, 1, 4000)) ** 2
    return {_MEAN_SLOPE: float(np.mean(slopes)), _SQUARE_SLOPE: float(np.mean(slopes**2))}


def _small_logit(rng: Rng) -> Values:
    return {slope_j: _slope(1e-4 * rng.random(), 2.0)}


def _saturated(rng: Rng) -> Values:
    cap = float(rng.uniform(0.5, 3))
    return {D: float(np.ptp(cap * np.tanh(np.array([-50.0, 50.0])))), c: cap}
