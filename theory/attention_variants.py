"""Rigorous bounds on attention of every kind in use.

All of them see one thing: a softmax of logits l_tj that depend on the query's token u_t and on the key's token
u_j. With a_tj = dl_tj/du_j and b_tj = dl_tj/du_t, the block Jacobian of any such attention is

    dA_t/du_j = sum_h W_O^h { p_tj [W_V^h + (v_j - o_t) a_tj'] + delta_tj sum_i p_ti (v_i - o_t) b_ti' },

whether the logits are turned (RoPE), shifted (ALiBi), capped, normalised (QK-norm) or masked (a window).
"""

from __future__ import annotations

from typing import Any

from theory.functions import exp, maximum, minimum, sqrt
from theory.quantities import quantity
from theory.random_matrix import cesaro_opnorm, harmonic_number
from theory.sources import Source
from theory.statements import Statement, register

CAUSAL = {"causal": (True,)}
FULL = {"causal": (False,), "window": (0,)}
_OWN = Source(key="spikecheck", label="block Jacobian and Cauchy-Schwarz")


def _windowed(n_tokens: Any, n_seen: Any, logit_spread: Any) -> Any:
    """Bound on a causal softmax matrix whose rows see at most n_seen tokens."""
    beyond = minimum(1, maximum(0, n_tokens - n_seen))
    return minimum(sqrt(n_seen), exp(logit_spread, sqrt(cesaro_opnorm(n_seen) ** 2 + beyond)))


def _unmasked(n_tokens: Any, logit_spread: Any) -> Any:
    """Bound on a softmax matrix whose rows see every token."""
    return minimum(sqrt(n_tokens), exp(logit_spread / 2))


def _through_logits(heads_OV: Any, R: Any, key_slope: Any, query_slope: Any, rows: Any) -> Any:
    """Bound on what passes through the keys and the queries; rows: of the sum of a slope's variances."""
    return heads_OV * R * (key_slope * sqrt(rows) + query_slope)


@register
def attention_window_upper() -> Statement:
    r"""Bound the causal softmax matrix of one head that sees its last w tokens.

    .. math:: \|P\| \le \min\left(\sqrt w, e^D \sqrt{\|C_w\|^2 + [T > w]}\right)

    Holds: causal softmax, each row over its last w tokens (w = T without a window), D the largest max - min of
        the logits in a row, whatever they are made of. Attained by equal logits without a window.
    Why: entrywise P <= e^D times the windowed running mean, whose first w rows are C_w and whose others, a
        moving average, have norm at most 1; and rows sum to 1 while columns have at most w entries.
    """
    return Statement(
        name="attention-window-upper",
        kind="upper",
        quantity=quantity("attention_probability"),
        formula=_windowed,
        source=Source(key="spikecheck", label="entrywise domination; hardy1920 for |C_w| < 2"),
        assumptions=("causal softmax over the last w tokens",),
        why="p_tj <= e^D / min(t, w); the first w rows are C_w, the others a moving average of norm at most 1",
        tight=True,
        covers=CAUSAL,
    )


@register
def attention_full_probability_upper() -> Statement:
    r"""Bound the softmax matrix of one head that sees every token.

    .. math:: \|P\| \le \min(\sqrt T, e^{D/2})

    Holds: no mask, D the largest max - min of a row's logits. Attained by equal logits.
    Why: rows sum to 1, columns to at most min(T, e^D), and |P|^2 <= |P|_1 |P|_inf.
    """
    return Statement(
        name="attention-full-probability-upper",
        kind="upper",
        quantity=quantity("attention_probability"),
        formula=_unmasked,
        source=Source(key="spikecheck", label="row and column sums"),
        assumptions=("softmax over all tokens",),
        why="p_tj <= e^D / T, so that columns sum to at most e^D; rows sum to 1",
        tight=True,
        covers=FULL,
    )


