"""Rigorous chains about attention over the whole sequence.

With p_tj the softmax row of a head, v_j its values, k_tj its keys and o_t = sum_j p_tj v_j its output, moving u_j
changes A_t in three ways: through the values, through the keys and (j = t only) through the query. RoPE turns keys
and queries; k_tj = R_t' R_j k_j is the key in the frame of query t, and without RoPE it is k_j.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import sympy as sp  # pyright: ignore[reportMissingTypeStubs]

from theory.derivation import Derivation, Step, register_derivation, substitution
from theory.derivations_expressions import MaxOver, Norm, SumOver, Transposed, Values, array, entry
from theory.derivations_numeric import Array, Attention, Rng, jacobian, opnorm, random_attention
from theory.sources import Source
from theory.statements import find
from theory.symbols import symbol

_sp: Any = sp

OWN = Source(key="spikecheck", label="block Jacobian and Cauchy-Schwarz")

g, T, d_head, R = symbol("kv_group"), symbol("n_tokens"), symbol("d_head"), symbol("R")
chi, spread = symbol("column_sum"), symbol("logit_spread")
norms = {letter: symbol(f"opnorm_{letter}") for letter in "QKVOP"}
key_term, query_term = symbol("key_term"), symbol("query_term")

h, h_t = entry("h"), entry("h,t")
p_tj, delta = entry("p_tj", "p_{tj}"), entry("delta_tj", r"\delta_{tj}")
norm_Vh, norm_Kh = entry("|W_V^h|", r"\| W_V^h \|"), entry("|W_K^h|", r"\| W_K^h \|")
_NORM_QH = entry("|W_Q^h|", r"\| W_Q^h \|")
_NORM_BH = entry("|b_Q^h|", r"\| b_Q^h \|")
W_Oh, W_Vh, W_Qh = array("W_O^h", "W_O^h"), array("W_V^h", "W_V^h"), array("W_Q^h", "W_Q^h")
v_j, o_t, a_tj, q_t = array("v_j"), array("o_t"), array("a_tj", "a_{tj}"), array("q_t")
cov_vk = array("Cov_t(v,k)", r"\mathrm{Cov}_t(v, k)")
cov_v = array("Cov_t(v)", r"\mathrm{Cov}_t(v)")
block = array("dA_t/du_j", r"\frac{\partial A_t}{\partial u_j}")
whole = array("J_u", "J_u")
W_O_all = array("(I_T x W_O)", r"(I_T \otimes W_O)")
by_value, by_key, by_query = (array(f"J^{name}", f"J^{name}") for name in "VKQ")
B_j, J_INDEX = array("B_j"), entry("j")


def _numbers(layer: Attention, u: Array, place: tuple[int, int, int] = (-1, -1, 0)) -> Values:
    """Everything the chains speak of, for one attention sub-layer at the normalised tokens u (T, d).

    place: the token t, the token j <= t and the head that steps about a single one look at.
    """
    n, d = u.shape
    heads, width, group = layer.W_Q.shape[0], layer.d_head, layer.group
    p, v, q = layer.probabilities(u), layer.values(u), layer.queries(u)
    W_K, W_V = np.repeat(layer.W_K, group, axis=0), np.repeat(layer.W_V, group, axis=0)
    W_O = layer.W_O.reshape(d, heads, width)
    q_own = np.einsum("tfe,htf->hte", layer.turns, q)  # before the rotation
    frame = np.einsum("tfe,jfi->tjei", layer.turns, layer.turns)  # R_t' R_j
    k = np.einsum("tfe,hjf->htje", layer.turns, layer.keys(u))
    a = np.einsum("hid,tjei,hte->htjd", W_K, frame, q_own) / np.sqrt(width)
    o = np.einsum("htj,hje->hte", p, v)
    centred = v[:, None] - o[:, :, None]  # (h, t, j, e)
    covariance_v = np.einsum("htj,htje,htjf->htef", p, centred, centred)
    covariance_k = np.einsum("htj,htje,htjf->htef", p, centred, k)
    covariance_norm = np.linalg.norm(covariance_v, 2, axis=(2, 3))

    values_part = np.einsum("htj,hed->thejd", p, W_V)
    keys_part = np.einsum("htj,htje,htjd->thejd", p, centred, a)
    query_part = np.einsum("htef,hfd,tj->thejd", covariance_k, layer.W_Q, np.eye(n)) / np.sqrt(width)
    shape = (n * heads * width, n * d)
    J = jacobian(layer, u)
    blocks = [np.einsum("ht,ht,htd,hte->de", covariance_norm, p[:, :, j], a[:, :, j], a[:, :, j]) for j in range(n)]

    t, j, some_head = place[0] % n, place[1] % n, place[2]
    by_head = [
        {
            **{p_tj: p[i, t, j], W_Oh: W_O[:, i], W_Vh: W_V[i], W_Qh: layer.W_Q[i], cov_vk: covariance_k[i, t]},
            **{v_j: v[i, j][:, None], o_t: o[i, t][:, None], a_tj: a[i, t, j][:, None]},
        }
        for i in range(heads)
    ]
    by_head_and_token = [
        {p_tj: p[i, s, j], cov_v: covariance_v[i, s], a_tj: a[i, s, j][:, None]} for i in range(heads) for s in range(n)
    ]
    radius = float(np.max(np.linalg.norm(u, axis=1)))
    head_norms = [(opnorm(W_V[i]), opnorm(layer.W_Q[i]), opnorm(W_K[i])) for i in range(heads)]
    logits = layer.logits(u)
    turned = not np.allclose(layer.turns, np.eye(width))
    return {
        **{g: group, T: n, d_head: width, R: radius, h: by_head, h_t: by_head_and_token, delta: float(t == j)},
        **{block: J.reshape(n, d, n, d)[t, :, j], whole: J, W_O_all: np.kron(np.eye(n), layer.W_O)},
        **{by_value: values_part.reshape(shape), by_key: keys_part.reshape(shape), by_query: query_part.reshape(shape)},
        **{B_j: blocks[j], J_INDEX: [{B_j: matrix} for matrix in blocks]},
        norms["Q"]: opnorm(layer.W_Q.reshape(-1, d)),
        norms["K"]: opnorm(layer.W_K.reshape(-1, d)),
        norms["V"]: opnorm(layer.W_V.reshape(-1, d)),
        norms["O"]: opnorm(layer.W_O),
        norms["P"]: max(opnorm(row) for row in p),
        key_term: max(opnorm(matrix) for matrix in blocks) ** 0.5,
        query_term: float(np.max(np.linalg.norm(covariance_k, 2, axis=(2, 3)))),
        symbol("head_VQ"): max(
            vn * (qn + float(np.linalg.norm(b_Q)) / radius) for (vn, qn, _), b_Q in zip(head_norms, layer.b_Q)
        ),
        symbol("head_VK"): max(
            vn * (kn + turned * float(np.linalg.norm(b_K)) / radius)
            for (vn, _, kn), b_K in zip(head_norms, np.repeat(layer.b_K, group, axis=0))
        ),
        chi: float(np.max(np.sum(p, axis=1))),
        spread: max(float(np.ptp(row[s, : s + 1])) for row in logits for s in range(n)),
        **{cov_v: covariance_v[some_head, t], q_t: q[some_head, t][:, None], norm_Vh: head_norms[some_head][0]},
        _NORM_QH: head_norms[some_head][1],
        _NORM_BH: float(np.linalg.norm(layer.b_Q[some_head])),
    }


def _sample(rng: Rng) -> Values:
    """Random attention with grouped heads and biases, with or without RoPE, logits from flat to peaked."""
    layer = random_attention(
        rng, n_tokens=4, d=5, heads=4, kv_heads=int(rng.choice([1, 2, 4])), d_head=4,
        turning=int(rng.choice([0, 2, 4])), scale=float(rng.choice([0.3, 1.0, 3.0])),
    )  # fmt: skip
    t, j = sorted(int(token) for token in rng.integers(0, 4, 2))[::-1]
    return _numbers(layer, rng.normal(0, 1, (4, 5)), (t, t if rng.random() < 0.3 else j, int(rng.integers(4))))


def _one_head(rng: Rng, **changes: Any) -> Attention:
    """One head of width 3 on width 5, no biases, with the given weights in place of random ones."""
    weights: dict[str, Any] = {
        **{name: rng.normal(0, 0.5, (1, 3, 5)) for name in ("W_Q", "W_K", "W_V")},
        "W_O": rng.normal(0, 0.5, (5, 3)),
        **{name: np.zeros((1, 3)) for name in ("b_Q", "b_K", "b_V")},
    }
    n_tokens = int(changes.pop("n_tokens"))
    return Attention(**(weights | changes), turns=np.broadcast_to(np.eye(3), (n_tokens, 3, 3)))


def _flat(rng: Rng) -> Values:
    """Equal logits, one head: P is the matrix of running means."""
    return _numbers(_one_head(rng, n_tokens=4, W_Q=np.zeros((1, 3, 5))), rng.normal(0, 1, (4, 5)))


def _single_token(rng: Rng) -> Values:
    """One token, W_O = W_V', no query: only the value term is left, with aligned factors."""
    W_V, zero = rng.normal(0, 0.5, (1, 3, 5)), np.zeros((1, 3, 5))
    layer = _one_head(rng, n_tokens=1, W_Q=zero, W_K=zero, W_V=W_V, W_O=W_V[0].T)
    return _numbers(layer, rng.normal(0, 1, (1, 5)))


