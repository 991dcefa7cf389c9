"""Matrices over the positions of a sequence, kept in blocks, and what averaging over earlier tokens does to them.

A T x T matrix is kept as one value for each pair of blocks of tokens and one for each token's own entry. With one
token a block this is the matrix itself; with growing blocks T = 2048 is as cheap as T = 150.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from theory.arguments import require_tokens

Array = NDArray[np.float64]

EXACT_POSITIONS = 160  # below this length every position is its own block
SINGLES = 24  # positions at the start that are blocks of one at any length
GROWTH = 0.04  # size of a later block over its start
SAMPLES = 16  # positions of a block whose averages are averaged


class Gram(NamedTuple):
    """A T x T matrix, constant over blocks except on its diagonal.

    diag: (B,) entry of a token with itself. off: (B, B) entry of two different tokens; within a block of
    one token `off` has no meaning and no weight.
    """

    diag: Array
    off: Array

    @property
    def mT(self) -> Gram:
        return Gram(self.diag, self.off.T)

    def __add__(self, other: Gram) -> Gram:  # type: ignore[override]
        return Gram(self.diag + other.diag, self.off + other.off)

    def __sub__(self, other: Gram) -> Gram:
        return Gram(self.diag - other.diag, self.off - other.off)

    def __mul__(self, other: Gram | float) -> Gram:  # type: ignore[override]
        """Entrywise product, or a scalar multiple."""
        if isinstance(other, Gram):
            return Gram(self.diag * other.diag, self.off * other.off)
        return Gram(self.diag * other, self.off * other)

    def over_outer(self, scale: Array) -> Gram:
        """Divide entrywise by scale_t scale_t'."""
        return Gram(self.diag / scale**2, self.off / np.outer(scale, scale))

    def outer(self, scale: Array) -> Gram:
        """Multiply entrywise by scale_t scale_t'."""
        return Gram(self.diag * scale**2, self.off * np.outer(scale, scale))

    def dense(self) -> Array:
        """The matrix itself, for blocks of one token."""
        matrix = self.off.copy()
        np.fill_diagonal(matrix, self.diag)
        return matrix


def ones(n_blocks: int) -> Gram:
    """The matrix of ones."""
    return Gram(np.ones(n_blocks), np.ones((n_blocks, n_blocks)))


def normalised(a: Gram, eps: float) -> tuple[Gram, Array]:
    """The Gram matrix after a normalisation, and the (B,) root mean squares that it divided by, eps in them."""
    scale = np.sqrt(a.diag + eps)
    return a.over_outer(scale), scale


@dataclass(frozen=True, slots=True)
class Blocks:
    """A partition of the positions 1..T into runs of consecutive tokens.

    sizes: (B,) tokens of a block. starts: (B,) tokens before it.
    """

    sizes: Array
    starts: Array

    @staticmethod
    def of(n_tokens: int, *, exact: bool = False, largest: int = 0) -> Blocks:
        """Single positions up to `EXACT_POSITIONS` (or throughout), then runs growing by 4 % of their start.

        Args:
            largest: size of a run; 0 for any.
        """
        n_tokens = require_tokens(n_tokens)
        sizes: list[int] = []
        start = 0
        single = n_tokens if exact or n_tokens <= EXACT_POSITIONS else SINGLES
        while start < n_tokens:
            size = 1 if start < single else max(1, round(GROWTH * start))
            size = min(size, n_tokens - start, largest or n_tokens)
            sizes.append(size)
            start += size
        size_array = np.array(sizes, dtype=np.float64)
        return Blocks(size_array, np.concatenate([[0.0], np.cumsum(size_array)[:-1]]))

    @property
    def single(self) -> bool:
        """Whether every block is one token."""
        return bool(np.all(self.sizes == 1))

    def trace(self, a: Gram) -> float:
        """Sum of the diagonal over tokens."""
        return float(np.sum(self.sizes * a.diag))

    def total(self, a: Gram) -> float:
        """Sum over all pairs of tokens."""
        return self.trace(a) + float(self.sizes @ a.off @ self.sizes - self.sizes @ np.diagonal(a.off))

    def distances(self) -> Array:
        """(B, B) mean distance between two different tokens of a pair of blocks; 0 for a block of one with itself."""
        middle = self.starts + (self.sizes + 1) / 2
        apart = np.abs(middle[:, None] - middle[None, :])
        np.fill_diagonal(apart, np.where(self.sizes > 1, (self.sizes + 1) / 3, 0.0))
        return apart


class Sides(NamedTuple):
    """An averaging P on one side of a Gram matrix A and on both: P A and P A P', or A P and P' A P."""

    once: Gram
    twice: Gram


