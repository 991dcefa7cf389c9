r"""A tied table at initialisation: the logits' Jacobian in it, by simulation of the ensemble.

Where the stream reaches the final norm as the table made it, the logits of T different tokens are Y E' with y_t the
norm of row v_t. A change dE moves them by Y dE' + c N(dE) E', N the norm's Jacobian at the sequence's rows. Words that
the sequence does not have enter by their Gram matrix alone: of V - T normal rows it is that of a triangular matrix of
chi and normal numbers, so that a draw is T + d rows however large the vocabulary. Nothing is measured on a model.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theory.attention_simulation import LARGEST_INPUT, TOLERANCE
from theory.quantities import quantity
from theory.random_matrix import elementwise
from theory.sources import Source
from theory.statements import Statement, register

Array = NDArray[np.float64]

MOST, FEWEST = 64, 16  # draws: one is 1 to 9 % off the mean, the more the narrower and the fewer the tokens
NUMBERS = 2**18  # in all inputs together, where it is neither
DIFFERENT = {"the vocabulary has a word for each token": lambda n_tokens, vocab_size: n_tokens <= vocab_size}


class SimulatedTable:
    """One draw of a normal table of this std, read by T different tokens, before a LayerNorm of unit gain.

    Attributes:
        seen: (T, D) rows that the sequence reads.
        others: (M, D) a root of the other rows' Gram matrix, M the smaller of their number and D.
        read: (T, D) `seen` behind the norm: the head's input.
    """

    def __init__(
        self, d: int, n_tokens: int, vocab_size: int, std: float, eps: float, gradient: float, rng: np.random.Generator
    ) -> None:
        self.gradient = gradient
        self.seen = std * rng.standard_normal((n_tokens, d))
        self.others = std * _root(vocab_size - n_tokens, d, rng)
        centred = self.seen - self.seen.mean(axis=1, keepdims=True)
        self.scale = np.sqrt(np.mean(centred**2, axis=1, keepdims=True) + eps)
        self.read = centred / self.scale

    def forward(self, change: Array) -> Array:
        """What a change of `seen` and `others`, flat, makes of the logits (T, T + M), flat."""
        moved = change.reshape(-1, self.seen.shape[1])
        through = self.gradient * self._norm(moved[: len(self.seen)])
        return (self.read @ moved.T + through @ np.vstack([self.seen, self.others]).T).ravel()

    def backward(self, cotangent: Array) -> Array:
        """The transpose."""
        given = cotangent.reshape(len(self.seen), -1)
        found = given.T @ self.read
        found[: len(self.seen)] += self.gradient * self._norm(given @ np.vstack([self.seen, self.others]))
        return found.ravel()

    def norm(self, rng: np.random.Generator) -> float:
        """|J_T|, from a random start."""
        from scipy.sparse import linalg

        krylov: Any = linalg  # untyped in part
        (tokens, d), rows = self.seen.shape, len(self.seen) + len(self.others)
        if tokens * rows == 1:  # a row, which the method does not take
            return float(np.linalg.norm(self.backward(np.ones(1))))
        operator = krylov.LinearOperator(
            (tokens * rows, rows * d), matvec=self.forward, rmatvec=self.backward, dtype=np.float64
        )
        start = rng.standard_normal(min(operator.shape))
        return float(krylov.svds(operator, k=1, tol=TOLERANCE, v0=start, return_singular_vectors=False)[0])

    def _norm(self, x: Array) -> Array:
        """The norm's Jacobian at each row, its own transpose."""
        x = x - x.mean(axis=1, keepdims=True)
        return (x - self.read * np.mean(self.read * x, axis=1, keepdims=True)) / self.scale


def _root(count: int, d: int, rng: np.random.Generator) -> Array:
    """A matrix with the law of the Gram matrix of `count` standard normal rows: themselves, or triangular."""
    if count <= d:
        return rng.standard_normal((count, d))
    root = np.triu(rng.standard_normal((d, d)), 1)
    np.fill_diagonal(root, np.sqrt(rng.chisquare(count - np.arange(d))))
    return root


@lru_cache(maxsize=64)
def simulated_tables(d: int, n_tokens: int, vocab_size: int, std: float, eps: float, gradient: float) -> Array:
    """(draws,) norms |J_T| by fixed seeds, of fewer draws where an input is larger.

    Raises:
        ValueError: the vocabulary has too few words for tokens that are all different, or there is too much to draw.
    """
    if vocab_size < n_tokens:
        raise ValueError(f"{n_tokens} different tokens are not of {vocab_size}; use vocab_size={n_tokens} or more")
    if d * n_tokens > LARGEST_INPUT:
        raise ValueError(f"{n_tokens} tokens of width {d} are not simulated; use at most {LARGEST_INPUT} numbers")
    norms: list[float] = []
    for seed in range(min(max(NUMBERS // (d * n_tokens), FEWEST), MOST)):
        rng = np.random.default_rng(seed)
        norms.append(SimulatedTable(d, n_tokens, vocab_size, std, eps, gradient, rng).norm(rng))
    return np.array(norms)


@register
def tied_simulated() -> Statement:
    r"""Predict the Jacobian norm of the logits in a tied table where the stream is what the table made it.

    .. math:: E \|J_T\|, \qquad J_T \, dE = Y dE^\top + c \, N(dE) E^\top, \qquad \text{mean over draws of tables}

    Holds: branches that write nothing, as with output matrices of zero; a final LayerNorm of unit gain, normal tables,
        no token twice, no positions in the stream, d from 64 to 512, at most 2^15 numbers in a sequence. What branches
        write makes Y of other vectors and N the Jacobian of the whole network: nothing is said there.
    Why: it is the definition, evaluated on the law that the configuration states. With a large vocabulary it is about
        |E| at the steepest token's norm, `embedding-sharp`; |Y| remains where the embedding is detached.
    """

    def formula(embedding_gradient: Any, sigma_e: Any, eps: Any, d: Any, n_tokens: Any, vocab_size: Any) -> Any:
        def one(gradient: Any, std: Any, floor: Any, width: Any, length: Any, words: Any) -> float:
            sizes = int(width), int(length), int(words)
            return float(simulated_tables(*sizes, float(std), float(floor), float(gradient)).mean())

        return elementwise("simulated_table", one, embedding_gradient, sigma_e, eps, d, n_tokens, vocab_size)

    return Statement(
        name="tied-simulated",
        kind="sharp",
        quantity=quantity("tied_jacobian"),
        formula=formula,
        source=Source(key="spikecheck", label=f"simulation, seeds 0 to {MOST - 1}, of large inputs to {FEWEST - 1}"),
        assumptions=(
            "normal table, no token twice", "branches that write nothing", "final LayerNorm of unit gain", "d >= 64",
            *DIFFERENT,
        ),
        why="the exact Jacobian's norm, averaged over draws of the law that the configuration states",
        target=0.03,
        covers={"final_norm": (True,), "norm": ("layernorm",), "averages": (False,)},
        domain={
            "d": (64.0, 512.0), "vocab_size": (2.0, math.inf), "numbers": (0.0, float(LARGEST_INPUT)),
            "largest_count": (1.0, 1.0),
        },
        relations=DIFFERENT,
    )  # fmt: skip
