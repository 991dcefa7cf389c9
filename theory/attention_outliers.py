r"""Where softmax rows are uneven: the norm of attention as an outlier that one row makes.

The value term alone keeps nearly the norm it has at even rows. Beside it, a row t of a head sends its softmax
Jacobian S_t twice, through the query and through the keys: over orthogonal directions, since tokens, queries, keys
and values of different places are nearly so at large width. |S_t| is at most 1/2, of two tokens with equal weight. The
strongest of all rows and heads counts, and its strength alone is drawn: logits, and sizes of the vectors that meet.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theory.arguments import require_tokens
from theory.attention import WHOLE_HEADS
from theory.quantities import quantity
from theory.random_matrix import cesaro_opnorm, elementwise
from theory.sources import Source
from theory.statements import Statement, register

Array = NDArray[np.float64]

DRAWS = 64
MOST_STEPS = 3000
CONVERGED = 1e-9


def value_resolvents(z: float, n_tokens: int) -> tuple[Array, Array]:
    r"""(G, H), T x T: mean resolvents of C_T (x) W_O W_V on its two sides at z beyond its norm, c_V c_O = 1.

    As in `theory.residual_edges.mixing_edge`, without the identity: G = (z - P)^(-1) and H = (z - R)^(-1).
    """
    one = np.eye(n_tokens)
    mean = np.tril(np.ones((n_tokens, n_tokens))) / np.arange(1, n_tokens + 1)[:, None]
    P, R = np.zeros_like(one), np.zeros_like(one)
    for _ in range(MOST_STEPS):
        G, H = _inverse(z * one - P), _inverse(z * one - R)
        Y = mean.T @ G @ mean
        new_P, new_R = mean @ _inverse(_inverse(H) - Y) @ mean.T, _inverse(_inverse(Y) - H)
        change = max(float(np.abs(new_P - P).max()), float(np.abs(new_R - R).max()))
        P, R = (new_P + new_P.T) / 2, (new_R + new_R.T) / 2
        if change < CONVERGED:
            break
    return _inverse(z * one - P), _inverse(z * one - R)


def _inverse(matrix: Array) -> Array:
    return np.linalg.inv(matrix).astype(np.float64, copy=False)


def softmax_opnorm(p: Array) -> Array:
    """|diag(p) - p p'| along the last axis: the root of sum p_i^2/(p_i - x) = 1 between the two largest weights."""
    ordered = np.sort(p, axis=-1)
    low, high = ordered[..., -2].copy(), ordered[..., -1].copy()
    for _ in range(40):
        middle = (low + high) / 2
        gap = p - middle[..., None]
        above = np.sum(np.divide(p * p, gap, out=np.zeros_like(p), where=gap != 0), axis=-1) > 1
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return (low + high) / 2


@lru_cache(maxsize=256)
def strongest_row(d: int, n_heads: int, d_head: int, n_tokens: int, logit_variance: float) -> float:
    """Mean of the largest 2 |S_t| sqrt(f_v (f_q + f_k)/2) over rows and heads, by a fixed seed.

    f are squared lengths over their means, of W_O v, W_K' q and W_Q' k: chi-squares of d_head, and of d.
    """
    rng = np.random.default_rng(0)
    hidden = np.triu(np.full((n_tokens, n_tokens), -np.inf), 1)
    strengths: list[float] = []
    for _ in range(DRAWS):
        logits = math.sqrt(logit_variance) * rng.standard_normal((n_heads, n_tokens, n_tokens)) + hidden
        weights = np.exp(logits - logits.max(axis=2, keepdims=True))
        norms = softmax_opnorm(weights / weights.sum(axis=2, keepdims=True))
        short, long = (rng.chisquare(size, (3, n_heads, n_tokens)) / size for size in (d_head, d))
        value, query, key = short * long
        strengths.append(float(np.max(2 * norms * np.sqrt(value * (query + key) / 2))))
    return float(np.mean(strengths))


