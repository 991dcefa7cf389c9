"""Attention of any kind in numbers: the letters of its chains, random cases and cases that attain a line.

The letters are those of attention over the whole sequence, with a_tj = dl_tj/du_j and b_tj = dl_tj/du_t for logits
l_tj of any kind; the numbers take them from products of queries and keys, turned by RoPE or not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from theory.derivations_expressions import Values, array, entry
from theory.derivations_numeric import Array, Attention, Rng, jacobian, opnorm, random_attention
from theory.symbols import symbol

T, w, R, spread, chi = (symbol(name) for name in ("n_tokens", "n_seen", "R", "logit_spread", "column_sum"))
opnorm_P, opnorm_O, opnorm_VH, heads_OV = (symbol(name) for name in ("opnorm_P", "opnorm_O", "opnorm_VH", "heads_OV"))
key_slope, query_slope = symbol("key_slope"), symbol("query_slope")
blocks_names = ("opnorm_OV", "opnorm_P_mean", "P_deviation", "key_blocks", "query_blocks")
opnorm_OV, opnorm_P_mean, P_deviation, key_blocks, query_blocks = (symbol(name) for name in blocks_names)

h = entry("h")
p_tj, delta = entry("p_tj", "p_{tj}"), entry("delta_tj", r"\delta_{tj}")
means = entry("|C_T,w|", r"\| C_{T,w} \|")
W_Oh, W_Vh = array("W_O^h", "W_O^h"), array("W_V^h", "W_V^h")
v_j, o_t, a_tj = array("v_j"), array("o_t"), array("a_tj", "a_{tj}")
cov_vb = array("Cov_t(v,b)", r"\mathrm{Cov}_t(v, b)")
block, whole = array("dA_t/du_j", r"\frac{\partial A_t}{\partial u_j}"), array("J_u", "J_u")
by_value, by_key, by_query = (array(f"J^{name}", f"J^{name}") for name in "VKQ")


def _windowed_mean(n: int, seen: int) -> Array:
    rows = np.tril(np.ones((n, n))) - np.tril(np.ones((n, n)), -seen)
    return rows / rows.sum(axis=1, keepdims=True)


def numbers(layer: Attention, u: Array, place: tuple[int, int] = (-1, 0)) -> Values:
    """Everything the chains speak of, at the normalised tokens u (T, d); place: the token t and the token j <= t."""
    n, d = u.shape
    heads, width, group = layer.W_Q.shape[0], layer.d_head, layer.group
    p, v, q, k = layer.probabilities(u), layer.values(u), layer.queries(u), layer.keys(u)
    W_K, W_V = np.repeat(layer.W_K, group, axis=0), np.repeat(layer.W_V, group, axis=0)
    W_O = layer.W_O.reshape(d, heads, width).transpose(1, 0, 2)
    a = np.einsum("hid,jfi,htf->htjd", W_K, layer.turns, q) / np.sqrt(width)
    b = np.einsum("hid,tfi,hjf->htjd", layer.W_Q, layer.turns, k) / np.sqrt(width)
    centred = np.einsum("htj,htje->htje", p, v[:, None] - (p @ v)[:, :, None])
    values_part = np.einsum("hde,htj,hef->tdjf", W_O, p, W_V)
    key_blocks_ = np.einsum("hde,htje,htjf->tjdf", W_O, centred, a)
    covariance = np.einsum("htje,htjf->htef", centred, b)
    query_blocks_ = np.einsum("hde,htef->tdf", W_O, covariance)
    query_part = np.einsum("tdf,tj->tdjf", query_blocks_, np.eye(n))
    spread_b = np.einsum("htj,htjd,htje->tde", p, b - np.einsum("htj,htjd->htd", p, b)[:, :, None], b)
    logits, seen = layer.logits(u), layer.seen(n)
    size, J = (n * d, n * d), jacobian(layer, u)
    t, j = place[0] % n, place[1] % n
    mean = p.mean(axis=0)
    return {
        **{T: n, w: min(layer.window or n, n), R: float(np.max(np.linalg.norm(u, axis=1))), delta: float(t == j)},
        **{block: J.reshape(n, d, n, d)[t, :, j], whole: J},
        h: [
            {p_tj: p[i, t, j], W_Oh: W_O[i], W_Vh: W_V[i], v_j: v[i, j][:, None], cov_vb: covariance[i, t]}
            | {o_t: (p @ v)[i, t][:, None], a_tj: a[i, t, j][:, None]}
            for i in range(heads)
        ],
        by_value: values_part.reshape(size),
        by_key: key_blocks_.transpose(0, 2, 1, 3).reshape(size),
        by_query: query_part.reshape(size),
        opnorm_O: opnorm(layer.W_O),
        opnorm_VH: opnorm(W_V.reshape(-1, d)),
        opnorm_OV: opnorm(layer.W_O @ W_V.reshape(-1, d)),
        heads_OV: opnorm(np.concatenate(list(W_O @ W_V), axis=1)),
        opnorm_P: max(opnorm(one) for one in p),
        opnorm_P_mean: opnorm(mean),
        P_deviation: max(opnorm(one - mean) for one in p),
        key_blocks: opnorm(np.linalg.norm(key_blocks_, 2, axis=(2, 3))),
        query_blocks: max(opnorm(one) for one in query_blocks_),
        key_slope: max(opnorm(a[:, i, m]) for i in range(n) for m in range(n) if seen[i, m]),
        query_slope: max(opnorm(one) for one in spread_b) ** 0.5,
        chi: float(np.max(np.sum(p, axis=1))),
        spread: max(float(np.ptp(head[i, seen[i]])) for head in logits for i in range(n)),
        means: opnorm(_windowed_mean(n, min(layer.window or n, n))),
    }


def any_attention(rng: Rng, *, causal: bool = True) -> Values:
    layer = random_attention(
        rng, n_tokens=4, d=5, heads=4, kv_heads=int(rng.choice([1, 2, 4])), d_head=4,
        turning=int(rng.choice([0, 2, 4])), scale=float(rng.choice([0.3, 1.0, 3.0])),
    )  # fmt: skip
    layer = replace(layer, causal=causal, window=int(rng.choice([0, 2, 3])) if causal else 0)
    t, j = sorted(int(token) for token in rng.integers(0, 4, 2))[::-1]
    j = max(j, t + 1 - layer.window) if layer.window else j  # a token that t sees: another's block is zero
    return numbers(layer, rng.normal(0, 1, (4, 5)), (t, t if rng.random() < 0.3 else j))


def any_full(rng: Rng) -> Values:
    return any_attention(rng, causal=False)


def _layer(*, n_tokens: int, causal: bool = True, window: int = 0, **weights: Any) -> Attention:
    """One head of width 3 on width 5; what is not given is zero."""
    none: dict[str, Any] = {
        **{name: np.zeros((1, 3, 5)) for name in ("W_Q", "W_K", "W_V")},
        "W_O": np.zeros((5, 3)),
        **{name: np.zeros((1, 3)) for name in ("b_Q", "b_K", "b_V")},
    }
    turns = np.broadcast_to(np.eye(3), (n_tokens, 3, 3))
    return Attention(turns=turns, causal=causal, window=window, **(none | weights))


def averaging(rng: Rng, **changes: Any) -> Values:
    """Equal logits, one head, W_O = W_V'."""
    W_V = rng.normal(0, 1, (1, 3, 5))
    return numbers(_layer(n_tokens=4, W_V=W_V, W_O=W_V[0].T, **changes), rng.normal(0, 1, (4, 5)))


