"""Why a shortcut of std 1 and not more: growth and the branches' share of the stream are two faces of one number."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import sympy as sp  # pyright: ignore[reportMissingTypeStubs]

from theory.derivation import Derivation, line, register_derivation
from theory.derivations_expressions import Norm, SumOver, Values, array, entry
from theory.derivations_numeric import STEP, Array, Rng, column_jacobian, layer_norm, relu
from theory.derivations_simulation import norm_rows, rms, run
from theory.sources import Source
from theory.symbols import symbol

_sp: Any = sp

OWN = Source(key="spikecheck", label="elasticity of the closed form")
PAPER = Source(key="takase2025spike", label="eq. (15)")

N, T, d, sigma_e, b = (symbol(name) for name in ("n_layers", "n_tokens", "d", "sigma_e", "branch_variance"))
growth = entry("|g_0|/|g_N|", r"\frac{\| g_0 \|}{\| g_N \|}")
share, knee, place = entry("rho", r"\rho"), entry("sigma_k", r"\sigma_k"), entry("l")
elasticity = entry(
    "dlog(|g_0|/|g_N|)/dlog(sigma_e)", r"\frac{d \log (\| g_0 \| / \| g_N \|)}{d \log \sigma_e}", signed=True
)
at_knee = entry("growth(sigma_k)", r"\mathrm{growth}(\sigma_k)")
half = entry("elasticity(sigma_k)", r"\mathrm{elasticity}(\sigma_k)", signed=True)
at_one = entry("growth(1)", r"\mathrm{growth}(1)")
written, c = entry("N b"), entry("c")
depth = entry("l=1..N", "l=1..N")
other, own_logit = (
    entry("std(l_other)", r"\mathrm{std}(\ell_{other})"),
    entry("mean(l_own)", r"\mathrm{mean}(\ell_{own})"),
)
_AT_X, _AT_CX = array("J(x)"), array("J(cx)")

SIMULATED = "within 10 % at d = 128, 48 independent tokens and 6 feed-forward half-layers"


def _branch(rng: Rng) -> Values:
    """A normalised branch's Jacobian at x and at c x."""
    first, second, x = rng.normal(0, 1, (12, 5)), rng.normal(0, 1, (5, 12)), rng.normal(0, 1, (5, 1))
    factor = float(rng.uniform(0.2, 5))

    def branch(x: Array) -> Array:
        return second @ relu(first @ layer_norm(x))

    return {_AT_X: column_jacobian(branch, x), _AT_CX: column_jacobian(branch, factor * x), c: factor}


def _network(rng: Rng) -> Values:
    """A random Pre-LN network; what the branches wrote is the stream less the embedding."""
    start, gain = float(rng.uniform(0.8, 2)), 0.5
    found = run(rng, start=start, gain=gain)
    last = found.stream
    layers = len(found.branch)
    return {
        **{growth: found.gradients[0] / found.gradients[-1], N: layers, sigma_e: start, b: gain},
        **{share: rms(last - found.embedding) ** 2 / rms(last) ** 2},
    }


def _tied(rng: Rng) -> Values:
    """Logits of a tied head: rows of the table (the embeddings) with the normalised stream."""
    start, gain = float(rng.uniform(0.8, 2)), 0.5
    found = run(rng, start=start, gain=gain)
    last = found.stream
    logits = norm_rows(last)[0] @ found.embedding.T
    count, width = last.shape
    return {
        **{own_logit: float(np.mean(np.diagonal(logits))), other: rms(logits[~np.eye(count, dtype=bool)])},
        **{d: width, sigma_e: start, share: rms(last - found.embedding) ** 2 / rms(last) ** 2},
    }


def _formula(rng: Rng) -> Values:
    """The closed form as a function of sigma_e, its elasticity by a complex step, and where that is -1/2."""
    from scipy.optimize import brentq  # pyright: ignore[reportMissingTypeStubs]

    layers, gain, start = int(rng.integers(1, 50)), float(rng.uniform(0.01, 1)), float(rng.uniform(0.05, 3))

    def log_growth(log_start: Any) -> Any:
        return np.log(np.sqrt(1 + layers * gain / np.exp(log_start) ** 2))

    def slope(log_start: float) -> float:
        return float(np.imag(log_growth(log_start + 1j * STEP))) / STEP

    root: Any = brentq(lambda log_start: slope(log_start) + 0.5, -12, 12, xtol=1e-14)
    return {
        **{N: layers, b: gain, sigma_e: start, elasticity: slope(np.log(start)), knee: float(np.exp(root))},
        **{at_knee: float(np.exp(log_growth(root))), half: slope(root)},
        share: layers * gain / (layers * gain + start**2),
    }


def _turning(rng: Rng, *, small: bool = False) -> Values:
    values = dict(_formula(rng))
    values[b] *= 1e-5 if small else 1.0
    return values | {depth: [{place: float(layer)} for layer in range(1, int(values[N]) + 1)]}


def _paper(rng: Rng) -> Values:
    """The paper's initialisation, matrix by matrix."""
    width, layers, tokens = int(rng.integers(64, 4096)), int(rng.integers(1, 96)), int(rng.integers(1, 4096))
    std = np.sqrt(2 / (5 * width))
    out = std / np.sqrt(2 * layers)
    fed = sum(out**2 for _ in range(4 * width)) * (sum(std**2 for _ in range(width)) / 2)
    attended = width * std**2 * width * out**2 * np.mean(1 / np.arange(1, tokens + 1))
    total = layers * float(fed + attended)
    return {written: total, T: tokens, knee: total**0.5, at_one: float(np.sqrt(1 + total))}