def _two_equal_keys(rng: Rng) -> Values:
    """Two tokens whose keys agree and whose values differ: Cauchy-Schwarz over the row is an equality."""
    layer = _one_head(rng, n_tokens=2)
    null = np.linalg.svd(layer.W_K[0])[2][-1]
    first = rng.normal(0, 1, 5)
    return _numbers(layer, np.stack([first, first + 2 * null]))


def _opposite_tokens(rng: Rng) -> Values:
    """Two opposite tokens along the top singular vectors of W_V = W_K, equal logits: covariances are R^2 of it."""
    W = rng.normal(0, 1, (1, 3, 5))
    top = np.linalg.svd(W[0])[2][0]
    layer = _one_head(rng, n_tokens=2, W_Q=np.zeros((1, 3, 5)), W_V=W, W_K=W)
    return _numbers(layer, np.stack([2 * top, -2 * top]))


def _aligned_query(rng: Rng) -> Values:
    """Tokens along W_Q's top singular vector, the bias along its image."""
    left, singular, right = np.linalg.svd(rng.normal(0, 1, (3, 5)))
    W_Q = (left * singular) @ right[:3]
    layer = _one_head(rng, n_tokens=2, W_Q=W_Q[None], b_Q=1.5 * left[:, 0][None])
    return _numbers(layer, np.stack([right[0], 2 * right[0]]))


