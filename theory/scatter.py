"""What a finite width adds: how much a token's mean square scatters, and what the norms make of it on the way back."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from theory.architecture import Activation, Architecture
from theory.kernels import activation_function, activation_slope, gauss_hermite
from theory.logits import lost_directions, norm_gain

Array = NDArray[np.float64]
OUTPUT_NORMS = ("peri-ln", "branch-ln")


def scatter(architecture: Architecture, attention: Array, feedforward: Array) -> Array:
    r"""Relative variance of a token's mean square after an update at finite width, of a token whose scale was fixed.

    .. math:: v = \frac{2}{d}\left(1 - (1 - a)^2\right) + a_A^2 v_A + a_F^2 v_F

    Why: |x + f|^2 with branches f of share a = a_A + a_F has the cross term's 4 a (1 - a)/d and their own 2 a^2/d; the
        sums inside the branches add theirs (`inner_scatter`). Nearly: f's entries are normal given what W_O or W_2
        reads. Derivation `update-scatter`.

    Args:
        attention, feedforward: a_A and a_F, the branches' parts of the mean square.
    """
    a = architecture
    inner = attention**2 * inner_scatter(a, "attention") + feedforward**2 * inner_scatter(a, "feedforward")
    return _crossed(a, attention + feedforward) + inner


def stream_scatter(
    architecture: Architecture,
    before: Array,
    attention: Array,
    feedforward: Array,
    *,
    loose: tuple[float, float] = (1.0, 1.0),
    gates: float = 0.0,
) -> Array:
    """The same of a token whose mean square scattered before.

    Args:
        loose: of attention's and the feed-forward's own mean square, the part that no output norm fixes: eps in it.
        gates: relative variance of the squares of an expert's gates, from token to token.
    """
    a, share = architecture, attention + feedforward
    own = (attention * loose[0]) ** 2 * inner_scatter(a, "attention")
    own = own + (feedforward * loose[1]) ** 2 * (inner_scatter(a, "feedforward") + gates)
    return (1 - share) ** 2 * before + _crossed(a, share) + own


def _crossed(a: Architecture, share: Array) -> Array:
    return 2 / a.d_model * (1 - (1 - share) ** 2)


def inner_scatter(architecture: Architecture, name: str) -> float:
    r"""Relative variance of a branch's mean square by the sum over what is inside it.

    .. math:: v_A = \frac{2}{n}, \qquad v_F = \frac{\kappa - 1}{m}

    of n = n_kv d_head coordinates of values, which are normal, and of m hidden units h, kappa = E[h^4]/E[h^2]^2.
    """
    a = architecture
    if name == "attention":
        return 2 / (a.n_kv_heads * a.d_head)
    return (_hidden(a).kurtosis - 1) / units(a)


def post_norm(architecture: Architecture, attention: Array, feedforward: Array, *, first: bool) -> tuple[Array, float]:
    """E[1/s^2] over 1/E[s^2] of the norm after an update, and what the norm below lets through.

    The branches' share of the mean square is what fluctuates where a norm before has fixed the rest: s^2 has relative
    variance `scatter`, and LayerNorm takes 1/d of the branches' mean square. In the first layer everything does:
    d/(d-3) (LayerNorm) and d/(d-2). On its way down the shortcut the gradient has lost the direction of the norm
    above, whose squared cosine with that of the norm below is 1 - share. Derivation `post-norm-gain`.
    """
    a, share = architecture, attention + feedforward
    d, lost = a.d_model, lost_directions(a.norm)
    if first:
        gain = np.full(share.size, d / max(d - lost - 1, 1))
    else:
        gain = 1 + scatter(a, attention, feedforward) + (lost - 1) * share / d
    return gain, 1 - float(np.mean(share)) / d


def inner_loss(architecture: Architecture, name: str) -> float:
    r"""What a branch's gradient loses, to first order, below a norm that reads nothing but the branch.

    .. math:: \frac{1}{n} \text{ (attention)}, \qquad \frac{2\chi - 1}{m} \text{ (feed-forward)}

    Why: a gradient orthogonal to W_2 h has no part along h, chi/m of it over m units with slopes D, where chi =
        E[h^2 D^2]/(E[h^2] E[D^2]); and the norm divides by a length that goes with the slopes, by (chi - 1)/m. Of n =
        n_kv d_head values the slopes are 1. Derivation `output-norm-gain`.
    """
    a = architecture
    return 1 / (a.n_kv_heads * a.d_head) if name == "attention" else (2 * _hidden(a).overlap - 1) / units(a)


def own_gain(architecture: Architecture, name: str, lacking: float) -> float:
    r"""What a branch sends back of the square of a gradient along its own output, over what it does of another's.

    .. math:: \left(1 + \frac{n}{d}\right)\left(1 + \frac{d}{n}\right) \text{ (attention)}, \qquad
        1 + \frac{d}{m} \chi + \lambda^2 \text{ (feed-forward)}

    of n = n_kv d_head values, and m units with the chi of `inner_loss`. Why: W'W = E[W'W] + a rest as of independent
        weights. For W_2 h the mean is d/m of what that sends to h, where the slopes are large; of W_1' on it, the part
        along the input is a norm's to take, of square 1 for a ReLU and up to 3 for others. For W_O W_V the means are
        one another's rest: 1, n/d, d/n and 1. Derivation `own-gain`.

    Args:
        lacking: lambda, the share of eps in what the norm before the branch divides by; 1 without one.
    """
    a = architecture
    if name == "attention":
        values = a.n_kv_heads * a.d_head / a.d_model
        return (1 + values) * (1 + 1 / values)
    return 1 + _hidden(a).overlap * a.d_model / units(a) + lacking**2


def output_norm_gain(architecture: Architecture, name: str) -> float:
    r"""Backward variance gain of the norm of a branch's output, times its mean square.

    .. math:: g_d\, \frac{n - 1}{n - 2} \text{ (attention)}, \qquad
        g_d \left(1 + \frac{\kappa - 2\chi}{m}\right) \text{ (feed-forward)}

    with g_d the gain over d independent numbers: `inner_scatter` less `inner_loss`, to all orders of normal values.
        Derivation `output-norm-gain`.
    """
    a, outer = architecture, norm_gain(architecture.norm, architecture.d_model)
    if name == "attention":
        return outer * norm_gain("rmsnorm", a.n_kv_heads * a.d_head)
    return outer * max(1 + inner_scatter(a, name) - inner_loss(a, name), 0.0)


def output_norm_error(architecture: Architecture, attention: float, feedforward: float) -> float:
    """What `output_norm_gain` leaves out of the square of a gradient that has these shares through its branches.

    The next order: E[1/|h|^2] E[|h|^2] is 1 + v + v^2 + .. with v = `inner_scatter` of a chi-square.
    """
    a = architecture
    if a.block not in OUTPUT_NORMS:
        return 0.0
    return attention * inner_scatter(a, "attention") ** 2 + feedforward * inner_scatter(a, "feedforward") ** 2


def units(architecture: Architecture) -> int:
    """Hidden units that a token passes: of all experts that it is sent to."""
    a = architecture
    return a.d_ffn * (a.experts_per_token if a.n_experts else 1)


class Hidden(NamedTuple):
    """Of a hidden unit h with slopes D: kurtosis = E[h^4]/E[h^2]^2, overlap = E[h^2 D^2]/(E[h^2] E[D^2])."""

    kurtosis: float
    overlap: float


def _hidden(a: Architecture) -> Hidden:
    return hidden_moments(a.activation, a.gated, a.stds.ffn_in**2 * a.d_model)


@lru_cache(maxsize=64)
def hidden_moments(activation: Activation, gated: bool, variance: float) -> Hidden:
    """Moments of F(z), or F(z) z', of normal z, z' with this variance; those of a linear one where they vanish.

    D^2 is the square of the gradient by z, and by z', over its weights' variance.

    >>> [round(x, 6) for x in hidden_moments("relu", False, 1.0)]
    [6.0, 2.0]
    >>> round(hidden_moments("identity", True, 1.0).overlap, 6)
    3.0
    """
    nodes, weights = gauss_hermite()
    size = min(max(variance, 1e-12), 1e6)
    z = math.sqrt(size) * nodes
    square, slope = activation_function(activation, z) ** 2, size * activation_slope(activation, z) ** 2
    mean, mean_slope, fourth, both = (float(values @ weights) for values in (square, slope, square**2, square * slope))
    if mean <= 0:
        return Hidden(9.0, 3.0) if gated else Hidden(3.0, 1.0)
    if gated:
        mean_slope, fourth, both = mean_slope + mean, 3 * fourth, 3 * both + fourth
    return Hidden(fourth / mean**2, both / (mean * mean_slope))
