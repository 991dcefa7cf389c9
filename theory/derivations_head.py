"""What the loss sends back through the head: gradients of two tokens share what their predictions share."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import sympy as sp  # pyright: ignore[reportMissingTypeStubs]

from theory.derivation import Derivation, line, register_derivation, substitution
from theory.derivations_expressions import Transposed, Values, array, entry
from theory.derivations_numeric import Rng, column_jacobian, jacobian, layer_norm, softmax
from theory.sources import Source
from theory.symbols import symbol

_sp: Any = sp

OWN = Source(key="spikecheck", label="softmax of random logits")
STEIN = Source(key="price1958theorem", label="its first order, Stein's identity")

d, mu, sigma, eps = symbol("d"), entry("m"), symbol("sigma"), symbol("eps")
behind = entry("P_f x.P_f' x'", r"P_f x \cdot P_{f'} x'", signed=True)
dot_x, dot_f = entry("x.x'", r"x \cdot x'", signed=True), entry("f.f'", r"f \cdot f'", signed=True)
scale = entry("s_eps", r"s_\epsilon")
V, c, delta = entry("V"), entry("c", signed=True), entry("delta_yy'", r"\delta_{y y'}")
p, y = array("p"), array("y")
at_logits = array("dL/dl", r"\frac{\partial L}{\partial \ell}")
dot = entry("(p-y).(p'-y')", r"(p - y) \cdot (p' - y')", signed=True)
mean_dot = entry("E[(p-y).(p'-y')]", r"\mathbb{E}[(p - y) \cdot (p' - y')]", signed=True)
p_target, q_target, both = entry("p_y'", r"p_{y'}"), entry("p'_y", r"p'_y"), entry("E[p.p']", r"\mathbb{E}[p \cdot p']")
square = entry("E|p|^2", r"\mathbb{E}\|p\|^2")
through = entry("E[W'a.W'b]", r"\mathbb{E}[W^\top a \cdot W^\top b]", signed=True)
fixed = entry("a.b", r"a \cdot b", signed=True)
x, W, N = array("x"), array("W"), array("dnorm/dx", r"\frac{\partial \mathrm{norm}}{\partial x}")
tilt = array("E[W'p]", r"\mathbb{E}[W^\top p]")
capped_tilt = array("E[W'l'p]", r"\mathbb{E}[W^\top (\ell' \circ p)]")
curved = entry("E[l''.p]", r"\mathbb{E}[\ell'' \cdot p]", signed=True)
sloped = entry("E[l'^2.(p-p^2)]", r"\mathbb{E}[\ell'^2 \cdot (p - p^2)]")
leaning = entry("E_p[l'^2+l'']", r"\mathbb{E}_p[\ell'^2 + \ell'']", signed=True)
along_logit = entry("E_p[z l']", r"\mathbb{E}_p[z \ell']")
v, l_x, p_x = entry("v"), entry("l_x", r"\ell_x"), entry("p_x")
row = entry("|e-x(x.e)|^2", r"\|e - x (x \cdot e)\|^2")
rows = entry("(e-x(x.e)).(e'-x'(x'.e'))", r"(e - x (x \cdot e)) \cdot (e' - x' (x' \cdot e'))", signed=True)
own_share, tokens = entry("s"), dot_x
I = array("I")  # noqa: E741  the identity's letter

VOCABULARY, DRAWS = 4096, 200


def _logits(rng: Rng) -> Values:
    """Two tokens' distributions over six words, of any logits; averages are over all shifts of the words."""
    words = 6
    logits, other = rng.normal(0, 1.5, words), rng.normal(0, 1.5, words)
    target, other_target = int(rng.integers(words)), int(rng.integers(words))
    first, second = softmax(logits), softmax(other)
    one, two = np.eye(words)[target], np.eye(words)[other_target]

    def loss(l: Any) -> Any:  # noqa: E741
        return np.log(np.sum(np.exp(l))) - l[target]

    shifted = [(np.roll(first, by) - one) @ (np.roll(second, by) - two) for by in range(words)]
    return {
        **{at_logits: jacobian(loss, logits).T, p: first[:, None], y: one[:, None]},
        **{dot: float((first - one) @ (second - two)), delta: float(target == other_target), V: words},
        **{p_target: first[other_target], q_target: second[target], mean_dot: float(np.mean(shifted))},
        both: float(first @ second),
    }


