r"""The attention norm at uneven softmax rows, by simulation of the initial ensemble.

Where logits spread, no product of a few matrices has the norm any more: a few early rows, whose tokens move each
other through query and key, stand out from the rest, differently in every draw. The mean over draws is then what a
configuration decides, and it is found by drawing: weights and tokens from the law that the configuration states, the
Jacobian's action written out, its largest singular value by a Krylov method. Nothing is measured on a model.

`simulated_norms` takes any `Architecture`: grouped heads, rotary positions, ALiBi, windows, QK-norm, soft-caps and any
scale; the statement here is of plain attention, those of variants and of half-layers are in
`theory.attention_ensembles`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theory.architecture import Architecture
from theory.arguments import require_tokens
from theory.gram_maps import alibi_slopes
from theory.initialisation import flat
from theory.quantities import quantity
from theory.random_matrix import elementwise
from theory.sources import Source
from theory.statements import Statement, register

Array = NDArray[np.float64]

DRAWS = 64
TOLERANCE = 5e-3  # of the Krylov method; a norm itself is far closer
LARGEST_INPUT = 2**15  # numbers in an input: seconds for all draws together
# Where 64 draws have a mean with a standard error of at most 1.8 per cent.
DRAWN = {
    "d": (64.0, 512.0), "n_tokens": (16.0, math.inf), "n_heads": (4.0, math.inf), "d_head": (16.0, math.inf),
    "logit_variance": (0.0, 4.0),
}  # fmt: skip
OWN_KEYS = {"each query head has its own key head": lambda kv_group: kv_group == 1}


class SimulatedAttention:
    """One draw of a layer's attention on T normal tokens as its norm leaves them; causal unless told.

    Shapes: T tokens, D width, H query heads, G key and value heads, E head width. Weights are normal with the
    architecture's standard deviations, whatever its distribution; biases are zero and gains one.
    """

    def __init__(
        self, architecture: Architecture, n_tokens: int, rng: np.random.Generator, layer: int = 0, *,
        causal: bool = True,
    ) -> None:  # fmt: skip
        a = self.architecture = architecture
        stds = a.layer_stds(layer)
        x = rng.standard_normal((n_tokens, a.d_model))
        self.u = _normalised(a, x, 0.0)[0]
        shapes = {"query": a.n_heads, "key": a.n_kv_heads, "value": a.n_kv_heads, "output": a.n_heads}
        self.weights: dict[str, Array] = {
            name: getattr(stds, name) * rng.standard_normal((heads, a.d_head, a.d_model))
            for name, heads in shapes.items()
        }
        base = a.rope_base_at(layer)
        self.rotation = None
        if base is not None and a.rope_width > 0:
            self.rotation = _rotation(n_tokens, a.rope_width, base, a.rope_slowing(layer))
        self.query, self.query_scale = self._finished(self._project("query", self.u))
        self.key, self.key_scale = self._finished(self._project("key", self.u))
        self.value = self._each_head(self._project("value", self.u))
        # Queries and keys as they meet in a logit, (H, T, E).
        self.left, self.right = self._turned(self.query), self._each_head(self._turned(self.key))
        logits = a.logit_scale * self.left @ self.right.mT
        self.slope = np.full(logits.shape, a.logit_scale)
        if a.attention_softcap:
            capped = np.tanh(logits / a.attention_softcap)
            logits, self.slope = a.attention_softcap * capped, self.slope * (1 - capped**2)
        distance = np.arange(n_tokens)[:, None] - np.arange(n_tokens)
        if a.positions == "alibi":
            slopes = np.array(alibi_slopes(a.n_heads, limit=a.n_heads))[::-1]
            logits = logits - slopes[:, None, None] * distance
        seen = ((distance >= 0) | (not causal)) & (distance < (a.window_at(layer) or n_tokens))
        logits = np.where(seen, logits, -np.inf)
        weights = np.exp(logits - logits.max(axis=2, keepdims=True))
        self.p = weights / weights.sum(axis=2, keepdims=True)

    def forward(self, change: Array) -> Array:
        """J w, flattened like w, (T D,)."""
        w_TD = change.reshape(self.u.shape)
        dq = self._turned(self._through_norm(self._project("query", w_TD), self.query, self.query_scale))
        dk = self._turned(self._through_norm(self._project("key", w_TD), self.key, self.key_scale))
        dv = self._each_head(self._project("value", w_TD))
        dl = dq @ self.right.mT + self.left @ self._each_head(dk).mT
        mixed = self.p @ dv + self._through_softmax(self.slope * dl) @ self.value
        return (mixed @ self.weights["output"]).sum(axis=0).ravel()

    def backward(self, cotangent: Array) -> Array:
        """J' g."""
        g_HTE = cotangent.reshape(self.u.shape) @ self.weights["output"].mT
        dl = self.slope * self._through_softmax(g_HTE @ self.value.mT)
        dq = self._turned(dl @ self.right, back=True)
        dk = self._turned(self._each_group(dl.mT @ self.left), back=True)
        parts = (
            self._through_norm(dq, self.query, self.query_scale) @ self.weights["query"],
            self._through_norm(dk, self.key, self.key_scale) @ self.weights["key"],
            self._each_group(self.p.mT @ g_HTE) @ self.weights["value"],
        )
        return sum((part.sum(axis=0) for part in parts), start=np.zeros(self.u.shape)).ravel()

    def half_layer(self, std: float) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
        """The action of I + J and its transpose, J of the pre-normed branch in a stream whose tokens have this std."""

        def through(change: Array) -> Array:
            return (_norm_jacobian(self.architecture, change.reshape(self.u.shape), self.u) / std).ravel()

        def forward(change: Array) -> Array:
            return change.ravel() + self.forward(through(change))

        def backward(cotangent: Array) -> Array:
            return cotangent.ravel() + through(self.backward(cotangent))

        return forward, backward

    def norm(self, rng: np.random.Generator, std: float | None = None) -> float:
        """|J|, or |I + J| of the half-layer in a stream of this std, from a random start."""
        from scipy.sparse import linalg

        krylov: Any = linalg  # untyped in part
        forward, backward = (self.forward, self.backward) if std is None else self.half_layer(std)
        size = self.u.size
        operator = krylov.LinearOperator((size, size), matvec=forward, rmatvec=backward, dtype=np.float64)
        start = rng.standard_normal(size)
        return float(krylov.svds(operator, k=1, tol=TOLERANCE, v0=start, return_singular_vectors=False)[0])

    def _project(self, name: str, x_TD: Array) -> Array:
        return x_TD @ self.weights[name].mT

    def _each_head(self, x_GTE: Array) -> Array:
        return np.repeat(x_GTE, self.architecture.n_heads // self.architecture.n_kv_heads, axis=0)

    def _each_group(self, x_HTE: Array) -> Array:
        """The transpose of `_each_head`: sums over a group's heads."""
        return x_HTE.reshape(self.architecture.n_kv_heads, -1, *x_HTE.shape[1:]).sum(axis=1)

    def _finished(self, x: Array) -> tuple[Array, Array]:
        """Queries or keys after QK-norm, and what it divided by."""
        a = self.architecture
        if a.qk_norm == "none":
            return x, np.ones(1)
        found, scale = _normalised(a, self._as_normed(x), a.eps)
        return self._as_heads(found), scale

    def _through_norm(self, change: Array, normed: Array, scale: Array) -> Array:
        """The Jacobian of QK-norm, its own transpose: mean (of a LayerNorm) and radius taken out, over the scale."""
        if self.architecture.qk_norm == "none":
            return change
        change, normed = self._as_normed(change), self._as_normed(normed)
        return self._as_heads(_norm_jacobian(self.architecture, change, normed) / scale)

    def _as_normed(self, x_HTE: Array) -> Array:
        """In the rows that QK-norm normalises: a head's, or all heads' of a token."""
        if self.architecture.qk_norm != "full":
            return x_HTE
        return x_HTE.transpose(1, 0, 2).reshape(x_HTE.shape[1], -1)

    def _as_heads(self, x: Array) -> Array:
        if self.architecture.qk_norm != "full":
            return x
        return x.reshape(x.shape[0], -1, self.architecture.d_head).transpose(1, 0, 2)

    def _turned(self, x: Array, *, back: bool = False) -> Array:
        """Rotary positions, the two halves paired; `back` turns the other way."""
        if self.rotation is None:
            return x
        cosine, sine = self.rotation
        half, sine = sine.shape[1], -sine if back else sine
        first, second, still = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return np.concatenate([first * cosine - second * sine, second * cosine + first * sine, still], axis=-1)

    def _through_softmax(self, change_HTT: Array) -> Array:
        """(diag(p) - p p') of each row; its own transpose."""
        moved = self.p * change_HTT
        return moved - self.p * moved.sum(axis=2, keepdims=True)


def _normalised(a: Architecture, x: Array, eps: float) -> tuple[Array, Array]:
    """LayerNorm or RMSNorm of the last axis, and what it divides by."""
    if a.norm == "layernorm":
        x = x - x.mean(axis=-1, keepdims=True)
    scale = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    return x / scale, scale


def _norm_jacobian(a: Architecture, change: Array, normed: Array) -> Array:
    """What a norm's Jacobian, its own transpose, makes of a change, times what the norm divides by."""
    if a.norm == "layernorm":
        change = change - change.mean(axis=-1, keepdims=True)
    return change - normed * np.mean(normed * change, axis=-1, keepdims=True)


def _rotation(n_tokens: int, width: int, base: float, slowing: tuple[float, ...]) -> tuple[Array, Array]:
    """(T, width/2) cosines and sines of rotary positions, each frequency times its slowing."""
    angles = np.outer(np.arange(n_tokens), base ** (-np.arange(0, width, 2) / width) * (slowing or 1.0))
    return np.cos(angles), np.sin(angles)


@lru_cache(maxsize=64)
def simulated_norms(
    architecture: Architecture, n_tokens: int, layer: int = 0, *, std: float | None = None, draws: int = DRAWS,
    causal: bool = True,
) -> Array:  # fmt: skip
    """(draws,) norms of a layer's attention Jacobian in its normalised input, by fixed seeds.

    Args:
        std: of the stream; then the norms are those of the half-layer, |I + J|, behind a norm without eps.

    Raises:
        ValueError: an input is too large to draw many, and the message says how large; or n_tokens is below 1 or
            beyond the learned positions.
    """
    n_tokens = require_tokens(n_tokens, architecture)
    width, size = architecture.d_model, architecture.d_model * n_tokens
    if width < 2 or size > LARGEST_INPUT:
        raise ValueError(
            f"{n_tokens} tokens of width {width} are not simulated; use a width of 2 or more and at most "
            f"{LARGEST_INPUT} numbers"
        )
    norms: list[float] = []
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        norms.append(SimulatedAttention(architecture, n_tokens, rng, layer, causal=causal).norm(rng, std))
    return np.array(norms)


def plain_attention(width: int, heads: int, d_head: int, n_tokens: int, logit_variance: float) -> Architecture:
    """Attention without positions, c_V c_O = 1, logits of this variance."""
    init = replace(
        flat(width**-0.5), query_key=width**-0.5 * logit_variance**0.25, writers=(heads * d_head) ** -0.5
    )  # fmt: skip
    return Architecture(
        name="plain", d_model=width, n_layers=1, n_heads=heads, n_kv_heads=heads, d_head=d_head, d_ffn=1, vocab_size=1,
        context=n_tokens, positions="none", init=init,
    )  # fmt: skip


def simulated(
    name: str, of: str, formula: Callable[..., Any], *, drawn: str, positions: str, draws: int = DRAWS,
    largest: int = LARGEST_INPUT, domain: Mapping[str, tuple[float, float]] | None = None,
    relations: Mapping[str, Callable[..., bool]] | None = None, covers: Mapping[str, tuple[Any, ...]] | None = None,
) -> Statement:  # fmt: skip
    """A sharp statement of the mean norm over draws by fixed seeds.

    Args:
        of: the quantity's name.
        drawn, positions: assumptions in words: what is drawn from which law, and where tokens know their places.
        largest: numbers in an input, above which so many draws are not made.
        domain, relations: what bounds it besides `DRAWN` and the input's size.
        covers: the variants it speaks of, if not of attention with a mask.
    """
    return Statement(
        name=name,
        kind="sharp",
        quantity=quantity(of),
        formula=formula,
        source=Source(key="spikecheck", label=f"simulation of the ensemble, {draws} draws, seeds 0 to {draws - 1}"),
        assumptions=(
            drawn, "logit variance at most 4", positions, "at least 16 tokens and 4 heads of width 16",
            *(relations or {}),
        ),
        why="the exact Jacobian's norm, averaged over draws of the law that the configuration states",
        target=0.03,
        covers=covers or {},
        domain=DRAWN | {"numbers": (0.0, float(largest))} | dict(domain or {}),
        relations=relations or {},
    )  # fmt: skip


@register
def attention_simulated() -> Statement:
    r"""Predict the mean norm of the attention sub-layer's Jacobian where softmax rows are uneven.

    .. math:: E \|J_u\|, \qquad \text{mean over 64 draws of weights and tokens}

    Holds: logit variance up to 4, widths from 64 to 512, at least 16 tokens and 4 heads of width 16, at most 2^15
        numbers in a sequence, independent normal weights and tokens, no positions inside attention, a key for each
        head.
    Why: it is the definition, evaluated on the law that the configuration states. A draw is a few to fourteen per
        cent off the mean there, so that the mean has a standard error below 1.8 %. With fewer tokens or heads, or
        narrow ones, less is averaged in a draw: at one head and two tokens it is half the mean off.
    """

    def formula(c_VO: Any, d: Any, n_heads: Any, d_head: Any, n_tokens: Any, logit_variance: Any) -> Any:
        def one(gain: Any, width: Any, heads: Any, width_of_head: Any, length: Any, variance: Any) -> float:
            a = plain_attention(int(width), int(heads), int(width_of_head), int(length), float(variance))
            return math.sqrt(gain) * float(simulated_norms(a, a.context).mean())

        return elementwise("simulated_attention", one, c_VO, d, n_heads, d_head, n_tokens, logit_variance)

    return simulated(
        "attention-simulated", "attention_jacobian", formula,
        drawn="independent normal weights and tokens", positions="no positions inside", relations=OWN_KEYS,
    )  # fmt: skip