@register_derivation
def shortcut_scale() -> Derivation:
    """Why a shortcut of std 1 and not more."""
    exact = partial(line, source=OWN, sample=_formula)
    simulated = partial(line, source=OWN, sample=_network, tolerance=0.1, accuracy=SIMULATED)
    whole = N * b + sigma_e**2
    tokens = _sp.harmonic(T) / T
    falls = line(
        Norm(_AT_CX),
        "=",
        Norm(_AT_X) / c,
        "scale invariance of the norm",
        "What falls first: a branch reads norm(x), so its Jacobian is that at x over c, the 1/sigma_x' of eq. (15).",
        source=PAPER,
        sample=_branch,
    )
    closed = simulated(
        growth,
        "~",
        _sp.sqrt(1 + N * b / sigma_e**2),
        "closed form",
        "What falls over the depth; see the derivation closed-form.",
    )
    rises = simulated(
        share,
        "~",
        N * b / whole,
        "variance of a sum",
        "rho is the branches' share of the last stream: what the network, and not the embedding, has written.",
    )
    both = simulated(
        growth,
        "~",
        1 / _sp.sqrt(1 - share),
        "the two lines above",
        "Growth is bought with the branches' share and with nothing else: no scale has little of one and much of the "
        "other.",
        proof=lambda: (1 / (1 - rises.right)) - closed.right**2,
    )
    slope = exact(
        elasticity,
        "=",
        -N * b / whole,
        "derivative",
        "The elasticity of growth is -rho: from -1 where branches outweigh the embedding to 0 where they vanish.",
        proof=lambda: sigma_e * _sp.diff(_sp.log(closed.right), sigma_e) + N * b / whole,
    )
    at = exact(
        knee, "=", _sp.sqrt(N * b), "the knee", "Where the elasticity is -1/2: the embedding weighs as much as all."
    )
    halved = exact(
        half,
        "=",
        -_sp.Rational(1, 2),
        "substitution",
        "Far left of the knee a doubled std halves growth; right of it it soon buys nothing.",
        proof=lambda: slope.right.subs(sigma_e, _sp.sqrt(N * b)) + _sp.Rational(1, 2),
    )
    root_two = exact(
        at_knee,
        "=",
        _sp.sqrt(2),
        "substitution",
        "The most that is left to gain at the knee is a factor sqrt 2, whatever the architecture.",
        proof=lambda: closed.right.subs(sigma_e, _sp.sqrt(N * b)) - _sp.sqrt(2),
    )
    turning = exact(
        SumOver(b / (sigma_e**2 + place * b), depth),
        "<=",
        _sp.log(1 + N * b / sigma_e**2),
        "sum below an integral",
        "Effective depth: each layer replaces b/s_l^2 of the stream, all layers at most 2 log(growth). It falls to 0.",
        sample=_turning,
        tight=partial(_turning, small=True),
    )
    noise = simulated(
        other,
        "~",
        sigma_e * _sp.sqrt(d),
        "independent rows",
        "Tied head, multiplier 1: a token's logits grow like sigma_e (an untied head does not see sigma_e, since the "
        "final norm comes before it; with a multiplier the table keeps its small std).",
        sample=_tied,
        tolerance=0.15,
        accuracy=SIMULATED.replace("10 %", "15 %") + ": ReLU branches share a direction, which moves a row together",
    )
    signal = simulated(
        own_logit,
        "~",
        sigma_e * d * _sp.sqrt(1 - share),
        "projection on the embedding",
        "And the token predicts itself, sqrt(d (1 - rho)) deviations above the rest, which tends to sqrt(d).",
        sample=_tied,
    )
    paper = line(
        written,
        "=",
        _sp.Rational(4, 25) + _sp.Rational(2, 25) * tokens,
        "the paper's initialisation",
        "N (2/(5d) / (2N)) 4d (1/5) for the feed-forward, half of that times H_T/T for attention: no width, no depth.",
        source=PAPER,
        sample=_paper,
    )
    paper_knee = line(
        knee,
        "=",
        _sp.Rational(2, 5) * _sp.sqrt(1 + tokens / 2),
        "root of the line above",
        "The knee is at 0.4: Vanilla's sqrt(2/(5d)) lies far left of it, Scaled Embed's 0.632 and Embed LN's 1 right.",
        source=OWN,
        sample=_paper,
        proof=lambda: paper.right - (_sp.Rational(2, 5) * _sp.sqrt(1 + tokens / 2)) ** 2,
    )
    at_unit = line(
        at_one,
        "=",
        _sp.sqrt(_sp.Rational(29, 25) + _sp.Rational(2, 25) * tokens),
        "sigma_e = 1",
        "Growth 1.08 with branches that write 14 % of the stream. At std 2 growth is 1.02 and their share 4 %: nothing "
        "is left to gain, and the branches must grow before they are heard. Training moves the knee, as b grows.",
        source=OWN,
        sample=_paper,
        proof=lambda: 1 + paper.right - (_sp.Rational(29, 25) + _sp.Rational(2, 25) * tokens),
    )
    return Derivation(
        name="shortcut-scale",
        title="Why a shortcut of std 1 and not more",
        steps=(
            *(falls, closed, rises, both, slope, at, halved, root_two),
            *(turning, noise, signal, paper, paper_knee, at_unit),
        ),
        assumptions=(
            "at initialisation; the closed form's assumptions (tokens uncorrelated, attention uniform, ReLU)",
            "the trade is derived, not the best point on it: what share training needs is not said at initialisation",
            "lines 12 to 14: weights N(0, 2/(5d)), output matrices times 1/sqrt(2N), d_ffn = 4d",
        ),
    )
