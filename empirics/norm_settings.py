"""A row of the table of sub-layer norms, and sub-layers whose weights are drawn for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.nn import Module

from empirics.benches import Choices, small_architecture
from theory.statements import Statement

PRECISE = 1e-3  # of Lanczos, as what it makes likely: its value is closer still
Layer = TypeVar("Layer", bound=Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One row of the table: the symbols' values, and how to draw the true norm at a seed.

    Attributes:
        values: every symbol of the statement, and what else its domain speaks of.
    """

    label: str
    values: Mapping[str, Any]
    draw: Callable[[int], float]
    seeds: int

    def inside(self, statement: Statement) -> bool:
        """Whether the statement claims its target here."""
        return not statement.outside(self.values)

    def predicted(self, statement: Statement) -> float:
        return float(statement.evaluate(self.values))


def to_fill(kind: type[Layer], choices: Choices, dtype: torch.dtype = torch.float32) -> Layer:
    """A sub-layer whose weights are all still to be drawn: until then they take neither time nor memory."""
    with torch.device("meta"):
        module = kind(small_architecture(choices)).to(dtype)
    return module.to_empty(device="cpu").requires_grad_(False)


def fill(module: Any, sigmas: Mapping[str, float], generator: torch.Generator) -> None:
    """Normal weights, in the order of the names."""
    for name, sigma in sigmas.items():
        getattr(module, name).weight.normal_(0, sigma, generator=generator)
