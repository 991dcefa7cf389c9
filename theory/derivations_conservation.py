"""What the growth recursion conserves, and how its closed form follows token by token.

The recursion carries, for every token, the mean square of the residual stream S_t forwards and of the gradient G_t
backwards. With uncorrelated tokens and uniform attention sum_t S_t G_t is the same at every place of the depth.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import sympy as sp  # pyright: ignore[reportMissingTypeStubs]

from theory.derivation import Derivation, derivation, line, register_derivation, substitution
from theory.derivations_expressions import SumOver, Transposed, Values, array, entry
from theory.derivations_growth import four_layers
from theory.derivations_numeric import STEP, Array, Rng, gelu
from theory.derivations_simulation import norm_rows, through_norm
from theory.kernels import gauss_hermite
from theory.sources import Source
from theory.symbols import symbol

_sp: Any = sp

OWN = Source(key="spikecheck", label="conservation in the growth recursion")
PRICE = Source(key="price1958theorem", label="derivative in a covariance")

N, T, sigma_e = symbol("n_layers"), symbol("n_tokens"), symbol("sigma_e")
b_ffn, c_VO = symbol("b_ffn"), symbol("c_VO")
growth = entry("|g_0|/|g_N|", r"\frac{\| g_0 \|}{\| g_N \|}")
slope, slopes = entry("dkappa/dc", r"\frac{d\kappa}{dc}"), entry("E[F'(z) F'(z')]", r"\mathbb{E}[F'(z) F'(z')]")
square, square_slope = entry("E[F(z)^2]", r"\mathbb{E}[F(z)^2]"), entry("E[F'(z)^2]", r"\mathbb{E}[F'(z)^2]")
variance, token, s_t = entry("q"), entry("t"), entry("s_t")
S_l, S_next, G_l, G_next = array("S_l"), array("S_{l+1}"), array("G_l"), array("G_{l+1}")
diagonal, squares = array("diag(S_l)", r"\mathrm{diag}(S_l)"), array("P^o2", r"P^{\circ 2}")
one = array("ones", r"\mathbf{1}")

WIDTH, COUNT, DRAWS = 128, 6, 24
ACCURACY = f"within 10 % at d = {WIDTH} and {COUNT} tokens, mean of {DRAWS} draws"


def _kernel(rng: Rng) -> Values:
    """GELU's kernel by quadrature: its derivative in the covariance, and the mean product of slopes."""
    q, q_other = rng.uniform(0.5, 1.5, 2)
    c = float(rng.uniform(-0.5, 0.9)) * np.sqrt(q * q_other)
    nodes, weights = gauss_hermite()

    def kappa(c: Any) -> Any:
        z = np.sqrt(q) * nodes[:, None]
        other = c / np.sqrt(q) * nodes[:, None] + np.sqrt(q_other - c * c / q) * nodes
        return weights @ (gelu(z) * gelu(other)) @ weights

    def derivative(z: Array) -> Array:
        return np.imag(gelu(z + 1j * STEP)) / STEP

    z = np.sqrt(q) * nodes[:, None]
    other = c / np.sqrt(q) * nodes[:, None] + np.sqrt(q_other - c * c / q) * nodes
    return {
        slope: float(np.imag(kappa(c + 1j * STEP))) / STEP,
        slopes: float(weights @ (derivative(z) * derivative(other)) @ weights),
    }


def _relu(rng: Rng) -> Values:
    """ReLU's mean squares: half of a normal variable's."""
    q = float(rng.uniform(0.1, 4))
    nodes, weights = gauss_hermite()  # polynomials on a half-line: by symmetry half of the whole
    return {square: float(weights @ (q * nodes**2)) / 2, square_slope: float(np.sum(weights)) / 2, variance: q}


