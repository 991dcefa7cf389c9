"""The gradient bound over all layers, from the norms of the half-layers' Jacobians."""

from __future__ import annotations

from typing import Any

import numpy as np

from theory.derivation import Derivation, Step, register_derivation
from theory.derivations_expressions import Norm, ProductOver, Transposed, Values, array, entry
from theory.derivations_numeric import Array, Attention, Rng, jacobian, layer_norm, random_attention, relu
from theory.sources import Source

_GX = array("dL/dx_n", r"\frac{\partial \mathcal{L}}{\partial x_n}")
_GY = array("dL/dy_n", r"\frac{\partial \mathcal{L}}{\partial y_n}")
_GX_1 = array("dL/dx_1", r"\frac{\partial \mathcal{L}}{\partial x_1}")
_GY_N = array("dL/dy_N", r"\frac{\partial \mathcal{L}}{\partial y_N}")
_DY_N = array("dy_n/dx'_n", r"\frac{\partial y_n}{\partial x'_n}")
_DX_N = array("dx'_n/dx_n", r"\frac{\partial x'_n}{\partial x_n}")
_INDEX = entry("n")


def _network(rng: Rng, *, shrink: bool = False) -> Values:
    """Three Pre-LN layers on 3 tokens of width 4 and a quadratic loss; shrink: each half-layer only rescales."""
    n_tokens, width = 3, 4
    x = rng.normal(0, 1, (n_tokens, width))
    target = rng.normal(0, 1, x.shape)
    layers: list[dict[Any, Array]] = []
    maps: list[Any] = []
    gradient_in: Array = np.zeros(0)

    def norm(x: Array) -> Array:
        return layer_norm(x.T, 1e-5).T

    start = x
    for _ in range(3):
        mix = random_attention(rng, n_tokens=n_tokens, d=width, heads=2, kv_heads=2, d_head=2, turning=2)
        W_1, W_2 = rng.normal(0, 1, (8, width)), rng.normal(0, 1, (width, 8))
        first, second = rng.uniform(0.5, 2, 2)

        def attend(x: Array, mix: Attention = mix, factor: float = first) -> Array:
            return factor * x if shrink else x + mix(norm(x))

        def feed(x: Array, W_1: Array = W_1, W_2: Array = W_2, factor: float = second) -> Array:
            return factor * x if shrink else x + relu(norm(x) @ W_1.T) @ W_2.T

        layers.append({_DX_N: jacobian(attend, x), _DY_N: jacobian(feed, attend(x))})
        maps.append((attend, feed))
        x = feed(attend(x))
    gradient_out = (x - target).reshape(-1, 1)

    def loss(x: Array, first: int) -> Array:
        for attend, feed in maps[first:]:
            x = feed(attend(x))
        return np.sum((x - target) ** 2 / 2).reshape(1)

    gradient_in = jacobian(lambda x: loss(x, 0), start).T
    before_last = start
    for attend, feed in maps[:-1]:
        before_last = feed(attend(before_last))
    return {
        **layers[-1],
        _GX: jacobian(lambda x: loss(x, 2), before_last).T,
        _GY: gradient_out,
        _GX_1: gradient_in,
        _GY_N: gradient_out,
        _INDEX: layers,
    }


@register_derivation
def gradient() -> Derivation:
    """The gradient bound over all layers."""
    source = Source(key="takase2025spike", label="gradient bound")
    chain = Step(
        left=_GX,
        right=Transposed(_DX_N) * Transposed(_DY_N) * _GY,
        relation="=",
        rule="chain rule",
        source=source,
        explanation="One layer, gradients as columns over the whole sequence.",
        sample=_network,
    )
    one_layer = Step(
        left=Norm(_GX),
        right=Norm(_DX_N) * Norm(_DY_N) * Norm(_GY),
        relation="<=",
        rule="sub-multiplicativity",
        source=source,
        explanation="A transpose has the norm of its matrix.",
        sample=_network,
        tight=lambda rng: _network(rng, shrink=True),
    )
    all_layers = Step(
        left=Norm(_GX_1),
        right=Norm(_GY_N) * ProductOver(Norm(_DY_N) * Norm(_DX_N), _INDEX),
        relation="<=",
        rule="induction over layers",
        source=source,
        explanation="y_n is x_{n+1}: the last line N times. A true bound only with Jacobians of the whole sequence.",
        sample=_network,
        tight=lambda rng: _network(rng, shrink=True),
    )
    return Derivation(
        name="gradient",
        title="Gradient bound over N layers",
        steps=(chain, one_layer, all_layers),
        assumptions=("Jacobians over the whole sequence; a token's own Jacobian is not enough",),
    )
