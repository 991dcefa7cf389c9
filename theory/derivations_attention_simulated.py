"""Attention's norms by simulation: from the definition of attention to the mean over draws of its Jacobian's norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import sympy as sp  # pyright: ignore[reportMissingTypeStubs]

from theory.architecture import Architecture
from theory.attention_ensembles import VARIANT_DRAWS, variant
from theory.attention_simulation import DRAWS, SimulatedAttention, plain_attention, simulated_norms
from theory.derivation import Derivation, Sampler, line, register_derivation
from theory.derivations_expressions import Norm, Values, array, entry
from theory.derivations_feedforward_edge import with_family
from theory.derivations_numeric import Array, Rng, jacobian, layer_norm, opnorm, softmax
from theory.sources import Source
from theory.statements import find
from theory.symbols import symbol

_sp: Any = sp

OWN = Source(key="spikecheck", label="the definition of attention")
KRYLOV = Source(key="spikecheck", label="Lanczos bidiagonalisation, to its stated tolerance")
LAW = Source(key="spikecheck", label="law of large numbers")
WIDTH, HEADS, HEAD, LENGTH, VARIANCE, STD = 16, 2, 8, 5, 0.5, 0.6
SAME = 0.08
OTHERS = 64  # draws with weights and tokens of their own

c_VO = symbol("c_VO")
J, direction, action = array("J_u", "J_u"), array("omega", r"\omega"), array("dA", r"dA")
u, normed = array("u"), array("LN(c e)", r"\mathrm{LN}(c \, e)")
J_c = array("J_u(c)", "J_u(c)")
factor = entry("c")
krylov = entry("|J_u|_Krylov", r"\| J_u \|_{Krylov}")
one_std, count = entry("std |J_u|", r"\mathrm{std} \| J_u \|"), entry("n")
mean_std = entry("std mean", r"\mathrm{std} \, \overline{\| J_u \|}")
mean_square = entry("E|J_u|_F^2", r"\mathbb{E} \| J_u \|_F^2")
seeds_square = entry("mean |J_u|_F^2 over seeds", r"\overline{\| J_u \|_F^2}")
seeds_mean = entry("mean |J_u| over seeds", r"\overline{\| J_u \|}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A statement with an ensemble of small size, and the symbols at which its formula draws from that ensemble."""

    statement: str
    architecture: Architecture
    symbols: Mapping[str, float]
    shortcut: bool = False
    causal: bool = True

    def draw(self, rng: Rng) -> SimulatedAttention:
        return SimulatedAttention(self.architecture, LENGTH, rng, causal=self.causal)


SIZES = {"d": WIDTH, "n_heads": HEADS, "d_head": HEAD, "n_tokens": LENGTH, "logit_variance": VARIANCE, "c_VO": 1.0}
_PLAIN = plain_attention(WIDTH, HEADS, HEAD, LENGTH, VARIANCE)
_OPTIONS: dict[str, Any] = {"rotary": 0.5, "rope_base": 100.0, "alibi": 0, "n_seen": 3, "softcap": 2.0, "qk_norm": 1}
KINDS = (
    Kind(statement="attention-simulated", architecture=_PLAIN, symbols=SIZES),
    Kind(statement="attention-half-layer-simulated", architecture=_PLAIN, symbols={**SIZES, "s": STD}, shortcut=True),
    Kind(statement="attention-full-simulated", architecture=_PLAIN, symbols=SIZES, causal=False),
    Kind(
        statement="attention-variants-simulated",
        architecture=variant(WIDTH, HEADS, HEAD, 2, LENGTH, VARIANCE, **_OPTIONS),
        symbols={**SIZES, "kv_group": 2, **_OPTIONS},
    ),
)


