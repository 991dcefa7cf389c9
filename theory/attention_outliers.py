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
from theory.quantities import quantity
from theory.random_matrix import cesaro_opnorm, elementwise, heads_edge
from theory.sources import Source
from theory.statements import Statement, register

Array = NDArray[np.float64]

UNEVEN_HEADS = {
    "the heads are together as wide as the stream, with a key head each": lambda n_heads, d_head, kv_group, d: (
        n_heads * d_head == d and kv_group == 1
    ),
}
DRAWS, MANY_ROWS, BATCH = 64, 1024, 2**18
HEIGHTS = 20
MOST_STEPS = 3000
CONVERGED = 1e-9


def value_resolvents(z: float, n_tokens: int, ratio: float = 1.0) -> tuple[Array, Array]:
    r"""(G, H), T x T: mean resolvents of C_T (x) W_O W_V on its two sides at z beyond its norm, c_V c_O = 1.

    As in `theory.residual_edges.mixing_edge`, without the identity: G = (z - P)^(-1) and H = (z - R)^(-1).
    """
    one = np.eye(n_tokens)
    mean = running_mean(n_tokens) / math.sqrt(ratio)
    P, R = np.zeros_like(one), np.zeros_like(one)
    for _ in range(MOST_STEPS):
        G, H = _inverse(z * one - P), _inverse(z * one - R)
        Y = mean.T @ G @ mean
        new_P, new_R = ratio * mean @ _inverse(_inverse(H) - Y) @ mean.T, ratio * _inverse(_inverse(Y) - H)
        change = max(float(np.abs(new_P - P).max()), float(np.abs(new_R - R).max()))
        P, R = (new_P + new_P.T) / 2, (new_R + new_R.T) / 2
        if change < CONVERGED:
            break
    return _inverse(z * one - P), _inverse(z * one - R)


