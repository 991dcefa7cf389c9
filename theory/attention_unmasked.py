"""Attention without a mask at initialisation: where logits are small every softmax row is the mean, 11'/T, of norm 1.

Where they are not, the norm is simulated.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from theory.attention import HEADS, value_ratio
from theory.attention_simulation import OWN_KEYS, plain_attention, simulated, simulated_norms
from theory.functions import sqrt
from theory.quantities import quantity
from theory.random_matrix import elementwise, heads_edge, heads_opnorm
from theory.residual_edges import NO_BRANCH, residual_edge
from theory.sources import Source
from theory.statements import Statement, register

FULL = {"causal": (False,), "window": (0,)}
# With fewer tokens, or larger logits, a row is uneven enough to be felt beside the mean.
DOMAIN = {"d": (256.0, math.inf), "logit_variance": (0.0, 0.2), "n_tokens": (16.0, math.inf)}


def spread_out(d: float, n_heads: float, d_head: float, kv_group: float, logit_variance: float) -> bool:
    """Whether what passes through queries and keys, shared by all tokens, is small beside the value term."""
    return logit_variance * d / (2 * n_heads) <= 2 * heads_edge(value_ratio(n_heads, d_head, kv_group, d)).limit


RELATIONS = HEADS | {"a d / (2 n_heads) is at most twice the squared edge of W_O W_V": spread_out}
ASSUMES = ("independent normal weights", "logit variance at most 0.2", "d >= 256", "at least 16 tokens", *RELATIONS)


def full_residual_opnorm(c_VO: Any, s: Any, d: Any, ratio: Any) -> Any:
    """Predicted |I + (11'/T) (x) W_O W_V / s| at width d, elementwise; T does not matter.

    Along the mean of all tokens it is I + W_O W_V / s, a linear feed-forward half-layer of ratio * d units; else I.
    """

    def one(gain: Any, scale: Any, width: Any, inner: Any) -> float:
        if gain == 0:
            return NO_BRANCH.limit
        inner = float(inner)
        strength = math.sqrt(gain / inner) / float(scale)
        return residual_edge(np.ones(1), np.ones(1), inner, strength).opnorm(float(width))

    return elementwise("residual_edge_full_attention", one, c_VO, s, d, ratio)


@register
def attention_full_sharp() -> Statement:
    r"""Predict the Jacobian norm of attention without a mask at initialisation.

    .. math:: \|J_u\| \approx \sqrt{c_V c_O} \, e(k/d), \qquad e(1)^2 \to 27/4

    with k = n_heads d_head / g the width of all value heads.
    Holds: near-uniform softmax (logit variance at most 0.2), k from d/4 to 4 d, d >= 256, at least 16 tokens.
    Why: with P near 11'/T, of norm 1, the Jacobian is (11'/T) (x) W_O W_V. What passes through queries and keys is
        shared by T tokens and small, where a causal row of two tokens is not.
    """
    return Statement(
        name="attention-full-sharp",
        kind="sharp",
        quantity=quantity("attention_jacobian"),
        formula=lambda c_VO, d, n_heads, d_head, kv_group: (
            sqrt(c_VO) * heads_opnorm(value_ratio(n_heads, d_head, kv_group, d), d)
        ),
        source=Source(key="pennington2017resurrecting", label="free convolution; heads and finite width derived here"),
        assumptions=ASSUMES,
        why="|(11'/T) (x) W_O W_V| = |W_O W_V|: edge of the free convolution, less its Tracy-Widom offset",
        target=0.03,
        covers=FULL,
        domain=DOMAIN,
        relations=RELATIONS,
    )


@register
def attention_full_half_layer_sharp() -> Statement:
    r"""Predict |I + J| of a pre-norm half-layer of attention without a mask at initialisation.

    .. math:: \|I + J\| \approx \left\| I + \frac{W_O W_V}{s} \right\|

    Holds: as `attention-full-sharp`, all tokens of one std s.
    Why: along the mean of all tokens the half-layer is I + W_O W_V / s, elsewhere the identity.
    """
    return Statement(
        name="attention-full-half-layer-sharp",
        kind="sharp",
        quantity=quantity("half_layer_jacobian"),
        formula=lambda c_VO, s, d, n_heads, d_head, kv_group: full_residual_opnorm(
            c_VO, s, d, value_ratio(n_heads, d_head, kv_group, d)
        ),
        source=Source(
            key="haagerup2000brown", label="sums of R-diagonal elements; the minimum and its correction derived here"
        ),
        assumptions=(*ASSUMES, "tokens of one std"),
        why="edge of I plus an R-diagonal element, less its Tracy-Widom offset",
        target=0.025,
        covers=FULL,
        domain=DOMAIN,
        relations=RELATIONS,
    )


@register
def attention_full_simulated() -> Statement:
    r"""Predict the mean norm of attention without a mask where softmax rows are uneven.

    .. math:: E \|J_u\|, \qquad \text{mean over 64 draws of weights and tokens}

    Holds: as `attention-simulated`, without its mask.
    Why: it is the definition, evaluated on the law that the configuration states. Where rows are even
        `attention-full-sharp` is a closed form.
    """

    def formula(c_VO: Any, d: Any, n_heads: Any, d_head: Any, n_tokens: Any, logit_variance: Any) -> Any:
        def one(gain: Any, width: Any, heads: Any, width_of_head: Any, length: Any, variance: Any) -> float:
            a = plain_attention(int(width), int(heads), int(width_of_head), int(length), float(variance))
            return math.sqrt(gain) * float(simulated_norms(a, a.context, causal=False).mean())

        return elementwise("simulated_full_attention", one, c_VO, d, n_heads, d_head, n_tokens, logit_variance)

    return simulated(
        "attention-full-simulated", "attention_jacobian", formula,
        drawn="independent normal weights and tokens", positions="no positions inside", relations=OWN_KEYS,
        covers=FULL,
    )  # fmt: skip