@lru_cache(maxsize=256)
def outlier(n_tokens: int, theta: float) -> float:
    r"""|J_u| / sqrt(c_V c_O) where the strongest row has strength theta, or the norm at even rows if that is larger.

    The row's change is theta x y' with unit x and y; y lies half in token t, through the query, and half in the
    tokens t sees, through the keys. x = W_O^h v, and the value term has W_O^h v in it too: it adds
    P_h (x) W_O^h v v' W_V^h. Both are of finite rank, and a singular value z leaves the others where

    .. math:: \lambda_{\max}\left( G (C_T H C_T' + \theta^2 g e_t e_t') \right) = 1, \quad g = |y|^2_H .

    At t = 2, the first row that two tokens share, both weights are 1/2.
    """
    from scipy.optimize import brentq

    edge = float(cesaro_opnorm(n_tokens)) * math.sqrt(27) / 2
    if n_tokens < 2:
        return edge
    mean = np.tril(np.ones((n_tokens, n_tokens))) / np.arange(1, n_tokens + 1)[:, None]

    def excess(z: float) -> float:
        G, H = value_resolvents(z, n_tokens)
        row = mean @ H @ mean.T
        row[1, 1] += theta**2 * ((H[0, 0] + H[1, 1]) / 2 + H[1, 1]) / 2
        root = np.linalg.cholesky(G)
        return float(np.linalg.eigvalsh(root.T @ row @ root)[-1]) - 1

    low = edge * (1 + 1e-3)  # nearer to the edge the iteration is slow
    if excess(low) < 0:
        return edge
    found: Any = brentq(excess, low, edge + 3 * theta, xtol=1e-6)
    return float(found)


def uneven_opnorm(d: int, n_heads: int, d_head: int, n_tokens: int, logit_variance: float) -> float:
    """`outlier` at the strength theta = sqrt(2 d_head a) / 2 times that of the strongest row.

    Raises:
        ValueError: there is no token.
    """
    require_tokens(n_tokens)
    if n_tokens < 2:
        return outlier(1, 0.0)
    strength = strongest_row(d, n_heads, d_head, n_tokens, logit_variance)
    return outlier(n_tokens, math.sqrt(2 * d_head * logit_variance) / 2 * strength)


@register
def attention_uneven_sharp() -> Statement:
    r"""Predict the attention sub-layer's Jacobian norm where softmax rows are uneven.

    .. math:: \|J_u\| \approx \sqrt{c_V c_O} \, z(T, \theta), \qquad z \to \theta \approx \sqrt{d_h a / 2}

    Holds: logit variance a from 1 to 4, heads 64 to 256 wide, 4 to 16 of them, together as wide as the stream, a key
        head for each, 16 to 64 tokens: 6 % there, mostly low.
        Rows act one by one here; that near ones strengthen each other is left out, and `attention-simulated` has it.
    Why: the row of the strongest softmax Jacobian is an outlier of the value term; see `theory.attention_outliers`.
    """

    def formula(c_VO: Any, d: Any, n_heads: Any, d_head: Any, n_tokens: Any, logit_variance: Any) -> Any:
        def one(gain: Any, width: Any, heads: Any, width_of_head: Any, length: Any, variance: Any) -> float:
            sizes = int(width), int(heads), int(width_of_head), int(length)
            return math.sqrt(gain) * uneven_opnorm(*sizes, float(variance))

        return elementwise("attention_outlier", one, c_VO, d, n_heads, d_head, n_tokens, logit_variance)

    return Statement(
        name="attention-uneven-sharp",
        kind="sharp",
        quantity=quantity("attention_jacobian"),
        formula=formula,
        source=Source(key="helton2007operator", label="bulk; the outlier derived here"),
        assumptions=(
            "independent normal weights and tokens", "logit variance from 1 to 4", "d >= 256",
            "4 to 16 heads, 64 to 256 wide", "16 to 64 tokens", "no positions inside", *WHOLE_HEADS,
        ),
        why="outlier that the strongest softmax row makes beside the value term",
        target=0.06,
        domain={
            "d": (256.0, math.inf), "d_head": (64.0, 256.0), "n_heads": (4.0, 16.0),
            "n_tokens": (16.0, 64.0), "logit_variance": (1.0, 4.0),
        },
        relations=WHOLE_HEADS,
    )  # fmt: skip
