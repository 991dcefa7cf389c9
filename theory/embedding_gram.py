"""The embedding as a Gram matrix over positions: where the growth recursion starts."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from theory.architecture import Architecture
from theory.grams import Blocks, Gram, normalised

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


def embedding_gram(architecture: Architecture, blocks: Blocks, tokens: NDArray[np.int64] | None) -> Gram:
    """Gram matrix of the stream entering the first block; equal tokens share their row."""
    a, n = architecture, blocks.sizes.size
    off = np.zeros((n, n)) if tokens is None else (tokens[:, None] == tokens[None, :]).astype(np.float64)
    raw = (a.embedding_multiplier * a.stds.embedding) ** 2
    gram = Gram(np.full(n, raw), raw * off)
    # Positions are added before an embedding norm, so that the norm sees both.
    if a.positions == "learned":
        gram = gram + Gram(np.full(n, a.stds.position**2), np.zeros((n, n)))
    elif a.positions == "sinusoidal":
        gram = gram + _sinusoidal_gram(a, blocks)
    return normalised(gram, a.eps)[0] if a.embedding_norm else gram


def _sinusoidal_gram(architecture: Architecture, blocks: Blocks) -> Gram:
    """Gram matrix of the fixed sine and cosine table, less its mean over coordinates if a LayerNorm removes it."""
    half = architecture.d_model // 2
    angles = 10_000.0 ** (-2 * np.arange(half) / architecture.d_model)
    middle = blocks.starts + (blocks.sizes - 1) / 2
    phase = np.outer(middle, angles)
    table = np.concatenate([np.sin(phase), np.cos(phase)], axis=1)
    if architecture.norm == "layernorm":
        table = table - table.mean(axis=1, keepdims=True)
    off = table @ table.T / table.shape[1]
    return Gram(np.diagonal(off).copy(), off)
