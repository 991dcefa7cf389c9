"""The paper's two conditions for stability, evaluated, and what follows from them and the growth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from theory.architecture import Architecture
from theory.growth import ForwardPass, Growth
from theory.stack import DepthBound, input_scales, paper_bound

Outcome = Literal["stable", "at risk", "unstable", "unknown"]

# Thresholds are conventions until outcomes of real trainings calibrate them.
GROWTH_LIMIT = 2.0  # stable up to this growth of the gradient from the last layer to the first
SUBLAYER_LIMIT = 2.0  # condition 1: the paper's norm of a sub-layer in its normalised input
SHORTCUT_LIMIT = 2.0  # condition 2: the paper's excess over 1 of a half-layer's Jacobian, at the worst layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One of the paper's two conditions, evaluated.

    Attributes:
        holds: whether it is known to hold.
        value: the largest over sub-layers and depth; `limit` is the convention it is held against. Not a number where
            the recursion has none at some layer and no other layer exceeds the limit.
    """

    name: str
    holds: bool
    value: float
    limit: float


def conditions(
    architecture: Architecture, forward: Growth | ForwardPass, paper: DepthBound
) -> tuple[Condition, Condition]:
    """Small sub-layers and a large shortcut, by the paper's bounds on them."""
    excess = np.stack([paper.attention, paper.feedforward], axis=1)
    # What a branch's norm divides by is the shortcut's doing, not the sub-layer's.
    sublayer = largest(excess * input_scales(architecture, forward), SUBLAYER_LIMIT)
    alpha = architecture.shortcut_multiplier
    shortcut = largest(excess / alpha, SHORTCUT_LIMIT) if alpha > 0 else math.inf
    return (
        Condition(name="small sub-layers", holds=sublayer <= SUBLAYER_LIMIT, value=sublayer, limit=SUBLAYER_LIMIT),
        Condition(name="large shortcut", holds=shortcut <= SHORTCUT_LIMIT, value=shortcut, limit=SHORTCUT_LIMIT),
    )


def conditions_of(forward: ForwardPass) -> tuple[Condition, Condition]:
    """The same of a forward pass alone."""
    a = forward.architecture
    return conditions(a, forward, paper_bound(a, forward.n_tokens, forward))


def largest(values: NDArray[np.float64], limit: float) -> float:
    """The largest of the numbers, unless one that is none could still exceed the limit where they do not."""
    numbers = values[~np.isnan(values)]
    found = float(np.max(numbers, initial=-math.inf))
    return found if numbers.size == values.size or found > limit else math.nan


def outcome_of(growth: Growth, found: Sequence[Condition]) -> Outcome:
    """The verdict."""
    if any(condition.value > condition.limit for condition in found):
        return "at risk"  # the conditions do not depend on the growth's domain
    if not growth.in_domain or not all(condition.holds for condition in found):
        return "unknown"
    return "stable" if growth.value <= GROWTH_LIMIT else "at risk"


def in_words(value: float) -> str:
    """Four digits, or `unknown` for what is no finite number."""
    return f"{value:.4g}" if math.isfinite(value) else "unknown"
