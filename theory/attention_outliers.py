r"""Where softmax rows are uneven: the norm of attention as an outlier that one row makes, in closed form.

The value term alone keeps nearly the norm it has at even rows. Beside it, a row t of a head sends its softmax
Jacobian S_t twice, through the query and through the keys: over orthogonal directions, since tokens, queries, keys
and values of different places are nearly so at large width. With two tokens of equal weight |S_t| is 1/2, its maximum,
and of many rows and heads some come close.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theory.quantities import quantity
from theory.random_matrix import cesaro_opnorm, elementwise
from theory.sources import Source
from theory.statements import Statement, register

Array = NDArray[np.float64]

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


@lru_cache(maxsize=256)
def uneven_opnorm(d_head: int, n_tokens: int, logit_variance: float) -> float:
    r"""|J_u| / sqrt(c_V c_O) where a row is shared by two tokens, or the norm at even rows if that is larger.

    The row's change is theta x y' with theta = sqrt(2 d_head a) / 2 and unit x, y; y lies half in token t, through
    the query, and half in the tokens t sees, through the keys. x = W_O^h v, and the value term has W_O^h v in it too:
    it adds P_h (x) W_O^h v v' W_V^h. Both are of finite rank, and a singular value z leaves the others where

    .. math:: \lambda_{\max}\left( G (C_T H C_T' + \theta^2 g e_t e_t') \right) = 1, \quad g = |y|^2_H .

    At t = 2, the first row that two tokens share, both weights are 1/2.
    """
    from scipy.optimize import brentq

    edge = float(cesaro_opnorm(n_tokens)) * math.sqrt(27) / 2
    if n_tokens < 2:
        return edge
    mean = np.tril(np.ones((n_tokens, n_tokens))) / np.arange(1, n_tokens + 1)[:, None]
    theta = math.sqrt(2 * d_head * logit_variance) / 2

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


@register
def attention_uneven_sharp() -> Statement:
    r"""Predict the attention sub-layer's Jacobian norm where softmax rows are uneven, in closed form.

    .. math:: \|J_u\| \approx \sqrt{c_V c_O} \, z(T, d_h a), \qquad z \to \sqrt{d_h a / 2}

    Holds: logit variance a from 1 to 4, heads 64 to 256 wide and at least 4 of them, 16 to 128 tokens: 7 % there.
        Left out are that sizes of queries, keys and values vary from row to row, of which the largest counts (4 to
        6 % low at d_head = 64), and that no row need be shared quite evenly (2 % high at d_head = 256).
        `attention-simulated` has both.
    Why: a row shared by two tokens is an outlier of the value term; see `theory.attention_outliers`.
    """

    def formula(c_VO: Any, d_head: Any, n_tokens: Any, logit_variance: Any) -> Any:
        def one(gain: Any, width: Any, length: Any, variance: Any) -> float:
            return math.sqrt(gain) * uneven_opnorm(int(width), int(length), float(variance))

        return elementwise("attention_outlier", one, c_VO, d_head, n_tokens, logit_variance)

    return Statement(
        name="attention-uneven-sharp",
        kind="sharp",
        quantity=quantity("attention_jacobian"),
        formula=formula,
        source=Source(key="helton2007operator", label="bulk; the outlier derived here"),
        assumptions=(
            "independent normal weights and tokens", "logit variance from 1 to 4", "d >= 256",
            "at least 4 heads, 64 to 256 wide", "16 to 128 tokens", "no positions inside",
        ),
        why="outlier that a softmax row of two equal tokens makes beside the value term",
        target=0.07,
        domain={
            "d": (256.0, math.inf), "d_head": (64.0, 256.0), "n_heads": (4.0, math.inf),
            "n_tokens": (16.0, 128.0), "logit_variance": (1.0, 4.0),
        },
    )  # fmt: skip