def _together(rng: Rng, *, sign: int = 1) -> Values:
    """Distributions of two tokens whose logits correlate, over a large vocabulary; means over draws."""
    variance = float(rng.uniform(0.8, 1.2))
    covariance = sign * variance * float(rng.uniform(0.6, 0.9))
    root = np.linalg.cholesky(np.array([[variance, covariance], [covariance, variance]]))
    logits = np.einsum("ij,njv->niv", root, rng.normal(0, 1, (DRAWS, 2, VOCABULARY)))
    pairs = softmax(logits)
    shared = float(np.mean(np.sum(pairs[:, 0] * pairs[:, 1], axis=1)))
    # Over all shifts of the vocabulary a target's probability is 1/V.
    apart = float(np.mean(np.sum(pairs, axis=2))) / VOCABULARY
    return {both: shared, mean_dot: shared - 2 * apart, V: VOCABULARY, c: covariance, delta: 0.0}


def _heads(rng: Rng) -> Values:
    """Random heads on 32 words of a token of width 8, means over 40000."""
    width, words, draws = 8, 32, 40_000
    std, multiplier = float(rng.uniform(0.2, 0.4)), float(rng.uniform(0.7, 1.3))
    token = rng.normal(0, 1, width)
    token *= np.sqrt(width) / np.linalg.norm(token)
    heads = rng.normal(0, std, (draws, words, width))
    rows = softmax(multiplier * heads @ token)
    a, b = rng.normal(0, 1, (2, words))
    b += 2 * a  # so that their product is not by chance small
    mapped = np.einsum("nvi,v->ni", heads, a), np.einsum("nvi,v->ni", heads, b)
    return {
        **{tilt: np.einsum("nvi,nv->i", heads, rows)[:, None] / draws, x: token[:, None], d: width, mu: multiplier},
        **{square: float(np.mean(np.sum(rows**2, axis=1))), sigma: std},
        **{through: float(np.mean(np.sum(mapped[0] * mapped[1], axis=1))), fixed: float(a @ b)},
    }


def _normalised(rng: Rng, *, with_eps: bool = False) -> Values:
    """One head, behind a LayerNorm whose output is x."""
    width, words = 6, 10
    token, added = rng.normal(0, 1, (width, 1)), float(rng.uniform(0.1, 10)) if with_eps else 0.0
    norm = partial(layer_norm, eps=added)
    normed = norm(token)
    head = rng.normal(0, 1, (words, width))
    return {
        N: column_jacobian(norm, token), x: normed, W: head, p: softmax((head @ normed)[:, 0])[:, None], d: width,
        I: np.eye(width), eps: added, scale: float(np.sqrt(token.var() + added)),
    }  # fmt: skip


def _branches(rng: Rng) -> Values:
    """Two tokens x = u + f in one space, f orthogonal to all that is not a branch's output."""
    width = 8
    f, f_other = np.concatenate([rng.normal(1, 1, (2, 3)), np.zeros((2, width - 3))], axis=1)
    u, u_other = np.concatenate([np.zeros((2, 3)), rng.normal(1, 1, (2, width - 3))], axis=1)
    x_one, x_two = u + f, u_other + f_other
    g, g_other = x_one - f * (f @ x_one) / (f @ f), x_two - f_other * (f_other @ x_two) / (f_other @ f_other)
    return {behind: float(g @ g_other), dot_x: float(x_one @ x_two), dot_f: float(f @ f_other)}


def _capped(rng: Rng) -> Values:
    """The same heads with logits l = tanh z, means over 200000."""
    width, words, draws, std = 8, 32, 200_000, 0.3
    token = rng.normal(0, 1, width)
    token *= np.sqrt(width) / np.linalg.norm(token)
    multiplier = float(rng.uniform(0.7, 1.3))
    z = multiplier * std * np.sqrt(width) * rng.normal(0, 1, (draws, words))
    slopes = 1 / np.cosh(z) ** 2
    p_rows = softmax(np.tanh(z))
    # W p lies along x in the mean: that component is all that is drawn, W x = z / m.
    component = float(np.mean(np.sum(z * slopes * p_rows, axis=1))) / multiplier / width
    return {
        **{capped_tilt: component * token[:, None], x: token[:, None], mu: multiplier, sigma: std},
        curved: float(np.mean(np.sum(-2 * np.tanh(z) * slopes * p_rows, axis=1))),
        sloped: float(np.mean(np.sum(slopes**2 * (p_rows - p_rows**2), axis=1))),
    }


