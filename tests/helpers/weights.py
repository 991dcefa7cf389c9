"""Seeded numbers, very small architectures, and their models some way off where they start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from empirics.adversaries import normal as normal
from empirics.benches import SMALL
from empirics.model import Transformer, build
from theory.architecture import Architecture


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def architecture(**changes: Any) -> Architecture:
    """A very small architecture; one layer, one head, unless told otherwise."""
    return Architecture(**SMALL | changes)


def disturb(module: nn.Module, seed: int, by: float = 0.3) -> None:
    """Move every parameter off its initial value, gains and biases too; by 0.3, enough to make attention uneven."""
    g = generator(seed)
    for parameter in module.parameters():
        parameter.data += by * torch.randn(parameter.shape, generator=g, dtype=torch.float64).to(parameter)


def disturbed(a: Architecture, seed: int = 0) -> Transformer:
    """A float64 model some way off its initialisation, gains and biases included."""
    model = build(a, seed=seed, dtype=torch.float64)
    disturb(model, seed + 1, 0.2)
    return model


def svd_norm(matrix: Tensor) -> float:
    """The largest singular value, by a dense decomposition."""
    return float(torch.linalg.svdvals(matrix.detach())[0])
