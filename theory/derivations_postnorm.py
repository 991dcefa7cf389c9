"""Norms after the addition: Post-LN against Pre-LN, and DeepNorm."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import sympy as sp  # pyright: ignore[reportMissingTypeStubs]

from theory.derivation import Derivation, Step, line, register_derivation
from theory.derivations_expressions import ProductOver, SumOver, Values, entry
from theory.derivations_layouts import ACCURACY, N, added, alpha, b, b_back, g_l, g_next, growth, numbers, sigma_e
from theory.derivations_numeric import Rng, opnorm
from theory.derivations_simulation import TOKENS, Pass, norm_rows, run
from theory.sources import Source

_sp: Any = sp

OWN = Source(key="spikecheck", label="variance calculus of layouts")
XIONG = Source(key="xiong2020layernorm", label="theorem 1")
DEEPNET = Source(key="wang2022deepnet", label="DeepNorm")

DRAWS, WIDE = 6, 192
place = entry("l")
upto, below = entry("l=1..N", "l=1..N"), entry("l=0..N-1", "l=0..N-1")
M, b_0, b_0_back = entry("M"), entry("b_0"), entry("b_0'", "b_0'")
pre_ratio = entry("[|dW_2^1|/|dW_2^N|]_pre", r"\left[ \frac{\| \partial W_2^1 \|}{\| \partial W_2^N \|} \right]_{pre}")
post_ratio = entry(
    "[|dW_2^1|/|dW_2^N|]_post", r"\left[ \frac{\| \partial W_2^1 \|}{\| \partial W_2^N \|} \right]_{post}"
)
J, J_l, s_added = entry("|J|", r"\| J \|"), entry("|J_l|", r"\| J_l \|"), entry("s_{+,l}", "s_{+,l}")
last_ratio = entry("|dW_2^N|_pre/|dW_2^N|_post", r"\frac{\| \partial W_2^N \|_{pre}}{\| \partial W_2^N \|_{post}}")


def _post(rng: Rng, *, smooth: bool = False, keep: float = 1.0, gain: float = 0.5) -> Values:
    """Post-LN; smooth: an activation whose slope and output do not balance, b' = 4b/3."""
    found = run(rng, layout="post", start=1.0, gain=gain, keep=keep, smooth=smooth)
    return numbers(found, branch_variance=gain, residual_scale=keep)


def _unbalanced(rng: Rng) -> Values:
    return _post(rng, smooth=True)


def _weights(rng: Rng) -> Values:
    """Mean over draws of what Pre-LN and Post-LN, from the same unit stream, make of the weights' gradients."""
    pre = [run(rng, start=1.0) for _ in range(DRAWS)]
    post = [run(rng, layout="post", start=1.0) for _ in range(DRAWS)]

    def mean(place: int, passes: list[Pass]) -> float:
        return float(np.mean([one.weights[place] for one in passes]))

    return {
        **{pre_ratio: mean(0, pre) / mean(-1, pre), post_ratio: mean(0, post) / mean(-1, post)},
        **{last_ratio: mean(-1, pre) / mean(-1, post), N: len(pre[0].weights), sigma_e: 1.0, b: 0.5},
    }


def _depths(rng: Rng, *, small: bool = False) -> Values:
    """Numbers for sums and products over the depth, b' at least b."""
    layers, start = int(rng.integers(1, 40)), float(rng.uniform(0.3, 1.5))
    gain = float(rng.uniform(0.1, 1)) * (1e-4 if small else 1)
    more = float(rng.uniform(1, 2)) * gain
    keep = float(rng.uniform(1, 3))
    from_one = [{place: float(depth)} for depth in range(1, layers + 1)]
    from_zero = [{place: float(depth)} for depth in range(layers)]
    norm = float(rng.uniform(1, 3)) * (1e-4 if small else 1)
    return {
        **{N: layers, sigma_e: start, b: gain, b_back: more, alpha: keep, upto: from_one, below: from_zero, J: norm},
        **{M: layers, b_0: gain, b_0_back: more},
    }


def _small(rng: Rng) -> Values:
    return _depths(rng, small=True)


def _post_norms(rng: Rng, *, idle: bool = False) -> Values:
    """A small Post-LN network with its half-layers' norms; idle: branches of zero, and a gradient that norms keep."""
    width, layers = 16, 3
    x = norm_rows(rng.normal(0, 1, (1, width)))[0]
    maps: list[Values] = []
    total = np.eye(width)
    for _ in range(layers):
        first, second = rng.normal(0, 0.5, (width, 4 * width)), rng.normal(0, 0.0 if idle else 0.2, (4 * width, width))
        is_open = (x @ first > 0).astype(float)
        branch = (first * is_open) @ second  # transposed: tokens are rows
        after, std = norm_rows(x + (x @ first * is_open) @ second)
        norm = (np.eye(width) - 1 / width - after.T @ after / width) / float(std[0, 0])
        total = total @ (np.eye(width) + branch) @ norm
        maps.append({J_l: opnorm(branch), s_added: float(std[0, 0])})
        x = after
    gradient = rng.normal(0, 1, (width, 1))
    if idle:
        gradient = gradient - gradient.mean() - x.T * float((x @ gradient)[0, 0]) / width
    return {growth: float(np.linalg.norm(total @ gradient) / np.linalg.norm(gradient)), upto: maps}


