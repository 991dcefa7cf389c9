r"""Attention logits at initialisation: how much they vary and how much gradient they pass.

A logit is l = scale q.k, of variance v = scale^2 d_h c_Q c_K between normalised, uncorrelated tokens. Two things change
what a softmax makes of it:

QK-norm. Normalised vectors of w coordinates (a head's, or all heads' at once: with grouped queries w_q for the queries
and w_k < w_q for the keys) have length sqrt(w). LayerNorm leaves w - 1 of their directions, whence
E[(q.k)^2] = d_h (1 + (d_h - 1)/((w_q - 1)(w_k - 1))) over the coordinates of one head; the norm's backward gain is
`norm_gain`, with n/(n - 2) for the scale of n normal numbers.

Soft-capping, l = c tanh(z/c). What two rows share has the slope once in each, to first order in their covariance; what
a row has with itself the slope's square. Both are taken where the softmax has its weight
(`theory.softmax_moments.capped_moments`).
"""

from __future__ import annotations

from typing import NamedTuple

from theory.architecture import Architecture, Norm
from theory.softmax_moments import Capped, capped_moments


class Logits(NamedTuple):
    """variance: between normalised, uncorrelated tokens. queries, keys: gains of the way back, over `variance`.

    capped: what a soft-cap makes of them; None without one.
    """

    variance: float
    queries: float
    keys: float
    capped: Capped | None = None


def attention_logits(architecture: Architecture, layer: int = 0) -> Logits:
    """The logits of one layer between normalised, uncorrelated tokens."""
    a, stds = architecture, architecture.layer_stds(layer)
    products, gains = (a.d_model * stds.query * stds.key) ** 2, (1.0, 1.0)
    if a.qk_norm != "none":
        query, key = normalised_widths(a)
        shared = (a.d_head - 1) / max((query - 1) * (key - 1), 1) if a.norm == "layernorm" else 0.0
        products, gains = 1.0 + shared, (norm_gain(a.norm, query), norm_gain(a.norm, key))
    variance = a.logit_scale**2 * a.d_head * products
    if a.attention_softcap == 0:
        return Logits(variance, *gains)
    capped = capped_moments(variance, a.attention_softcap)
    return Logits(capped.variance, *gains, capped)


def normalised_widths(architecture: Architecture) -> tuple[int, int]:
    """Coordinates that QK-norm normalises at once, of a query and of a key."""
    a = architecture
    return (a.d_head, a.d_head) if a.qk_norm == "head" else (a.n_heads * a.d_head, a.n_kv_heads * a.d_head)


def norm_gain(norm: Norm, width: int, *, fixed_scale: bool = False) -> float:
    """Backward variance gain of a normalisation of `width` numbers, times their mean square.

    The Jacobian projects out 2 directions (LayerNorm: mean and radius) or 1 (RMSNorm). The vector's own scale
    fluctuates at finite width, and E[1/s^2] exceeds 1/E[s^2]: together (d-2)/(d-3) and (d-1)/(d-2), exact for normal
    numbers; (d-2)/d and (d-1)/d where a norm before has fixed the scale.
    """
    left = max(width - lost_directions(norm), 0)
    return left / (width if fixed_scale else max(left - 1, 1))


def lost_directions(norm: Norm) -> int:
    """How many directions the Jacobian of a norm takes out."""
    return 2 if norm == "layernorm" else 1
