"""A tied table at initialisation: from the definition of logits to the mean over draws of their Jacobian's norm."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import sympy as sp  # pyright: ignore[reportMissingTypeStubs]

from theory.derivation import Derivation, line, register_derivation
from theory.derivations_expressions import Norm, Values, array, entry
from theory.derivations_numeric import Array, Rng, jacobian, layer_norm, opnorm
from theory.sources import Source
from theory.statements import find
from theory.symbols import symbol
from theory.tied import MOST, SimulatedTable

_sp: Any = sp
OWN = Source(key="spikecheck", label="product rule of the table's two uses")
KRYLOV = Source(key="spikecheck", label="Lanczos bidiagonalisation, to its stated tolerance")
WIDTH, LENGTH, WORDS, STD, EPS, GRADIENT = 8, 3, 10, 0.5, 1e-3, 0.6
MANY, DRAWS = 40, 2000

J, J_root = array("J_T", "J_T"), array("J_R", "J_R")
change, action = array("dE"), array("dL", r"dL")
krylov = entry("|J_T|_Krylov", r"\| J_T \|_{Krylov}")
others, root = entry("E|E_r|", r"\mathbb{E} \| E_r \|"), entry("E|R|", r"\mathbb{E} \| R \|")
seeds_mean = entry("mean |J_T| over seeds", r"\overline{\| J_T \|}")


def dense(table: Array, gradient: float = GRADIENT) -> Array:
    """The logits' Jacobian in the whole table by complex steps, the sequence reading its first rows."""

    def logits(E: Array) -> Array:
        start = table[:LENGTH] + gradient * (E[:LENGTH] - table[:LENGTH])
        return layer_norm(start.T, EPS).T @ E.T

    return jacobian(logits, table)


def _draw(rng: Rng, words: int = WORDS) -> SimulatedTable:
    return SimulatedTable(WIDTH, LENGTH, words, STD, EPS, GRADIENT, rng)


def _action(rng: Rng) -> Values:
    drawn = _draw(rng)
    J_T = dense(np.vstack([drawn.seen, drawn.others]))
    w = rng.normal(0, 1, (J_T.shape[1], 1))
    return {J: J_T, change: w, action: drawn.forward(w[:, 0])[:, None]}


def _first(rng: Rng) -> Values:
    drawn = _draw(rng)
    return {J: dense(np.vstack([drawn.seen, drawn.others])), krylov: drawn.norm(rng)}


def _rotated(rng: Rng) -> Values:
    """More words than the width, and the triangular root of their Gram matrix in their place."""
    seen, rest = rng.normal(0, STD, (LENGTH, WIDTH)), rng.normal(0, STD, (MANY - LENGTH, WIDTH))
    triangle = np.linalg.qr(rest)[1]
    return {J: dense(np.vstack([seen, rest])), J_root: dense(np.vstack([seen, triangle]))}


def _law(rng: Rng) -> Values:
    """Norms of normal rows, and of the roots that are drawn for them."""
    rest = [opnorm(rng.normal(0, STD, (MANY - LENGTH, WIDTH))) for _ in range(DRAWS)]
    drawn = [opnorm(_draw(rng, MANY).others) for _ in range(DRAWS)]
    return {others: float(np.mean(rest)), root: float(np.mean(drawn))}


@cache
def _at_seeds() -> float:
    drawn = [_draw(np.random.default_rng(seed)) for seed in range(MOST)]
    return float(np.mean([opnorm(dense(np.vstack([one.seen, one.others]))) for one in drawn]))


def _by_definition(rng: Rng) -> Values:
    values = {"embedding_gradient": GRADIENT, "sigma_e": STD, "eps": EPS, "d": WIDTH, "n_tokens": LENGTH}
    return {**{symbol(name): value for name, value in values.items()}, symbol("vocab_size"): WORDS,
            seeds_mean: _at_seeds()}  # fmt: skip


@register_derivation
def tied_simulated() -> Derivation:
    """The sampled Jacobian's mean norm."""
    statement = find("tied-simulated")
    exact = line(
        action,
        "=",
        J * change,
        "product rule",
        "Y dE' + c N(dE) E', N the final norm's Jacobian at the rows that the sequence reads. A factor on the "
        "embedding's rows cancels in the norm but for eps: rows have the std of what the norm reads.",
        source=OWN,
        sample=_action,
    )
    largest = line(
        krylov,
        "~=",
        Norm(J),
        "Krylov method",
        "From J_T dE and J_T' dL alone.",
        source=KRYLOV,
        sample=_first,
        tolerance=5e-3,
        accuracy="within 0.5 %, the method's tolerance",
    )
    rotated = line(
        Norm(J),
        "=",
        Norm(J_root),
        "invariance under rotation",
        "E_r, the rows that the sequence does not read, is Q R: a rotation Q of words turns logits and changes alike, "
        "and what is outside of its range has the norm |Y| at most, which is never the larger.",
        source=OWN,
        sample=_rotated,
    )
    law = line(
        others,
        "~=",
        root,
        "Bartlett's decomposition",
        "R of normal rows has independent entries, normal ones above the diagonal and the roots of chi-squares of V - "
        "T, V - T - 1, ... degrees on it.",
        source=OWN,
        sample=_law,
        tolerance=0.01,
        accuracy=f"within 1 % for means of {DRAWS} draws, three standard errors of their difference",
    )
    conclusion = line(
        seeds_mean,
        "~=",
        statement.expression,
        "mean over draws",
        "Over the statement's own seeds, from the definition. A draw of a real table is of the same law.",
        source=KRYLOV,
        sample=_by_definition,
        tolerance=5e-3,
        accuracy="within 0.5 %, the method's tolerance: the same draws are on both sides",
    )
    return Derivation(
        name="tied-simulated",
        title="A tied table by simulation, the norm itself",
        steps=(exact, largest, rotated, law, conclusion),
        statement=statement.name,
        assumptions=statement.assumptions,
    )
