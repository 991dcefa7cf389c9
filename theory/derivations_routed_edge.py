"""Experts behind a router at initialisation: from the product rule to the outlier that the router makes."""

from __future__ import annotations

import math
from functools import cache, partial
from itertools import combinations
from typing import Any

import numpy as np
import sympy as sp  # pyright: ignore[reportMissingTypeStubs]

from theory.derivation import Derivation, line, register_derivation
from theory.derivations_expressions import SumOver, Transposed, Values, array, entry
from theory.derivations_feedforward_edge import with_family
from theory.derivations_numeric import Array, Rng, column_jacobian, jacobian, opnorm, relu, silu
from theory.sources import Source
from theory.statements import find
from theory.symbols import symbol

_sp: Any = sp
OWN = Source(key="spikecheck", label="product rule of gates and experts")
FREE = Source(key="pennington2017resurrecting", label="free multiplicative convolution")
OUTLIERS = Source(key="benaych2012singular", label="theorem 2.9's condition, for a product")

EXPERTS, CHOSEN, TOKENS = 4, 2, 4
WIDE, UNITS = 256, 512  # where resolvents are taken
WIDTH, HIDDEN, SEQUENCES = 64, 128, 400  # of the mean
STDS = {"sigma_1": 0.1, "sigma_2": 0.09, "sigma_3": 0.11, "sigma_router": 0.125}

d, u, W_2, J = symbol("d"), array("u"), array("W_2"), array("J_u", "J_u")
K, H, V = array("K"), array("H"), array("V")
P, y_0 = array("P"), array("y_0")
i, q, z = entry("i"), entry("q"), entry("z")
s_i, c_i = entry("s_i"), entry("c_i", signed=True)
form = entry("sum c_i^2 (W_2'RW_2)_ii", r"\sum_i c_i^2 (W_2^\top R W_2)_{ii}")
largest = entry("sqrt lambda(a b)", r"\sqrt{\lambda(a b)}")
share_i, norm_i = entry("pi_i", r"\pi_i"), entry("|J|_(i)", r"\| J \|_{(i)}")
sequences = entry("mean max_t |J_t|", r"\overline{\max_t \| J_t \|}")
mean_norm = entry("E max_t |J_t|", r"\mathbb{E} \max_t \| J_t \|")


class Drawn:
    """A layer of four experts with normal weights, and what a token makes of it."""

    def __init__(self, rng: Rng, width: int, hidden: int, *, gated: bool, renormalised: bool = True) -> None:
        def normal(name: str, *shape: int) -> Array:
            return rng.normal(0, STDS[name] * 8 / math.sqrt(width), shape)

        self.gated, self.renormalised = gated, renormalised
        self.W_1, self.W_3 = normal("sigma_1", EXPERTS, hidden, width), normal("sigma_3", EXPERTS, hidden, width)
        self.W_2, self.router = normal("sigma_2", EXPERTS, width, hidden), normal("sigma_router", EXPERTS, width)

    def hidden(self, e: int, x: Array) -> Array:
        """Outputs of an expert's units."""
        if self.gated:
            return silu(self.W_1[e] @ x) * (self.W_3[e] @ x)
        return relu(self.W_1[e] @ x)

    def gates(self, x: Array) -> Array:
        """(E,) at a token, or a column for each of its columns."""
        logits = self.router @ x
        weights = np.exp(logits)
        kept = np.where(np.real(logits) >= np.sort(np.real(logits), axis=0)[-CHOSEN], weights, 0)
        return kept / np.sum(kept if self.renormalised else weights, axis=0)

    def output(self, x: Array) -> Array:
        return sum(
            (self.gates(x)[e] * (self.W_2[e] @ self.hidden(e, x)) for e in range(EXPERTS)), start=0 * x
        )  # fmt: skip

    def parts(self, x: Array) -> dict[str, Array]:
        """The chosen experts' matrices side by side: W_2, gates times units' derivatives, outputs, gates' gradients."""
        gates, slopes = self.gates(x), column_jacobian(self.gates, x[:, None])
        chosen: list[int] = np.flatnonzero(gates).tolist()
        size = self.W_2.shape[2]
        outputs = np.zeros((size * CHOSEN, CHOSEN))
        for place, e in enumerate(chosen):
            outputs[place * size : (place + 1) * size, place] = self.hidden(e, x)
        return {
            "W_2": np.hstack([self.W_2[e] for e in chosen]),
            "K": np.vstack([gates[e] * self.derivative(e, x) for e in chosen]),
            "H": outputs,
            "V": slopes[chosen],
        }

    def derivative(self, e: int, x: Array) -> Array:
        """Of an expert's units."""
        z_1 = self.W_1[e] @ x
        if not self.gated:
            return (z_1 > 0)[:, None] * self.W_1[e]
        open_ = 1 / (1 + np.exp(-z_1))
        slope = open_ * (1 + z_1 * (1 - open_))
        return (slope * (self.W_3[e] @ x))[:, None] * self.W_1[e] + (z_1 * open_)[:, None] * self.W_3[e]


