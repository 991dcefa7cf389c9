"""Attention's norms at even softmax rows: the edge of W_O W_V for heads of any width, with a causal mask or without."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import sympy as sp  # pyright: ignore[reportMissingTypeStubs]

from theory.architecture import Architecture
from theory.attention_simulation import SimulatedAttention, plain_attention
from theory.derivation import Derivation, Sampler, Step, line, register_derivation
from theory.derivations_expressions import Norm, SumOver, Values, array, entry
from theory.derivations_numeric import Array, Rng, opnorm
from theory.derivations_offsets import least
from theory.random_matrix import TRACY_WIDOM_MEAN, cesaro_opnorm, heads_edge, heads_opnorm
from theory.sources import Source
from theory.statements import find
from theory.symbols import symbol

_sp: Any = sp

FREE = Source(key="pennington2017resurrecting", label="free multiplicative convolution")
SUM = Source(key="haagerup2000brown", label="sums of R-diagonal elements")
OFFSET = Source(key="johnstone2001largest", label="the offset's law; its scale by the curvature")
HARDY = Source(key="hardy1920", label="for |C_T| < 2")
OWN = Source(key="spikecheck", label="linear algebra")

# Heads that together are one and a half times as wide as the stream, in pairs that share a key and a value.
WIDTH, HEADS, GROUP, HEAD, TOKENS, LOGITS, STD = 96, 4, 2, 36, 3, 0.01, 0.7
DRAWS = 48
EDGE_DRAWS = 400
EVEN = "at logit variance 0.01"
MEAN_OF_DRAWS = (
    f"the target, for the mean of {DRAWS} draws at d = {WIDTH}, T = {TOKENS}: six of its standard errors, of which a "
    "factor of 1.05 is twelve"
)

d, s, T, c_VO = symbol("d"), symbol("s"), symbol("n_tokens"), symbol("c_VO")
n_heads, d_head, group = symbol("n_heads"), symbol("d_head"), symbol("kv_group")
ratio = n_heads * d_head / (group * d)
I = array("I")  # noqa: E741  the identity's letter
W_O, W_V = array("W_O"), array("W_V")
_h, _W_Oh, _W_Vh = entry("h"), array("W_O^h", "W_O^h"), array("W_V^h", "W_V^h")
_J = array("J_u", "J_u")
HALF = array("dx'/dx", r"\frac{\partial x'}{\partial x}")
_CAUSAL = array("C_T (x) W_O W_V", r"C_T \otimes W_O W_V")
_FULL = array("(11'/T) (x) W_O W_V", r"(11^\top / T) \otimes W_O W_V")
CAUSAL_HALF = array("I + C_T (x) W_O W_V / s", r"I + C_T \otimes W_O W_V / s")
_FULL_HALF = array("I + (11'/T) (x) W_O W_V / s", r"I + (11^\top / T) \otimes W_O W_V / s")
_mean = entry("E|J_u|", r"\mathbb{E} \| J_u \|")
MEAN_HALF = entry("E|dx'/dx|", r"\mathbb{E} \| \frac{\partial x'}{\partial x} \|")
_mean_product = entry("E|W_O W_V|", r"\mathbb{E} \| W_O W_V \|")
w, t = entry("w"), entry("t(w)")
edge, above, below = (entry(f"lambda_{name}", rf"\lambda_{{{name}}}") for name in ("edge", "+", "-"))
bend, step_ = entry("lambda''", r"\lambda''"), entry("h_", r"h_\gamma")

SIZES: dict[Any, float] = {
    **{d: WIDTH, n_heads: HEADS, d_head: HEAD, group: GROUP, T: TOKENS, c_VO: 1.0, s: STD},
    symbol("logit_variance"): LOGITS,
}


def grouped(width: int, heads: int, kv_group: int, head: int, n_tokens: int, logit_variance: float) -> Architecture:
    """Attention without positions whose heads share keys and values in groups; c_V c_O = 1."""
    return replace(plain_attention(width, heads, head, n_tokens, logit_variance), n_kv_heads=heads // kv_group)


_ARCHITECTURE = grouped(WIDTH, HEADS, GROUP, HEAD, TOKENS, LOGITS)


def running_mean(n_tokens: int) -> Array:
    return np.tril(np.ones((n_tokens, n_tokens))) / np.arange(1, n_tokens + 1)[:, None]


def together(drawn: SimulatedAttention) -> tuple[Array, Array]:
    """W_O with the columns of each group's heads added, (d, k), and W_V, (k, d)."""
    a = drawn.architecture
    out = drawn.weights["output"].reshape(a.n_kv_heads, -1, a.d_head, a.d_model).sum(axis=1)
    return out.reshape(-1, a.d_model).T, drawn.weights["value"].reshape(-1, a.d_model)


