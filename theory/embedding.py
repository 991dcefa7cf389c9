"""The embedding layer x_0 = norm(mu E[token] + P[place]): the Jacobian of the stream's start in its tables.

It is a selection matrix, one row a token of the sequence, times the identity of width d: what repeats adds up.
A fixed position, sinusoidal say, has no table and no slope. A detached embedding scales every gradient by c.
"""

from __future__ import annotations

from typing import Any

from theory.functions import sqrt
from theory.quantities import quantity
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
