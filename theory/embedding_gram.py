"""The embedding as a Gram matrix over positions: where the growth recursion starts."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from theory.architecture import Architecture, Norm
from theory.grams import Blocks, Gram, normalised

Array = NDArray[np.float64]

SMALLEST_SQUARE = 1e-100  # of a normaliser; its inverse square still fits a double


def embedding_variance(architecture: Architecture) -> float:
    """Mean square of the residual stream entering the first block, for one token at one position."""
    raw = raw_variance(architecture)
    return raw / (raw + architecture.eps) if architecture.embedding_norm else raw


def raw_variance(architecture: Architecture) -> float:
    """Mean square of an embedding before its norm, if it has one; positions included."""
    raw = (architecture.embedding_multiplier * architecture.stds.embedding) ** 2
    if architecture.positions == "learned":
        raw += architecture.stds.position**2
    return raw + (0.5 if architecture.positions == "sinusoidal" else 0.0)


def require_scale(architecture: Architecture) -> None:
    """Raise a ValueError for embeddings so small, without an eps, that nothing can be normalised by them."""
    raw = raw_variance(architecture)
    if raw + architecture.eps < SMALLEST_SQUARE:
        raise ValueError(
            f"embeddings of std {math.sqrt(raw):g} with eps={architecture.eps:g} leave a normalisation nothing to "
            "divide by; use eps=1e-5, or a larger standard deviation (initializer_range)"
        )


class Stream(NamedTuple):
    """The residual stream as two Gram matrices: of its entries less their mean over coordinates, and of that mean.

    Only a sinusoidal table has a mean to speak of, of up to a tenth of its square: random entries have one of 1/d.
    """

    varied: Gram
    mean: Gram

    def read(self, norm: Norm | None) -> Gram:
        """What a normalisation, or None of any, sees of it: LayerNorm removes the mean."""
        return self.varied if norm == "layernorm" else self.varied + self.mean

    def scaled(self, factor: float) -> Stream:
        """Of the stream times a number whose square is `factor`."""
        return Stream(self.varied * factor, self.mean * factor)

    def normalised(self, norm: Norm, eps: float) -> tuple[Stream, Array]:
        """After a normalisation, and the (B,) root mean squares that it divided by, eps in them."""
        seen, scale = normalised(self.read(norm), eps)
        if norm == "layernorm":
            return Stream(seen, self.mean * 0.0), scale
        return Stream(self.varied.over_outer(scale), self.mean.over_outer(scale)), scale


def embedding_gram(
    architecture: Architecture, blocks: Blocks, tokens: NDArray[np.int64] | None, *, distinct: bool = False
) -> Stream:
    """The stream entering the first block; equal tokens share their row, and random ones do so once in V."""
    a, n = architecture, blocks.sizes.size
    off = equality(tokens, n, 0.0 if distinct else 1 / a.vocab_size)
    raw = (a.embedding_multiplier * a.stds.embedding) ** 2
    gram, mean = Gram(np.full(n, raw), raw * off), Gram(np.zeros(n), np.zeros((n, n)))
    # Positions are added before an embedding norm, so that the norm sees both.
    if a.positions == "learned":
        gram = gram + Gram(np.full(n, a.stds.position**2), np.zeros((n, n)))
    elif a.positions == "sinusoidal":
        table = _sinusoidal_table(a, blocks)
        means = table.mean(axis=1, keepdims=True)
        gram, mean = gram + _products(table - means), _products(means)
    stream = Stream(gram, mean)
    return stream.normalised(a.norm, a.eps)[0] if a.embedding_norm else stream


def equality(ids: NDArray[np.int64] | None, n: int, chance: float) -> Array:
    """(n, n) 1 where two ids are equal; where there are none, the chance that two random ones are."""
    return np.full((n, n), chance) if ids is None else (ids[:, None] == ids[None, :]).astype(np.float64)


def _sinusoidal_table(architecture: Architecture, blocks: Blocks) -> Array:
    """(B, d) the fixed sines and cosines at the middle of a block."""
    half = architecture.d_model // 2
    angles = 10_000.0 ** (-2 * np.arange(half) / architecture.d_model)
    middle = blocks.starts + (blocks.sizes - 1) / 2
    phase = np.outer(middle, angles)
    return np.concatenate([np.sin(phase), np.cos(phase)], axis=1)


def _products(rows: Array) -> Gram:
    """Gram matrix of rows, over their length."""
    off = rows @ rows.T / rows.shape[1]
    return Gram(np.diagonal(off).copy(), off)