def _point(rng: Rng, width: int) -> Array:
    x = rng.normal(0, 1, width)
    return x * math.sqrt(width) / np.linalg.norm(x)


def _small(rng: Rng, *, gated: bool) -> Values:
    """A token of width 6 at either kind of gates."""
    layer = Drawn(rng, 6, 5, gated=gated, renormalised=bool(rng.random() < 0.5))
    x = _point(rng, 6)
    found = layer.parts(x)
    # Along the token the units change as F'(z_1) z_1 (z_3) + F(z_1) z_3: their own directional derivative.
    along = jacobian(lambda t: np.concatenate([layer.hidden(e, x * (1 + t[0])) for e in range(EXPERTS)]), np.zeros(1))
    gates = layer.gates(x)
    chosen = np.flatnonzero(gates)
    change = np.concatenate([gates[e] * along[e * 5 : (e + 1) * 5] for e in chosen])
    moved = found["H"] @ jacobian(lambda t: layer.gates(x * (1 + t[0])), np.zeros(1))[chosen]
    return {
        **{J: jacobian(layer.output, x), W_2: found["W_2"], K: found["K"], H: found["H"], V: found["V"]},
        **{u: x[:, None], d: 6.0, P: np.eye(6) - np.outer(x, x) / 6, y_0: change + moved},
    }


def _slopes(layer: Drawn, x: Array) -> Array:
    """Stds of the chosen units' rows off the token over those of a normal matrix: gates times slopes, (k M,)."""
    gates = layer.gates(x)
    found: list[Array] = []
    for e in np.flatnonzero(gates):
        z_1, std = layer.W_1[e] @ x, STDS["sigma_1"] * 8 / math.sqrt(len(x))
        if not layer.gated:
            found.append(gates[e] * std * (z_1 > 0))
            continue
        open_, other = 1 / (1 + np.exp(-z_1)), STDS["sigma_3"] * 8 / math.sqrt(len(x))
        slope = open_ * (1 + z_1 * (1 - open_)) * (layer.W_3[e] @ x)
        found.append(gates[e] * np.hypot(slope * std, z_1 * open_ * other))
    return np.concatenate(found)


def _resolvents(rng: Rng, *, gated: bool) -> Values:
    """Beyond the edge of W_2 K P: its resolvent's trace, a column's quadratic form, and the outlier's condition."""
    layer, x = Drawn(rng, WIDE, UNITS, gated=gated), _point(rng, WIDE)
    found, unit = layer.parts(x), STDS["sigma_2"] * 8 * math.sqrt(WIDE)
    off = np.eye(WIDE) - np.outer(x, x) / WIDE
    left, second = found["W_2"], found["W_2"] @ found["K"] @ off
    slopes = _slopes(layer, x)

    def resolvent(matrix: Array, height: float) -> Array:
        return height * unit * np.linalg.inv((height * unit) ** 2 * np.eye(WIDE) - matrix @ matrix.T)

    height = 1.2 * opnorm(second) / unit
    beyond = resolvent(second, height)
    column = found["H"][:, 0]
    diagonal = WIDE * np.einsum("mi,mn,ni->i", left / unit, beyond * unit, left / unit, optimize=True)
    # All that is beside the first part, as left and right factors.
    along = (found["K"] + found["H"] @ found["V"]) @ x / WIDE
    lefts, rights = left @ np.column_stack([along, found["H"]]), np.column_stack([x, (found["V"] @ off).T])
    whole = opnorm(second + lefts @ rights.T) / unit
    a, b = lefts.T @ resolvent(second, whole) @ lefts, rights.T @ resolvent(second.T, whole) @ rights
    return {
        **{d: float(WIDE), q: float(np.trace(beyond)) / WIDE * unit, z: height, form: float(column**2 @ diagonal)},
        **{largest: float(np.max(np.real(np.linalg.eigvals(a @ b)))) ** 0.5},
        i: [{s_i: s, c_i: c} for s, c in zip(slopes, column, strict=True)],
    }


def _orders(rng: Rng) -> Values:
    """The largest of three of seven, over all choices of three."""
    norms = np.sort(rng.uniform(0, 1, 7))
    shares = [math.comb(place, 2) / math.comb(7, 3) for place in range(7)]
    return {
        sequences: float(np.mean([max(some) for some in combinations(norms, 3)])),
        i: [{share_i: share, norm_i: norm} for share, norm in zip(shares, norms, strict=True)],
    }


@cache
def _measured(gated: bool) -> float:
    """Mean over sequences of four tokens of the largest norm, by the product rule, at seeds of its own."""
    found: list[float] = []
    for seed in range(SEQUENCES):
        rng = np.random.default_rng(10**6 + seed)
        layer = Drawn(rng, WIDTH, HIDDEN, gated=gated)
        norms: list[float] = []
        for _ in range(TOKENS):
            parts = layer.parts(_point(rng, WIDTH))
            norms.append(opnorm(parts["W_2"] @ (parts["K"] + parts["H"] @ parts["V"])))
        found.append(max(norms))
    return float(np.mean(found))