@dataclass(frozen=True, slots=True)
class Averaging:
    """A fixed row-stochastic matrix P: token t averages over earlier tokens, itself included.

    Attributes:
        mass: (B, B) weight that a token of the row's block gives to all of the column's block.
        square: (B, B) sum of the squares of those weights.
        own: (B,) weight that a token gives to itself.
        pair: (B, B) weight of one different token of the column's block; 0 for a block of one with itself.
        mass_columns, square_columns: (B, B) sums of the weights, and of their squares, over the tokens of the row's
            block, for one token of the column's block.
    """

    blocks: Blocks
    mass: Array
    square: Array
    own: Array
    pair: Array
    mass_columns: Array
    square_columns: Array

    @staticmethod
    def of(blocks: Blocks, mass: Array, square: Array, own: Array) -> Averaging:
        """From the sums over blocks."""
        eye, sizes = np.eye(blocks.sizes.size), blocks.sizes
        others = sizes[None, :] - eye
        pair = (mass - eye * own) / np.where(others > 0, others, 1.0)
        columns = (rows * sizes[:, None] / sizes[None, :] for rows in (mass, square))
        return Averaging(blocks, mass, square, own, pair, *columns)

    def left(self, a: Gram) -> Gram:
        """P A."""
        return self._left(a, self.mass @ a.off)

    def right(self, a: Gram) -> Gram:
        """A P."""
        return self._right(a, a.off @ self.mass_columns)

    def averaged(self, a: Gram) -> Sides:
        """P A and P A P' for any A; entries of a token with itself by the exact sums of squares."""
        off = self.mass @ a.off
        once = self._left(a, off)
        diag = np.sum(off * self.mass, axis=1) + self.square @ _extra(a)
        return Sides(once, Gram(diag, self.left(once.mT).mT.off))

    def average(self, a: Gram) -> Gram:
        """P A P'."""
        return self.averaged(a).twice

    def own_average(self, a: Gram) -> Array:
        """(B,) the diagonal of P A P'."""
        return np.sum((self.mass @ a.off) * self.mass, axis=1) + self.square @ _extra(a)

    def spread_out(self, a: Gram) -> Sides:
        """A P and P' A P for any A; entries of a token with itself by the exact sums of squares."""
        off = a.off @ self.mass_columns
        once = self._right(a, off)
        diag = np.sum(off * self.mass_columns, axis=0) + _extra(a) @ self.square_columns
        return Sides(once, Gram(diag, self.right(once.mT).mT.off))

    def spread(self, a: Gram) -> Gram:
        """P' A P."""
        return self.spread_out(a).twice

    def _left(self, a: Gram, off: Array) -> Gram:
        extra = _extra(a)
        return Gram(np.diagonal(off) + self.own * extra, off + self.pair * extra[None, :])

    def _right(self, a: Gram, off: Array) -> Gram:
        extra = _extra(a)
        return Gram(np.diagonal(off) + self.own * extra, off + extra[:, None] * self.pair)

    def dense(self) -> Array:
        """(T, T) P itself, for blocks of one token."""
        return self.mass


def _extra(a: Gram) -> Array:
    """(B,) what a token has with itself beyond what it has with another of its block."""
    return a.diag - np.diagonal(a.off)


def causal(blocks: Blocks, *, window: int = 0, slope: float = 0.0) -> Averaging:
    """Softmax of logits -slope * distance over the last `window` tokens (0: over all that came before)."""
    return _causal(tuple(blocks.sizes.tolist()), window, slope)


@lru_cache(maxsize=64)
def _causal(sizes: tuple[float, ...], window: int, slope: float) -> Averaging:
    sizes_array = np.array(sizes)
    blocks = Blocks(sizes_array, np.concatenate([[0.0], np.cumsum(sizes_array)[:-1]]))
    n = sizes_array.size
    mass, square, own = np.zeros((n, n)), np.zeros((n, n)), np.zeros(n)
    ends = blocks.starts + sizes_array
    for row, (start, size) in enumerate(zip(blocks.starts, sizes_array, strict=True)):
        count = int(min(size, SAMPLES))
        tokens = start + (np.arange(count) + 0.5) * size / count + 0.5  # 1-based; exact for blocks of at most SAMPLES
        seen = np.minimum(tokens, window) if window else tokens
        # Distances 0 .. seen-1; a block holds those from t - end to t - start - 1.
        low = np.clip(tokens[:, None] - ends[None, :], 0, seen[:, None])
        high = np.clip(tokens[:, None] - blocks.starts[None, :], 0, seen[:, None])
        total = _geometric(seen, slope)
        weights = (_geometric(high, slope) - _geometric(low, slope)) / total[:, None]
        squares = (_geometric(high, 2 * slope) - _geometric(low, 2 * slope)) / total[:, None] ** 2
        mass[row], square[row], own[row] = weights.mean(0), squares.mean(0), np.mean(1 / total)
    return Averaging.of(blocks, mass, square, own)


def _geometric(count: Array, slope: float) -> Array:
    """Sum of exp(-slope i) over i = 0 .. count-1, interpolated between whole counts."""
    return count if slope == 0 else -np.expm1(-slope * count) / -math.expm1(-slope)
