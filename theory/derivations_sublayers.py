"""Chains about the gated feed-forward, the feed-forward branch and the embeddings: exact Jacobians, then bounds."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import sympy as sp  # pyright: ignore[reportMissingTypeStubs]

from theory.derivation import Derivation, line, register_derivation, substitution
from theory.derivations_expressions import MaxOver, Norm, Transposed, Values, array, entry
from theory.derivations_numeric import ACTIVATIONS, STEP, Array, Rng, column_jacobian, jacobian, layer_norm, opnorm
from theory.sources import Source
from theory.symbols import symbol

_sp: Any = sp

OWN = Source(key="spikecheck", label="product rule and sub-multiplicativity")
GLU = Source(key="shazeer2020glu", label="gated linear units")
DETACH = Source(key="zeng2023glm", label="embedding gradient shrink")
CHAIN = Source(key="spikecheck", label="chain rule of ffn-upper and norm-jacobian-upper")

W_1, W_2, W_3, u, x = array("W_1"), array("W_2"), array("W_3"), array("u"), array("x")
value, slope = (
    array("diag(F(z_1))", r"\mathrm{diag}(F(z_1))"),
    array("diag(F'(z_1) z_3)", r"\mathrm{diag}(F'(z_1) z_3)"),
)
beside, stacked = array("M"), array("[W_1; W_3]", r"\left[ W_1; W_3 \right]")
unit, unit_slope, unit_value = (
    entry("i"),
    entry("(F'(z_1i) z_3i)", r"\left( F'(z_{1i}) z_{3i} \right)", signed=True),
    entry("F(z_1i)", "F(z_{1i})", signed=True),
)
norm_2, norm_13, gate_slope = symbol("opnorm_2"), symbol("opnorm_13"), symbol("gate_slope")
_FFN = array("dFFN/du", r"\frac{\partial \mathrm{FFN}}{\partial u}")


def _gated(rng: Rng, *, one_unit: bool = False) -> Values:
    """A gated feed-forward with biases; one_unit: two orthogonal input weights of equal length."""
    width, hidden = (2, 1) if one_unit else (5, 12)
    F = ACTIVATIONS[str(rng.choice(["relu", "gelu", "silu"]))]
    first, third = rng.normal(0, 1, (hidden, width)), rng.normal(0, 1, (hidden, width))
    if one_unit:
        first, third = np.array([[2.0, 0.0]]), np.array([[0.0, 2.0]])
    second, point = rng.normal(0, 1, (width, hidden)), rng.normal(0, 1, (width, 1))
    bias_1, bias_3 = rng.normal(0, 1, (hidden, 1)), rng.normal(0, 1, (hidden, 1))
    z_1, z_3 = first @ point + bias_1, third @ point + bias_3
    slopes = np.imag(F(z_1 + 1j * STEP)) / STEP * z_3
    values = F(z_1)
    return {
        **{W_1: first, W_2: second, W_3: third, slope: np.diag(slopes[:, 0]), value: np.diag(values[:, 0])},
        **{beside: np.hstack([np.diag(slopes[:, 0]), np.diag(values[:, 0])]), stacked: np.vstack([first, third])},
        **{norm_2: opnorm(second), norm_13: opnorm(np.vstack([first, third]))},
        gate_slope: float(np.max(np.hypot(slopes, values))),
        unit: [{unit_slope: float(a), unit_value: float(b)} for a, b in zip(slopes[:, 0], values[:, 0])],
        _FFN: column_jacobian(lambda u: second @ (F(first @ u + bias_1) * (third @ u + bias_3)), point),
    }


def _one_unit(rng: Rng) -> Values:
    return _gated(rng, one_unit=True)


@register_derivation
def ffn_gated_upper() -> Derivation:
    """The gated feed-forward sub-layer's Jacobian."""
    own = partial(line, source=OWN, sample=_gated)
    exact = line(
        _FFN,
        "=",
        W_2 * (slope * W_1 + value * W_3),
        "product rule",
        "FFN(u) = W_2 (F(z_1) z_3) entry by entry, z_1 = W_1 u + b_1 and z_3 = W_3 u + b_3.",
        source=GLU,
        sample=_gated,
    )
    factors = own(
        slope * W_1 + value * W_3,
        "=",
        beside * stacked,
        "block product",
        "M = [diag(F'(z_1) z_3), diag(F(z_1))], side by side.",
    )
    rows = own(
        Norm(beside),
        "=",
        MaxOver(_sp.sqrt(unit_slope**2 + unit_value**2), unit),
        "orthogonal rows",
        "MM' is diagonal: its entries are the squared rows.",
    )
    named = own(
        MaxOver(_sp.sqrt(unit_slope**2 + unit_value**2), unit),
        "=",
        gate_slope,
        "definition",
        "The letter by which it is measured, the largest over tokens too.",
    )
    product = own(
        Norm(_FFN),
        "<=",
        norm_2 * Norm(beside) * norm_13,
        "sub-multiplicativity",
        "One factor for both input matrices: the triangle inequality over the two terms would cost up to sqrt 2.",
        tight=_one_unit,
    )
    conclusion = substitution(
        *(product, rows, named),
        source=OWN,
        explanation="Attained by one unit with orthogonal input weights of equal length.",
        sample=_gated,
        tight=_one_unit,
    )
    return Derivation(
        name="ffn-gated-upper",
        title="Gated feed-forward sub-layer, a true bound",
        steps=(exact, factors, rows, named, product, conclusion),
        statement="ffn-gated-upper",
        assumptions=("activations known",),
    )


