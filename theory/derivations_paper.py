"""The paper's chains, step by step: eq. (15), eq. (20) and the gradient bound they are put into.

The paper writes `<=` throughout. Each line here carries what it really is: equalities and inequalities up to the
Gaussian norm, which is an estimate and makes both results estimates.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import sympy as sp  # pyright: ignore[reportMissingTypeStubs]

from theory.derivation import Derivation, Step, register_derivation, substitution
from theory.derivations_bounds import layer_norm_proof
from theory.derivations_expressions import Norm, Transposed, Values, array
from theory.derivations_numeric import (
    Array,
    Rng,
    column_jacobian,
    identity,
    jacobian,
    layer_norm,
    opnorm,
    random_attention,
    relu,
)
from theory.sources import Source
from theory.statements import find
from theory.symbols import symbol

_sp: Any = sp

EQ_15 = Source(key="takase2025spike", label="eq. (15)")
EQ_20 = Source(key="takase2025spike", label="eq. (20)")
MODEL = Source(key="takase2025spike", label="Pre-LN layer")
OWN = Source(key="spikecheck", label="linear algebra")

# Width of the checks of estimates. There a norm is 2 to 4 % below sigma (sqrt m + sqrt n) on average (Tracy-Widom
# offset, johnstone2001largest) and fluctuates by 1 to 2 %.
WIDTH = 64
ACCURACY = f"within 10 % at d = {WIDTH}: Tracy-Widom offset and fluctuation, johnstone2001largest"
EXCEEDED = f"exceeded by at most 10 % at d = {WIDTH}, where norms fluctuate about a mean below the estimate"

d, d_ffn = symbol("d"), symbol("d_ffn")
I = array("I")  # noqa: E741  the identity's letter
one = array("ones", r"\mathbf{1}")
z = array("z")


def _gaussian_norm(sigma: str, rows: Any, columns: Any) -> Any:
    """sigma (sqrt rows + sqrt columns), from the statement."""
    letters = {symbol("sigma"): symbol(sigma), symbol("rows"): rows, symbol("columns"): columns}
    return find("gaussian-opnorm-estimate").expression.subs(letters, simultaneous=True)


def _feedforward(rng: Rng, *, width: int = 8, linear: bool = False, aligned: bool = False) -> Values:
    """A random feed-forward half-layer and its Jacobians; aligned: W_2 = W_1', which makes the bounds tight."""
    hidden, sigma_1, sigma_2 = 4 * width, 0.7, 1.3
    x = rng.normal(0, 0.1 if aligned else rng.uniform(0.2, 2), (width, 1))
    first, second = rng.normal(0, sigma_1, (hidden, width)), rng.normal(0, sigma_2, (width, hidden))
    if aligned:  # inside the range of the LayerNorm Jacobian, which misses 1 and z
        unit = np.linalg.qr(np.hstack([np.ones((width, 1)), x]))[0]
        first = first - first @ unit @ unit.T
        second = first.T * sigma_2 / sigma_1
    F = identity if linear or aligned else relu
    u = layer_norm(x)
    units = [float(F(np.sum(first[k] * u[:, 0]))) for k in range(hidden)]
    loops = [[x[i, 0] + sum(second[i, k] * units[k] for k in range(hidden))] for i in range(width)]
    return {
        **{d: width, d_ffn: hidden, symbol("sigma_1"): sigma_1, symbol("sigma_2"): sigma_2},
        **{symbol("sigma_xp"): float(np.std(x)), symbol("opnorm_1"): opnorm(first), symbol("opnorm_2"): opnorm(second)},
        **{array("y"): np.array(loops), array("x'"): x, array("W_1"): first, array("W_2"): second},
        **{_sp.Function("F"): F, _sp.Function("LN"): layer_norm, I: np.eye(width), one: np.ones((width, 1)), z: u},
        _LN_XP: column_jacobian(layer_norm, x),
        _FFN_U: column_jacobian(lambda u: second @ F(first @ u), u),
        _DY: column_jacobian(lambda x: x + second @ F(first @ layer_norm(x)), x),
    }


_LN_XP = array("dLN/dx'", r"\frac{\partial \mathrm{LN}}{\partial x'}")
_FFN_U = array("dFFN/du", r"\frac{\partial \mathrm{FFN}}{\partial u}")
_DY = array("dy/dx'", r"\frac{\partial y}{\partial x'}")
_LN_X = array("dLN/dx", r"\frac{\partial \mathrm{LN}}{\partial x}")
_Z_U = array("J^Z", r"J^{Z}")
_DX = array("dx'/dx", r"\frac{\partial x'}{\partial x}")


def _aligned(rng: Rng) -> Values:
    return _feedforward(rng, aligned=True)