@register
def attention_general_upper() -> Statement:
    r"""Bound the Jacobian of causal attention of any kind from norms of the weights alone.

    .. math:: \|J_u\| \le \|W_O\| \|\tilde W_V\| \pi + \|[W_O^h W_V^h]_h\| R \left( \kappa_K \sqrt\chi
        + \kappa_Q \right), \qquad \chi = \min\left(e^D H_w, \tfrac12 \min(T - 1, w)\right)

    with pi the bound of `attention-window-upper`, R the largest normalised token, and kappa_K, kappa_Q bounds on
    the slopes of all heads' logits: sum_h (a_tj^h . x)^2 <= kappa_K^2 |x|^2 at every t and j, and
    sum_h Var_p(b_tj^h . x) <= kappa_Q^2 |x|^2 over every softmax row.
    Holds: any weights and biases, any input of tokens at most R long, any positions, window, QK-norm and cap.
    Why: by Cauchy-Schwarz |sum_j p_j (u_j - mean) f_j| <= R sd_p(f) for f_j = a_tj . du_j. Summed over rows,
        Var_p(f) is at most half of sum_j f_j^2 (Popoviciu), and at most sum_j p_j f_j^2.
    How loose: at d = 64, T = 16, four heads and the paper's initialisation it gives about 50 where normal tokens have
        1.5; but some normalised tokens have more than 18, and no bound from the weights alone can be below that.
    """

    def formula(
        opnorm_O: Any, opnorm_VH: Any, heads_OV: Any, R: Any, key_slope: Any, query_slope: Any,
        n_tokens: Any, n_seen: Any, logit_spread: Any,
    ) -> Any:  # fmt: skip
        rows = minimum(exp(logit_spread, harmonic_number(n_seen)), minimum(n_tokens - 1, n_seen) / 2)
        values = opnorm_O * opnorm_VH * _windowed(n_tokens, n_seen, logit_spread)
        return values + _through_logits(heads_OV, R, key_slope, query_slope, rows)

    return Statement(
        name="attention-general-upper",
        kind="upper",
        quantity=quantity("attention_jacobian"),
        formula=formula,
        source=_OWN,
        assumptions=("causal softmax over the last w tokens",),
        why="Cauchy-Schwarz under each softmax row; a row's variance is at most half its sum of squares",
        tight=True,
        covers=CAUSAL,
    )


@register
def attention_full_upper() -> Statement:
    r"""Bound the Jacobian of attention without a mask from norms of the weights alone.

    .. math:: \|J_u\| \le \|W_O\| \|\tilde W_V\| \min(\sqrt T, e^{D/2}) + \|[W_O^h W_V^h]_h\| R \left(
        \kappa_K \sqrt{\min(e^D, T/2)} + \kappa_Q \right)

    Holds: as `attention-general-upper`, every row over every token.
    Why: as there; the columns of P sum to at most e^D.
    """

    def formula(
        opnorm_O: Any, opnorm_VH: Any, heads_OV: Any, R: Any, key_slope: Any, query_slope: Any,
        n_tokens: Any, logit_spread: Any,
    ) -> Any:  # fmt: skip
        rows = minimum(exp(logit_spread), n_tokens / 2)
        values = opnorm_O * opnorm_VH * _unmasked(n_tokens, logit_spread)
        return values + _through_logits(heads_OV, R, key_slope, query_slope, rows)

    return Statement(
        name="attention-full-upper",
        kind="upper",
        quantity=quantity("attention_jacobian"),
        formula=formula,
        source=_OWN,
        assumptions=("softmax over all tokens",),
        why="as attention-general-upper, with the row and column sums of an unmasked softmax",
        tight=True,
        covers=FULL,
    )


@register
def attention_blocks_upper() -> Statement:
    r"""Bound the Jacobian of attention of any kind with its real probabilities and logit slopes.

    .. math:: \|J_u\| \le \min\left(\|W_O \tilde W_V\| \|\bar P\| + \|W_O\| \|\tilde W_V\| \max_h \|P_h - \bar P\|,
        \|W_O\| \|\tilde W_V\| \max_h \|P_h\|\right) + \|(\|K_{tj}\|)_{tj}\| + \max_t \|Q_t\|

    with P-bar the mean over heads, K_tj = sum_h p_tj W_O^h (v_j - o_t) a_tj' and
    Q_t = sum_h W_O^h sum_j p_tj (v_j - o_t) b_tj'.
    Holds: any weights, biases, input and mask. Attained by one token, whatever its weights.
    Why: what heads share is a Kronecker product P-bar (x) W_O W_V, and a block matrix has at most the norm of the
        matrix of its blocks' norms. It needs T^2 products of h vectors, and no matrix of T d rows.
    """

    def formula(
        opnorm_OV: Any, opnorm_P_mean: Any, opnorm_O: Any, opnorm_VH: Any, P_deviation: Any, opnorm_P: Any,
        key_blocks: Any, query_blocks: Any,
    ) -> Any:  # fmt: skip
        apart = opnorm_O * opnorm_VH
        values = minimum(opnorm_OV * opnorm_P_mean + apart * P_deviation, apart * opnorm_P)
        return values + key_blocks + query_blocks

    return Statement(
        name="attention-blocks-upper",
        kind="upper",
        quantity=quantity("attention_jacobian"),
        formula=formula,
        source=Source(key="spikecheck", label="block Jacobian and the norms of its blocks"),
        assumptions=("softmax attention", "probabilities and logit slopes known"),
        why="P-bar (x) W_O W_V for what heads share; a block matrix is bounded by the matrix of its blocks' norms",
        tight=True,
    )