def one_draw(rng: Rng, *, causal: bool, std: float | None = None) -> Values:
    """Attention or its half-layer, and the same at rows that are even."""
    drawn = SimulatedAttention(_ARCHITECTURE, TOKENS, rng, causal=causal)
    out, value = together(drawn)
    forward = drawn.forward if std is None else drawn.half_layer(std)[0]
    basis = np.eye(TOKENS * WIDTH)
    mixing = running_mean(TOKENS) if causal else np.full((TOKENS, TOKENS), 1 / TOKENS)
    even = np.kron(mixing, out @ value)
    found: Values = {
        **SIZES, W_O: out, W_V: value, I: np.eye(WIDTH),
        (_J if std is None else HALF): np.stack([forward(column) for column in basis], axis=1),
    }  # fmt: skip
    if std is None:
        return {**found, (_CAUSAL if causal else _FULL): even}
    return {**found, (CAUSAL_HALF if causal else _FULL_HALF): basis + even / std}


def many_draws(rng: Rng, *, causal: bool, std: float | None = None) -> Values:
    """The mean norm."""
    norms = [SimulatedAttention(_ARCHITECTURE, TOKENS, rng, causal=causal).norm(rng, std) for _ in range(DRAWS)]
    return {**SIZES, (_mean if std is None else MEAN_HALF): float(np.mean(norms))}