@register_derivation
def ffn() -> Derivation:
    """Eq. (15): the feed-forward half-layer."""
    F, LN, xp = _sp.Function("F"), _sp.Function("LN"), array("x'")
    W_1, W_2, sigma = array("W_1"), array("W_2"), symbol("sigma_xp")
    norm_1, norm_2 = symbol("opnorm_1"), symbol("opnorm_2")
    definition = Step(
        left=array("y"),
        right=xp + W_2 * F(W_1 * LN(xp)),
        relation="=",
        rule="definition",
        source=MODEL,
        explanation="The feed-forward half of a Pre-LN layer; biases and the gain are left out.",
        sample=_feedforward,
    )
    chain = Step(
        left=_DY,
        right=I + _FFN_U * _LN_XP,
        relation="=",
        rule="chain rule",
        source=EQ_15,
        explanation="The shortcut gives I, the branch a product, with u = LN(x').",
        sample=_feedforward,
    )
    jacobian_ln = Step(
        left=_LN_XP,
        right=(I - one * Transposed(one) / d - z * Transposed(z) / d) / sigma,
        relation="=",
        rule="LayerNorm Jacobian",
        source=Source(key="xiong2020layernorm", label="lemma 3"),
        explanation="From the derivatives of mean and variance, at eps = 0; z = LN(x'). See the derivation layernorm.",
        sample=_feedforward,
        proof=layer_norm_proof,
    )
    paper_ln = Step(
        left=_LN_XP,
        right=(I - z * Transposed(z) / d) / sigma,
        relation="~",
        rule="large width",
        source=EQ_15,
        explanation="The paper drops 11'/d, the derivative of the mean: one direction of d, and the norm stays.",
        sample=lambda rng: _feedforward(rng, width=128),
        tolerance=0.1,
        accuracy="within 10 % in Frobenius norm at d = 128: one direction of d - 1, 1/sqrt(d - 1) = 8.9 %",
    )
    triangle = Step(
        left=Norm(_DY),
        right=1 + Norm(_FFN_U * _LN_XP),
        relation="<=",
        rule="triangle inequality",
        source=OWN,
        explanation="The identity has norm 1.",
        sample=_feedforward,
        tight=_aligned,
    )
    product = Step(
        left=Norm(_FFN_U * _LN_XP),
        right=Norm(_FFN_U) * Norm(_LN_XP),
        relation="<=",
        rule="sub-multiplicativity",
        source=OWN,
        explanation="The spectral norm of a product is at most the product of the norms.",
        sample=_feedforward,
        tight=_aligned,
    )
    norm_ln = Step(
        left=Norm(_LN_XP),
        right=1 / sigma,
        relation="=",
        rule="eigenvalues of a projection",
        source=OWN,
        explanation="1 and z are orthogonal with squared norm d, so the bracket projects them out; d >= 3.",
        sample=_feedforward,
    )
    linear = Step(
        left=_FFN_U,
        right=W_2 * W_1,
        relation="=",
        rule="assumption: identity activation",
        source=Source(key="takase2025spike", label="assumption 1"),
        explanation="With F(a) = a the sub-layer is linear; no bound for GELU and SiLU, whose slopes exceed 1.",
        sample=lambda rng: _feedforward(rng, linear=True),
    )
    weights = Step(
        left=Norm(W_2 * W_1),
        right=norm_2 * norm_1,
        relation="<=",
        rule="sub-multiplicativity",
        source=OWN,
        explanation="Attained where W_2 is W_1 transposed; independent matrices with d_ffn = 4d reach half of it.",
        sample=_feedforward,
        tight=_aligned,
    )
    gaussian = [
        Step(
            left=norm,
            right=_gaussian_norm(sigma_i, d_ffn, d),
            relation="~",
            rule="Gaussian norm estimate",
            source=EQ_15,
            explanation=why,
            sample=lambda rng: _feedforward(rng, width=WIDTH, linear=True),
            tolerance=0.1,
            accuracy=ACCURACY,
        )
        for norm, sigma_i, why in (
            (norm_1, "sigma_1", "W_1 is d_ffn x d with N(0, sigma_1^2) entries."),
            (norm_2, "sigma_2", "W_2 is d x d_ffn: the same bracket again, hence its square (sqrt d + sqrt d_ffn)^2."),
        )
    ]
    conclusion = substitution(
        *(triangle, product, linear, weights, norm_ln, *gaussian),
        source=EQ_15,
        explanation="sigma_1 sigma_2 far below sigma_x' keeps the half-layer near the identity.",
        sample=lambda rng: _feedforward(rng, width=WIDTH, linear=True),
        tight=lambda rng: _feedforward(rng, width=WIDTH, aligned=True),
        tolerance=0.1,
        accuracy=EXCEEDED,
    )
    return Derivation(
        name="ffn",
        title="Feed-forward half-layer, eq. (15)",
        steps=(
            *(definition, chain, jacobian_ln, paper_ln, triangle, product, norm_ln, linear, weights),
            *(*gaussian, conclusion),
        ),
        statement="ffn-estimate",
        shortcut=True,
        assumptions=(*find("ffn-estimate").assumptions, "eps far below the variance", "unit gain"),
    )


