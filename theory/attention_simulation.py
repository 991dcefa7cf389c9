r"""The attention norm at uneven softmax rows, by simulation of the initial ensemble.

Where logits spread, no product of a few matrices has the norm any more: a few early rows, whose tokens move each
other through query and key, stand out from the rest, differently in every draw. The mean over draws is then what a
configuration decides, and it is found by drawing: weights and tokens from the law that the configuration states, the
Jacobian's action written out, its largest singular value by a Krylov method. Nothing is measured on a model.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theory.quantities import quantity
from theory.random_matrix import elementwise
from theory.sources import Source
from theory.statements import Statement, register

Array = NDArray[np.float64]

DRAWS = 64
TOLERANCE = 5e-3  # of the Krylov method; a norm itself is far closer
LARGEST_INPUT = 2**15  # numbers in an input: seconds for all draws together


class _Attention:
    """One draw of causal attention on T normal tokens, normalised by a LayerNorm.

    Shapes: T tokens, D width, H heads, E head width. A logit between two tokens has variance a; c_V = c_O = 1.
    """

    def __init__(
        self, rng: np.random.Generator, width: int, heads: int, d_head: int, length: int, logit_variance: float
    ) -> None:
        x = rng.standard_normal((length, width))
        x -= x.mean(axis=1, keepdims=True)
        u = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True))
        shape = (heads, d_head, width)
        self.W_Q, self.W_K, self.W_V = rng.standard_normal((3, *shape)) / math.sqrt(width)
        self.W_O = rng.standard_normal(shape) / math.sqrt(heads * d_head)
        scale = math.sqrt(logit_variance / d_head)
        self.W_Q = scale * self.W_Q  # so that a logit is a plain product of a query and a key
        self.q, self.k, self.v = (self._project(W, u) for W in (self.W_Q, self.W_K, self.W_V))
        logits = np.where(np.tri(length, dtype=bool), self.q @ self.k.mT, -np.inf)
        weights = np.exp(logits - logits.max(axis=2, keepdims=True))
        self.p = weights / weights.sum(axis=2, keepdims=True)

    @staticmethod
    def _project(W_HED: Array, x_TD: Array) -> Array:
        return x_TD @ W_HED.mT

    def _through_softmax(self, change_HTT: Array) -> Array:
        """(diag(p) - p p') of each row; its own transpose."""
        moved = self.p * change_HTT
        return moved - self.p * moved.sum(axis=2, keepdims=True)

    def forward(self, change: Array) -> Array:
        """J w, flattened like w, (T D,)."""
        w_TD = change.reshape(-1, self.W_V.shape[2])
        dq, dk, dv = (self._project(W, w_TD) for W in (self.W_Q, self.W_K, self.W_V))
        dp = self._through_softmax(dq @ self.k.mT + self.q @ dk.mT)
        return ((self.p @ dv + dp @ self.v) @ self.W_O).sum(axis=0).ravel()

    def backward(self, cotangent: Array) -> Array:
        """J' g."""
        g_HTE = self._project(self.W_O, cotangent.reshape(-1, self.W_V.shape[2]))
        dl = self._through_softmax(g_HTE @ self.v.mT)
        parts = self.p.mT @ g_HTE @ self.W_V + dl @ self.k @ self.W_Q + dl.mT @ self.q @ self.W_K
        return parts.sum(axis=0).ravel()


@lru_cache(maxsize=64)
def simulated_norms(width: int, heads: int, d_head: int, length: int, logit_variance: float) -> Array:
    """(DRAWS,) norms of attention's Jacobian for c_V c_O = 1, by a fixed seed.

    Raises:
        ValueError: an input is too large to draw many; the message says how large.
    """
    from scipy.sparse import linalg

    krylov: Any = linalg  # untyped in part
    size = width * length
    if width < 2 or size > LARGEST_INPUT:
        raise ValueError(
            f"{length} tokens of width {width} are not simulated; use a width of 2 or more and at most "
            f"{LARGEST_INPUT} numbers"
        )
    norms: list[float] = []
    for seed in range(DRAWS):
        rng = np.random.default_rng(seed)
        drawn = _Attention(rng, width, heads, d_head, length, logit_variance)
        operator = krylov.LinearOperator((size, size), matvec=drawn.forward, rmatvec=drawn.backward, dtype=np.float64)
        start = rng.standard_normal(size)
        found = krylov.svds(operator, k=1, tol=TOLERANCE, v0=start, return_singular_vectors=False)
        norms.append(float(found[0]))
    return np.array(norms)


@register
def attention_simulated() -> Statement:
    r"""Predict the mean norm of the attention sub-layer's Jacobian where softmax rows are uneven.

    .. math:: E \|J_u\|, \qquad \text{mean over 64 draws of weights and tokens}

    Holds: logit variance up to 4, widths from 64 to 512, at most 2^15 numbers in a sequence, independent normal
        weights and tokens, no positions inside attention, a key for each head.
    Why: it is the definition, evaluated on the law that the configuration states. A draw is a few to twelve per cent
        off the mean, more for few tokens: the mean is known to 1.5 %.
    """

    def formula(c_VO: Any, d: Any, n_heads: Any, d_head: Any, n_tokens: Any, logit_variance: Any) -> Any:
        def one(gain: Any, *sizes_and_variance: Any) -> float:
            *sizes, variance = sizes_and_variance
            return math.sqrt(gain) * float(simulated_norms(*map(int, sizes), float(variance)).mean())

        return elementwise("simulated_attention", one, c_VO, d, n_heads, d_head, n_tokens, logit_variance)

    return Statement(
        name="attention-simulated",
        kind="sharp",
        quantity=quantity("attention_jacobian"),
        formula=formula,
        source=Source(key="spikecheck", label=f"simulation of the ensemble, {DRAWS} draws, seeds 0 to {DRAWS - 1}"),
        assumptions=("independent normal weights and tokens", "logit variance at most 4", "no positions inside"),
        why="the exact Jacobian's norm, averaged over draws of the law that the configuration states",
        target=0.03,
        domain={"d": (64.0, 512.0), "numbers": (0.0, float(LARGEST_INPUT)), "logit_variance": (0.0, 4.0)},
    )