def written_out(a: Architecture, weights: Mapping[str, Array], u: Array, *, causal: bool = True) -> Array:
    """Attention from its definition, one head at a time; u (T, d), which may be complex for a derivative."""
    tokens, group = len(u), a.n_heads // a.n_kv_heads
    places = np.arange(tokens)
    distance = places[:, None] - places
    seen = ((distance >= 0) | (not causal)) & (distance < (a.window_at(0) or tokens))
    out = np.zeros(u.shape, dtype=u.dtype)
    for head in range(a.n_heads):
        q, k = u @ weights["query"][head].T, u @ weights["key"][head // group].T
        if a.qk_norm == "head":
            q, k = layer_norm(q.T, a.eps).T, layer_norm(k.T, a.eps).T
        base = a.rope_base_at(0)
        if base is not None and a.rope_width:
            q, k = _turned(q, a.rope_width, base), _turned(k, a.rope_width, base)
        logits = a.logit_scale * q @ k.T
        if a.attention_softcap:
            logits = a.attention_softcap * np.tanh(logits / a.attention_softcap)
        values = u @ weights["value"][head // group].T
        out = out + softmax(logits, seen) @ values @ weights["output"][head]
    return out


def _turned(x: Array, width: int, base: float) -> Array:
    """Pairs (i, i + width/2) as complex numbers, which place t turns by the angle t base^(-2i/width)."""
    half = width // 2
    angle = np.array([[t * base ** (-2 * pair / width) for pair in range(half)] for t in range(len(x))])
    one, two, still = x[:, :half], x[:, half:width], x[:, width:]
    first, second = one * np.cos(angle) - two * np.sin(angle), two * np.cos(angle) + one * np.sin(angle)
    return np.concatenate([first, second, still], axis=1)


def dense(kind: Kind, drawn: SimulatedAttention) -> Array:
    """The Jacobian of a draw by complex steps, of the half-layer with its norm where the statement is of that."""
    a, weights = kind.architecture, drawn.weights
    if not kind.shortcut:
        return jacobian(lambda x: written_out(a, weights, x, causal=kind.causal), drawn.u)
    return jacobian(lambda x: x + written_out(a, weights, layer_norm(x.T).T), STD * drawn.u)


def _drawn(rng: Rng, *, kind: Kind) -> Values:
    """The action that the simulation iterates on, against the Jacobian of the definition."""
    drawn = kind.draw(rng)
    w = rng.normal(0, 1, (LENGTH * WIDTH, 1))
    forward = drawn.half_layer(STD)[0] if kind.shortcut else drawn.forward
    return {J: dense(kind, drawn), direction: w, action: forward(w[:, 0])[:, None]}


def _first(rng: Rng, *, kind: Kind) -> Values:
    """The norm of the simulation's first draw."""
    std = STD if kind.shortcut else None
    found = simulated_norms(kind.architecture, LENGTH, std=std, draws=1, causal=kind.causal)
    drawn = kind.draw(np.random.default_rng(0))
    return {J: dense(kind, drawn), krylov: float(found[0])}


def _token(rng: Rng) -> Values:
    """A normal row of an embedding of any std, behind its norm."""
    row = rng.normal(0, 1, (WIDTH, 1))
    size = float(rng.uniform(0.01, 10))
    return {factor: size, u: layer_norm(row), normed: layer_norm(size * row)}


def _scaled(rng: Rng) -> Values:
    """The Jacobian with W_O c times as large."""
    drawn = SimulatedAttention(_PLAIN, LENGTH, rng)
    gain = float(rng.uniform(0.2, 2))
    larger = {**drawn.weights, "output": gain * drawn.weights["output"]}
    found = jacobian(lambda x: written_out(_PLAIN, larger, x), drawn.u)
    return {factor: gain, J: jacobian(lambda x: written_out(_PLAIN, drawn.weights, x), drawn.u), J_c: found}


def _means(rng: Rng, *, kind: Kind) -> Values:
    """Spread of the norm over 24 draws, and of means of 16 taken from them at random."""
    norms = [opnorm(dense(kind, kind.draw(rng))) for _ in range(24)]
    means = rng.choice(norms, (4000, 16)).mean(axis=1)
    return {count: 16.0, one_std: float(np.std(norms)), mean_std: float(np.std(means))}


@cache
def _at_seeds(kind: str) -> tuple[float, float]:
    """Means of |J_u| and |J_u|_F^2 over the statement's own seeds, from the definition."""
    chosen = next(one for one in KINDS if one.statement == kind)
    draws = VARIANT_DRAWS if "variants" in kind else DRAWS
    found = [dense(chosen, chosen.draw(np.random.default_rng(n))) for n in range(draws)]
    return float(np.mean([opnorm(J) for J in found])), float(np.mean([np.sum(J**2) for J in found]))


def _by_definition(rng: Rng, *, kind: Kind) -> Values:
    return {seeds_mean: _at_seeds(kind.statement)[0], **{symbol(name): value for name, value in kind.symbols.items()}}


def _fresh(rng: Rng, *, kind: Kind) -> Values:
    """Mean square of other draws, whose weights have the variances that the symbols state."""
    stds: dict[str, float] = dict.fromkeys(("query", "key"), WIDTH**-0.5 * VARIANCE**0.25)
    stds |= {"value": WIDTH**-0.5, "output": (HEADS * HEAD) ** -0.5}
    if kind.architecture.qk_norm != "none":
        stds |= {"query": 1.0, "key": 1.0}  # a norm takes out what they are
    squares: list[float] = []
    for _ in range(OTHERS):
        drawn = kind.draw(rng)
        drawn.u = layer_norm(rng.normal(0, 1, (WIDTH, LENGTH))).T
        drawn.weights = {name: rng.normal(0, stds[name], part.shape) for name, part in drawn.weights.items()}
        squares.append(float(np.sum(dense(kind, drawn) ** 2)))
    return {mean_square: float(np.mean(squares)), seeds_square: _at_seeds(kind.statement)[1]}


def _chain(kind: Kind) -> Derivation:
    statement = find(kind.statement)
    at: dict[str, Sampler] = {
        name: partial(made, kind=kind)
        for name, made in {
            "drawn": _drawn,
            "first": _first,
            "means": _means,
            "fresh": _fresh,
            "definition": _by_definition,
        }.items()
    }
    law = line(
        normed,
        "=",
        u,
        "invariance of the norm",
        "A token at initialisation is a normal row e of the embedding at any scale c: what attention sees is the norm "
        "of standard normal numbers, which is drawn, with weights of the configuration's std.",
        source=LAW,
        sample=_token,
    )
    exact = line(
        action,
        "=",
        J * direction,
        "product rule",
        "The change of queries, keys and values along omega, then of logits, softmax and output, written out; J_u "
        "with its shortcut and norm for a half-layer. Compared with complex steps of the definition, head by head.",
        source=OWN,
        sample=at["drawn"],
    )
    largest = line(
        krylov,
        "~=",
        Norm(J),
        "Krylov method",
        "From J_u omega and J_u' omega alone, so that no T d by T d matrix is made.",
        source=KRYLOV,
        sample=at["first"],
        tolerance=5e-3,
        accuracy="within 0.5 %, the method's tolerance",
    )
    gain = line(
        J_c,
        "=",
        factor * J,
        "linearity",
        "The output matrix enters once: the draws have c_V c_O = 1, and its root multiplies J_u.",
        source=OWN,
        sample=_scaled,
    )
    spread = line(
        mean_std,
        "~=",
        one_std / _sp.sqrt(count),
        "standard error",
        "Draws by different seeds are independent: the mean of n is known to the spread of one over sqrt(n).",
        source=LAW,
        sample=at["means"],
        tolerance=0.05,
        accuracy="within 5 % for the spread of 4000 means, known to 1 %",
    )
    same = line(
        mean_square,
        "~=",
        seeds_square,
        "law of large numbers",
        "Draws with weights and tokens of their own have the same mean, here of the sum of all squared entries, which "
        "varies less than the norm.",
        source=LAW,
        sample=at["fresh"],
        tolerance=SAME,
        accuracy=f"within {100 * SAME:g} % for {OTHERS} draws: more than three standard errors of the difference",
    )
    conclusion = line(
        seeds_mean,
        "~=",
        statement.expression,
        "mean over draws",
        "Over the statement's own seeds, from the definition. The network's own mean is over the same law, to the "
        "standard error above.",
        source=LAW,
        sample=at["definition"],
        tolerance=5e-3,
        accuracy="within 0.5 %, the method's tolerance: the same draws are on both sides",
    )
    return Derivation(
        name="attention-simulated",
        title="Attention at uneven rows by simulation, the norm itself",
        steps=(law, exact, largest, gain, spread, same, conclusion),
        statement=statement.name,
        assumptions=statement.assumptions,
    )


@register_derivation
def attention_simulated() -> Derivation:
    """The sampled Jacobian's mean norm."""
    return with_family([_chain(kind) for kind in KINDS])