def running_mean(n_tokens: int) -> Array:
    """C_T: row t is 1/t on columns 1 to t."""
    return np.tril(np.ones((n_tokens, n_tokens))) / np.arange(1, n_tokens + 1)[:, None]


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
def strongest_rows(d: int, n_heads: int, d_head: int, n_tokens: int, logit_variance: float, kv_group: int = 1) -> Array:
    """(draws,) of the largest 2 |S_t| sqrt(f_v (f_q + f_k)/2) over rows and heads, by a fixed seed.

    f are squared lengths over their means, of W_O v, W_K' q and W_Q' k: chi-squares of d_head, and of d. The lengths
    of values and keys are those of a group's.
    """
    rng = np.random.default_rng(0)
    hidden = np.triu(np.full((n_tokens, n_tokens), -np.inf), 1)
    rows = n_heads * n_tokens
    # Of few rows the strongest varies more, and is drawn more often.
    draws, batch = DRAWS * max(1, MANY_ROWS // rows), max(1, BATCH // (rows * n_tokens))
    strengths: list[Array] = []
    for size in (min(batch, draws - done) for done in range(0, draws, batch)):
        logits = math.sqrt(logit_variance) * rng.standard_normal((size, n_heads, n_tokens, n_tokens)) + hidden
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        norms = softmax_opnorm(weights / weights.sum(axis=-1, keepdims=True))
        short, long = (rng.chisquare(width, (3, size, n_heads, n_tokens)) / width for width in (d_head, d))
        value, query, key = _grouped(short, kv_group) * long
        strengths.append((2 * norms * np.sqrt(value * (query + key) / 2)).max(axis=(1, 2)))
    return np.concatenate(strengths)


def _grouped(short: Array, kv_group: int) -> Array:
    """(3, draws, heads, tokens) squared lengths of values, queries and keys, one value and key for a group's heads."""
    shared = np.repeat(short[:, :, ::kv_group], kv_group, axis=2)
    return np.stack([shared[0], short[1], shared[2]])


def outlier(n_tokens: int, theta: Array, ratio: float = 1.0, kv_group: int = 1) -> Array:
    r"""|J_u| / sqrt(c_V c_O) where the strongest row has strength theta, or the norm at even rows if that is larger.

    The row's change is theta x y' with unit x and y; y lies half in token t, through the query, and half in the
    tokens t sees, through the keys. x = W_O^h v, and the value term has W_O^h v in it too: it adds
    P_h (x) W_O^h v v' W_V^h. Both are of finite rank, and a singular value z leaves the others where

    .. math:: \lambda_{\max}\left( G (C_T H C_T' d/k + \theta^2 g e_t e_t') \right) = 1, \quad g = |y|^2_H,

    k the width of all query heads. At t = 2, the first row that two tokens share, both weights are 1/2. Where a group
    of heads has one value, the value term has the sum of their W_O^h v, of which x is one: the others are a second
    direction, and the matrix that meets G is one of 2 T rows. theta is explicit in z, and interpolated.

    Args:
        theta: strengths, (draws,).
        ratio: k/d.
        kv_group: query heads that share a value.
    """
    from scipy.interpolate import PchipInterpolator

    inner = ratio / kv_group
    edge = float(cesaro_opnorm(n_tokens)) * math.sqrt(heads_edge(inner).limit)
    if n_tokens < 2:
        return np.full(np.shape(theta), edge)
    mean = running_mean(n_tokens) / math.sqrt(ratio)
    shares = np.array([1.0] if kv_group == 1 else [1.0, math.sqrt(kv_group - 1)])
    low = edge * (1 + 1e-3)  # nearer to the edge the iteration is slow
    heights = low + float(np.max(theta)) * np.linspace(0, 1, HEIGHTS) ** 1.5
    found = np.zeros(HEIGHTS)
    for place, z in enumerate(heights):
        G, H = value_resolvents(float(z), n_tokens, inner)
        rest = np.kron(np.eye(len(shares)), _inverse(G)) - np.kron(np.outer(shares, shares), mean @ H @ mean.T)
        length = ((H[0, 0] + H[1, 1]) / 2 + H[1, 1]) / 2
        found[place] = 1 / math.sqrt(length * _inverse(rest)[1, 1])
    curve: Any = PchipInterpolator(found, heights)
    return np.where(theta <= found[0], edge, curve(np.maximum(theta, found[0]))).astype(np.float64, copy=False)


@lru_cache(maxsize=256)
def uneven_opnorm(d: int, n_heads: int, d_head: int, n_tokens: int, logit_variance: float, kv_group: int = 1) -> float:
    """Mean of `outlier` over strengths theta = sqrt(2 a d / n_heads) / 2 times that of the strongest row.

    Raises:
        ValueError: there is no token.
    """
    require_tokens(n_tokens)
    strengths = strongest_rows(d, n_heads, d_head, n_tokens, logit_variance, kv_group) if n_tokens > 1 else np.zeros(1)
    theta = math.sqrt(2 * d / n_heads * logit_variance) / 2 * strengths
    return float(outlier(n_tokens, theta, n_heads * d_head / d, kv_group).mean())


@register
def attention_uneven_sharp() -> Statement:
    r"""Predict the attention sub-layer's Jacobian norm where softmax rows are uneven.

    .. math:: \|J_u\| \approx \sqrt{c_V c_O} \, z(T, \theta), \qquad z \to \theta \approx \sqrt{a d / (2 n_h)}

    Holds: logit variance a from 1 to 4, heads 64 to 256 wide, 4 to 16 of them, together as wide as the stream, a key
        head for each, 16 to 64 tokens: 6 % there, mostly low; 7 % low at eight heads of 64 in pairs, d 256.
        Rows act one by one here; that near ones strengthen each other is left out, and `attention-simulated` has it.
    Why: the row of the strongest softmax Jacobian is an outlier of the value term; see `theory.attention_outliers`.
    """

    def formula(
        c_VO: Any, d: Any, n_heads: Any, d_head: Any, kv_group: Any, n_tokens: Any, logit_variance: Any
    ) -> Any:  # fmt: skip
        def one(
            gain: Any, width: Any, heads: Any, width_of_head: Any, group: Any, length: Any, variance: Any
        ) -> float:  # fmt: skip
            sizes = int(width), int(heads), int(width_of_head), int(length)
            return math.sqrt(gain) * uneven_opnorm(*sizes, float(variance), int(group))

        return elementwise("attention_outlier", one, c_VO, d, n_heads, d_head, kv_group, n_tokens, logit_variance)

    return Statement(
        name="attention-uneven-sharp",
        kind="sharp",
        quantity=quantity("attention_jacobian"),
        formula=formula,
        source=Source(key="helton2007operator", label="bulk; the outlier derived here"),
        assumptions=(
            "independent normal weights and tokens", "logit variance from 1 to 4", "d >= 256",
            "4 to 16 heads, 64 to 256 wide", "16 to 64 tokens", "no positions inside", *UNEVEN_HEADS,
        ),
        why="outlier that the strongest softmax row makes beside the value term",
        target=0.06,
        domain={
            "d": (256.0, math.inf), "d_head": (64.0, 256.0), "n_heads": (4.0, 16.0),
            "n_tokens": (16.0, 64.0), "logit_variance": (1.0, 4.0),
        },
        relations=UNEVEN_HEADS,
    )  # fmt: skip