def _shared(rng: Rng) -> Values:
    """Heads in pairs that share a value, head by head and together."""
    drawn = SimulatedAttention(grouped(6, 4, 2, 3, 2, 1.0), 2, rng)
    out, value = together(drawn)
    heads = [{_W_Oh: drawn.weights["output"][head].T, _W_Vh: drawn.weights["value"][head // 2]} for head in range(4)]
    return {_h: heads, W_O: out, W_V: value}


def _edge(rng: Rng) -> Values:
    """The edge of W_O W_V, its bend, and the mean norm over draws at width 64."""
    width, inner = 64, 96
    share = inner / width

    def raised(place: float) -> float:
        return share * place / (1 - place)

    def height(place: float) -> float:
        return (1 + raised(place)) ** 2 / (share * place)

    def at(resolvent: float) -> float:
        """The height as a function of share * w/(1 + t), which is the resolvent."""
        from scipy.optimize import brentq  # pyright: ignore[reportMissingTypeStubs]

        near = found.place / 1.01, 1.01 * found.place  # it rises with w there
        place: Any = brentq(lambda x: share * x / (1 + raised(x)) - resolvent, *near, xtol=1e-16)
        return height(float(place))

    found = least(height, 1e-6, 1 - 1e-9)
    middle = share * found.place / (1 + raised(found.place))
    h = 3e-4 * middle
    known = heads_edge(share)
    norms = [
        opnorm(rng.normal(0, inner**-0.5, (width, inner)) @ rng.normal(0, width**-0.5, (inner, width)))
        for _ in range(EDGE_DRAWS)
    ]
    return {
        **{d: width, n_heads: 6, d_head: 32, group: 2, c_VO: 1.0, w: found.place, t: raised(found.place)},
        **{edge: known.limit, bend: known.curvature, step_: h, above: at(middle + h), below: at(middle - h)},
        _mean_product: float(np.mean(norms)),
    }


def _flat(left: Any, right: Any, why: str, sample: Sampler) -> Step:
    return line(
        left,
        "~=",
        right,
        "uniform softmax",
        why,
        source=OWN,
        sample=sample,
        tolerance=0.02,
        accuracy=f"within 2 % {EVEN}, where the same weights are on both sides",
    )


def _concluded(left: Any, name: str, why: str, source: Source, sample: Sampler) -> Step:
    return line(
        left,
        "~=",
        find(name).expression,
        "edge and Tracy-Widom offset",
        why,
        source=source,
        sample=sample,
        tolerance=0.025,
        accuracy=MEAN_OF_DRAWS,
    )


def _derived(name: str, title: str, *steps: Step) -> Derivation:
    return Derivation(name=name, title=title, steps=steps, statement=name, assumptions=find(name).assumptions)


@register_derivation
def attention_sharp() -> Derivation:
    """The attention sub-layer's Jacobian norm at initialisation."""
    shared = line(
        SumOver(_W_Oh * _W_Vh, _h),
        "=",
        W_O * W_V,
        "distributivity",
        "Heads that share a value add what they write: k = n_h d_h/g columns, sqrt(g) as large, so that c_V c_O is the "
        "same. Where all heads attend alike, this is all of them.",
        source=OWN,
        sample=_shared,
    )
    drawn: Sampler = partial(one_draw, causal=True)
    flat = _flat(
        Norm(_J),
        Norm(_CAUSAL),
        "With small logits every softmax row is the running mean, whatever the head: P_h is C_T.",
        drawn,
    )
    factors = line(
        Norm(_CAUSAL),
        "=",
        cesaro_opnorm(T) * Norm(W_O * W_V),
        "Kronecker product",
        "Singular values multiply; |C_T| is below 2 for any T.",
        source=HARDY,
        sample=drawn,
    )
    share = line(
        t,
        "=",
        ratio * w / (1 - w),
        "definition",
        "As of a feed-forward layer of k units with slope 1.",
        source=OWN,
        sample=_edge,
    )
    least_ = line(
        edge,
        "=",
        (1 + t) ** 2 / (ratio * w),
        "free multiplicative convolution",
        "The least height over w, at which a resolvent of |W_O W_V|^2 over c_V c_O still exists.",
        source=FREE,
        sample=_edge,
    )
    root = 2 / (2 + ratio + _sp.sqrt(ratio * (ratio + 8)))
    place = line(
        w,
        "=",
        root,
        "stationary point",
        "Where (1 - k/d) w^2 - (2 + k/d) w + 1 vanishes; at k = d it is 1/3, and the edge 27/4.",
        source=OWN,
        sample=_edge,
        tolerance=1e-6,
        accuracy="the left side is found by search, where the height is flat",
        proof=lambda: (1 - ratio) * root**2 - (2 + ratio) * root + 1,
    )
    curve = line(
        bend,
        "=",
        (above - 2 * edge + below) / step_**2,
        "second difference",
        "In the resolvent (k/d) w/(1 + t), a step h_ to both sides of the edge's.",
        source=OWN,
        sample=_edge,
        tolerance=1e-4,
        accuracy="a finite difference: h_ is 3e-4 of the resolvent",
    )
    offset = line(
        _mean_product,
        "~=",
        _sp.sqrt(c_VO)
        * _sp.sqrt(edge + TRACY_WIDOM_MEAN * d ** _sp.Rational(-2, 3) * (bend / 2) ** _sp.Rational(1, 3)),
        "Tracy-Widom offset",
        "Near a square-root edge the largest of d points lies so much below it on average, a mean of -1.2065.",
        source=OFFSET,
        sample=_edge,
        tolerance=0.02,
        accuracy=f"within 2 % for the mean of {EDGE_DRAWS} draws at width 64: three standard errors and the law's next "
        "order; without the offset it is 4 %",
    )
    conclusion = _concluded(
        _mean,
        "attention-sharp",
        "The heads' edge is the root of the line above; |C_T| multiplies it.",
        FREE,
        partial(many_draws, causal=True),
    )
    return _derived(
        "attention-sharp",
        "Attention at initialisation, the norm itself",
        *(shared, flat, factors, share, least_, place, curve, offset, conclusion),
    )


@register_derivation
def attention_full_sharp() -> Derivation:
    """The same without a mask."""
    drawn: Sampler = partial(one_draw, causal=False)
    flat = _flat(
        Norm(_J),
        Norm(_FULL),
        "With small logits every softmax row is the mean over all tokens. What passes through queries and keys is of "
        "the size of a logit's slope over T.",
        drawn,
    )
    factors = line(
        Norm(_FULL),
        "=",
        Norm(W_O * W_V),
        "Kronecker product",
        "11'/T is a projection, of norm 1.",
        source=OWN,
        sample=drawn,
    )
    product = line(
        _mean_product,
        "~=",
        _sp.sqrt(c_VO) * heads_opnorm(ratio, d),
        "edge and Tracy-Widom offset",
        "Lines 4 to 8 of attention-sharp.",
        source=FREE,
        sample=_edge,
        tolerance=0.02,
        accuracy=f"within 2 % for the mean of {EDGE_DRAWS} draws at width 64: three standard errors and the law's next "
        "order",
    )
    conclusion = _concluded(
        _mean,
        "attention-full-sharp",
        "The length of the sequence does not appear.",
        FREE,
        partial(many_draws, causal=False),
    )
    return _derived(
        "attention-full-sharp",
        "Attention without a mask at initialisation, the norm itself",
        *(flat, factors, product, conclusion),
    )


@register_derivation
def attention_full_half_layer_sharp() -> Derivation:
    """The half-layer without a mask."""
    drawn: Sampler = partial(one_draw, causal=False, std=STD)
    flat = _flat(
        Norm(HALF),
        Norm(_FULL_HALF),
        "Every row is the mean over all tokens, and the norm's projector takes out one direction of many.",
        drawn,
    )
    along = line(
        Norm(_FULL_HALF),
        "=",
        _sp.Max(1, Norm(I + W_O * W_V / s)),
        "a projection and its complement",
        "Along the mean of all tokens 11'/T is 1, elsewhere 0: there the half-layer is the identity.",
        source=OWN,
        sample=drawn,
    )
    conclusion = _concluded(
        MEAN_HALF,
        "attention-full-half-layer-sharp",
        "I + W_O W_V / s is a linear feed-forward half-layer of k units, whose edge and offset half-layer-sharp-relu "
        "has; it is at least 1.",
        SUM,
        partial(many_draws, causal=False, std=STD),
    )
    return _derived(
        "attention-full-half-layer-sharp",
        "The half-layer of attention without a mask at initialisation, the norm itself",
        *(flat, along, conclusion),
    )