lipschitz, norm_1, gain, s = symbol("lipschitz"), symbol("opnorm_1"), symbol("gain"), symbol("s")
_BRANCH = array("dFFN(LN(X))/dX", r"\frac{\partial \mathrm{FFN}(\mathrm{LN}(X))}{\partial X}")
_TOKEN = array("dFFN(LN(x_t))/dx_t", r"\frac{\partial \mathrm{FFN}(\mathrm{LN}(x_t))}{\partial x_t}")
_FFN_T = array("dFFN/du_t", r"\frac{\partial \mathrm{FFN}}{\partial u_t}")
_LN_T = array("dLN/dx_t", r"\frac{\partial \mathrm{LN}}{\partial x_t}")
token = entry("t")


def _branch(rng: Rng, *, aligned: bool = False) -> Values:
    """Three tokens through LayerNorm with a gain and a feed-forward; aligned: one token, identity maps."""
    from theory.activations import lipschitz as largest_slope

    n_tokens, width, epsilon = (1 if aligned else 3), 5, 1e-3
    name: Any = "identity" if aligned else str(rng.choice(["relu", "gelu", "silu"]))
    F = ACTIVATIONS[name]
    hidden = width if aligned else 8
    first = np.eye(width) if aligned else rng.normal(0, 1, (hidden, width))
    second = np.eye(width) if aligned else rng.normal(0, 1, (width, hidden))
    scales = np.ones((width, 1)) if aligned else rng.normal(0, 1, (width, 1))
    tokens = rng.normal(0, 1, (n_tokens, width))

    def norm(x: Array) -> Array:
        return scales * layer_norm(x, epsilon)

    def feed(u: Array) -> Array:
        return second @ F(first @ u)

    columns = [row[:, None] for row in tokens]
    return {
        **{lipschitz: largest_slope(name), norm_1: opnorm(first), norm_2: opnorm(second)},
        **{gain: float(np.max(np.abs(scales))), s: float(np.sqrt(np.min(np.var(tokens, axis=1)) + epsilon))},
        _BRANCH: jacobian(lambda X: feed(norm(X.T)).T, tokens),
        token: [
            {
                _TOKEN: column_jacobian(lambda x: feed(norm(x)), x),
                _FFN_T: column_jacobian(feed, norm(x)),
                _LN_T: column_jacobian(norm, x),
            }
            for x in columns
        ],
    }


def _aligned_branch(rng: Rng) -> Values:
    return _branch(rng, aligned=True)