def _attend(rng: Rng) -> Values:
    """Uniform attention on independent tokens of different sizes, forwards and backwards, means over draws."""
    std = 0.9 / np.sqrt(WIDTH)
    mean_of_past = np.tril(np.ones((COUNT, COUNT))) / np.arange(1, COUNT + 1)[:, None]
    sizes, back = rng.uniform(0.5, 2, (COUNT, 1)), rng.uniform(0.5, 2, (COUNT, 1))
    totals = {name: np.zeros((COUNT, 1)) for name in (S_l, S_next, G_l, G_next)}
    for _ in range(DRAWS):
        x, g = sizes * rng.normal(0, 1, (COUNT, WIDTH)), back * rng.normal(0, 1, (COUNT, WIDTH))
        mix = rng.normal(0, std, (WIDTH, WIDTH)) @ rng.normal(0, std, (WIDTH, WIDTH))
        u, scale = norm_rows(x)
        after = x + mean_of_past @ u @ mix
        before = g + through_norm(mean_of_past.T @ g @ mix.T, u, scale)
        for name, rows in ((S_l, x), (S_next, after), (G_l, before), (G_next, g)):
            totals[name] += np.mean(rows**2, axis=1, keepdims=True) / DRAWS
    return {
        **totals,
        **{squares: mean_of_past**2, one: np.ones((COUNT, 1)), c_VO: (WIDTH * std * std) ** 2},
        diagonal: np.diag(totals[S_l][:, 0]),
    }


def _recursion(rng: Rng, *, attention: bool = True) -> Values:
    """The recursion itself on three layers, at uncorrelated tokens and with the final norm's gradient."""
    count, layers, start = int(rng.integers(1, 7)), 3, float(rng.uniform(0.3, 1))
    gain, fed = (float(rng.uniform(0.1, 1)) if attention else 0.0), float(rng.uniform(0.1, 1))
    weights = (np.tril(np.ones((count, count))) / np.arange(1, count + 1)[:, None]) ** 2
    stream, places = np.full((count, 1), start**2), []
    for _ in range(layers):
        for half in (gain * weights, fed * np.eye(count)):
            places.append((stream, half))
            stream = stream + half @ np.ones((count, 1))
    gradient = 1 / stream
    last, pairs = gradient, []
    for before, half in reversed(places):
        after, gradient = gradient, gradient + half.T @ gradient / before
        pairs.append((before, before + half @ np.ones((count, 1)), gradient, after))
    at = pairs[int(rng.integers(len(pairs)))]
    by_token = [{token: float(t + 1), s_t: float(np.sqrt(stream[t, 0]))} for t in range(count)]
    return {
        **{S_l: at[0], S_next: at[1], G_l: at[2], G_next: at[3]},
        **{growth: float(np.sqrt(np.sum(gradient) / np.sum(last))), T: count, N: layers, sigma_e: start},
        **{c_VO: gain, b_ffn: fed, token: by_token},
    }


def _last_token(rng: Rng) -> Values:
    values = _recursion(rng)
    return {**values, **values[token][-1]}


def _no_attention(rng: Rng) -> Values:
    return _recursion(rng, attention=False)


def _simulated(rng: Rng) -> Values:
    values = dict(four_layers(rng))
    return values | {token: [{token: float(t + 1)} for t in range(int(values[T]))]}


@cache
def conservation_proof(count: int = 3) -> Any:
    """Sympy: sum of S_l G_l less sum of S_next G_next for any S, G and squared probabilities."""
    S, G = (_sp.Matrix(_sp.symbols(f"{letter}_1:{count + 1}", positive=True)) for letter in "SG")
    weights = _sp.Matrix(count, count, lambda t, j: _sp.Symbol(f"p_{t}{j}", positive=True) if j <= t else 0)
    after = S + c_VO * weights * _sp.ones(count, 1)
    before = _sp.Matrix([G[j] + c_VO * (weights.T * G)[j] / S[j] for j in range(count)])
    return _sp.expand((S.T * before)[0] - (after.T * G)[0])


