"""Weights and inputs built to attack bounds: float64, of any scale, and of shapes that random draws never have."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from theory.architecture import Architecture

KINDS = ("normal", "rank-one", "aligned", "zero", "sparse", "heavy")
TOKENS = ("normal", "equal", "repeated", "one zero", "zero", "aligned", "opposite")

scales = st.floats(-3, 3).map(lambda exponent: 10.0**exponent)
seeds = st.integers(0, 2**31 - 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def matrix(kind: str, seed: int, rows: int, columns: int) -> Tensor:
    """A rows x columns matrix of order one; `aligned` ones all share their singular vectors."""
    if kind == "rank-one":
        return torch.outer(normal(seed, rows), normal(seed + 1, columns))
    if kind == "aligned":
        return torch.eye(rows, columns, dtype=torch.float64)
    if kind == "zero":
        return torch.zeros(rows, columns, dtype=torch.float64)
    drawn = normal(seed, rows, columns)
    if kind == "sparse":
        return drawn * (normal(seed + 1, rows, columns) > 0.7)
    return drawn**3 if kind == "heavy" else drawn


def tokens(kind: str, seed: int, length: int, width: int) -> Tensor:
    """A length x width input of order one."""
    drawn = normal(seed, length, width)
    if kind == "equal":
        return drawn[:1].expand(length, width).clone()
    if kind == "repeated":
        return drawn[torch.arange(length) // 2].clone()
    if kind == "one zero":
        drawn[-1] = 0.0
    if kind == "zero":
        drawn[:] = 0.0
    if kind == "aligned":
        return drawn[:, :1] * torch.eye(1, width, dtype=torch.float64)
    if kind == "opposite":
        return drawn[:1] * (1 - 2 * (torch.arange(length) % 2))[:, None]
    return drawn


@st.composite
def matrices(draw: st.DrawFn, rows: int, columns: int) -> Tensor:
    return matrix(draw(st.sampled_from(KINDS)), draw(seeds), rows, columns) * draw(scales)


@st.composite
def inputs(draw: st.DrawFn, length: int, width: int, kinds: tuple[str, ...] = TOKENS) -> Tensor:
    return tokens(draw(st.sampled_from(kinds)), draw(seeds), length, width) * draw(scales)


@st.composite
def fill(draw: st.DrawFn, module: nn.Module) -> None:
    """Draw every parameter of a module (in place) and make it float64: matrices, and biases large, small or none."""
    module.double()
    for parameter in module.parameters():
        if parameter.ndim == 2:
            value = draw(matrices(*parameter.shape))
        else:
            value = draw(st.sampled_from([0.0, 1.0])) * normal(draw(seeds), *parameter.shape) * draw(scales)
        parameter.data = value
    module.requires_grad_(False)


def architecture(**changes: object) -> Architecture:
    """A very small architecture; one layer, one head, unless told otherwise."""
    fields: dict[str, object] = {
        "name": "test",
        "d_model": 4,
        "n_layers": 1,
        "n_heads": 1,
        "n_kv_heads": 1,
        "d_head": 2,
        "d_ffn": 4,
        "vocab_size": 16,
        "context": 16,
        "positions": "none",
    }
    return Architecture(**(fields | changes))  # type: ignore[arg-type]