def _mean(rng: Rng, *, gated: bool) -> Values:
    sizes = {"d": WIDTH, "d_ffn": HIDDEN, "n_experts": EXPERTS, "n_chosen": CHOSEN, "n_tokens": TOKENS}
    values = {symbol(name): float(size) for name, size in {**sizes, **STDS, "gates_renormalised": 1}.items()}
    return {**values, mean_norm: _measured(gated)}


def _chain(name: str, *, gated: bool) -> Derivation:
    statement = find(name)
    small, resolvents = partial(_small, gated=gated), partial(_resolvents, gated=gated)
    exact = line(
        J,
        "=",
        W_2 * (K + H * V),
        "product rule",
        "The chosen experts' matrices side by side: one feed-forward layer of all their units. K is their derivative "
        "times the gates, H their outputs, a column for each expert, V the gates' gradients.",
        source=OWN,
        sample=small,
    )
    split = line(
        K + H * V,
        "=",
        K * P + y_0 * Transposed(u) / d + H * V * P,
        "orthogonal projection",
        "Along u, where |u|^2 = d, and off it. At given inputs of the units the rows of K P are independent normal "
        "ones, of std s_i; the last part has rank k and size sqrt(d), as outputs are sqrt(d) long.",
        source=OWN,
        sample=small,
    )
    edge = line(
        z,
        "~=",
        (1 + SumOver(q**2 * s_i**2 / (1 - q**2 * s_i**2), i) / d) / q,
        "free convolution",
        "Of X = W_2 K P over sigma_2 d alone, q being tr z (z^2 - XX')^(-1) / d, beyond the edge.",
        source=FREE,
        sample=resolvents,
        tolerance=0.02,
        accuracy=f"within 2 % at width {WIDE}: a trace varies by 1/d, a draw's slopes are known",
    )
    column = line(
        form,
        "~=",
        q * SumOver(c_i**2 / (1 - q**2 * s_i**2), i),
        "leaving one unit out",
        "R = z (z^2 - XX')^(-1), and W_2 over sigma_2 sqrt(d). A unit's own column of W_2 has the form q/(1 - q^2 "
        "s_i^2), those of two units none on average. So a pair of columns of [y_0, H] has such a sum, the matrix a, "
        "and a pair of rows v of V off u has q v.v', the matrix b, in which u has 1/z.",
        source=FREE,
        sample=resolvents,
        tolerance=0.1,
        accuracy=f"within 10 % at width {WIDE}: forms vary by sqrt(2/d) = 9 %, their sum over {UNITS} units by 1 to "
        "2 %, as the largest units of a gated layer decide it",
    )
    outlier = line(
        largest,
        "~=",
        _sp.Integer(1),
        "outliers of a low-rank part",
        "X + A B' has the singular value z where a b has the eigenvalue 1, with a = A'RA and b the same of B and X'; "
        "at |J_u| it has, the root being shown, but for the mixed forms, which are 0 on average and drawn as normal "
        "numbers of variance t/d, t being the sum in line 3 over d.",
        source=OUTLIERS,
        sample=resolvents,
        tolerance=0.1,
        accuracy=f"within 10 % for one draw at width {WIDE}, whose mixed forms are of order 1/sqrt(d) = 6 %",
    )
    order = line(
        sequences,
        "=",
        SumOver(share_i * norm_i, i),
        "order statistics",
        "Of tokens drawn at one router every choice of T is a sequence: the i-th smallest norm is the largest of T in "
        "a share C(i - 1, T - 1)/C(n, T) of them. Drawn are the router, the units' inputs and W_2 [y_0, H].",
        source=OWN,
        sample=_orders,
    )
    conclusion = line(
        mean_norm,
        "~=",
        statement.expression,
        "mean over draws",
        "Of the outlier, or of the edge where no outlier is: gates over one expert alone have none.",
        source=OUTLIERS,
        sample=partial(_mean, gated=gated),
        tolerance=0.035,
        accuracy=f"within 3.5 % for the mean of {SEQUENCES} sequences of {TOKENS} tokens at width {WIDTH}: over three "
        "standard errors of either side",
    )
    return Derivation(
        name="experts-sharp-relu",
        title="Experts behind a router at initialisation, the norm itself",
        steps=(exact, split, edge, column, outlier, order, conclusion),
        statement=statement.name,
        assumptions=statement.assumptions,
    )


@register_derivation
def experts_sharp_relu() -> Derivation:
    """The largest norm over tokens, without a gate and with one."""
    return with_family(
        [_chain("experts-sharp-relu", gated=False), _chain("experts-sharp-gated-silu", gated=True)]
    )  # fmt: skip
