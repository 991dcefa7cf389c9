"""The attention half-layer x' = x + Attn(norm(x)), over the whole sequence.

A per-token Jacobian dx'_t/dx_t cannot bound a gradient: with a loss on the last token alone the gradient
of every other token vanishes after the last layer and does not vanish before it. All bounds here are of
the T d x T d Jacobian.
"""

from __future__ import annotations

import math
from typing import Any

from theory.functions import exp, minimum, sqrt
from theory.quantities import quantity
from theory.random_matrix import cesaro_opnorm, harmonic_number, heads_edge, heads_opnorm
from theory.residual_edges import attention_residual_opnorm
from theory.sources import Source
from theory.statements import Statement, register


def value_ratio(n_heads: Any, d_head: Any, kv_group: Any, d: Any) -> Any:
    """Inner width of W_O W_V over d. Heads that share a value add what they write: one head, sqrt(g) as large."""
    return n_heads * d_head / (kv_group * d)


def even_enough(
    d: float, n_heads: float, d_head: float, kv_group: float, logit_variance: float, n_tokens: float
) -> bool:
    """Whether no two early tokens move each other by more than the value term: a d / (2 n_heads) is their square."""
    most = (0.95 if n_tokens >= 16 else 0.475) * heads_edge(value_ratio(n_heads, d_head, kv_group, d)).limit
    return logit_variance * d / (2 * n_heads) <= most


# What the closed forms at initialisation assume of heads.
HEADS = {
    "value heads are together a quarter to four times as wide as the stream": lambda n_heads, d_head, kv_group, d: (
        0.25 <= value_ratio(n_heads, d_head, kv_group, d) <= 4
    ),
}
EVEN_ROWS = {
    "a d / (2 n_heads) is at most 0.95 times the squared edge of W_O W_V, 0.475 below 16 tokens": even_enough,
}

# Attention whose logits are products of a query and a key, turned by RoPE or not, and nothing else.
PRODUCTS = {"positions": ("none", "rope"), "qk_norm": ("none",), "attention_softcap": (0.0,)}


@register
def softmax_jacobian() -> Statement:
    r"""Bound the Jacobian of one softmax row.

    .. math:: \|\mathrm{diag}(p) - p p^\top\| \le \tfrac12

    Holds: any logits; equality at two equal logits.
    Why: v'Jv = Var_p(v) <= (max v - min v)^2 / 4 <= 1/2 for unit v (Popoviciu).
    Source: popoviciu1935.
    """

    def formula() -> Any:
        from fractions import Fraction

        return Fraction(1, 2)

    return Statement(
        name="softmax-jacobian",
        kind="upper",
        quantity=quantity("softmax_jacobian"),
        formula=formula,
        source=Source(key="popoviciu1935", label="variance inequality"),
        assumptions=(),
        why="v'Jv = Var_p(v) <= (max v - min v)^2 / 4 <= 1/2 for unit v",
        tight=True,
    )


@register
def attention_estimate() -> Statement:
    r"""The paper's excess over 1 of the attention half-layer's Jacobian.

    .. math:: \|\partial x'/\partial x\| \le 1 + \frac{\sigma_O}{\sigma_x} C_{attn}, \qquad C_{attn} = 2\sqrt d \|J^Z\|

    This statement is the branch; `residual` adds the 1.
    Source: takase2025spike, eq. (20); the 2 is |W_O| ~ sigma_O (sqrt d + sqrt d).
    """
    return Statement(
        name="attention-estimate",
        kind="estimate",
        quantity=quantity("attention_branch"),
        formula=lambda sigma_O, sigma_x, d, J_Z: 2 * sqrt(d) * J_Z * sigma_O / sigma_x,
        source=Source(key="takase2025spike", label="eq. (20)"),
        assumptions=("x and the weights are normal (assumption 1)", "W_O is square"),
        why="|W_O| |J^Z| by the Gaussian norm estimate, over the LayerNorm's sigma",
    )


