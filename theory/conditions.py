"""The paper's two conditions for stability, evaluated, and what follows from them and the growth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from theory.architecture import Architecture
from theory.forward_pass import ForwardPass
from theory.growth import Growth
from theory.stack import DepthBound, input_scales, paper_bound

Outcome = Literal["stable", "at risk", "unstable", "unknown"]

# Thresholds are conventions until outcomes of real trainings calibrate them.
GROWTH_LIMIT = 2.0  # stable up to this growth of the gradient from the last layer to the first
SUBLAYER_LIMIT = 2.0  # condition 1: the paper's norm of a sub-layer in its normalised input
SHORTCUT_LIMIT = 2.0  # condition 2: the paper's excess over 1 of a half-layer's Jacobian, at the worst layer
# Below it most of what a norm divides by is eps, a constant: it then normalises nothing, whatever the growth is.
NORMALISED_LIMIT = 0.5


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


@np.errstate(over="ignore", invalid="ignore")
def normalised_share(architecture: Architecture, forward: Growth | ForwardPass) -> float:
    """Smallest share s^2/(s^2 + eps) of the mean square in what a norm of the stream or of a branch divides by.

    1 without such a norm; not a number where a mean square is none. QK-norms are left to the growth's domain.
    """
    a = architecture
    std, branches = np.asarray(forward.residual_std), np.asarray(forward.branch_std)
    # A norm's output has that share as its mean square: so has the stream behind an embedding norm or one of post-ln.
    shares = [np.ones(1), std[:1] ** 2 if a.embedding_norm else std[:0]]
    read = std[:-1] if a.block in ("pre-ln", "peri-ln") else std[:0]
    if a.final_norm:
        read = np.append(read, std[-1])
    shares.append(read**2 / (read**2 + a.eps))
    if a.block in ("peri-ln", "branch-ln"):
        shares.append(branches**2 / (branches**2 + a.eps))
    elif a.block == "post-ln":
        shares.append(std[1:] ** 2)
    return float(np.min(np.concatenate(shares)))


def largest(values: NDArray[np.float64], limit: float) -> float:
    """The largest of the numbers, unless one that is none could still exceed the limit where they do not."""
    numbers = values[~np.isnan(values)]
    found = float(np.max(numbers, initial=-math.inf))
    return found if numbers.size == values.size or found > limit else math.nan


def outcome_of(growth: Growth, found: Sequence[Condition], share: float) -> Outcome:
    """The verdict; `share` is of `normalised_share`."""
    if any(condition.value > condition.limit for condition in found):
        return "at risk"  # the conditions do not depend on the growth's domain
    if not growth.in_domain or not all(condition.holds for condition in found):
        return "unknown"
    if growth.value > GROWTH_LIMIT:
        return "at risk"
    # Of norms that normalise nothing no risk is known; but growth and conditions are of the network as it is, and once
    # training lifts the stream over sqrt(eps) its norms make another one of it.
    return "stable" if share >= NORMALISED_LIMIT else "unknown"


def in_words(value: float) -> str:
    """Four digits, or `unknown` for what is no finite number."""
    return f"{value:.4g}" if math.isfinite(value) else "unknown"
