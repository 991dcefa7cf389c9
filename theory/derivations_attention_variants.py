"""Rigorous chains about attention of every kind: one Jacobian for any logits, by its slopes.

The letters are those of attention over the whole sequence, with a_tj = dl_tj/du_j and b_tj = dl_tj/du_t for logits
l_tj of any kind; the samples take them from products of queries and keys, turned by RoPE or not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import sympy as sp  # pyright: ignore[reportMissingTypeStubs]

from theory.derivation import Derivation, Step, register_derivation, substitution
from theory.derivations_expressions import Norm, SumOver, Transposed, Values, array, entry
from theory.derivations_numeric import Array, Attention, Rng, jacobian, opnorm, random_attention
from theory.random_matrix import cesaro_opnorm
from theory.sources import Source
from theory.statements import find
from theory.symbols import symbol

_sp: Any = sp

OWN = Source(key="spikecheck", label="block Jacobian and Cauchy-Schwarz")
SUMS = Source(key="spikecheck", label="row and column sums")
MEANS = Source(key="spikecheck", label="entrywise domination; hardy1920 for |C_w| < 2")

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


def _numbers(layer: Attention, u: Array, place: tuple[int, int] = (-1, 0)) -> Values:
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
    size = (n * d, n * d)
    t, j = place[0] % n, place[1] % n
    mean = p.mean(axis=0)
    return {
        **{T: n, w: min(layer.window or n, n), R: float(np.max(np.linalg.norm(u, axis=1))), delta: float(t == j)},
        **{block: jacobian(layer, u).reshape(n, d, n, d)[t, :, j], whole: jacobian(layer, u)},
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


def _sample(rng: Rng, *, causal: bool = True) -> Values:
    layer = random_attention(
        rng, n_tokens=4, d=5, heads=4, kv_heads=int(rng.choice([1, 2, 4])), d_head=2, rope=bool(rng.random() < 0.5),
        scale=float(rng.choice([0.3, 1.0, 3.0])),
    )  # fmt: skip
    layer = replace(layer, causal=causal, window=int(rng.choice([0, 2, 3])) if causal else 0)
    t, j = sorted(int(token) for token in rng.integers(0, 4, 2))[::-1]
    j = max(j, t + 1 - layer.window) if layer.window else j  # a token that t sees: another's block is zero
    return _numbers(layer, rng.normal(0, 1, (4, 5)), (t, t if rng.random() < 0.3 else j))


def _full(rng: Rng) -> Values:
    return _sample(rng, causal=False)


def _layer(*, n_tokens: int, causal: bool = True, window: int = 0, **weights: Any) -> Attention:
    """One head of width 3 on width 5; what is not given is zero."""
    none: dict[str, Any] = {
        **{name: np.zeros((1, 3, 5)) for name in ("W_Q", "W_K", "W_V")},
        "W_O": np.zeros((5, 3)),
        **{name: np.zeros((1, 3)) for name in ("b_Q", "b_K", "b_V")},
    }
    turns = np.broadcast_to(np.eye(3), (n_tokens, 3, 3))
    return Attention(turns=turns, causal=causal, window=window, **(none | weights))


def _averaging(rng: Rng, **changes: Any) -> Values:
    """Equal logits, one head, W_O = W_V'."""
    W_V = rng.normal(0, 1, (1, 3, 5))
    return _numbers(_layer(n_tokens=4, W_V=W_V, W_O=W_V[0].T, **changes), rng.normal(0, 1, (4, 5)))


def _averaging_full(rng: Rng) -> Values:
    return _averaging(rng, causal=False)


def _first_alone(rng: Rng) -> Values:
    """Every row sees the first token and nothing else."""
    towards, token = np.eye(1, 3)[0], np.eye(1, 5)[0]
    layer = _layer(n_tokens=4, W_K=800.0 * np.outer(towards, token)[None], b_Q=towards[None])
    return _numbers(layer, np.concatenate([token[None], np.zeros((3, 5))]))


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
    return _numbers(_layer(n_tokens=2, causal=causal, **weights), np.stack([2 * top, -2 * top]))


def _keys(rng: Rng) -> Values:
    return _two_tokens(rng, "keys")


def _queries(rng: Rng) -> Values:
    return _two_tokens(rng, "queries")


def _keys_full(rng: Rng) -> Values:
    return _two_tokens(rng, "keys", causal=False)


def _one_token(rng: Rng) -> Values:
    """Only values: weights of any kind."""
    layer = random_attention(rng, n_tokens=1, d=5, heads=2, kv_heads=1, d_head=2, rope=False)
    return _numbers(layer, rng.normal(0, 1, (1, 5)))


