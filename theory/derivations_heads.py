"""What the single-head assumption costs: nothing at uniform attention, and no factor for the number of heads at all."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import sympy as sp  # pyright: ignore[reportMissingTypeStubs]

from theory.derivation import Derivation, line, register_derivation, substitution
from theory.derivations_expressions import Norm, SumOver, Values, array, entry
from theory.derivations_numeric import Array, Rng, opnorm, softmax
from theory.sources import Source
from theory.symbols import symbol

_sp: Any = sp

OWN = Source(key="spikecheck", label="heads side by side")

heads, c_VO = symbol("n_heads"), symbol("c_VO")
norm_O, norm_V, norm_P = symbol("opnorm_O"), symbol("opnorm_V"), symbol("opnorm_P")
head = entry("h")
P_h, W_Oh, W_Vh, W_O, W_V = array("P_h"), array("W_O^h", "W_O^h"), array("W_V^h", "W_V^h"), array("W_O"), array("W_V")
by_value = array("J^VO", r"J^{VO}")
kron = array("P_h (x) W_O^h W_V^h", r"P_h \otimes W_O^h W_V^h")
side = array("[P_h (x) W_V^h]_h", r"\left[ P_h \otimes W_V^h \right]_h")
single = array("P (x) W_O W_V", r"P \otimes W_O W_V")

WIDTH = 128


def _sample(
    rng: Rng, *, count: int = 4, width: int = 12, n_tokens: int = 3, equal: bool = False, aligned: bool = False
) -> Values:
    """Heads with their own softmax matrices; equal: the same for all. aligned: one head with W_O = W_V'."""
    d_head, std = width // count, 1 / np.sqrt(width)
    logits = rng.normal(0, 2, (1 if equal else count, n_tokens, n_tokens))
    visible = np.tril(np.ones((n_tokens, n_tokens), dtype=bool))
    P = np.broadcast_to(softmax(logits, visible), (count, n_tokens, n_tokens))
    value, out = rng.normal(0, std, (width, width)), rng.normal(0, std, (width, width))
    out = value.T if aligned else out
    values, outs = value.reshape(count, d_head, width), out.reshape(width, count, d_head)
    # By hand, token by token: A_t = sum_h W_O^h sum_j p_tj W_V^h u_j is linear in u.
    by_hand: Array = np.zeros((n_tokens, width, n_tokens, width))
    for t in range(n_tokens):
        for j in range(t + 1):
            for i in range(count):
                by_hand[t, :, j] += P[i, t, j] * outs[:, i] @ values[i]
    return {
        **{by_value: by_hand.reshape(n_tokens * width, -1), heads: count, c_VO: (width * std * std) ** 2},
        **{norm_O: opnorm(out), norm_V: opnorm(value), norm_P: max(opnorm(one) for one in P), W_O: out, W_V: value},
        side: np.vstack([np.kron(P[i], values[i]) for i in range(count)]),
        single: np.kron(P[0], out @ value),
        head: [
            {P_h: P[i], W_Oh: outs[:, i], W_Vh: values[i], kron: np.kron(P[i], outs[:, i] @ values[i])}
            for i in range(count)
        ],
    }


@register_derivation
def single_head() -> Derivation:
    """What the single-head assumption costs."""
    equal = partial(_sample, equal=True)
    aligned = partial(_sample, count=1, aligned=True)
    large = partial(_sample, width=WIDTH, n_tokens=1)
    own = partial(line, source=OWN, sample=_sample)
    accuracy = f"within 12 % at d = {WIDTH} and 4 heads: the Tracy-Widom offsets of two narrow matrices"
    value = own(
        by_value,
        "=",
        SumOver(kron, head),
        "product rule",
        "The path through the values, over the sequence; the paths through keys and queries vanish with the logits.",
    )
    naive = own(
        Norm(by_value),
        "<=",
        SumOver(Norm(P_h) * Norm(W_Oh) * Norm(W_Vh), head),
        "triangle inequality",
        "Head by head: the way that pays for the number of heads.",
        tight=aligned,
    )
    paid = own(
        SumOver(Norm(W_Oh) * Norm(W_Vh), head),
        "~=",
        _sp.sqrt(c_VO) * (1 + _sp.sqrt(heads)) ** 2,
        "Gaussian norm",
        "|W_O^h| is sigma_O (sqrt d + sqrt(d/n_h)), and alike for W_V^h; n_h times their product.",
        sample=large,
        tolerance=0.12,
        accuracy=accuracy,
    )
    together = own(
        Norm(by_value),
        "<=",
        norm_O * Norm(side),
        "sub-multiplicativity",
        "The heads' outputs side by side meet one W_O: (I_T x W_O) times the stack over heads.",
        tight=aligned,
    )
    stacked = own(
        Norm(side) ** 2,
        "<=",
        norm_P**2 * norm_V**2,
        "order of symmetric matrices",
        "The stack's Gram is sum_h P_h'P_h x W_V^h'W_V^h, at most max_h |P_h|^2 times I x W_V'W_V.",
        tight=equal,
    )
    joint = own(
        Norm(by_value),
        "<=",
        norm_O * norm_V * norm_P,
        "the two lines above",
        "No sqrt(n_h): many heads cost no more than one.",
        tight=aligned,
    )
    four = own(
        norm_O * norm_V,
        "~=",
        4 * _sp.sqrt(c_VO),
        "Gaussian norm",
        "See the derivation factor-two. At 16 heads the triangle inequality pays 25; the norm itself is 2.6.",
        sample=large,
        tolerance=0.12,
        accuracy=accuracy,
    )
    collapse = own(
        by_value,
        "=",
        single,
        "bilinearity",
        "Where all heads attend alike (at initialisation: to the running mean) they are one head, exactly.",
        sample=equal,
    )
    exact = substitution(
        *(
            own(Norm(by_value), "=", Norm(single), "bilinearity", "", sample=equal),
            own(Norm(single), "=", norm_P * Norm(W_O * W_V), "Kronecker product", "", sample=equal),
        ),
        source=OWN,
        explanation="So the single-head assumption is exact at initialisation; heads that differ are bounded above.",
        sample=equal,
    )
    return Derivation(
        name="single-head",
        title="What the single-head assumption costs",
        steps=(value, naive, paid, together, stacked, joint, four, collapse, exact),
        assumptions=(
            "the probabilities are held fixed; attention-upper-aposteriori adds what moves them, without sqrt(n_h) too",
            "lines 3 and 7: independent normal weights, large width, heads of width d/n_h",
            "lines 8 and 9: all heads have the same probabilities",
        ),
    )