@register_derivation
def ffn_branch_upper() -> Derivation:
    """The feed-forward branch's Jacobian in the residual stream."""
    own = partial(line, source=CHAIN, sample=_branch)
    diagonal = own(
        Norm(_BRANCH),
        "=",
        MaxOver(Norm(_TOKEN), token),
        "block-diagonal matrix",
        "Each token passes by itself, so the sequence's Jacobian has one block a token.",
    )
    product = own(
        MaxOver(Norm(_TOKEN), token),
        "<=",
        MaxOver(Norm(_FFN_T) * Norm(_LN_T), token),
        "chain rule, sub-multiplicativity",
        "u_t = LN(x_t).",
        tight=_aligned_branch,
    )
    bounds = own(
        MaxOver(Norm(_FFN_T) * Norm(_LN_T), token),
        "<=",
        lipschitz * norm_1 * norm_2 * gain / s,
        "ffn-upper and layernorm",
        "L |W_1| |W_2| and |gamma|/s_t, s the smallest s_t.",
        tight=_aligned_branch,
    )
    conclusion = substitution(
        *(diagonal, product, bounds),
        source=CHAIN,
        explanation="The only place where the residual stream's size enters: 1/s.",
        sample=_branch,
        tight=_aligned_branch,
    )
    return Derivation(
        name="ffn-branch-upper",
        title="Feed-forward branch, a true bound in the residual stream",
        steps=(diagonal, product, bounds, conclusion),
        statement="ffn-branch-upper",
        assumptions=("feed-forward without a gate", "s > 0"),
    )


E, S, G, X = array("E"), array("S"), array("G"), array("X")
mu, count, shrink = entry("mu", r"\mu"), entry("n_max", r"n_{\max}"), entry("alpha_E", r"\alpha_E")
eps, sigma_E = symbol("eps"), entry("sigma_E", r"\sigma_E")
_DX_DE = array("dX/dE", r"\frac{\partial X}{\partial E}")
_DL_DE = array("dL/dE", r"\frac{\partial \mathcal{L}}{\partial E}")
_DETACHED = array("dL_det/dE", r"\frac{\partial \mathcal{L}_{\mathrm{det}}}{\partial E}")
_TIED = array("dL_tied/dE", r"\frac{\partial \mathcal{L}_{\mathrm{tied}}}{\partial E}")
_LN_E = array("dLN(mu e)/de", r"\frac{\partial \mathrm{LN}(\mu e)}{\partial e}")
_ROW, _ROWS_G = array("dL/dE_v", r"\frac{\partial \mathcal{L}}{\partial E_v}"), array("G_v", "G_v")
n_v, Y, dlogits = entry("n_v"), array("Y"), array("dL/dlogits", r"\frac{\partial \mathcal{L}}{\partial \ell}")


def _embedding(rng: Rng, *, equal: bool = False) -> Values:
    """Five tokens over a table of four rows, some repeated, and a smooth loss; equal: the loss is the same for all."""
    ids = np.array([0, 2, 0, 1, 0])
    one_hot = np.eye(4)[ids]
    table, factor, kept = rng.normal(0, 1, (4, 3)), float(rng.uniform(0.5, 4)), float(rng.uniform(0.05, 0.9))
    weights = np.ones((5, 3)) * rng.normal(0, 1, 3) if equal else rng.normal(0, 1, (5, 3))

    def stream(E: Array) -> Array:
        return factor * one_hot @ E

    def loss(x: Array) -> Array:
        return np.sum(weights * (x if equal else np.sin(x))).reshape(1)

    def detached(E: Array) -> Array:
        return loss(kept * stream(E) + (1 - kept) * stream(table))

    def tied(E: Array, head: Array) -> Array:
        return np.sum(np.sin(layer_norm(stream(E).T).T @ head.T + np.arange(4))).reshape(1)

    backward = jacobian(loss, stream(table)).reshape(5, 3)
    normalised = layer_norm(stream(table).T).T
    epsilon = 1e-2
    row = table[:1].T
    return {
        **{E: table, S: one_hot, X: stream(table), mu: factor, shrink: kept, G: backward, count: 3, n_v: 3},
        **{_DX_DE: jacobian(stream, table), _DL_DE: jacobian(lambda E: loss(stream(E)), table).reshape(4, 3)},
        **{_DETACHED: jacobian(detached, table).reshape(4, 3), Y: normalised, eps: epsilon},
        **{sigma_E: float(np.std(row)), _LN_E: column_jacobian(lambda e: layer_norm(factor * e, epsilon), row)},
        _TIED: jacobian(lambda E: tied(E, E), table).reshape(4, 3),
        array("G_tied", r"G_{\mathrm{tied}}"): jacobian(
            lambda x: np.sum(np.sin(layer_norm(x.T).T @ table.T + np.arange(4))).reshape(1), stream(table)
        ).reshape(5, 3),
        dlogits: np.cos(normalised @ table.T + np.arange(4)),
        **{_ROW: jacobian(lambda E: loss(stream(E)), table).reshape(4, 3)[:1].T, _ROWS_G: backward[ids == 0].T},
    }