def _one_aligned(rng: Rng) -> Values:
    W_V = rng.normal(0, 1, (1, 3, 5))
    return _numbers(_layer(n_tokens=1, W_V=W_V, W_O=W_V[0].T), rng.normal(0, 1, (1, 5)))


def _means_step() -> Step:
    return Step(
        left=opnorm_P,
        right=_sp.exp(spread) * means,
        relation="<=",
        rule="entrywise domination",
        source=MEANS,
        explanation="p_tj <= e^D / min(t, w), the windowed running mean's entry, wherever the row sees at all.",
        sample=_sample,
        tight=_averaging,
    )


@register_derivation
def attention_window_upper() -> Derivation:
    """The softmax matrix of a row's last w tokens."""
    split = Step(
        left=means,
        right=_sp.sqrt(cesaro_opnorm(w) ** 2 + _sp.Min(1, _sp.Max(0, T - w))),
        relation="<=",
        rule="rows in two groups",
        source=MEANS,
        explanation="The first w rows are C_w; the others, if any, a moving average with rows and columns of sum <= 1.",
        sample=_sample,
        tight=_averaging,
    )
    sums = Step(
        left=opnorm_P,
        right=_sp.sqrt(w),
        relation="<=",
        rule="row and column sums",
        source=SUMS,
        explanation="|P|^2 <= |P|_1 |P|_inf: rows sum to 1, and at most w rows see a column.",
        sample=_sample,
        tight=_first_alone,
    )
    smaller = Step(
        left=opnorm_P,
        right=find("attention-window-upper").expression,
        relation="<=",
        rule="the smaller of two bounds",
        source=MEANS,
        explanation="Each holds, so both do.",
        sample=_sample,
        tight=_averaging,
    )
    return Derivation(
        name="attention-window-upper",
        title="The causal softmax matrix, with a window or without",
        steps=(_means_step(), split, sums, smaller),
        statement="attention-window-upper",
        assumptions=("causal softmax over the last w tokens",),
    )


def _column_steps() -> tuple[Step, Step]:
    columns = Step(
        left=chi,
        right=_sp.Min(T, _sp.exp(spread)),
        relation="<=",
        rule="entrywise domination",
        source=SUMS,
        explanation="T entries of at most e^D / T, and of at most 1.",
        sample=_full,
        tight=_averaging_full,
    )
    sums = Step(
        left=opnorm_P,
        right=_sp.sqrt(chi),
        relation="<=",
        rule="row and column sums",
        source=SUMS,
        explanation="|P|^2 <= |P|_1 |P|_inf, and rows sum to 1.",
        sample=_full,
        tight=_averaging_full,
    )
    return columns, sums


@register_derivation
def attention_full_probability_upper() -> Derivation:
    """The softmax matrix without a mask."""
    columns, sums = _column_steps()
    smaller = Step(
        left=opnorm_P,
        right=find("attention-full-probability-upper").expression,
        relation="<=",
        rule="the line above, root by root",
        source=SUMS,
        explanation="The root of the smaller is the smaller of the roots.",
        sample=_full,
        tight=_averaging_full,
    )
    return Derivation(
        name="attention-full-probability-upper",
        title="The softmax matrix without a mask",
        steps=(columns, sums, smaller),
        statement="attention-full-probability-upper",
        assumptions=("softmax over all tokens",),
    )


def _jacobian_steps(sample: Any) -> tuple[Step, Step, Step]:
    blocks = Step(
        left=block,
        right=SumOver(W_Oh * (p_tj * (W_Vh + (v_j - o_t) * Transposed(a_tj)) + delta * cov_vb), h),
        relation="=",
        rule="product rule",
        source=OWN,
        explanation="dp_tj = p_tj (dl_tj - sum_i p_ti dl_ti); a and b say how a logit moves with its two tokens.",
        sample=sample,
    )
    parts = Step(
        left=whole,
        right=by_value + by_key + by_query,
        relation="=",
        rule="definition",
        source=OWN,
        explanation="All blocks at once: through the values, the keys and the query.",
        sample=sample,
    )
    triangle = Step(
        left=Norm(whole),
        right=Norm(by_value) + Norm(by_key) + Norm(by_query),
        relation="<=",
        rule="triangle inequality",
        source=OWN,
        explanation="One token has only the first.",
        sample=sample,
        tight=_one_token,
    )
    return blocks, parts, triangle


def _value_step(sample: Any) -> Step:
    return Step(
        left=Norm(by_value),
        right=opnorm_O * opnorm_VH * opnorm_P,
        relation="<=",
        rule="Kronecker product",
        source=OWN,
        explanation="(I x W_O) diag_h(P_h x I) (I x W_V), with a group's rows of W_V repeated for its heads.",
        sample=sample,
        tight=_one_aligned,
    )