def _isometric_query(rng: Rng) -> Values:
    """W_Q with orthonormal rows keeps the covariance's norm."""
    rows = np.linalg.qr(rng.normal(0, 1, (5, 3)))[0].T
    return _numbers(_one_head(rng, n_tokens=3, W_Q=rows[None]), rng.normal(0, 1, (3, 5)))


def _jacobian_steps() -> tuple[Step, Step, Step]:
    """The block Jacobian, its three parts and the triangle inequality."""
    inner = p_tj * (W_Vh + (v_j - o_t) * Transposed(a_tj)) + delta / _sp.sqrt(d_head) * cov_vk * W_Qh
    blocks = Step(
        left=block,
        right=SumOver(W_Oh * inner, h),
        relation="=",
        rule="product rule",
        source=OWN,
        explanation="dp_tj = p_tj (dl_tj - sum_i p_ti dl_ti) makes it v_j - o_t; a_tj = W_K' R_j' R_t q_t / sqrt(d_h).",
        sample=_sample,
    )
    parts = Step(
        left=whole,
        right=W_O_all * (by_value + by_key + by_query),
        relation="=",
        rule="definition",
        source=OWN,
        explanation="All blocks at once, heads side by side: through the values, the keys and the query.",
        sample=_sample,
    )
    triangle = Step(
        left=Norm(whole),
        right=norms["O"] * (Norm(by_value) + Norm(by_key) + Norm(by_query)),
        relation="<=",
        rule="sub-multiplicativity and triangle inequality",
        source=OWN,
        explanation="I_T x W_O has the norm of W_O, however many tokens.",
        sample=_sample,
        tight=_single_token,
    )
    return blocks, parts, triangle


def _term_steps() -> tuple[Step, Step, Step, Step]:
    """Each part by measured probabilities and covariances."""
    value = Step(
        left=Norm(by_value),
        right=_sp.sqrt(g) * norms["V"] * norms["P"],
        relation="<=",
        rule="Kronecker product",
        source=OWN,
        explanation="Head h gives P_h x W_V^h; the sum over heads stays inside |W_V|, which g query heads share.",
        sample=_sample,
        tight=_flat,
    )
    definition = Step(
        left=B_j,
        right=SumOver(Norm(cov_v) * p_tj * a_tj * Transposed(a_tj), h_t),
        relation="=",
        rule="definition",
        source=OWN,
        explanation="What token j's key can do to all outputs.",
        sample=_sample,
    )
    key = Step(
        left=Norm(by_key),
        right=MaxOver(_sp.sqrt(Norm(B_j)), J_INDEX),
        relation="<=",
        rule="Cauchy-Schwarz",
        source=OWN,
        explanation="|sum_j p_tj (v_j - o_t) a_tj'w_j|^2 <= |Cov_t(v)| sum_j p_tj (a_tj'w_j)^2, summed over h and t.",
        sample=_sample,
        tight=_two_equal_keys,
    )
    query = Step(
        left=Norm(by_query),
        right=query_term * norms["Q"] / _sp.sqrt(d_head),
        relation="<=",
        rule="sub-multiplicativity",
        source=OWN,
        explanation="Only u_t moves q_t, so the blocks are diagonal in t.",
        sample=_sample,
        tight=_isometric_query,
    )
    return value, definition, key, query


