"""Rigorous chains about the embedding layer, a selection of rows of its tables."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import sympy as sp  # pyright: ignore[reportMissingTypeStubs]

from theory.derivation import Derivation, Step, line, register_derivation, substitution
from theory.derivations_expressions import Norm, Transposed, Values, array, entry
from theory.derivations_numeric import Rng, column_jacobian, jacobian, layer_norm, opnorm
from theory.sources import Source
from theory.symbols import symbol

_sp: Any = sp
OWN = Source(key="spikecheck", label="selection matrices")

c, mu, T = symbol("embedding_gradient"), symbol("multiplier"), symbol("n_tokens")
kappa, rows = symbol("norm_slope"), symbol("position_rows")
token_weight, position_weight = symbol("token_weight"), symbol("position_weight")
S, I, N = array("S"), array("I"), array("N")  # noqa: E741  the identity's letter
whole = array("J_E", "J_E")
count = entry("max_v n_v", r"\max_v n_v")
sigma_e, smallest = symbol("sigma_e"), symbol("s")
DEPTH = 3  # width of the sampled embeddings


def _sequence(rng: Rng, tokens: list[int], *, learned: bool, normed: bool) -> Values:
    """A table of five tokens read at the given places."""
    length, gradient, factor = len(tokens), float(rng.uniform(0.1, 1)), float(rng.uniform(0.5, 3))
    gain, epsilon = (rng.normal(0, 1, DEPTH), 0.1) if normed else (np.ones(DEPTH), 0.0)
    select = np.eye(5)[tokens]
    read = np.hstack([factor * select, float(learned) * np.eye(length)])
    before = read @ rng.normal(0, 1, (read.shape[1], DEPTH))
    places = range(length)
    blocks = [
        column_jacobian(lambda x: gain[:, None] * layer_norm(x, epsilon), before[[t]].T) if normed else np.eye(DEPTH)
        for t in places
    ]
    slopes = [float(np.max(np.abs(gain)) / np.sqrt(np.var(before[t]) + epsilon)) if normed else 1.0 for t in places]
    norm = np.zeros((length * DEPTH, length * DEPTH))
    for t in places:
        norm[t * DEPTH : (t + 1) * DEPTH, t * DEPTH : (t + 1) * DEPTH] = blocks[t]
    return {
        **{c: gradient, mu: factor, T: length, rows: float(learned), I: np.eye(length), S: select},
        whole: gradient * norm @ np.kron(read, np.eye(DEPTH)),
        N: norm,
        kappa: float(np.max(np.abs(gain)) / np.sqrt(epsilon)) if normed else 1.0,
        token_weight: max(sum(slopes[t] ** 2 for t in places if tokens[t] == v) for v in tokens),
        position_weight: max(slopes) ** 2 * learned,
        count: float(np.max(select.sum(axis=0))),
        _READ: np.kron(np.hstack([factor * select, float(learned) * np.eye(length)]), np.eye(DEPTH)),
        _GRAM: opnorm(factor**2 * select @ select.T + float(learned) * np.eye(length)),
    }


_READ = array("[mu S, ell I] x I", r"[\mu S, \ell I] \otimes I")
_GRAM = entry("|mu^2 SS' + ell I|", r"\| \mu^2 S S^\top + \ell I \|")


def _sample(rng: Rng) -> Values:
    tokens = [int(token) for token in rng.integers(0, 3, 4)]
    return _sequence(rng, tokens, learned=bool(rng.random() < 0.5), normed=bool(rng.random() < 0.5))


def _repeated(rng: Rng) -> Values:
    """One token over and over, no norm."""
    return _sequence(rng, [2, 2, 2], learned=True, normed=False)


def _mixed(rng: Rng) -> Values:
    """No norm: the real counts."""
    return _sequence(rng, [0, 1, 1, 2], learned=True, normed=False)


def _steps() -> tuple[Step, Step]:
    exact = Step(
        left=whole,
        right=c * N * _READ,
        relation="=",
        rule="chain rule",
        source=OWN,
        explanation="Row t reads token v_t, times mu, and its position; then the norm's Jacobian, token by token.",
        sample=_sample,
    )
    gram = Step(
        left=_GRAM,
        right=mu**2 * count + rows,
        relation="=",
        rule="spectral theorem",
        source=OWN,
        explanation="SS' is all ones between places of one token: its eigenvalues are the tokens' counts.",
        sample=_sample,
    )
    return exact, gram


@register_derivation
def embedding_upper_apriori() -> Derivation:
    """The embedding layer from the configuration alone."""
    exact, gram = _steps()
    product = Step(
        left=Norm(whole),
        right=c * kappa * _sp.sqrt(_GRAM),
        relation="<=",
        rule="sub-multiplicativity",
        source=OWN,
        explanation="The norm's Jacobian is at most max|gamma|/sqrt(eps) at every token; |A|^2 = |AA'|.",
        sample=_sample,
        tight=_mixed,
    )
    most = Step(
        left=count,
        right=T,
        relation="<=",
        rule="counting",
        source=OWN,
        explanation="No token is in a sequence more often than it has places.",
        sample=_sample,
        tight=_repeated,
    )
    conclusion = substitution(
        *(product, gram, most),
        source=OWN,
        explanation="Attained by one token repeated.",
        sample=_sample,
        tight=_repeated,
    )
    return Derivation(
        name="embedding-upper-apriori",
        title="The embedding layer, a true bound from the configuration",
        steps=(exact, gram, product, most, conclusion),
        statement="embedding-upper-apriori",
        assumptions=("tables of their own",),
    )


@register_derivation
def embedding_upper_aposteriori() -> Derivation:
    """The embedding layer for a given sequence."""
    exact, _ = _steps()
    square = Step(
        left=Norm(whole * Transposed(whole)),
        right=c**2 * (mu**2 * token_weight + position_weight),
        relation="<=",
        rule="blocks of the vocabulary",
        source=OWN,
        explanation="The places of one token share its row: their squared slopes add up. A position's stands alone.",
        sample=_sample,
        tight=_mixed,
    )
    conclusion = Step(
        left=Norm(whole),
        right=c * _sp.sqrt(mu**2 * token_weight + position_weight),
        relation="<=",
        rule="|J|^2 = |JJ'|",
        source=OWN,
        explanation="Without a norm it is the norm itself.",
        sample=_sample,
        tight=_mixed,
    )
    return Derivation(
        name="embedding-upper-aposteriori",
        title="The embedding layer, a true bound for a given sequence",
        steps=(exact, square, conclusion),
        statement="embedding-upper-aposteriori",
        assumptions=("tables of their own",),
    )


def _distinct(rng: Rng) -> Values:
    """Four tokens out of 10^9, no norm; the table has the rows that are read."""
    drawn = rng.integers(0, 10**9, 4)
    _, places = np.unique(drawn, return_inverse=True)
    return _sequence(rng, [int(place) for place in places], learned=bool(rng.random() < 0.5), normed=False)


def _normalised_wide(rng: Rng) -> Values:
    """Two different normal tokens of width 256 behind a LayerNorm of unit gain, eps = 0."""
    width, length, std = 256, 2, float(rng.uniform(0.3, 2))
    gradient, factor, learned = float(rng.uniform(0.1, 1)), float(rng.uniform(0.5, 3)), float(rng.random() < 0.5)
    before = rng.normal(0, std, (length, width))
    blocks = [gradient * column_jacobian(layer_norm, x[:, None]) for x in before]
    # A row reads its own token and its own place: its block of the Jacobian is the norm's, mu and ell times.
    jacobian = np.zeros((length * width, 2 * length * width))
    for t, part in enumerate(blocks):
        here = slice(t * width, (t + 1) * width)
        jacobian[here, here] = factor * part
        jacobian[here, length * width + t * width : length * width + (t + 1) * width] = learned * part
    return {
        **{c: gradient, mu: factor, rows: learned, whole: jacobian, sigma_e: std},
        smallest: float(np.min(np.std(before, axis=1))),
    }


@register_derivation
def embedding_estimate() -> Derivation:
    """The embedding layer without a norm, estimated."""
    exact, _ = _steps()
    itself = Step(
        left=Norm(whole),
        right=c * _sp.sqrt(mu**2 * count + rows),
        relation="=",
        rule="|J|^2 = |JJ'|",
        source=OWN,
        explanation="Without a norm JJ' is c^2 (mu^2 SS' + ell I) x I, and SS' has the counts for eigenvalues.",
        sample=_mixed,
    )
    once = Step(
        left=count,
        right=_sp.Integer(1),
        relation="~",
        rule="few tokens of many",
        source=OWN,
        explanation="Of T random tokens T^2/(2V) pairs are expected to be equal; a text repeats more.",
        sample=_distinct,
        tolerance=1e-9,
        accuracy="exact for 4 tokens of 10^9, of which none is drawn twice",
    )
    conclusion = substitution(
        *(itself, once),
        source=OWN,
        explanation="Scaling by mu scales it, detaching by c; a fixed position adds nothing, a learned one its own "
        "row.",
        sample=_distinct,
        tolerance=1e-9,
        accuracy="exact where no token repeats",
    )
    return Derivation(
        name="embedding-estimate",
        title="The embedding layer without a norm, estimated",
        steps=(exact, itself, once, conclusion),
        statement="embedding-estimate",
        assumptions=("tables of their own", "no norm behind them", "few tokens of a large vocabulary"),
    )


@register_derivation
def embedding_normalised_estimate() -> Derivation:
    """A normalised embedding, estimated in the paper's manner."""
    itself = Step(
        left=Norm(whole),
        right=c * _sp.sqrt(mu**2 + rows) / smallest,
        relation="=",
        rule="orthogonal rows",
        source=OWN,
        explanation="No token twice: JJ' is block-diagonal over the places, c^2 (mu^2 + ell) times the norm's own "
        "square, which is 1/s_t^2 (derivation layernorm).",
        sample=_normalised_wide,
    )
    typical = Step(
        left=smallest,
        right=sigma_e,
        relation="~",
        rule="law of large numbers",
        source=Source(key="takase2025spike", label="a norm's Jacobian as 1/sigma"),
        explanation="The std of a row for the std of the table, for every token; the smallest of T is below it.",
        sample=_normalised_wide,
        tolerance=0.15,
        accuracy="within 15 % at d = 256 and 2 tokens: a row's std varies by 1/sqrt(2d) = 4.4 %, the smallest is below",
    )
    conclusion = substitution(
        *(itself, typical),
        source=OWN,
        explanation="So an embedding norm multiplies the tables' gradient by 1/sigma_e, as much as sqrt(d) does for "
        "the paper's tables of std sqrt(2/(5d)), but for the factor sqrt(5/2).",
        sample=_normalised_wide,
        tolerance=0.15,
        accuracy="within 15 % at d = 256 and 2 tokens, as the line above",
    )
    return Derivation(
        name="embedding-normalised-estimate",
        title="A normalised embedding, estimated",
        steps=(itself, typical, conclusion),
        statement="embedding-normalised-estimate",
        assumptions=("tables of their own", "no token twice", "LayerNorm with unit gain, eps = 0"),
    )