@register_derivation
def growth_conservation() -> Derivation:
    """The closed form of the growth recursion, token by token."""
    recursion = partial(line, source=OWN, sample=_recursion)
    attend = partial(line, source=OWN, sample=_attend, tolerance=0.1, accuracy=ACCURACY)
    price = line(
        slope,
        "=",
        slopes,
        "Price's theorem",
        "kappa(c) = E[F(z) F(z')], (z, z') normal with covariance c: two integrations by parts. So the backward kernel "
        "is the derivative of the forward one, for every activation.",
        source=PRICE,
        sample=_kernel,
    )
    euler = line(
        square,
        "=",
        variance * square_slope,
        "Euler's theorem",
        "z F'(z) = F(z) for ReLU and the identity, z of variance q. So a feed-forward adds b_F to S_t forwards, and "
        "b_F G_t to S_t G_t backwards.",
        source=OWN,
        sample=_relu,
    )
    forward = attend(
        S_next,
        "~",
        S_l + c_VO * squares * one,
        "independent weights",
        "Uniform attention over uncorrelated tokens adds c_V c_O sum_j p_tj^2 = c_V c_O / t to token t.",
    )
    backward = attend(
        diagonal * G_l,
        "~",
        diagonal * G_next + c_VO * Transposed(squares) * G_next,
        "independent weights",
        "Token j gathers sum_t p_tj^2 G_t, over its own S_j by the norm.",
    )
    conserved = recursion(
        Transposed(S_l) * G_l,
        "=",
        Transposed(S_next) * G_next,
        "transposition",
        "1' diag(S_l) G_l: what attention adds to S forwards it adds to S'G backwards. Exact in the recursion, for any "
        "probabilities; token by token it does not hold.",
        proof=conservation_proof,
    )
    start = recursion(
        growth,
        "=",
        _sp.sqrt(T / (sigma_e**2 * SumOver(1 / s_t**2, token))),
        "both ends",
        "The final norm makes G_N,t = 1/s_t^2, so the conserved sum is T; at the start it is sigma_e^2 sum_t G_0,t.",
    )
    stream = recursion(
        s_t,
        "=",
        _sp.sqrt(sigma_e**2 + N * (b_ffn + c_VO / token)),
        "solution of the recurrence",
        "N layers.",
        sample=_last_token,
    )
    conclusion = substitution(
        *(start, stream),
        source=OWN,
        explanation="A harmonic mean over the tokens.",
        sample=_recursion,
    )
    simulated = line(
        growth,
        "~",
        conclusion.right,
        "large width",
        "Against a random network with LayerNorm, ReLU and uniform attention.",
        source=OWN,
        sample=_simulated,
        tolerance=0.1,
        accuracy="within 10 % at d = 128, 16 tokens and 4 layers",
    )
    mean = recursion(
        growth,
        "<=",
        _sp.sqrt(1 + N * (b_ffn + c_VO * _sp.harmonic(T) / T) / sigma_e**2),
        "harmonic below arithmetic mean",
        "The derivation closed-form, which averages S over the tokens: never below. They agree without attention.",
        tight=_no_attention,
        proof=lambda: closed_form_with_branches() - _sp.sqrt(1 + N * (b_ffn + c_VO * _sp.harmonic(T) / T) / sigma_e**2),
    )
    return Derivation(
        name="growth-conservation",
        title="What the growth recursion conserves",
        steps=(price, euler, forward, backward, conserved, start, stream, conclusion, simulated, mean),
        assumptions=(
            "lines 2 to 10: ReLU or identity, tokens uncorrelated, attention uniform, eps = 0",
            "d large: the factor 1 - 2/d of LayerNorm's backward pass is left out",
        ),
    )


def closed_form_with_branches() -> Any:
    """The closed form with the feed-forward's share left as b_F."""
    d, d_ffn, sigma_1, sigma_2 = (symbol(name) for name in ("d", "d_ffn", "sigma_1", "sigma_2"))
    found = derivation("closed-form").conclusion.right
    return found.subs(d_ffn, 2 * b_ffn / (sigma_1**2 * sigma_2**2 * d))
