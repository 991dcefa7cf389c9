r"""The norm of experts behind a router at initialisation: a large outlier that the router makes, or else the experts'.

Given the inputs of its units, what a token's chosen experts do is one feed-forward layer of all their units, the
slopes of each expert times its gate, and the gates' own change is a matrix of rank k beside it,

.. math:: J_u = W_2 \left[ S N P + y_0 \frac{u^\top}{d} + H V \right], \qquad V = \frac{\partial g}{\partial l} W_r P

with W_2 the chosen experts' second matrices side by side, S the units' slopes, N a normal matrix, P = 1 - uu'/d, H
the units' outputs in a column for each expert, W_r the router, l its logits at u, and y_0 what remains along u. The
first part has the edge of `theory.random_matrix`; outputs are sqrt(d) long, so that the last is the larger.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from theory.activations import activation_function, activation_slope
from theory.architecture import Activation
from theory.arguments import require_sizes, require_tokens
from theory.random_matrix import product_edge

Array = NDArray[np.float64]

TOKENS = 16  # of a router, or as many as the sequence has
DRAWN = 4096  # tokens of long sequences in all
MOST_ROUTERS = 128  # the mean is then known to 0.7 %, of gated experts with few units to 1.5 %


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedLayer:
    """A layer of E experts, k of them to a token, with normal weights of these stds; sigma_3 is of a gated one."""

    activation: Activation
    gated: bool
    d: int
    d_ffn: int
    experts: int
    chosen: int
    renormalised: bool
    sigma_1: float
    sigma_2: float
    sigma_3: float
    sigma_router: float

    def units(self, rng: np.random.Generator) -> tuple[Array, Array, Array]:
        """Of the chosen experts' units (k, M): squared slope off u, change along u, and output."""
        z = self.sigma_1 * math.sqrt(self.d) * rng.standard_normal((self.chosen, self.d_ffn))
        slope, value = activation_slope(self.activation, z), activation_function(self.activation, z)
        if not self.gated:
            return (self.sigma_1 * slope) ** 2, slope * z, value
        other = self.sigma_3 * math.sqrt(self.d) * rng.standard_normal(z.shape)
        squares = (self.sigma_1 * slope * other) ** 2 + (self.sigma_3 * value) ** 2
        return squares, (slope * z + value) * other, value * other


class Token(NamedTuple):
    """What decides a token's norm, over sigma_2 d.

    squares: (k M,) squared slopes, each expert's times its squared gate.
    columns: (k + 1, k M) y_0 and H'.
    rows: (k, k) Gram matrix VV'/d of the rows that go with H.
    """

    squares: Array
    columns: Array
    rows: Array


def token(layer: RoutedLayer, router: Array, rng: np.random.Generator) -> Token:
    """One token of a layer with this router (E, D)."""
    u = rng.standard_normal(layer.d)
    u *= math.sqrt(layer.d) / np.linalg.norm(u)
    logits = router @ u
    here = np.argsort(-logits)[: layer.chosen]
    among = here if layer.renormalised else np.arange(layer.experts)
    p = np.exp(logits - logits.max())
    p /= p[among].sum()
    off = router - np.outer(logits, u) / layer.d
    weight = p[here, None]  # the gates
    rows = weight * (off[here] - p[among] @ off[among])
    moved = p[here] * (logits[here] - p[among] @ logits[among])
    squares, along, outputs = layer.units(rng)
    columns = np.zeros((layer.chosen + 1, layer.chosen, layer.d_ffn))
    columns[0] = weight * along + moved[:, None] * outputs
    for e in range(layer.chosen):
        columns[e + 1, e] = outputs[e]
    return Token((weight**2 * squares).ravel(), columns.reshape(layer.chosen + 1, -1), rows @ rows.T / layer.d)