def _idle(rng: Rng) -> Values:
    return _post_norms(rng, idle=True)


def _branch_norm(rng: Rng) -> Values:
    """Norm of one wide ReLU branch at a normalised token, and its mean square output over tokens."""
    first, second = rng.normal(0, 1, (4 * WIDE, WIDE)), rng.normal(0, 1, (WIDE, 4 * WIDE))
    z = first @ norm_rows(rng.normal(0, 1, (TOKENS, WIDE)))[0].T
    return {J: opnorm(second * (z[:, 0] > 0) @ first), b: float(np.mean((second @ np.maximum(z, 0)) ** 2))}


def _bounds_over_depth() -> tuple[Step, ...]:
    """What the paper's own bound, a product over half-layers, says of the two."""
    own = partial(line, source=OWN)
    bound = own(
        growth,
        "<=",
        ProductOver((1 + J_l) / s_added, upto),
        "sub-multiplicativity",
        "The paper's product in Post-LN: a half-layer's norm is at most 1 + |J_l|, the norm after it divides by s_+.",
        sample=_post_norms,
        tight=_idle,
    )
    equal = own(
        ProductOver((1 + J) / _sp.sqrt(1 + b), upto),
        "=",
        ((1 + J) / _sp.sqrt(1 + b)) ** N,
        "equal half-layers",
        "The stream has std 1 at every depth, so nothing shrinks. A norm is at least its root mean square: (1 + |J|)^2 "
        "is above 1 + b', so the bound is exponential in the depth, whatever b.",
        sample=_depths,
    )
    pre = own(
        ProductOver(1 + J / _sp.sqrt(sigma_e**2 + place * b), below),
        "<=",
        _sp.exp(J / sigma_e + 2 * J * (_sp.sqrt(sigma_e**2 + N * b) - sigma_e) / b),
        "1 + x <= e^x, sum below an integral",
        "In Pre-LN the branch is divided by s_l, which grows: the logarithm grows like sqrt(N), not like N.",
        sample=_depths,
        tight=_small,
    )
    size = own(
        J,
        "~=",
        _sp.sqrt(b) * _sp.GoldenRatio ** _sp.Rational(5, 2) / _sp.sqrt(2),
        "activation-cost",
        "ReLU at d_ffn = 4d: |J| is phi^(5/2) sigma_1 sigma_2 d and b is 2 (sigma_1 sigma_2 d)^2. Over 48 half-layers "
        "from std 1 and at b = 1 the bound is 10^18.0 in Post-LN and 10^9.5 in Pre-LN; at the paper's initialisation, "
        "b = 0.16/48, it is 10^2.6 in both: with small sub-layers the order of norm and addition matters little.",
        sample=_branch_norm,
        tolerance=0.1,
        accuracy="within 10 % at widths near 192: the edge's finite-width offset, and b of 48 tokens",
    )
    return bound, equal, pre, size