@register
def attention_probability_upper() -> Statement:
    r"""Bound the causal softmax matrix of one head.

    .. math:: \|P\| \le \min(\sqrt T, e^D \|C_T\|), \qquad \|C_T\| < 2

    Holds: causal softmax, D the largest max - min of a row's logits. Attained by equal logits.
    Why: p_tj <= e^D / t entrywise, and rows sum to 1, so |P|^2 <= |P|_1 |P|_inf <= T.
    """
    return Statement(
        name="attention-probability-upper",
        kind="upper",
        quantity=quantity("attention_probability"),
        formula=lambda n_tokens, logit_spread: minimum(sqrt(n_tokens), exp(logit_spread, cesaro_opnorm(n_tokens))),
        source=Source(key="spikecheck", label="entrywise domination; hardy1920 for |C_T| < 2"),
        assumptions=("causal softmax over all earlier tokens",),
        why="p_tj <= e^D / t entrywise; rows sum to 1, so |P|^2 <= |P|_1 |P|_inf <= T",
        tight=True,
        covers={"causal": (True,), "window": (0,)},
    )


@register
def attention_upper_apriori() -> Statement:
    r"""Bound the attention sub-layer's Jacobian from norms of the weights alone.

    .. math:: \|J_u\| \le \|W_O\| \left\{ \sqrt g \|W_V\| \pi + \frac{R^2}{\sqrt{d_h}} \left[
        \max_h(\|W_V^h\| (\|W_Q^h\| + \|b_Q^h\|/R)) \sqrt g \|W_K\| \sqrt\chi
        + \max_h(\|W_V^h\| (\|W_K^h\| + \|b_K^h\|/R)) \|W_Q\| \right] \right\}

    with pi = min(sqrt T, e^D |C_T|), chi = min(T, e^D H_T), R the largest normalised token, g the query heads
    a key head serves; b_K counts with RoPE alone.
    Holds: any weights, any key, value and query bias, causal softmax over all earlier tokens, logits
        q.k/sqrt(d_h), with or without RoPE. D may be any upper bound on the spread of a row's logits.
    Why: dA_t/du_j has a value term, a term through the keys (Cauchy-Schwarz over the softmax row) and one
        through the query; covariances are at most the squared radius; value biases cancel in them, and key
        biases too, unless RoPE turns them by the token.
    """

    def formula(
        opnorm_Q: Any, opnorm_K: Any, opnorm_V: Any, opnorm_O: Any, head_VQ: Any, head_VK: Any,
        R: Any, d_head: Any, kv_group: Any, n_tokens: Any, logit_spread: Any,
    ) -> Any:  # fmt: skip
        probability = minimum(sqrt(n_tokens), exp(logit_spread, cesaro_opnorm(n_tokens)))
        column = minimum(n_tokens, exp(logit_spread, harmonic_number(n_tokens)))
        keys = head_VQ * sqrt(kv_group) * opnorm_K * sqrt(column)
        queries = head_VK * opnorm_Q
        return opnorm_O * (sqrt(kv_group) * opnorm_V * probability + R**2 / sqrt(d_head) * (keys + queries))

    return Statement(
        name="attention-upper-apriori",
        kind="upper",
        quantity=quantity("attention_jacobian"),
        formula=formula,
        source=Source(key="spikecheck", label="block Jacobian and Cauchy-Schwarz"),
        assumptions=(
            "causal softmax over all earlier tokens: no sliding window, no padding mask",
            "logits are q.k / sqrt(d_h): no QK-norm, soft-capping or ALiBi",
            "RoPE or no positions inside attention",
        ),
        why="value, key and query terms of the block Jacobian, each by Cauchy-Schwarz over the softmax row",
        tight=True,
        covers={"causal": (True,), "window": (0,), **PRODUCTS},
    )


@register
def attention_upper_aposteriori() -> Statement:
    r"""Bound the attention sub-layer's Jacobian with its real probabilities.

    .. math:: \|J_u\| \le \|W_O\| \left\{ \sqrt g \|W_V\| \max_h \|P_h\| + \max_j \|B_j\|^{1/2}
        + \max_{h,t} \|\mathrm{Cov}_t(v, k)\| \|W_Q\| / \sqrt{d_h} \right\}

    with B_j = sum over h, t of |Cov_t(v)| p_tj a_tj a_tj', a_tj = W_K^h' R_j' R_t q_t / sqrt(d_h) and keys
    rotated into the frame of the query (without RoPE the rotations are identities).
    Holds: any weights and biases, causal or full softmax.
    Why: |sum_j p_tj (v_j - o_t) (a_tj . du_j)|^2 <= |Cov_t(v)| sum_j p_tj (a_tj . du_j)^2.
    """

    def formula(
        opnorm_Q: Any, opnorm_V: Any, opnorm_O: Any, opnorm_P: Any, key_term: Any, query_term: Any,
        d_head: Any, kv_group: Any,
    ) -> Any:  # fmt: skip
        values = sqrt(kv_group) * opnorm_V * opnorm_P
        return opnorm_O * (values + key_term + query_term * opnorm_Q / sqrt(d_head))

    return Statement(
        name="attention-upper-aposteriori",
        kind="upper",
        quantity=quantity("attention_jacobian"),
        formula=formula,
        source=Source(key="spikecheck", label="block Jacobian and Cauchy-Schwarz"),
        assumptions=("softmax of q.k / sqrt(d_h), RoPE or no positions inside", "probabilities and covariances known"),
        why="value, key and query terms of the block Jacobian, each with the real softmax row",
        tight=True,
        covers=PRODUCTS,
    )