def _named_key_term() -> Step:
    return Step(
        left=MaxOver(_sp.sqrt(Norm(B_j)), J_INDEX),
        right=key_term,
        relation="=",
        rule="definition",
        source=OWN,
        explanation="The letter by which the key term is measured.",
        sample=_sample,
    )


@register_derivation
def attention_upper_aposteriori() -> Derivation:
    """The bound that uses the real probabilities."""
    blocks, parts, triangle = _jacobian_steps()
    value, definition, key, query = _term_steps()
    named = _named_key_term()
    conclusion = substitution(
        *(triangle, value, key, named, query),
        source=OWN,
        explanation="No factor for the number of heads.",
        sample=_sample,
        tight=_single_token,
    )
    return Derivation(
        name="attention-upper-aposteriori",
        title="Attention over the sequence, a true bound from measured probabilities",
        steps=(blocks, parts, triangle, value, definition, key, named, query, conclusion),
        statement="attention-upper-aposteriori",
        assumptions=("softmax attention with logits q.k / sqrt(d_h), RoPE or no positions inside",),
    )


def _collect(expression: Any) -> Any:
    """Take the key and the query term's common factor out."""
    sums: Any = expression.atoms(_sp.Add)
    for terms in sums:
        expression = expression.xreplace({terms: _sp.collect(terms, R**2 / _sp.sqrt(d_head))})
    return expression


@register_derivation
def attention_upper_apriori() -> Derivation:
    """The bound from norms of the weights alone."""
    blocks, parts, triangle = _jacobian_steps()
    value, definition, key, query = _term_steps()
    named = _named_key_term()
    head_VQ, head_VK = symbol("head_VQ"), symbol("head_VK")
    probability = Step(
        left=norms["P"],
        right=find("attention-probability-upper").expression,
        relation="<=",
        rule="entrywise domination",
        source=Source(key="spikecheck", label="entrywise domination; hardy1920 for |C_T| < 2"),
        explanation="p_tj <= e^D / t, the running mean's entry; and rows that sum to 1 give |P| <= sqrt T.",
        sample=_sample,
        tight=_flat,
    )
    covariance = Step(
        left=Norm(cov_v),
        right=(norm_Vh * R) ** 2,
        relation="<=",
        rule="covariance at most second moment",
        source=OWN,
        explanation="Cov_t(v) = W_V^h Cov_t(u) W_V^h', and |Cov_t(u)| <= R^2; a value bias cancels.",
        sample=_sample,
        tight=_opposite_tokens,
    )
    reach = Step(
        left=Norm(q_t),
        right=R * (_NORM_QH + _NORM_BH / R),
        relation="<=",
        rule="triangle inequality",
        source=OWN,
        explanation="The query bias does not cancel: it scales the keys' effect.",
        sample=_sample,
        tight=_aligned_query,
    )
    keys = Step(
        left=key_term,
        right=head_VQ * R**2 / _sp.sqrt(d_head) * _sp.sqrt(g) * norms["K"] * _sp.sqrt(chi),
        relation="<=",
        rule="the two lines above in B_j",
        source=OWN,
        explanation="w'B_j w <= max_h(...)^2 R^4/d_h sum_h |W_K^h w|^2 sum_t p_tj; chi is the largest sum_t p_tj.",
        sample=_sample,
    )
    column = Step(
        left=chi,
        right=_sp.Min(T, _sp.exp(spread) * _sp.harmonic(T)),
        relation="<=",
        rule="entrywise domination",
        source=OWN,
        explanation="A causal column holds at most e^D (1 + 1/2 + ... + 1/T), and T entries of at most 1.",
        sample=_sample,
        tight=_flat,
    )
    queries = Step(
        left=query_term,
        right=head_VK * R**2,
        relation="<=",
        rule="covariance at most second moment",
        source=OWN,
        explanation="RoPE turns a key bias by the token, so that it does not cancel; without RoPE b_K^h is left out.",
        sample=_sample,
        tight=_opposite_tokens,
    )
    conclusion = substitution(
        *(triangle, value, probability, key, named, keys, column, query, queries),
        source=OWN,
        explanation="Rigorous, and loose where the softmax is far from one-hot.",
        sample=_sample,
        tight=_single_token,
        simplify=_collect,
    )
    return Derivation(
        name="attention-upper-apriori",
        title="Attention over the sequence, a true bound from the weights' norms",
        steps=(
            *(blocks, parts, triangle, value, probability, definition, key, named),
            *(covariance, reach, keys, column, query, queries, conclusion),
        ),
        statement="attention-upper-apriori",
        assumptions=("causal softmax over all earlier tokens, logits q.k / sqrt(d_h), RoPE or no positions inside",),
    )