tied, by_head, by_stream = array("J_T"), array("J_T^Y", "J_T^Y"), array("J_T^E", "J_T^E")
head_input, head_slope, table_norm = symbol("head_input"), symbol("head_slope"), symbol("opnorm_E")


def _tied(rng: Rng, *, alone: bool = False) -> Values:
    """Logits of four words over four tokens, the stream averaged over the past and normalised between.

    Alone: a vocabulary of one, one token, and nothing between.
    """
    words, length = (1, 1) if alone else (4, 4)
    gradient, factor = (1.0, 1.0) if alone else (float(rng.uniform(0.1, 1)), float(rng.uniform(0.5, 3)))
    tokens = rng.integers(0, words, length)
    table = rng.normal(0, 1, (words, DEPTH))
    mixing = np.eye(length) + np.tril(np.ones((length, length))) / np.arange(1, length + 1)[:, None]

    def body(stream: Any) -> Any:
        return stream if alone else layer_norm((mixing @ stream).T, 0.1).T

    start, read = factor * table[tokens], np.eye(words)[tokens]
    behind = body(start)

    def detached(E: Any) -> Any:
        return body(start + gradient * factor * (read @ (E - table)))

    return {
        **{tied: jacobian(lambda E: detached(E) @ E.T, table), by_head: jacobian(lambda E: behind @ E.T, table)},
        **{by_stream: jacobian(lambda E: detached(E) @ table.T, table), head_input: opnorm(behind)},
        **{head_slope: opnorm(jacobian(body, start)), table_norm: opnorm(table), c: gradient, mu: factor},
        token_weight: float(np.max(read.sum(axis=0))),
    }


