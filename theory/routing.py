r"""Experts behind a router: what top-k routing does to Gram matrices, as an expectation over the routing.

Token t goes to the k of E experts with the largest logits :math:`l_e(t) = w_e \cdot u_t` and gets
:math:`f_t = \sum_e g_e(t) F_e(u_t)`, with gates g the softmax of the logits, over the chosen alone or over all
experts, and 0 for those not chosen. At initialisation experts and router are independent, and the logits of two
tokens are Gaussian with the correlation :math:`\rho` of their inputs. With kappa and its slope those of one expert,

.. math::
    \text{forward} \quad A\,\kappa, \quad A = E \sum_e g_e(t) g_e(t'), \qquad
    \text{backward} \quad A\,\dot\kappa + r\,B\,\kappa, \quad
    B = E \sum_{ee'} \frac{\partial g_e}{\partial l_{e'}}(t) \frac{\partial g_e}{\partial l_{e'}}(t') ,

r the variance of a logit over that of an input's entry. A is the mean over routings, and so is B; the derivative is
the one that back-propagation takes, of the gates of the chosen. B is not dA/d(r rho): a token that changes its experts
makes the output jump, and no derivative sees that, so that with routing the backward multiplier is smaller than the
derivative of the forward kernel.

The router's share of the gradient moves the output partly along itself: its logits' gradient is D' F v, D = dg/dl and F
the experts' outputs, and a v that a norm above has made orthogonal to y loses of it the share of f in y times

.. math:: \frac{1}{B} E \frac{|D^T g|^2}{|g|^2} = \frac{1}{B} E \frac{\sum_e (g_e^2 - p_e |g|^2)^2}{|g|^2} ,

all of it with one expert. Below a norm of f itself a token's gates count over its own |g|^2, not over A. Derivation
`routing`.

A and B are averages over many draws of the logits with a fixed seed: top-k order statistics under a softmax have no
closed form. For a token with itself their standard errors are at most 0.5 and 2 % up to 128 experts; between two
uncorrelated tokens, where A is 1/E, 2 % (measured in the tests).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from theory.grams import Gram

Array = NDArray[np.float64]
DRAWS = 2**17  # logits in all: many experts need fewer draws, as each draw averages over them
ANGLES = 33  # of the correlation, arccos(rho); the overlaps are smooth in the angle where they have a root in rho
OWN = 8  # times as many draws for a token with itself
STEP = 0.05  # of the logarithm of the logits' variance, between tables


class Own(NamedTuple):
    """Of a token with itself.

    scatter: Var(|g|^2)/A^2. radial: share of B that moves the output along itself. normed: what a norm of the output
        leaves of B, over 1/A. Both are 0 where B is.
    """

    scatter: float
    radial: float
    normed: float


class Overlaps(NamedTuple):
    """`shared` = A and `slopes` = B, as Gram matrices over tokens."""

    shared: Gram
    slopes: Gram


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """A router of one layer.

    Attributes:
        experts, chosen: E and k.
        gain: r, the variance of a router logit over that of an input's entry.
        renormalised: gates are a softmax over the chosen experts; else over all, and then sum to less than 1.
    """

    experts: int
    chosen: int
    gain: float
    renormalised: bool

    def overlaps(self, kernel: Gram) -> Overlaps:
        """A and B between the tokens of an input with this Gram matrix; their lengths are taken as equal."""
        table = self._at(_tables, kernel)
        norms = np.sqrt(np.outer(kernel.diag, kernel.diag))
        angle = np.arccos(np.clip(kernel.off / np.where(norms > 0, norms, 1.0), -1.0, 1.0))
        grid = np.linspace(0.0, math.pi, ANGLES)
        shared, slopes = (
            Gram(np.full(kernel.diag.size, values[0]), np.interp(angle, grid, values)) for values in table
        )
        return Overlaps(shared, slopes)

    def own(self, kernel: Gram) -> Own:
        """What the routing of one token does beyond its mean."""
        return Own(*self._at(_own, kernel).tolist())

    def _at(self, table: Callable[[int, int, bool, int], Array], kernel: Gram) -> Array:
        """A table at the logits' variance, linear in its logarithm; not numbers where the input's are none."""
        variance = self.gain * float(np.mean(kernel.diag))
        place = math.log(max(variance, 1e-12)) / STEP if math.isfinite(variance) else 0.0
        low, high = (table(self.experts, self.chosen, self.renormalised, math.floor(place) + n) for n in (0, 1))
        found = low + (high - low) * (place - math.floor(place))
        return found if math.isfinite(variance) else found * math.nan


def gates(logits: Array, chosen: int, *, renormalised: bool) -> tuple[Array, Array]:
    """Gates g (..., E), 0 where not chosen, and p (..., E) with dg/dl = diag(g) - g p'."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    kept = weights
    if chosen < logits.shape[-1]:
        threshold = np.partition(logits, -chosen, axis=-1)[..., -chosen, None]
        kept = np.where(logits >= threshold, weights, 0.0)
    if renormalised:
        g = kept / kept.sum(axis=-1, keepdims=True)
        return g, g
    total = weights.sum(axis=-1, keepdims=True)
    return kept / total, weights / total


@lru_cache(maxsize=64)
def _tables(experts: int, chosen: int, renormalised: bool, place: int) -> Array:
    """A and B (2, angles) at the angles 0 .. pi between two tokens with router logits of variance exp(STEP place)."""
    rng, spread = np.random.default_rng(0), math.exp(0.5 * STEP * place)
    draws = max(DRAWS // experts, 64)

    def routed(logits: Array) -> tuple[Array, Array]:
        return gates(logits, chosen, renormalised=renormalised)

    logits, other = spread * rng.standard_normal((2, draws, experts))
    first, found = routed(logits), np.empty((2, ANGLES))
    for n, angle in enumerate(np.linspace(0.0, math.pi, ANGLES)):
        found[:, n] = _means(*first, *routed(math.cos(angle) * logits + math.sin(angle) * other))
    own = routed(spread * rng.standard_normal((OWN * draws, experts)))  # the entry that decides most
    found[:, 0] = _means(*own, *own)
    return found


@lru_cache(maxsize=64)
def _own(experts: int, chosen: int, renormalised: bool, place: int) -> Array:
    """(3,) `Own` at router logits of variance exp(STEP place), from the draws of the table's own entry."""
    rng = np.random.default_rng(1)
    logits = math.exp(0.5 * STEP * place) * rng.standard_normal((OWN * max(DRAWS // experts, 64), experts))
    g, p = gates(logits, chosen, renormalised=renormalised)
    own = np.sum(g * g, axis=1)
    slopes = own * (1 + np.sum(p * p, axis=1)) - 2 * np.sum(g * g * p, axis=1)
    along = np.sum((g * g - p * own[:, None]) ** 2, axis=1) / own
    shared, whole = own.mean(), slopes.mean()
    parts = [along.mean() / whole, shared * np.mean((slopes - along) / own) / whole] if whole > 0 else [0.0, 0.0]
    return np.array([np.var(own) / shared**2, *parts])


def _means(g: Array, p: Array, h: Array, q: Array) -> tuple[float, float]:
    """A and B as means over draws: of g.h, and of the trace of (diag(g) - g p')(diag(h) - h q')'."""
    both = g * h
    shared = both.sum(axis=1)
    slopes = shared * (1 + np.sum(p * q, axis=1)) - np.sum(both * (p + q), axis=1)
    return float(shared.mean()), float(slopes.mean())