def _equal(rng: Rng) -> Values:
    return _embedding(rng, equal=True)


def _update(rng: Rng) -> Values:
    """A table and its gradient's signs: an optimiser's step of one size for every entry."""
    table, factor, rate = rng.normal(0, rng.uniform(0.01, 1), (6, 4)), float(rng.uniform(0.5, 30)), 1e-3
    step = rate * np.sign(rng.normal(0, 1, table.shape))
    moved = float(np.linalg.norm(factor * (table + step) - factor * table) / np.linalg.norm(factor * table))
    return {relative: moved, eta: rate, sigma_E: float(np.sqrt(np.mean(table**2)))}


relative, eta = entry("|dX|/|X|", r"\frac{\| \Delta X \|}{\| X \|}"), entry("eta", r"\eta")


@register_derivation
def embedding() -> Derivation:
    """Embeddings: token table, scaled, detached, normalised and tied."""
    own = partial(line, source=Source(key="spikecheck", label="embeddings"), sample=_embedding)
    tied_stream = array("G_tied", r"G_{\mathrm{tied}}")
    definition = own(
        X,
        "=",
        mu * S * E,
        "definition",
        "S is one-hot, a row a token; mu the multiplier (sqrt d for Scaled Embed). Positions are added, not mixed: "
        "their Jacobian is the identity, and sinusoidal ones have no parameters.",
    )
    jacobian_step = own(
        Norm(_DX_DE),
        "=",
        mu * _sp.sqrt(count),
        "Kronecker product",
        "dX/dE = mu S x I_d, and S'S is diagonal with the tokens' counts: n_max is the largest.",
    )
    gradient = own(_DL_DE, "=", mu * Transposed(S) * G, "chain rule", "G = dL/dX; a row collects its token's places.")
    row = own(
        Norm(_ROW),
        "<=",
        mu * _sp.sqrt(n_v) * Norm(_ROWS_G),
        "sub-multiplicativity",
        "mu G_v' 1, over the n_v places of token v; attained where its gradients agree: a repeated token gathers n_v.",
        tight=_equal,
    )
    detached = line(
        _DETACHED,
        "=",
        shrink * mu * Transposed(S) * G,
        "chain rule",
        "Embed Detach: alpha x + (1 - alpha) stop(x). The forward pass and G are unchanged, the table's gradient alone "
        "shrinks: growth over the blocks is Vanilla's.",
        source=DETACH,
        sample=_embedding,
    )
    normalised = own(
        Norm(_LN_E),
        "=",
        mu / _sp.sqrt(mu**2 * sigma_E**2 + eps),
        "LayerNorm Jacobian",
        "Embed LN: the stream starts at std 1 whatever the table's std sigma_E, and the table's gradient is divided "
        "by it, up to eps/mu^2 (which matters for tables as small as sqrt eps).",
    )
    update = own(
        relative,
        "=",
        eta / sigma_E,
        "quotient",
        "A step of one size eta for every entry (Adam's first), all tokens once: mu cancels. So initialising at std 1, "
        "multiplying by sqrt d and normalising agree forwards but not in training: the last two move a table of std "
        "sqrt(2/(5d)), that much faster for its size.",
        sample=_update,
    )
    tied = own(
        _TIED,
        "=",
        mu * Transposed(S) * tied_stream + Transposed(dlogits) * Y,
        "total derivative",
        "A tied head, logits l = Y E': the table is reached twice, and the second time mu does not help.",
    )
    return Derivation(
        name="embedding",
        title="Embeddings: scaled, detached, normalised, tied",
        steps=(definition, jacobian_step, gradient, row, detached, normalised, update, tied),
        assumptions=("d >= 3 for the normalised table", "L is any smooth loss"),
    )
