"""What a branch's weights send back of a gradient that runs along its own output."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import sympy as sp  # pyright: ignore[reportMissingTypeStubs]

from theory.derivation import Derivation, line, register_derivation
from theory.derivations_expressions import Values, entry
from theory.derivations_numeric import Rng
from theory.sources import Source
from theory.symbols import symbol

_sp: Any = sp

OWN = Source(key="spikecheck", label="second moments of W'W")

d, m, n, chi = symbol("d"), symbol("d_ffn"), entry("n"), entry("chi")
one_matrix = entry("|W_2'W_2 h|^2/|W_2'v|^2", r"\|W_2^\top W_2 h\|^2 / \|W_2^\top v\|^2")
two_matrices = entry("|J'f|^2/|J'v|^2", r"\|J^\top f\|^2 / \|J^\top v\|^2")
normed = entry("|P J'f|^2/|P J'v|^2", r"\|P J^\top f\|^2 / \|P J^\top v\|^2")
whole = entry("|J'f|^2/|J'v|^2 (ReLU)", r"(\|J^\top f\|^2 / \|J^\top v\|^2)^{\mathrm{relu}}")
WIDTH, UNITS, VALUES, DRAWS = 96, 144, 48, 400
SAMPLED = f"sampled: mean of {DRAWS} draws, four standard errors of some 1.5 %"


def _normal(rng: Rng, rows: int, columns: int) -> Any:
    return rng.normal(0, columns**-0.5, (rows, columns))


def _feedforward(rng: Rng) -> Values:
    """ReLU layers of one token; v is a random vector as long as f, P takes the input's direction out."""
    squares = np.zeros(6)
    for _ in range(DRAWS):
        u = rng.normal(0, 1, WIDTH)
        enter, leave = _normal(rng, UNITS, WIDTH), _normal(rng, WIDTH, UNITS)
        open_units = enter @ u > 0
        h = np.where(open_units, enter @ u, 0.0)
        f, other = leave @ h, rng.normal(0, 1, WIDTH)
        other *= np.linalg.norm(f) / np.linalg.norm(other)
        found: list[float] = []
        for along in (f, other):
            hidden = leave.T @ along
            back = enter.T @ (open_units * hidden)
            left = back - u * (u @ back) / (u @ u)
            found += [float(x @ x) for x in (hidden, back, left)]
        squares += found
    hidden, back, left = squares[:3] / squares[3:]
    return {one_matrix: hidden, whole: back, normed: left, chi: 2.0, d: WIDTH, m: UNITS}


def _attention(rng: Rng) -> Values:
    """The value and the output matrix of n values."""
    squares = np.zeros(2)
    for _ in range(DRAWS):
        u = rng.normal(0, 1, WIDTH)
        value, output = _normal(rng, VALUES, WIDTH), _normal(rng, WIDTH, VALUES)
        f, other = output @ (value @ u), rng.normal(0, 1, WIDTH)
        other *= np.linalg.norm(f) / np.linalg.norm(other)
        squares += [float(np.sum((value.T @ (output.T @ along)) ** 2)) for along in (f, other)]
    return {two_matrices: squares[0] / squares[1], d: WIDTH, n: VALUES}


@register_derivation
def own_gain() -> Derivation:
    """A branch's own gain of a gradient along its output."""
    own = partial(line, source=OWN)
    first = own(
        one_matrix,
        "=",
        (d + m + 1) / m,
        "moments of a Wishart matrix",
        "E[(W'W)^2] = sigma^4 d (d + m + 1) for d rows of m entries, where strangers v as long as W h have sigma^2 m "
        "|v|^2: W'W is its mean, d sigma^2, and a rest as of weights that do not know h.",
        sample=_feedforward,
        tolerance=0.06,
        accuracy=f"exact; {SAMPLED}",
    )
    behind = own(
        normed,
        "~=",
        1 + chi * d / m,
        "law of large numbers",
        "What the mean sends to h meets its own slopes D, large where h is: chi = E[h^2 D^2]/(E[h^2] E[D^2]), 2 of "
        "ReLU. W_1 sends D h back along the input mostly, which the norm before the branch takes out.",
        sample=_feedforward,
        tolerance=0.1,
        accuracy=f"to 1/d and 1/m at d = {WIDTH}, m = {UNITS}; {SAMPLED}",
    )
    without = own(
        whole,
        "~=",
        2 + chi * d / m,
        "homogeneity of ReLU",
        "Without a norm, or below one whose eps is all that it divides by, that part stays: u.J'f = |f|^2, as J u = f.",
        sample=_feedforward,
        tolerance=0.1,
        accuracy=f"to 1/d and 1/m at d = {WIDTH}, m = {UNITS}; {SAMPLED}",
    )
    values = own(
        two_matrices,
        "~=",
        (1 + n / d) * (1 + d / n),
        "moments of Wishart matrices",
        "Either matrix of W_O W_V meets itself: beside strangers the mean of W_O'W_O is d/n, that of W_V'W_V n/d, and "
        "either rest 1.",
        sample=_attention,
        tolerance=0.1,
        accuracy=f"to 1/n at d = {WIDTH}, n = {VALUES}; {SAMPLED}",
    )
    return Derivation(
        name="own-gain",
        title="What a branch sends back of a gradient along its own output",
        steps=(first, behind, without, values),
        assumptions=("independent normal weights", "one token; attention's softmax row is all on itself"),
    )
