"""Rigorous chains about attention of every kind: one Jacobian for any logits, by its slopes."""

from __future__ import annotations

from typing import Any

import sympy as sp  # pyright: ignore[reportMissingTypeStubs]

from theory.derivation import Derivation, Step, register_derivation, substitution
from theory.derivations_attention_samples import (
    P_deviation,
    R,
    T,
    W_Oh,
    W_Vh,
    a_tj,
    across_keys,
    across_keys_full,
    across_queries,
    any_attention,
    any_full,
    averaging,
    averaging_full,
    block,
    by_key,
    by_query,
    by_value,
    chi,
    cov_vb,
    delta,
    first_alone,
    h,
    heads_OV,
    key_blocks,
    key_slope,
    means,
    o_t,
    one_aligned,
    one_token,
    opnorm_O,
    opnorm_OV,
    opnorm_P,
    opnorm_P_mean,
    opnorm_VH,
    p_tj,
    query_blocks,
    query_slope,
    spread,
    v_j,
    w,
    whole,
)
from theory.derivations_expressions import Norm, SumOver, Transposed
from theory.random_matrix import cesaro_opnorm
from theory.sources import Source
from theory.statements import find

_sp: Any = sp

OWN = Source(key="spikecheck", label="block Jacobian and Cauchy-Schwarz")
SUMS = Source(key="spikecheck", label="row and column sums")
MEANS = Source(key="spikecheck", label="entrywise domination; hardy1920 for |C_w| < 2")


def _means_step() -> Step:
    return Step(
        left=opnorm_P,
        right=_sp.exp(spread) * means,
        relation="<=",
        rule="entrywise domination",
        source=MEANS,
        explanation="p_tj <= e^D / min(t, w), the windowed running mean's entry, wherever the row sees at all.",
        sample=any_attention,
        tight=averaging,
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
        sample=any_attention,
        tight=averaging,
    )
    sums = Step(
        left=opnorm_P,
        right=_sp.sqrt(w),
        relation="<=",
        rule="row and column sums",
        source=SUMS,
        explanation="|P|^2 <= |P|_1 |P|_inf: rows sum to 1, and at most w rows see a column.",
        sample=any_attention,
        tight=first_alone,
    )
    smaller = Step(
        left=opnorm_P,
        right=find("attention-window-upper").expression,
        relation="<=",
        rule="the smaller of two bounds",
        source=MEANS,
        explanation="Each holds, so both do.",
        sample=any_attention,
        tight=averaging,
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
        sample=any_full,
        tight=averaging_full,
    )
    sums = Step(
        left=opnorm_P,
        right=_sp.sqrt(chi),
        relation="<=",
        rule="row and column sums",
        source=SUMS,
        explanation="|P|^2 <= |P|_1 |P|_inf, and rows sum to 1.",
        sample=any_full,
        tight=averaging_full,
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
        sample=any_full,
        tight=averaging_full,
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
        tight=one_token,
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
        tight=one_aligned,
    )


def _general(
    name: str, title: str, rows: Any, probability_bound: Any, sample: Any, flat: Any, across: Any, mask: str
) -> Derivation:
    blocks, parts, triangle = _jacobian_steps(sample)
    value = _value_step(sample)
    probability = Step(
        left=opnorm_P,
        right=probability_bound,
        relation="<=",
        rule="row and column sums, entrywise domination",
        source=SUMS,
        explanation="The bound on the softmax matrix.",
        sample=sample,
        tight=flat,
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
        tight=across,
    )
    queries = Step(
        left=Norm(by_query),
        right=heads_OV * R * query_slope,
        relation="<=",
        rule="Cauchy-Schwarz",
        source=OWN,
        explanation="Only u_t moves its own logits, so the blocks are diagonal in t: |Cov(u, f)| <= R sd(f).",
        sample=sample,
        tight=across_queries,
    )
    conclusion = substitution(
        *(triangle, value, probability, keys, queries),
        source=OWN,
        explanation="For any logits whose slopes are known.",
        sample=sample,
        tight=one_aligned,
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
        any_attention,
        averaging,
        across_keys,
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
        any_full,
        averaging_full,
        across_keys_full,
        "softmax over all tokens",
    )


@register_derivation
def attention_blocks_upper() -> Derivation:
    """Attention of any kind, from its softmax matrices and logit slopes."""
    blocks, parts, triangle = _jacobian_steps(any_attention)
    values = Step(
        left=Norm(by_value),
        right=_sp.Min(opnorm_OV * opnorm_P_mean + opnorm_O * opnorm_VH * P_deviation, opnorm_O * opnorm_VH * opnorm_P),
        relation="<=",
        rule="Kronecker products",
        source=OWN,
        explanation="The heads' mean gives P-bar x W_O W_V, what is left diag_h(P_h - P-bar) between W_O and W_V.",
        sample=any_attention,
        tight=one_token,
    )
    keys = Step(
        left=Norm(by_key),
        right=key_blocks,
        relation="<=",
        rule="norm of block norms",
        source=OWN,
        explanation="|sum_j K_tj w_j| <= sum_j |K_tj| |w_j| for every t.",
        sample=any_attention,
        tight=across_keys,
    )
    queries = Step(
        left=Norm(by_query),
        right=query_blocks,
        relation="=",
        rule="block-diagonal matrix",
        source=OWN,
        explanation="Only u_t moves its own logits.",
        sample=any_attention,
    )
    conclusion = substitution(
        *(triangle, values, keys, queries),
        source=OWN,
        explanation="Attained by one token, whatever the weights.",
        sample=any_attention,
        tight=one_token,
    )
    return Derivation(
        name="attention-blocks-upper",
        title="Attention of any kind, a true bound from the norms of its blocks",
        steps=(blocks, parts, triangle, values, keys, queries, conclusion),
        statement="attention-blocks-upper",
        assumptions=("softmax attention",),
    )
