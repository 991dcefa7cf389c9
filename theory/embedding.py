"""The embedding layer x_0 = norm(mu E[token] + P[place]): the Jacobian of the stream's start in its tables.

It is a selection matrix, one row a token of the sequence, times the identity of width d: what repeats adds up.
A fixed position, sinusoidal say, has no table and no slope. A detached embedding scales every gradient by c.
The paper states no estimate of it: its bounds end at the first block, and take the std of the embedding's output as
given: sqrt(2/(5d)), times sqrt(d), or 1 behind a norm. The estimates here are in its manner, of a norm its own 1/sigma.
What these treatments make of growth is `theory.growth`'s.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from theory.functions import sqrt
from theory.quantities import quantity
from theory.random_matrix import elementwise
from theory.sources import Source
from theory.statements import Statement, register

_OWN = Source(key="spikecheck", label="selection matrices")


@register
def embedding_upper_apriori() -> Statement:
    r"""Bound the embedding layer's Jacobian from the configuration alone.

    .. math:: \|J_E\| \le c \, \kappa_E \sqrt{\mu^2 T + \ell}

    with l = 1 if positions have a table, else 0, and kappa_E the steepest that the embedding's norm can be,
    max|gamma| / sqrt(eps), or 1 without one.
    Holds: any tokens. Attained by a sequence of one token repeated, without a norm.
    Why: J = N [mu S, I] (x) I with S the selection of tokens: SS' has the counts for eigenvalues, at most T.
    """

    def formula(embedding_gradient: Any, norm_slope: Any, multiplier: Any, n_tokens: Any, position_rows: Any) -> Any:
        return embedding_gradient * norm_slope * sqrt(multiplier**2 * n_tokens + position_rows)

    return Statement(
        name="embedding-upper-apriori",
        kind="upper",
        quantity=quantity("embedding_jacobian"),
        formula=formula,
        source=_OWN,
        assumptions=("tables of their own: a tied head adds its own gradient", "eps > 0 with an embedding norm"),
        why="a selection matrix has the root of its largest count for norm, and no count is above T",
        tight=True,
    )


@register
def embedding_upper_aposteriori() -> Statement:
    r"""Bound the embedding layer's Jacobian for a given sequence.

    .. math:: \|J_E\| \le c \sqrt{\mu^2 \max_v \sum_{t : v_t = v} \kappa_t^2 + \ell \max_t \kappa_t^2}

    with kappa_t = max|gamma| / s_t where the embedding is normalised, 1 where not; then the first sum is the largest
    count of a token, and the bound is the norm itself.
    Why: JJ' = N (mu^2 SS' + l I) N', and the first part is block-diagonal over the vocabulary.
    """

    def formula(embedding_gradient: Any, multiplier: Any, token_weight: Any, position_weight: Any) -> Any:
        return embedding_gradient * sqrt(multiplier**2 * token_weight + position_weight)

    return Statement(
        name="embedding-upper-aposteriori",
        kind="upper",
        quantity=quantity("embedding_jacobian"),
        formula=formula,
        source=_OWN,
        assumptions=("tables of their own: a tied head adds its own gradient",),
        why="rows of a token that repeats add up; a position is read once",
        tight=True,
    )


@register
def embedding_estimate() -> Statement:
    r"""Estimate the embedding layer's Jacobian without a norm, of a sequence that repeats no token.

    .. math:: \|J_E\| \sim c \sqrt{\mu^2 + \ell}

    Holds: few tokens of a large vocabulary. A token that occurs n times makes it c sqrt(mu^2 n + ell), which is why
        this is no bound: texts repeat their words, and the most frequent one decides.
    Why: `embedding-upper-aposteriori` is the norm itself; its largest count is taken as 1.
    """

    def formula(embedding_gradient: Any, multiplier: Any, position_rows: Any) -> Any:
        return embedding_gradient * sqrt(multiplier**2 + position_rows)

    return Statement(
        name="embedding-estimate",
        kind="estimate",
        quantity=quantity("embedding_jacobian"),
        formula=formula,
        source=_OWN,
        assumptions=("tables of their own", "no token twice", "no embedding norm"),
        why="a selection of rows that repeats none has orthogonal rows, each mu long, and a position's beside it",
        covers={"embedding_norm": (False,)},
    )


@register
def embedding_normalised_estimate() -> Statement:
    r"""Estimate the Jacobian of a normalised embedding, by the paper's estimate of a norm's Jacobian.

    .. math:: \|J_E\| \sim c \sqrt{\mu^2 + \ell} / \sigma_e

    with sigma_e the std of what the norm reads, as in `embedding-sharp`.
    Holds: unit gain, no token twice, sigma_e^2 far above eps. Too small by what the steepest of T tokens is above the
        others: 14 % at d = 256 and 1024 tokens, by `embedding-sharp`.
    Why: |dLN/dx| is 1/s_t, which the paper takes as 1/sigma for every token.
    """

    def formula(embedding_gradient: Any, multiplier: Any, position_rows: Any, sigma_e: Any) -> Any:
        return embedding_gradient * sqrt(multiplier**2 + position_rows) / sigma_e

    return Statement(
        name="embedding-normalised-estimate",
        kind="estimate",
        quantity=quantity("embedding_jacobian"),
        formula=formula,
        source=Source(key="takase2025spike", label="the Jacobian of LayerNorm as 1/sigma, here of the embedding's"),
        assumptions=("tables of their own", "no token twice", "unit gain", "eps left out"),
        why="the norm's Jacobian is 1/s at every token, and s is taken as the std of the tables",
        covers={"embedding_norm": (True,)},
    )


@register
def tied_upper() -> Statement:
    r"""Bound the Jacobian of the logits in a token table that is the head as well.

    .. math:: \|J_T\| \le \|Y\| + c \mu \sqrt{\max_v \sum_{t : v_t = v} \kappa_t^2} \; J_Y \|E\|

    with Y the head's input over the sequence and J_Y the norm, or a bound on it, of its Jacobian in the stream's start.
    Holds: any table, tokens and network between; logits Y E'. Attained by one token of a vocabulary of one.
    Why: d(Y E') = Y dE' + dY E'; the first is |Y| dE at most, the second |dY| |E|, and dY is through the embedding.
    """

    def formula(
        embedding_gradient: Any, multiplier: Any, token_weight: Any, head_input: Any, head_slope: Any, opnorm_E: Any
    ) -> Any:
        through = embedding_gradient * multiplier * sqrt(token_weight) * head_slope * opnorm_E
        return head_input + through

    return Statement(
        name="tied-upper",
        kind="upper",
        quantity=quantity("tied_jacobian"),
        formula=formula,
        source=Source(key="spikecheck", label="product rule of the table's two uses"),
        assumptions=("logits Y E', not multiplied and not capped", "a detached embedding's factor on its path alone"),
        why="the product rule and the triangle inequality; each path is sub-multiplicative",
        tight=True,
    )


@register
def embedding_sharp() -> Statement:
    r"""Predict the Jacobian norm of a normalised embedding of distinct tokens, at initialisation.

    .. math:: \|J_E\| \approx c \sqrt{\mu^2 + \ell} \; E\left[ (\sigma_e^2 \chi_{min} / d + \epsilon)^{-1/2} \right]

    with chi_min the smallest of T chi-squares of d - 1 degrees, sigma_e the std of what the norm reads.
    Holds: LayerNorm with unit gain, d >= 64, normal tables, no token twice. A draw is within 2 % of the mean.
    Why: no row is read twice, so the sequence's norm is the steepest token's, 1/s_t, and d s_t^2 / sigma_e^2 is a
        chi-square. Without a norm `embedding-upper-aposteriori` is the norm itself.
    """

    def formula(
        embedding_gradient: Any, multiplier: Any, position_rows: Any, sigma_e: Any, eps: Any, d: Any, n_tokens: Any
    ) -> Any:
        return embedding_gradient * sqrt(multiplier**2 + position_rows) * steepest_norm(sigma_e, eps, d, n_tokens)

    return Statement(
        name="embedding-sharp",
        kind="sharp",
        quantity=quantity("embedding_jacobian"),
        formula=formula,
        source=Source(key="spikecheck", label="smallest of independent chi-squares"),
        assumptions=("LayerNorm with unit gain", "normal tables of their own", "no token twice", "d >= 64"),
        why="the steepest of T independent tokens, each with slope 1/s_t",
        target=0.02,
        covers={"embedding_norm": (True,), "norm": ("layernorm",)},
        domain={"d": (64.0, math.inf), "largest_count": (1.0, 1.0)},
    )


def steepest_norm(sigma: Any, eps: Any, d: Any, n_tokens: Any) -> Any:
    """Mean over draws of the largest 1/s of T normal tokens of width d and this std, elementwise."""

    def one(spread: Any, floor: Any, width: Any, length: Any) -> float:
        from scipy.special import gammaincinv

        # The smallest of T has the level 1 - (1 - U)^(1/T); 256 midpoints of U leave 1e-4 of the mean.
        levels = -np.expm1(np.log1p(-(np.arange(256) + 0.5) / 256) / length)
        smallest = 2 * gammaincinv((width - 1) / 2, levels)
        return float(np.mean((spread**2 * smallest / width + floor) ** -0.5))

    return elementwise("steepest_norm", one, sigma, eps, d, n_tokens)