@register
def attention_sharp() -> Statement:
    r"""Predict the attention sub-layer's Jacobian norm at initialisation.

    .. math:: \|J_u\| \approx \|C_T\| \sqrt{c_V c_O} \, e(k/d), \qquad e(1)^2 \to 27/4

    with k = n_heads d_head / g the width of all value heads.
    Holds: near-uniform softmax (logit variance at most 0.2), k from d/4 to 4 d, d >= 256; 3 % there. What two tokens
        do to each other through a query grows like the root of a d / (2 n_heads), which must be below the value term;
        beyond, `attention-simulated`.
    Why: with P near C_T the Jacobian is C_T (x) W_O W_V, where heads that share a value are one; e is the edge of a
        product of two Gaussian matrices, less its Tracy-Widom offset.
    """
    return Statement(
        name="attention-sharp",
        kind="sharp",
        quantity=quantity("attention_jacobian"),
        formula=lambda c_VO, d, n_heads, d_head, kv_group, n_tokens: (
            cesaro_opnorm(n_tokens) * sqrt(c_VO) * heads_opnorm(value_ratio(n_heads, d_head, kv_group, d), d)
        ),
        source=Source(
            key="pennington2017resurrecting", label="free convolution; heads, mixing and finite width derived here"
        ),
        assumptions=("independent normal weights", "logit variance at most 0.2", "d >= 256", *HEADS, *EVEN_ROWS),
        why="|C_T (x) W_O W_V| = |C_T| |W_O W_V|; edge of the free convolution, less its Tracy-Widom offset",
        target=0.03,
        domain={"d": (256.0, math.inf), "logit_variance": (0.0, 0.2), "n_tokens": (1.0, math.inf)},
        relations=HEADS | EVEN_ROWS,
    )


@register
def attention_half_layer_sharp() -> Statement:
    r"""Predict |I + J| of a pre-norm attention half-layer at initialisation, over the whole sequence.

    .. math:: \|I + J\| \approx \left\| I + C_T \otimes \frac{W_O W_V}{s} \right\|

    Holds: near-uniform softmax and heads as for `attention-sharp`, at most 128 tokens, all with one std s;
        `theory.residual_edges.mixing_edge` takes tokens of several.
    Why: at T fixed and large d the norm tends to that of a matrix-valued sum of free elements, the least z at which
        four T x T matrices solve its equations; less its Tracy-Widom offset. |C_T| times the branch of one token,
        which leaves out that C_T is not normal, is up to 0.7 % higher.
    """
    return Statement(
        name="attention-half-layer-sharp",
        kind="sharp",
        quantity=quantity("half_layer_jacobian"),
        formula=lambda c_VO, s, d, n_heads, d_head, kv_group, n_tokens: attention_residual_opnorm(
            c_VO, s, d, value_ratio(n_heads, d_head, kv_group, d), n_tokens
        ),
        source=Source(
            key="haagerup2005application", label="convergence of the norm; equations and finite width derived here"
        ),
        assumptions=(
            "independent normal weights", "logit variance at most 0.2", "d >= 256", "at most 128 tokens of one std",
            *HEADS, *EVEN_ROWS,
        ),
        why="edge of I + C_T (x) W_O W_V / s with matrices of tokens for numbers, less its Tracy-Widom offset",
        target=0.025,
        domain={"d": (256.0, math.inf), "logit_variance": (0.0, 0.2), "n_tokens": (1.0, 128.0)},
        relations=HEADS | EVEN_ROWS,
    )  # fmt: skip