@register_derivation
def post_ln() -> Derivation:
    """Why Pre-LN is more stable than Post-LN."""
    own = partial(line, source=OWN, sample=_post, tolerance=0.1, accuracy=ACCURACY)
    before = own(
        added**2,
        "~",
        1 + b,
        "independent weights",
        "Post-LN: x_{l+1} = norm(x_l + branch(x_l)) on a stream of mean square 1; s_+ is the std before the norm.",
    )
    backward = own(
        g_l**2,
        "~",
        g_next**2 * (1 + b_back) / (1 + b),
        "chain rule",
        "The norm divides by s_+; the shortcut passes 1 and the branch b', the mean square of its slope.",
        sample=_unbalanced,
    )
    balance = own(
        b_back,
        "~",
        b,
        "Price's theorem",
        "For ReLU and the identity slope and output balance; for other activations, and between tokens that grow "
        "alike, they do not.",
    )
    steady = own(
        g_l,
        "~",
        g_next,
        "balance",
        "(1 + b)/(1 + b): the stream's gradient does not grow, whatever the size of the sub-layers.",
        proof=lambda: backward.right.subs(b_back, b) - g_next**2,
    )
    weights = partial(own, sample=_weights, accuracy=f"{ACCURACY}, means of {DRAWS} draws")
    post_weights = weights(
        post_ratio,
        "~",
        _sp.Integer(1),
        "outer product",
        "A weight's gradient is the gradient of what it writes times what it reads, |h| of one size: every layer's "
        "is as large as the last one's.",
    )
    pre_weights = weights(
        pre_ratio,
        "~",
        _sp.sqrt((sigma_e**2 + N * b) / (sigma_e**2 + b)),
        "conservation in Pre-LN",
        "There |g_l| s_l is conserved (residual-scaling), so a layer's weight gradient falls like 1/s_l with depth.",
    )
    last = weights(
        last_ratio,
        "~",
        _sp.sqrt(1 + b) / _sp.sqrt(sigma_e**2 + N * b),
        "final norm",
        "Pre-LN's final norm divides by s_N, Post-LN's last one by sqrt(1 + b): 1/sqrt(N) at depth. The source "
        "bounds the last feed-forward's gradient by O(d sqrt(ln d)) in Post-LN and O(d sqrt(ln d / N)) in Pre-LN, with "
        "high probability; that is cited, not derived.",
        source=XIONG,
    )
    total = line(
        SumOver(1 / (sigma_e**2 + place * b), upto),
        "<=",
        _sp.log(1 + N * b / sigma_e**2) / b,
        "sum below an integral",
        "Squared weight gradients over all layers, in units of |h|^2: logarithmic in Pre-LN, N/(1 + b) in Post-LN.",
        source=OWN,
        sample=_depths,
        tight=_small,
    )
    post_drift = own(
        growth,
        "~",
        ((1 + b_back) / (1 + b)) ** (N / 2),
        "the second line N times",
        "Any imbalance compounds exponentially with depth in Post-LN: explosion for b' > b, vanishing below.",
        sample=_unbalanced,
    )
    pre_drift = line(
        ProductOver(1 + b_back / (sigma_e**2 + place * b), below),
        "<=",
        _sp.exp(b_back / sigma_e**2) * (1 + N * b / sigma_e**2) ** (b_back / b),
        "1 + x <= e^x, sum below an integral",
        "The same imbalance in Pre-LN: growth^2 is at most a power of the depth, N^(b'/b), since s_l grows along.",
        source=OWN,
        sample=_depths,
        tight=_small,
    )
    return Derivation(
        name="post-ln",
        title="Why Pre-LN is more stable than Post-LN",
        steps=(
            *(before, backward, balance, steady, post_weights, pre_weights, last),
            *(total, post_drift, pre_drift, *_bounds_over_depth()),
        ),
        assumptions=(
            "half-layers, N of them, at initialisation; large width, eps = 0",
            "tokens uncorrelated, attention uniform; once tokens have grown alike attention adds more forwards than "
            "backwards, b > b', and Post-LN's gradient shrinks towards the first layer",
        ),
    )


@register_derivation
def deepnorm() -> Derivation:
    """DeepNorm: Post-LN with a scaled stream and small weights."""
    own = partial(line, source=DEEPNET, sample=partial(_post, keep=1.7), tolerance=0.1, accuracy=ACCURACY)
    before = own(
        added**2,
        "~",
        alpha**2 + b,
        "independent weights",
        "x_{l+1} = norm(alpha x_l + branch(x_l)): the stream's variance before the norm is S -> alpha^2 S + b, S = 1.",
    )
    backward = own(
        g_l**2,
        "~",
        g_next**2 * (alpha**2 + b_back) / (alpha**2 + b),
        "chain rule",
        "Post-LN's line with alpha^2 for the shortcut's 1.",
        sample=partial(_post, keep=1.7, smooth=True),
    )
    balanced = own(
        growth,
        "~",
        _sp.Integer(1),
        "balance",
        "b' = b for positively homogeneous activations: no growth, whatever alpha.",
        proof=lambda: backward.right.subs(b_back, b) / g_next**2 - 1,
    )
    drift = line(
        ((alpha**2 + b_back) / (alpha**2 + b)) ** N,
        "<=",
        _sp.exp(N * (b_back - b) / (alpha**2 + b)),
        "1 + x <= e^x",
        "What an imbalance b' > b makes of growth^2 over N half-layers.",
        source=OWN,
        sample=_depths,
        tight=_small,
    )
    choice = line(
        2 * M * (b_0_back - b_0) / (8 * M) / (_sp.sqrt(2 * M) + b_0 / (8 * M)),
        "=",
        2 * M * (b_0_back - b_0) / (8 * M * _sp.sqrt(2 * M) + b_0),
        "alpha = (2M)^(1/4), beta = (8M)^(-1/4)",
        "The exponent with M layers, 2M half-layers; both matrices of a branch are times beta, so b = beta^4 b_0 = "
        "b_0/(8M). It falls like 1/sqrt(M), where Post-LN's grows like M.",
        source=DEEPNET,
        sample=_depths,
    )
    return Derivation(
        name="deepnorm",
        title="DeepNorm",
        steps=(before, backward, balanced, drift, choice),
        assumptions=("Post-LN's assumptions; lines 1 to 4 count half-layers N", "decoder-only constants in line 5"),
    )