def averaging_full(rng: Rng) -> Values:
    return averaging(rng, causal=False)


def first_alone(rng: Rng) -> Values:
    """Every row sees the first token and nothing else."""
    towards, token = np.eye(1, 3)[0], np.eye(1, 5)[0]
    layer = _layer(n_tokens=4, W_K=800.0 * np.outer(towards, token)[None], b_Q=towards[None])
    return numbers(layer, np.concatenate([token[None], np.zeros((3, 5))]))


def _two_tokens(rng: Rng, through: str, *, causal: bool = True) -> Values:
    """Two opposite tokens along the top singular vector of W_O W_V, equal logits, and slopes across them."""
    W_V, W_O = rng.normal(0, 1, (3, 5)), rng.normal(0, 1, (5, 3))
    top = np.linalg.svd(W_O @ W_V)[2][0]
    W = rng.normal(0, 1, (3, 5))
    across = W - np.outer(W @ top, top)  # logits that the tokens do not have
    weights: dict[str, Any] = {"W_V": W_V[None], "W_O": W_O}
    if through == "keys":
        weights |= {"W_K": across[None], "b_Q": rng.normal(0, 1, (1, 3))}
    else:
        weights |= {"W_Q": across[None], "W_K": W[None]}
    return numbers(_layer(n_tokens=2, causal=causal, **weights), np.stack([2 * top, -2 * top]))


def across_keys(rng: Rng) -> Values:
    return _two_tokens(rng, "keys")


def across_queries(rng: Rng) -> Values:
    return _two_tokens(rng, "queries")


def across_keys_full(rng: Rng) -> Values:
    return _two_tokens(rng, "keys", causal=False)


def one_token(rng: Rng) -> Values:
    """Only values: weights of any kind."""
    layer = random_attention(rng, n_tokens=1, d=5, heads=2, kv_heads=1, d_head=2, turning=0)
    return numbers(layer, rng.normal(0, 1, (1, 5)))


def one_aligned(rng: Rng) -> Values:
    W_V = rng.normal(0, 1, (1, 3, 5))
    return numbers(_layer(n_tokens=1, W_V=W_V, W_O=W_V[0].T), rng.normal(0, 1, (1, 5)))
