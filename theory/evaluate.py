"""Statements over grids of architectures: arrays in, arrays out, a million configurations at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theory.architecture import EMBEDDINGS, EmbeddingTreatment
from theory.arguments import require_tokens
from theory.feedforward import ffn_estimate
from theory.records import plain

Array = NDArray[np.float64]
PAPER_EPS = 1e-5
MOST_ROWS = 10**6  # of a sweep: some ten seconds, and half a gigabyte


def paper_stds(d_model: Array, n_layers: Array) -> dict[str, Array]:
    """The paper's initialisation over arrays of widths and depths: `base` and the output matrices' `output`."""
    base = np.sqrt(2 / (5 * d_model))
    return {"base": base, "output": base / np.sqrt(2 * n_layers)}


def embedding_std(d_model: Array, treatment: EmbeddingTreatment) -> Array:
    """Standard deviation of the embeddings entering the first block, over an array of widths."""
    raw = 2 / (5 * d_model)
    if treatment == "scaled-embed":
        return np.sqrt(raw * d_model)
    if treatment == "embed-ln":
        return np.sqrt(raw / (raw + PAPER_EPS))
    return np.sqrt(raw)


def closed_form(d_model: Any, n_layers: Any, treatment: EmbeddingTreatment, n_tokens: int) -> tuple[Array, Array]:
    """Closed-form growth and first-layer eq. (15) excess of the paper's ReLU transformer; both estimates.

    Args:
        d_model, n_layers: arrays that broadcast.

    Returns:
        (growth, excess), each in the broadcast shape.

    Raises:
        ValueError: n_tokens, a width or a depth is below 1.
    """
    n_tokens = require_tokens(n_tokens)
    d, n = np.broadcast_arrays(np.asarray(d_model, dtype=np.float64), np.asarray(n_layers, dtype=np.float64))
    if not (np.all(d >= 1) and np.all(n >= 1)):
        raise ValueError("a width or a number of layers is below 1; use at least 1 for each")
    stds = paper_stds(d, n)
    start = embedding_std(d, treatment)
    hidden = stds["base"] ** 2 * d / 2  # E[ReLU(z)^2] is half the pre-activation variance
    feedforward = stds["output"] ** 2 * 4 * d * hidden
    harmonic = float(np.sum(1 / np.arange(1, n_tokens + 1))) / n_tokens
    attention = d**2 * stds["base"] ** 2 * stds["output"] ** 2 * harmonic
    growth = np.sqrt(1 + n * (feedforward + attention) / start**2)
    excess = ffn_estimate().evaluate(
        {"sigma_1": stds["base"], "sigma_2": stds["output"], "sigma_xp": start, "d": d, "d_ffn": 4 * d}
    )
    return growth, np.asarray(excess)


def closed_form_sweep(
    widths: Sequence[int], depths: Sequence[int], treatments: Sequence[EmbeddingTreatment] | None, n_tokens: int
) -> list[dict[str, Any]]:
    """One row a configuration of the grid; its cost is that of the rows, whatever the sizes.

    Raises:
        ValueError: more than a million rows; or as `closed_form`.
    """
    rows: list[dict[str, Any]] = []
    wanted = len(widths) * len(depths) * len(treatments or EMBEDDINGS)
    if wanted > MOST_ROWS:
        raise ValueError(
            f"{wanted} configurations are too many; use fewer widths or depths, at most {MOST_ROWS} in all"
        )
    grid_d, grid_n = np.meshgrid(np.asarray(widths), np.asarray(depths), indexing="ij")
    for treatment in treatments or EMBEDDINGS:
        growth, excess = closed_form(grid_d, grid_n, treatment, n_tokens)
        for index in np.ndindex(growth.shape):
            rows.append(
                plain(
                    {
                        "embedding": treatment,
                        "d_model": int(grid_d[index]),
                        "n_layers": int(grid_n[index]),
                        "growth": float(growth[index]),
                        "ffn_excess": float(excess[index]),
                        "kind": "estimate",
                    }
                )
            )
    return rows