def _leaning(rng: Rng) -> Values:
    """Over one normal logit z, weighted by e^(c tanh(z/c))."""
    variance, cap = float(rng.uniform(0.5, 4)), float(rng.uniform(1, 5))
    z = np.linspace(-12, 12, 4001) * np.sqrt(variance)
    slopes = 1 / np.cosh(z / cap) ** 2
    weights = np.exp(cap * np.tanh(z / cap) - z * z / (2 * variance))
    weights = weights / weights.sum()
    curvature = -2 / cap * np.tanh(z / cap) * slopes
    return {v: variance, leaning: float(weights @ (slopes**2 + curvature)), along_logit: float(weights @ (z * slopes))}


def _own_word(rng: Rng) -> Values:
    """A word of logit l_x among the others' random ones."""
    variance, own = float(rng.uniform(0.3, 1.2)), float(rng.uniform(6, 12))
    others = np.exp(rng.normal(0, np.sqrt(variance), (DRAWS, VOCABULARY))).sum(axis=1)
    return {p_x: float(np.mean(1 / (1 + others * np.exp(-own)))), l_x: own, v: variance, V: VOCABULARY}


def _own_rows(rng: Rng) -> Values:
    """Two tokens of unit length, each with the share s along its own row, orthogonal to the other's."""
    share = float(rng.uniform(0.1, 0.9))
    e, e_other = np.eye(8)[:2]
    rest = [np.concatenate([[0.0, 0.0], u / np.linalg.norm(u)]) for u in rng.normal(0, 1, (2, 6)) + 1]
    first, second = (np.sqrt(share) * own + np.sqrt(1 - share) * u for own, u in zip((e, e_other), rest, strict=True))
    g, g_other = e - first * (first @ e), e_other - second * (second @ e_other)
    return {
        **{own_share: share, tokens: float(first @ second)},
        **{row: float(g @ g), rows: float(g @ g_other)},
    }


