"""Small networks in numpy, with Jacobians by complex steps: what the checks of derivations compare with.

Nothing here uses a formula of a derivation. A complex step is exact to rounding, since no difference is taken:
f(x + ih) = f(x) + ih f'(x) + O(h^2), with h = 1e-20.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Rng = np.random.Generator
STEP = 1e-20


def jacobian(function: Callable[[Array], Array], point: Array) -> Array:
    """Jacobian of `function` between arrays of any shape, flattened: (outputs, inputs)."""
    columns: list[Array] = []
    for place in range(point.size):
        moved = point.astype(np.complex128).reshape(-1)
        moved[place] += 1j * STEP
        columns.append(np.imag(function(moved.reshape(point.shape))).reshape(-1) / STEP)
    return np.stack(columns, axis=1)


def column_jacobian(function: Callable[[Array], Array], point: Array) -> Array:
    """The same for a function that maps each column of a matrix by itself, at the column `point`; one call."""
    return np.imag(function(point + 1j * STEP * np.eye(point.size))) / STEP


def opnorm(matrix: Array) -> float:
    """Spectral norm."""
    return float(np.linalg.norm(matrix, 2))


def layer_norm(x: Array, eps: float = 0.0) -> Array:
    """(x - mean) / sqrt(var + eps) along the first axis, without gain and bias."""
    centred = x - np.mean(x, axis=0)
    return centred / np.sqrt(np.mean(centred * centred, axis=0) + eps)


def rms_norm(x: Array, eps: float = 0.0) -> Array:
    """x / sqrt(mean x^2 + eps) along the first axis, without gain."""
    return x / np.sqrt(np.mean(x * x, axis=0) + eps)


def identity(z: Array) -> Array:
    return z


def relu(z: Array) -> Array:
    return np.where(np.real(z) > 0, z, 0)


def silu(z: Array) -> Array:
    return z / (1 + np.exp(-z))


def gelu(z: Array) -> Array:
    from scipy.special import erf  # pyright: ignore[reportMissingTypeStubs]

    return z / 2 * (1 + erf(z / np.sqrt(2)))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"identity": identity, "relu": relu, "gelu": gelu, "silu": silu}


def chi_square_mean(function: Callable[[Any], Any], degrees: int) -> float:
    """Mean of a function of a chi-square variable, by quadrature over its density."""
    from scipy import integrate  # pyright: ignore[reportMissingTypeStubs]

    scale = degrees / 2 * math.log(2) + math.lgamma(degrees / 2)

    def integrand(q: float) -> float:
        return float(function(q)) * math.exp((degrees / 2 - 1) * math.log(q) - q / 2 - scale)

    spread = 12 * math.sqrt(2 * degrees) + 60  # beyond, the density is below 1e-16
    ends = (max(1e-12, degrees - spread), degrees, degrees + spread)
    pieces: Any = [integrate.quad(integrand, *part, epsabs=1e-14, epsrel=1e-12) for part in pairwise(ends)]
    return float(sum(value for value, _ in pieces))


def softmax(logits: Array, visible: Array | None = None) -> Array:
    """Softmax along the last axis, over the visible places."""
    weights = np.exp(logits - np.max(np.real(logits), axis=-1, keepdims=True))
    if visible is not None:
        weights = np.where(visible, weights, 0)
    return weights / np.sum(weights, axis=-1, keepdims=True)


def rotations(n_tokens: int, d_head: int, turning: int) -> Array:
    """(T, d_h, d_h) rotary matrices: the pair i of token t turns by t / 10^i; beyond `turning` coordinates none."""
    turns = np.tile(np.eye(d_head), (n_tokens, 1, 1))
    for t in range(n_tokens):
        for pair in range(turning // 2):
            angle = t / 10**pair
            cos, sin = np.cos(angle), np.sin(angle)
            turns[t, 2 * pair : 2 * pair + 2, 2 * pair : 2 * pair + 2] = [[cos, -sin], [sin, cos]]
    return turns


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Softmax attention; causal unless told, and over the last `window` tokens if that is not 0.

    W_Q: (h, d_h, d). W_K, W_V: (h/g, d_h, d). W_O: (d, h d_h). b_Q: (h, d_h). b_K, b_V: (h/g, d_h).
    turns: (T, d_h, d_h) rotations of queries and keys; identities without RoPE.
    """

    W_Q: Array
    W_K: Array
    W_V: Array
    W_O: Array
    b_Q: Array
    b_K: Array
    b_V: Array
    turns: Array
    causal: bool = True
    window: int = 0

    @property
    def group(self) -> int:
        return self.W_Q.shape[0] // self.W_K.shape[0]

    @property
    def d_head(self) -> int:
        return self.W_Q.shape[1]

    def queries(self, u: Array) -> Array:
        """(h, T, d_h), rotated."""
        return np.einsum("tef,htf->hte", self.turns, np.einsum("hed,td->hte", self.W_Q, u) + self.b_Q[:, None])

    def keys(self, u: Array) -> Array:
        """(h, T, d_h), rotated, repeated over the group."""
        keys = np.einsum("tef,htf->hte", self.turns, np.einsum("hed,td->hte", self.W_K, u) + self.b_K[:, None])
        return np.repeat(keys, self.group, axis=0)

    def values(self, u: Array) -> Array:
        """(h, T, d_h), repeated over the group."""
        return np.repeat(np.einsum("hed,td->hte", self.W_V, u) + self.b_V[:, None], self.group, axis=0)

    def logits(self, u: Array) -> Array:
        """(h, T, T)."""
        return np.einsum("hte,hje->htj", self.queries(u), self.keys(u)) / np.sqrt(self.d_head)

    def probabilities(self, u: Array) -> Array:
        """(h, T, T), zero where a token does not see."""
        return softmax(self.logits(u), self.seen(len(u)))

    def seen(self, n_tokens: int) -> Array:
        """(T, T), whether token t sees token j."""
        everything = np.ones((n_tokens, n_tokens), dtype=bool)
        seen = np.tril(everything) if self.causal else everything
        return np.triu(seen, 1 - self.window) if self.window else seen

    def heads(self, u: Array) -> Array:
        """(T, h d_h): the heads' outputs side by side."""
        mixed = np.einsum("htj,hje->the", self.probabilities(u), self.values(u))
        return mixed.reshape(len(u), -1)

    def __call__(self, u: Array) -> Array:
        """(T, d) to (T, d)."""
        return self.heads(u) @ self.W_O.T


def random_attention(
    rng: Rng, *, n_tokens: int, d: int, heads: int, kv_heads: int, d_head: int, turning: int, scale: float = 1.0
) -> Attention:
    """Normal weights of std scale / sqrt(d), standard normal biases; `turning` of a head's coordinates are rotary."""
    std = scale / np.sqrt(d)
    return Attention(
        W_Q=rng.normal(0, std, (heads, d_head, d)),
        W_K=rng.normal(0, std, (kv_heads, d_head, d)),
        W_V=rng.normal(0, std, (kv_heads, d_head, d)),
        W_O=rng.normal(0, std, (d, heads * d_head)),
        b_Q=rng.normal(0, 1, (heads, d_head)),
        b_K=rng.normal(0, 1, (kv_heads, d_head)),
        b_V=rng.normal(0, 1, (kv_heads, d_head)),
        turns=rotations(n_tokens, d_head, turning),
    )
