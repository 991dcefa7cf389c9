"""Chains about experts behind a router: a true bound for one token, and what routing does to Gram matrices."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import sympy as sp  # pyright: ignore[reportMissingTypeStubs]

from theory.derivation import Derivation, Step, register_derivation, substitution
from theory.derivations_expressions import Norm, SumOver, Transposed, Values, array, entry
from theory.derivations_numeric import Array, Rng, jacobian
from theory.sources import Source
from theory.symbols import symbol

_sp: Any = sp
OWN = Source(key="spikecheck", label="product rule of gates and experts")

EXPERTS, WIDTH, HIDDEN = 4, 5, 6

e = entry("e")
g_e, p_e, q_e, h_e = entry("g_e"), entry("p_e"), entry("p'_e"), entry("g'_e")
J_e, f_e, w_e, gradient_e = array("J_e"), array("f_e"), array("w_e"), array("dg_e/du", r"\nabla g_e")
mean_w = array("w_p", r"\bar w_p")
whole, through_router = array("J_u", "J_u"), array("J_r", "J_r")
largest, longest, spread = symbol("expert_jacobian"), symbol("expert_output"), symbol("router_spread")


def _gates(logits: Array, chosen: int, *, renormalised: bool) -> tuple[Array, Array]:
    """Gates and the softmax that they are of; for complex logits too, ordered by their real parts."""
    weights = np.exp(logits - np.max(np.real(logits)))
    kept = np.where(np.real(logits) >= np.sort(np.real(logits))[-chosen], weights, 0)
    total = np.sum(kept) if renormalised else np.sum(weights)
    return kept / total, (kept if renormalised else weights) / total


def _token(rng: Rng, case: Literal["any", "equal", "opposite"] = "any") -> Values:
    """A token at experts of one hidden layer of tanh: any, all the same, or two that are chosen and cancel."""
    chosen, renormalised = int(rng.integers(1, EXPERTS + 1)), bool(rng.random() < 0.5)
    router = rng.normal(0, 1, (EXPERTS, WIDTH))
    W_1, W_2 = rng.normal(0, 1, (EXPERTS, HIDDEN, WIDTH)), rng.normal(0, 1, (EXPERTS, WIDTH, HIDDEN))
    u = rng.normal(0, 1, WIDTH)
    if case != "any":
        W_1[:], W_2[:], router[:] = W_1[0], W_2[0], router[0]
        chosen, renormalised = EXPERTS, True
    if case == "opposite":
        across = rng.normal(0, 1, WIDTH)
        across -= u * (across @ u) / (u @ u)  # both rows have the same logit
        router[0], router[1] = router[0] + across, router[0] - across
        router[2:] -= 0.1 * u
        W_2[1], chosen = -W_2[0], 2

    def expert(place: int, x: Array) -> Array:
        return W_2[place] @ np.tanh(W_1[place] @ x)

    def gates(x: Array) -> Array:
        return _gates(router @ x, chosen, renormalised=renormalised)[0]

    def output(x: Array) -> Array:
        return sum((gates(x)[place] * expert(place, x) for place in range(EXPERTS)), start=np.zeros(WIDTH))

    g, p = _gates(router @ u, chosen, renormalised=renormalised)
    slopes = jacobian(gates, u)
    each = [jacobian(lambda x, place=place: expert(place, x), u) for place in range(EXPERTS)]
    outputs = [expert(place, u)[:, None] for place in range(EXPERTS)]
    return {
        whole: jacobian(output, u),
        e: [
            {g_e: g[i], p_e: p[i], J_e: each[i], f_e: outputs[i], w_e: router[i][:, None]}
            | {gradient_e: slopes[i][:, None]}
            for i in range(EXPERTS)
        ],
        mean_w: (p @ router)[:, None],
        through_router: sum(outputs[i] @ slopes[[i]] for i in range(EXPERTS)),
        largest: max(np.linalg.norm(one, 2) for one in each),
        longest: max(float(np.linalg.norm(one)) for one in outputs),
        spread: float(np.max(np.linalg.norm(router[:, None] - router, axis=2))),
    }


def _equal(rng: Rng) -> Values:
    return _token(rng, "equal")


def _opposite(rng: Rng) -> Values:
    return _token(rng, "opposite")


@register_derivation
def experts_upper() -> Derivation:
    """Experts behind a router, at one token."""
    product = Step(
        left=whole,
        right=SumOver(g_e * J_e, e) + SumOver(f_e * Transposed(gradient_e), e),
        relation="=",
        rule="product rule",
        source=OWN,
        explanation="The output is sum_e g_e f_e. Where the routing changes it jumps: nothing is said there.",
        sample=_token,
    )
    slopes = Step(
        left=SumOver(f_e * Transposed(gradient_e), e),
        right=SumOver(g_e * f_e * (Transposed(w_e) - Transposed(mean_w)), e),
        relation="=",
        rule="softmax Jacobian",
        source=OWN,
        explanation="dg_e = g_e (dl_e - sum_i p_i dl_i), over the chosen experts or over all, and dl_e = w_e.du.",
        sample=_token,
    )
    parts = Step(
        left=Norm(whole),
        right=SumOver(g_e * Norm(J_e), e) + Norm(SumOver(g_e * f_e * (Transposed(w_e) - Transposed(mean_w)), e)),
        relation="<=",
        rule="triangle inequality",
        source=OWN,
        explanation="Gates are at least 0.",
        sample=_token,
        tight=_equal,
    )
    convex = Step(
        left=SumOver(g_e * Norm(J_e), e),
        right=largest,
        relation="<=",
        rule="weighted mean",
        source=OWN,
        explanation="Gates sum to at most 1.",
        sample=_token,
        tight=_equal,
    )
    router = Step(
        left=Norm(SumOver(g_e * f_e * (Transposed(w_e) - Transposed(mean_w)), e)),
        right=longest * spread / 2,
        relation="<=",
        rule="Popoviciu's inequality",
        source=OWN,
        explanation="On a unit v: at most max|f_e| sum_e p_e |x_e - mean|, x_e = w_e.v, as g_e <= p_e; that is at most "
        "the standard deviation of x over p, and half its range, the largest (w_e - w_i).v.",
        sample=_token,
        tight=_opposite,
    )
    conclusion = substitution(
        *(parts, convex, router),
        source=OWN,
        explanation="Attained by equal experts with equal router rows.",
        sample=_token,
        tight=_equal,
    )
    return Derivation(
        name="experts-upper",
        title="Experts behind a router, a true bound at one token",
        steps=(product, slopes, parts, convex, router, conclusion),
        statement="experts-upper",
        assumptions=("no token between two routings",),
    )


# --- routing in expectation -----------------------------------------------------------------------------------------

DRAWS = 4000
ACCURACY = f"means over {DRAWS} draws, whose standard error is 1 to 2 %: 8 % is four of them or more"

shared, shared_itself, slopes_shared = entry("A"), entry("A_tt"), entry("B", signed=True)
overlap = entry("g.g'", r"g \cdot g'")
agreement = entry("p.p'", r"p \cdot p'")
products = entry("tr DD'", r"\mathrm{tr}\, D D'^\top", signed=True)
output_gram, gradient_gram = (
    entry("<f,f'>/d", r"\langle f, f' \rangle / d", signed=True),
    entry("|du|^2", r"\| \nabla_u \|^2"),
)
kappa = entry("kappa", r"\kappa", signed=True)
r, cotangent = entry("r"), entry("|v|^2", r"\| v \|^2")
own, share = entry("g.g", r"g \cdot g"), entry("a")
along, mean_along = (
    entry("|D'g|^2", r"\| D^\top g \|^2"),
    entry("E[|D'g|^2/|g|^2]", r"\mathbb{E}[\| D^\top g \|^2 / \| g \|^2]"),
)
router_gradient = entry("|du_r|^2", r"\| \nabla_u^{\mathrm{router}} \|^2")


def _pair(rng: Rng) -> Values:
    """Gates of two tokens with correlated logits."""
    chosen, renormalised = int(rng.integers(1, EXPERTS + 1)), bool(rng.random() < 0.5)
    first = rng.normal(0, 1.5, EXPERTS)
    second = 0.7 * first + rng.normal(0, 1, EXPERTS)
    g, p = _gates(first, chosen, renormalised=renormalised)
    h, q = _gates(second, chosen, renormalised=renormalised)

    def slopes(logits: Array) -> Array:
        return jacobian(lambda x: _gates(x, chosen, renormalised=renormalised)[0], logits)

    return {
        products: float(np.sum(slopes(first) * slopes(second))),
        overlap: float(g @ h),
        agreement: float(p @ q),
        own: float(g @ g),
        along: float(np.sum((slopes(first).T @ g) ** 2)),
        e: [{g_e: g[i], h_e: h[i], p_e: p[i], q_e: q[i]} for i in range(EXPERTS)],
    }


def _layer(rng: Rng) -> Values:
    """Linear experts of width 24 on two tokens of correlation 0.6, top 2 of 4, means over random weights."""
    width, variance, correlation = 24, 1.5, 0.6
    u = np.linalg.qr(rng.normal(0, 1, (width, 2)))[0].T * np.sqrt(width)
    u = np.stack([u[0], correlation * u[0] + np.sqrt(1 - correlation**2) * u[1]])
    sums = np.zeros(5)
    for _ in range(DRAWS):
        router = rng.normal(0, np.sqrt(variance / width), (EXPERTS, width))
        W = rng.normal(0, 1 / np.sqrt(width), (EXPERTS, width, width))
        v = rng.normal(0, 1, width)
        (g, _), (h, _) = (_gates(router @ x, 2, renormalised=True) for x in u)
        f = np.einsum("eij,tj->eti", W, u)
        slope = np.diag(g) - np.outer(g, g)
        gradient = np.einsum("e,eij,i->j", g, W, v) + router.T @ (slope @ (f[:, 0] @ v))
        both = np.einsum("e,ei->i", g, f[:, 0]) @ np.einsum("e,ei->i", h, f[:, 1]) / width
        sums += [both, g @ h, gradient @ gradient / (v @ v), np.sum(slope**2), g @ g]
    output, together, squared, mean_slopes, itself = sums / DRAWS
    return {
        **{output_gram: output, shared: together, kappa: correlation},
        **{gradient_gram: squared, slopes_shared: mean_slopes, r: variance, cotangent: 1.0, shared_itself: itself},
    }


def _below_a_norm(rng: Rng) -> Values:
    """One of four linear experts, gates over all; the gradient is orthogonal to x + f, half of which is f."""
    width, variance = 24, 4.0
    sums = np.zeros(3)
    u = rng.normal(0, 1, width)
    u *= np.sqrt(width) / np.linalg.norm(u)
    for _ in range(DRAWS):
        router = rng.normal(0, np.sqrt(variance / width), (EXPERTS, width))
        outputs = rng.normal(0, 1, (EXPERTS, width))  # W_e u
        g, p = _gates(router @ u, 1, renormalised=False)
        slope, f = np.diag(g) - np.outer(g, p), g @ outputs
        x, v = rng.normal(0, 1, (2, width))
        x -= f * (x @ f) / (f @ f)
        y = f / np.linalg.norm(f) + x / np.linalg.norm(x)
        v -= y * (v @ y) / (y @ y)
        gradient = router.T @ (slope.T @ (outputs @ v))
        sums += [gradient @ gradient / (v @ v), np.sum(slope**2), np.sum((slope.T @ g) ** 2) / (g @ g)]
    squared, mean_slopes, mean_own = sums / DRAWS
    return {router_gradient: squared, slopes_shared: mean_slopes, mean_along: mean_own, r: variance, share: 0.5} | {
        cotangent: 1.0
    }


@register_derivation
def routing() -> Derivation:
    """Top-k routing in expectation over the router's weights."""
    forward = Step(
        left=output_gram,
        right=shared * kappa,
        relation="~=",
        rule="independent experts",
        source=OWN,
        explanation="Two different experts' outputs are uncorrelated and the same expert's have the kernel kappa; the "
        "gates are independent of both. A = E sum_e g_e(t) g_e(t') is the expectation over the routing.",
        sample=_layer,
        tolerance=0.08,
        accuracy=ACCURACY,
    )
    backward = Step(
        left=gradient_gram,
        right=(shared_itself + r * slopes_shared) * cotangent,
        relation="~=",
        rule="independent experts",
        source=OWN,
        explanation="Through the experts A times the slope's kernel (1 for linear ones), through the router r B kappa, "
        "kappa = 1 of a token with itself: |w_e|^2 = r, and f_e.v has the variance kappa |v|^2.",
        sample=_layer,
        tolerance=0.08,
        accuracy=ACCURACY,
    )
    trace = Step(
        left=products,
        right=overlap * (1 + agreement) - SumOver(g_e * h_e * (p_e + q_e), e),
        relation="=",
        rule="softmax Jacobian",
        source=OWN,
        explanation="D = diag(g) - g p' has dg/dl, as long as the chosen stay chosen; B is the mean of this trace.",
        sample=_pair,
    )
    radial = Step(
        left=along,
        right=SumOver((g_e**2 - p_e * own) ** 2, e),
        relation="=",
        rule="softmax Jacobian",
        source=OWN,
        explanation="D'g for the same D: how the router moves the output along itself.",
        sample=_pair,
    )
    below = Step(
        left=router_gradient,
        right=r * (slopes_shared - share * mean_along) * cotangent,
        relation="~=",
        rule="projection",
        source=OWN,
        explanation="Below a norm of y = x + f, v is orthogonal to y. The router's gradient is D'F v with F F' the "
        "identity times |F|^2, kappa = 1; of it F y = |F|^2 g is lost, |F|^4 |D'g|^2/|y|^2, and |F|^2 |g|^2 = |f|^2 is "
        "the part a of |y|^2. One expert alone has all of it along itself: what is left is 1 - a.",
        sample=_below_a_norm,
        tolerance=0.08,
        accuracy=ACCURACY,
    )
    return Derivation(
        name="routing",
        title="Experts behind a router, in expectation over the routing",
        steps=(forward, backward, trace, radial, below),
        assumptions=("independent normal weights", "large width", "no token is dropped"),
    )