def token_norm(found: Token, d: int, rng: np.random.Generator) -> float:
    """|J_u| / (sigma_2 d): the outlier if there is one, else the edge.

    At the resolvent q of the first part, w = q^2, a column's quadratic form is a = q sum c c'/(1 - w s^2), and a row's
    b = q VV'/d off u and 1/(z d^2) along it, with z = (1 + t)/q as in `product_edge`. X + A B' has the singular value
    z where a b has the eigenvalue 1, if z falls there still. The forms vary with the draw: a is R G R with R its root
    and G the Gram matrix of k + 1 normal columns over d, and a mixed form m of A and B, normal of variance t/d to
    leading order, makes the eigenvalue (1 - m)^2.
    """
    from scipy.optimize import brentq

    squares, columns, rows = found
    open_ = (squares > 0) | (columns != 0).any(axis=0)
    squares, columns = squares[open_], columns[:, open_]
    if not squares.any():
        return 0.0
    normal = rng.standard_normal((len(columns), d))
    drawn, other = _root(normal @ normal.T / d), rng.standard_normal()
    b = np.zeros((len(columns), len(columns)))

    def t(w: float) -> float:
        return float(np.sum(w * squares / (1 - w * squares))) / d

    def excess(w: float) -> float:
        b[1:, 1:], b[0, 0] = w * rows, w / ((1 + t(w)) * d**2)
        root = _root(columns / (1 - w * squares) @ columns.T) @ drawn
        return float(np.linalg.eigvalsh(root.T @ b @ root)[-1]) - 1

    # Between what solves it with every slope the steepest and with none.
    end = 1 / squares.max()
    most = (1 - 1e-9) * end
    alone = (excess(1e-3 * end) + 1) * 1e6 / end**2  # the squared outlier if there were no first part
    low = 1 / (1 / end + math.sqrt(1 / end**2 + 4 * alone))
    high = min(1 / math.sqrt(alone), most)
    if excess(high) <= 0:
        high = most
    if excess(high) > 0 > excess(low):
        w: Any = brentq(excess, low, high, xtol=1e-3 * low)  # z is known to half as much
        falling = (1 + t(w)) / w - 2 * float(np.sum(squares / (1 - w * squares) ** 2)) / d  # -dz/dq
        if falling > 0:
            return (1 + t(w) + other * math.sqrt(t(w) / d) * w * falling) / math.sqrt(w)
    edge = product_edge(squares, np.full(len(squares), 1 / len(squares)), len(squares) / d)
    return edge.opnorm(d) + edge.opnorm_std(d) * other


def _root(matrix: Array) -> Array:
    """The symmetric root of a positive matrix, which may be singular but for rounding."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


@lru_cache(maxsize=64)
def routed_opnorm(layer: RoutedLayer, n_tokens: int) -> float:
    """Mean over draws of the largest |J_u| of n independent tokens, by fixed seeds.

    Of the tokens of a router every choice of n is a sequence: the i-th smallest norm is the largest of a share
    C(i - 1, n - 1)/C(tokens, n) of them.

    Raises:
        ValueError: a token goes to more experts than there are.
    """
    from scipy.special import gammaln

    if not 1 <= layer.chosen <= layer.experts:
        raise ValueError(f"n_chosen={layer.chosen} of n_experts={layer.experts}; use 1 to {layer.experts}")
    n_tokens = require_tokens(n_tokens)
    require_sizes(d=layer.d, d_ffn=layer.d_ffn)
    if layer.sigma_1 == 0 or (layer.gated and layer.sigma_3 == 0):
        return 0.0

    tokens = max(TOKENS, n_tokens)
    routers = max(1, min(MOST_ROUTERS, DRAWN // tokens))
    place = np.arange(n_tokens, tokens + 1)
    log_of = gammaln(place) - gammaln(place - n_tokens + 1) - gammaln(n_tokens)
    shares = np.exp(log_of - (gammaln(tokens + 1) - gammaln(n_tokens + 1) - gammaln(tokens - n_tokens + 1)))
    means: list[float] = []
    for seed in range(routers):
        rng = np.random.default_rng(seed)
        router = layer.sigma_router * rng.standard_normal((layer.experts, layer.d))
        norms = np.sort([token_norm(token(layer, router, rng), layer.d, rng) for _ in range(tokens)])
        means.append(float(shares @ norms[n_tokens - 1 :]))
    return layer.sigma_2 * layer.d * float(np.mean(means))