@register_derivation
def tied_upper() -> Derivation:
    """A table that is read at both ends."""
    own = partial(line, source=Source(key="spikecheck", label="product rule of the table's two uses"), sample=_tied)
    alone = partial(_tied, alone=True)
    both = own(
        tied,
        "=",
        by_head + by_stream,
        "product rule",
        "Logits Y E': d(Y E') = Y dE' + dY E', the head's path with Y held and the stream's with the head held.",
    )
    triangle = own(Norm(tied), "<=", Norm(by_head) + Norm(by_stream), "triangle inequality", "Of the two.", tight=alone)
    head = own(
        Norm(by_head), "=", head_input, "Kronecker product", "dE -> Y dE' is Y on every word's row: a norm of |Y|."
    )
    stream = own(
        Norm(by_stream),
        "<=",
        c * mu * _sp.sqrt(token_weight) * head_slope * table_norm,
        "sub-multiplicativity",
        "The embedding is c mu sqrt(max n_v) (see embedding-upper-aposteriori), the network between J_Y, the head |E|.",
        tight=alone,
    )
    conclusion = substitution(
        *(triangle, head, stream),
        source=OWN,
        explanation="A scaled embedding makes the second path larger and leaves the first: a tied table of a small "
        "stream is trained by its head.",
        sample=_tied,
        tight=alone,
    )
    return Derivation(
        name="tied-upper",
        title="A tied table, a true bound for a given sequence",
        steps=(both, triangle, head, stream, conclusion),
        statement="tied-upper",
        assumptions=("logits Y E', not multiplied and not capped", "no norm right behind the table in the samples"),
    )