def _general(name: str, title: str, rows: Any, averaging: Any, sample: Any, attained: Any, mask: str) -> Derivation:
    blocks, parts, triangle = _jacobian_steps(sample)
    value = _value_step(sample)
    probability = Step(
        left=opnorm_P,
        right=averaging,
        relation="<=",
        rule="row and column sums, entrywise domination",
        source=SUMS,
        explanation="The bound on the softmax matrix.",
        sample=sample,
        tight=attained,
    )
    keys = Step(
        left=Norm(by_key),
        right=heads_OV * R * key_slope * _sp.sqrt(rows),
        relation="<=",
        rule="Cauchy-Schwarz and Popoviciu",
        source=OWN,
        explanation="|Cov(u, f)| <= R sd(f) with f_j = a_tj . w_j; over all rows Var(f) is at most half of sum_j "
        "f_j^2, and at most sum_j p_tj f_j^2.",
        sample=sample,
        tight=_keys if sample is _sample else _keys_full,
    )
    queries = Step(
        left=Norm(by_query),
        right=heads_OV * R * query_slope,
        relation="<=",
        rule="Cauchy-Schwarz",
        source=OWN,
        explanation="Only u_t moves its own logits, so the blocks are diagonal in t: |Cov(u, f)| <= R sd(f).",
        sample=sample,
        tight=_queries,
    )
    conclusion = substitution(
        *(triangle, value, probability, keys, queries),
        source=OWN,
        explanation="For any logits whose slopes are known.",
        sample=sample,
        tight=_one_aligned,
        simplify=_collect,
    )
    return Derivation(
        name=name,
        title=title,
        steps=(blocks, parts, triangle, value, probability, keys, queries, conclusion),
        statement=name,
        assumptions=(mask,),
    )


def _collect(expression: Any) -> Any:
    """Take the slopes' common factor out."""
    return _sp.collect(_sp.expand(expression), heads_OV * R)


@register_derivation
def attention_general_upper() -> Derivation:
    """Causal attention of any kind, from norms of the weights alone."""
    rows = _sp.Min(_sp.exp(spread) * _sp.harmonic(w), _sp.Min(T - 1, w) / 2)
    return _general(
        "attention-general-upper",
        "Causal attention of any kind, a true bound from the weights' norms",
        rows,
        find("attention-window-upper").expression,
        _sample,
        _averaging,
        "causal softmax over the last w tokens",
    )


@register_derivation
def attention_full_upper() -> Derivation:
    """Attention without a mask, from norms of the weights alone."""
    return _general(
        "attention-full-upper",
        "Attention without a mask, a true bound from the weights' norms",
        _sp.Min(_sp.exp(spread), T / 2),
        find("attention-full-probability-upper").expression,
        _full,
        _averaging_full,
        "softmax over all tokens",
    )


@register_derivation
def attention_blocks_upper() -> Derivation:
    """Attention of any kind, from its softmax matrices and logit slopes."""
    blocks, parts, triangle = _jacobian_steps(_sample)
    values = Step(
        left=Norm(by_value),
        right=_sp.Min(opnorm_OV * opnorm_P_mean + opnorm_O * opnorm_VH * P_deviation, opnorm_O * opnorm_VH * opnorm_P),
        relation="<=",
        rule="Kronecker products",
        source=OWN,
        explanation="The heads' mean gives P-bar x W_O W_V, what is left diag_h(P_h - P-bar) between W_O and W_V.",
        sample=_sample,
        tight=_one_token,
    )
    keys = Step(
        left=Norm(by_key),
        right=key_blocks,
        relation="<=",
        rule="norm of block norms",
        source=OWN,
        explanation="|sum_j K_tj w_j| <= sum_j |K_tj| |w_j| for every t.",
        sample=_sample,
        tight=_keys,
    )
    queries = Step(
        left=Norm(by_query),
        right=query_blocks,
        relation="=",
        rule="block-diagonal matrix",
        source=OWN,
        explanation="Only u_t moves its own logits.",
        sample=_sample,
    )
    conclusion = substitution(
        *(triangle, values, keys, queries),
        source=OWN,
        explanation="Attained by one token, whatever the weights.",
        sample=_sample,
        tight=_one_token,
    )
    return Derivation(
        name="attention-blocks-upper",
        title="Attention of any kind, a true bound from the norms of its blocks",
        steps=(blocks, parts, triangle, values, keys, queries, conclusion),
        statement="attention-blocks-upper",
        assumptions=("softmax attention",),
    )