def _attention(rng: Rng, *, width: int = 8, aligned: bool = False) -> Values:
    """The last of 5 tokens in multi-head attention, the others fixed; aligned: 1 token and W_O = (W_V)'."""
    n_tokens, sigma_O = 1 if aligned else 5, 0.6
    x = rng.normal(0, 0.1 if aligned else rng.uniform(0.2, 2), (n_tokens, width))
    layer = random_attention(rng, n_tokens=n_tokens, d=width, heads=4, kv_heads=4, d_head=width // 4, turning=0)
    out = rng.normal(0, sigma_O, (width, width))
    layer = replace(layer, W_O=out)
    if aligned:
        unit = np.linalg.qr(np.stack([np.ones(width), x[-1]], axis=1))[0]
        out = out - unit @ unit.T @ out
        layer = replace(layer, W_O=out, W_V=out.T.reshape(4, width // 4, width))
    before = layer_norm(x[:-1].T).T

    def heads(u: Array) -> Array:
        return layer.heads(np.concatenate([before, u.T]))[-1:].T

    last = x[-1:].T
    J_Z = jacobian(heads, layer_norm(last))
    mixed = heads(layer_norm(last))[:, 0]
    loops = [[last[i, 0] + sum(out[i, k] * mixed[k] for k in range(width))] for i in range(width)]
    return {
        **{d: width, symbol("sigma_O"): sigma_O, symbol("sigma_x"): float(np.std(last)), symbol("J_Z"): opnorm(J_Z)},
        **{symbol("opnorm_O"): opnorm(out), array("x"): last, array("x'"): np.array(loops), array("W_O"): out},
        **{_sp.Function("Z"): heads, _sp.Function("LN"): layer_norm, I: np.eye(width), _Z_U: J_Z},
        _LN_X: column_jacobian(layer_norm, last),
        _DX: jacobian(lambda x: x + out @ heads(layer_norm(x)), last),
    }


def _output_matrix(rng: Rng) -> Values:
    """W_O alone."""
    values: Values = {d: WIDTH, symbol("sigma_O"): 0.6, symbol("opnorm_O"): opnorm(rng.normal(0, 0.6, (WIDTH, WIDTH)))}
    return values


def _attention_aligned(rng: Rng) -> Values:
    return _attention(rng, aligned=True)


@register_derivation
def attention() -> Derivation:
    """Eq. (20): the attention half-layer at one token."""
    Z, LN, x, W_O = _sp.Function("Z"), _sp.Function("LN"), array("x"), array("W_O")
    sigma, norm_O = symbol("sigma_x"), symbol("opnorm_O")
    definition = Step(
        left=array("x'"),
        right=x + W_O * Z(LN(x)),
        relation="=",
        rule="definition",
        source=MODEL,
        explanation="Z puts the heads' outputs side by side; the other tokens are held fixed.",
        sample=_attention,
    )
    chain = Step(
        left=_DX,
        right=I + W_O * _Z_U * _LN_X,
        relation="=",
        rule="chain rule",
        source=EQ_20,
        explanation="J^Z is the Jacobian of Z in its normalised input.",
        sample=_attention,
    )
    triangle = Step(
        left=Norm(_DX),
        right=1 + Norm(W_O * _Z_U * _LN_X),
        relation="<=",
        rule="triangle inequality",
        source=OWN,
        explanation="The identity has norm 1.",
        sample=_attention,
        tight=_attention_aligned,
    )
    product = Step(
        left=Norm(W_O * _Z_U * _LN_X),
        right=norm_O * symbol("J_Z") * Norm(_LN_X),
        relation="<=",
        rule="sub-multiplicativity",
        source=OWN,
        explanation="Twice: three factors.",
        sample=_attention,
        tight=_attention_aligned,
    )
    norm_ln = Step(
        left=Norm(_LN_X),
        right=1 / sigma,
        relation="=",
        rule="LayerNorm Jacobian",
        source=EQ_20,
        explanation="As in the feed-forward half: a projection over sigma_x, at eps = 0 and d >= 3.",
        sample=_attention,
    )
    gaussian = Step(
        left=norm_O,
        right=_gaussian_norm("sigma_O", d, d),
        relation="~",
        rule="Gaussian norm estimate",
        source=EQ_20,
        explanation="W_O is square: sqrt d + sqrt d, which is where the factor 2 comes from.",
        sample=_output_matrix,
        tolerance=0.1,
        accuracy=ACCURACY,
    )
    conclusion = substitution(
        *(triangle, product, norm_ln, gaussian),
        source=EQ_20,
        explanation="sigma_O far below sigma_x keeps the half-layer near the identity; |J^Z| is left unevaluated.",
        sample=lambda rng: _attention(rng, width=WIDTH),
        tight=lambda rng: _attention(rng, width=WIDTH, aligned=True),
        tolerance=0.1,
        accuracy=EXCEEDED,
    )
    return Derivation(
        name="attention",
        title="Attention half-layer at one token, eq. (20)",
        steps=(definition, chain, triangle, product, norm_ln, gaussian, conclusion),
        statement="attention-estimate",
        shortcut=True,
        assumptions=(
            *find("attention-estimate").assumptions,
            "one token's Jacobian, which leaves out what other tokens receive and so cannot bound a gradient",
        ),
    )