@register_derivation
def head_gradient() -> Derivation:
    """The loss's gradient at the head's input."""
    own = partial(line, source=OWN, sample=_logits)
    start = own(
        at_logits, "=", p - y, "derivative of log-sum-exp", "L = -l_y + ln sum e^l, p the softmax, y the target."
    )
    products = own(
        dot,
        "=",
        delta - p_target - q_target + both,
        "bilinearity",
        "Of two tokens, p.p' the sum over the vocabulary; delta is 1 where the targets are one word.",
    )
    symmetric = own(
        mean_dot,
        "=",
        delta - 2 / V + both,
        "exchangeability",
        "At initialisation no word is preferred: E[p_v] = 1/V.",
    )
    shared = own(
        both,
        "~=",
        _sp.exp(c) / V,
        "log-normal moments",
        "c is the covariance of the two tokens' logits at a word: E[e^(l + l')] is e^c times E[e^l] E[e^l'], and sums "
        "over a large vocabulary are their means. A token with itself has c = a, its logits' variance.",
        sample=_together,
        tolerance=0.04,
        accuracy=f"within 4 % at V = {VOCABULARY} and logits of variance 1: {DRAWS} draws have 1 %",
    )
    gram = substitution(
        *(symmetric, shared),
        source=OWN,
        explanation="Not the unit matrix: tokens that predict alike share a gradient, of either sign. At c = 0 it is "
        "-1/V, from 1' (p - y) = 0.",
        sample=partial(_together, sign=-1),
        tolerance=0.02,
        accuracy="within 2 % for tokens that are nearly opposite; towards c = ln 2, where it is 0, the line above is "
        "all",
    )
    isotropic = line(
        through,
        "=",
        sigma**2 * d * fixed,
        "isotropy",
        "At the head's input the gradient is m W'(p - y), m the factor on the logits. For a and b that do not depend "
        "on W its Gram matrix is that at the logits.",
        source=OWN,
        sample=_heads,
        tolerance=0.03,
        accuracy="exact; sampled: mean of 40000 draws, four standard errors of at most 0.7 %",
    )
    along = line(
        tilt,
        "=",
        mu * sigma**2 * (1 - square) * x,
        "Stein's identity",
        "But p does depend on W: it leans to the rows along x, E[W_vi p_v] = sigma^2 E[dp_v/dW_vi] with "
        "dp_v/dW_vi = m x_i (p_v - p_v^2).",
        source=STEIN,
        sample=_heads,
        tolerance=0.03,
        accuracy="exact; sampled: mean of 40000 draws, four standard errors of at most 0.7 %",
    )
    out = line(
        N * Transposed(W) * p,
        "=",
        N * (I - x * Transposed(x) / d) * Transposed(W) * p,
        "LayerNorm Jacobian",
        "The norm before the head takes out the direction of its token, and the tilt with it; without one it stays.",
        source=OWN,
        sample=_normalised,
    )
    left = line(
        N * x,
        "=",
        eps * x / scale**3,
        "LayerNorm Jacobian",
        "But for its eps: with x its output and s_eps what it divides by, it leaves the share eps/s_eps^2 of the tilt, "
        "all of it where the stream is small.",
        source=OWN,
        sample=partial(_normalised, with_eps=True),
    )
    branch = line(
        behind,
        "=",
        dot_x - dot_f,
        "projection",
        "What is left of the tilt meets the norms of the branches' outputs, where they have any. Each takes its own f, "
        "a part of x and orthogonal to the rest of it, out: between tokens x.x' loses f.f', the larger the more alike "
        "attention's averages are.",
        source=OWN,
        sample=_branches,
    )
    capped = line(
        capped_tilt,
        "=",
        mu * sigma**2 * (curved + sloped) * x,
        "Stein's identity",
        "Under a soft-cap l(z) of z = m W x the gradient is m W'(l'(p - y)), l' the slopes, and d(l'_v p_v)/dz_v = "
        "l''_v p_v + l'_v^2 (p_v - p_v^2).",
        source=STEIN,
        sample=_capped,
        tolerance=0.02,
        accuracy="exact; sampled: mean of 200000 draws, four standard errors of at most 0.4 %",
    )
    before = line(
        leaning,
        "=",
        along_logit / v,
        "Stein's identity",
        "Over a large vocabulary the bracket is this mean, of z weighted by e^l, with z's variance v before the cap. "
        "Where the cap is saturated l' is 0, and no tilt is left; without one it is 1.",
        source=STEIN,
        sample=_leaning,
    )
    own_word = line(
        p_x,
        "~=",
        1 / (1 + V * _sp.exp(v / 2 - l_x)),
        "log-normal mean",
        "A tied head has a row e along its token x, of a logit l_x beside the others' variance v: its word's "
        "probability is not 1/V, and the gradient has the part p_x e besides the isotropic one.",
        source=OWN,
        sample=_own_word,
        tolerance=0.02,
        accuracy=f"within 2 % at V = {VOCABULARY} and logits of variance 1",
    )
    own_row = line(
        row,
        "=",
        1 - own_share,
        "projection",
        "Lengths are 1, s the squared cosine of e and x. The norm takes the direction of x out; in post-ln without a "
        "final norm the last one does.",
        source=OWN,
        sample=_own_rows,
    )
    own_rows = line(
        rows,
        "=",
        own_share * tokens,
        "projection",
        "Rows of different words are orthogonal, and each to the other's token: tokens share what their streams do.",
        source=OWN,
        sample=_own_rows,
    )
    return Derivation(
        name="head-gradient",
        title="The loss's gradient at the head's input",
        steps=(
            *(start, products, symmetric, shared, gram, isotropic, along, out, left, branch),
            *(capped, before, own_word, own_row, own_rows),
        ),
        assumptions=(
            "a head of independent normal rows of std sigma; the last three lines: tied",
            "no soft-cap on the output logits but in lines 11 and 12",
        ),
    )
