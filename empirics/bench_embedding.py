"""The benches of the tables: the stream's start in them, and the logits in a table that is the head as well."""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from torch import Tensor, nn

from empirics import observables
from empirics.bench_sublayers import WIDTHS, norm_conditioning
from empirics.benches import Bench, Choices, add_bench, small_architecture
from empirics.model import make_norm
from theory.architecture import Norm

VOCABULARY = 3


def norm_slopes(norm: Any, x_TD: Tensor) -> Tensor:
    """(T,) bound on the slope of a norm at each token, 1 without one."""
    if norm is None:
        return torch.ones(len(x_TD), dtype=x_TD.dtype)
    observed = [observables.observe_norm(norm, x_D[None]) for x_D in x_TD]
    return torch.stack([values["gain"] / values["s"] for values in observed])


class EmbeddingTables(nn.Module):
    """The stream's start as a function of the tables: rows of the input are tokens', then the positions'."""

    def __init__(self, choices: Choices) -> None:
        super().__init__()
        self.tokens = [int(letter) for letter in choices["sequence"]]
        self.learned, self.multiplier = choices["position_rows"] == 1.0, choices["multiplier"]
        self.gradient = choices["embedding_gradient"]
        self.norm = make_norm(small_architecture(choices)) if choices["embedding_norm"] else None

    @property
    def rows(self) -> int:
        """Of the tables together, one below the other."""
        return VOCABULARY + (len(self.tokens) if self.learned else 0)

    def sums(self, table: Tensor) -> Tensor:
        """(T, D), before the norm."""
        x_TD = self.multiplier * table[self.tokens]
        return x_TD + table[VOCABULARY:] if self.learned else x_TD

    def forward(self, table: Tensor) -> Tensor:
        """(T, D), the stream that the first layer reads, times the factor on the gradient: so is its Jacobian."""
        x_TD = self.sums(table)
        return self.gradient * (x_TD if self.norm is None else self.norm(x_TD))


def observe_embedding(embedding: Any, table: Tensor) -> observables.Observed:
    """The largest sum of squared slopes over a token's places, over a position's, and the norm's largest slope."""
    squares, norm = norm_slopes(embedding.norm, embedding.sums(table)).square(), embedding.norm
    places = torch.tensor(embedding.tokens)
    steepest = 1.0 if norm is None else norm.weight.abs().max() / math.sqrt(norm.eps)
    return {
        "token_weight": torch.stack([squares[places == token].sum() for token in set(embedding.tokens)]).max(),
        "position_weight": squares.max() if embedding.learned else 0.0,
        "norm_slope": steepest,
        "n_tokens": len(embedding.tokens),
    }


def embedding_rounding(embedding: Any, table: Tensor) -> float:
    """That of the norm at its worst token, carried to the Jacobian's largest size."""
    if embedding.norm is None:
        return 0.0
    x_TD = embedding.sums(table)
    worst = max(norm_conditioning(embedding.norm, x_D[None]) for x_D in x_TD)
    size = math.sqrt(len(embedding.tokens) * embedding.multiplier**2 + 1) * embedding.gradient
    return worst * size * norm_slopes(embedding.norm, x_TD).max().item()


add_bench(
    Bench(
        quantity="embedding_jacobian",
        choices={
            "sequence": ("0", "00", "01", "001", "0121", "00000", "01201"),
            "d_model": WIDTHS[:5],
            "multiplier": (0.0, 0.3, 1.0, 16.0),
            "position_rows": (0.0, 1.0),
            "embedding_gradient": (1.0, 0.1),
            "embedding_norm": (False, True),
            "norm": get_args(Norm),
            "eps": (1e-12, 1e-5, 1e-3, 10.0),
        },
        module=EmbeddingTables,
        shape=lambda choices: (EmbeddingTables(choices).rows, choices["d_model"]),
        truth=observables.true_opnorm,
        symbols={("token_weight", "position_weight", "norm_slope", "n_tokens"): observe_embedding},
        rounding=embedding_rounding,
        several=lambda embedding, table: len(set(embedding.tokens)) > 1,
    )
)


class TiedTable(nn.Module):
    """Logits as a function of a table that is read at both ends; between, a running mean and a norm, or nothing."""

    def __init__(self, choices: Choices) -> None:
        super().__init__()
        self.tokens = [int(letter) for letter in choices["sequence"]]
        self.multiplier, self.gradient = choices["multiplier"], choices["embedding_gradient"]
        self.norm = make_norm(small_architecture(choices)) if choices["final_norm"] else None
        length = len(self.tokens)
        counts = torch.arange(1, length + 1, dtype=torch.float64)[:, None]
        mean_TT = torch.ones(length, length, dtype=torch.float64).tril() / counts
        self.mixing_TT = torch.eye(length, dtype=torch.float64) + (mean_TT if choices["averages"] else 0 * mean_TT)

    def mixed(self, table: Tensor) -> Tensor:
        """(T, D), what the norm reads."""
        return self.mixing_TT.to(table.dtype) @ (self.multiplier * table[self.tokens])

    def read(self, table: Tensor) -> Tensor:
        """(T, D), the head's input."""
        x_TD = self.mixed(table)
        return x_TD if self.norm is None else self.norm(x_TD)

    def forward(self, table: Tensor) -> Tensor:
        """(T, V) logits."""
        return self.read(table) @ table.mT


def true_tied(tied: Any, table: Tensor) -> Tensor:
    """|J_T|, the way through the stream times the factor on its gradient, and the head's."""
    # A copy each, so that what is held is not differentiated in.
    stream = observables.jacobian(lambda read: tied.read(read) @ table.mT, table.clone())
    head = observables.jacobian(lambda head: tied.read(table) @ head.mT, table.clone())
    return observables.opnorm(tied.gradient * stream + head)


def observe_tied(tied: Any, table: Tensor) -> observables.Observed:
    """Norms of the table and the head's input, the largest count, and a bound on the network between."""
    mixing = torch.linalg.matrix_norm(tied.mixing_TT.to(table.dtype), 2)
    return {
        "token_weight": float(max(map(tied.tokens.count, tied.tokens))),
        "head_input": torch.linalg.matrix_norm(tied.read(table), 2),
        "head_slope": mixing * norm_slopes(tied.norm, tied.mixed(table)).max(),
        "opnorm_E": torch.linalg.matrix_norm(table, 2),
    }


def tied_rounding(tied: Any, table: Tensor) -> float:
    """That of the norm at its worst token, carried to the Jacobian's largest size."""
    if tied.norm is None:
        return 0.0
    worst = max(norm_conditioning(tied.norm, x_D[None]) for x_D in tied.mixed(table))
    found = observe_tied(tied, table)
    size = found["head_input"] + tied.multiplier * len(tied.tokens) * found["head_slope"] * found["opnorm_E"]
    return worst * float(size)


add_bench(
    Bench(
        quantity="tied_jacobian",
        choices={
            "sequence": ("0", "00", "01", "001", "0121", "01201"),
            "d_model": WIDTHS[:5],
            "multiplier": (0.3, 1.0, 16.0),
            "embedding_gradient": (1.0, 0.1),
            "averages": (False, True),
            "final_norm": (False, True),
            "norm": get_args(Norm),
            "eps": (1e-12, 1e-5, 1e-3, 10.0),
        },
        module=TiedTable,
        shape=lambda choices: (VOCABULARY, choices["d_model"]),
        truth=true_tied,
        symbols={("token_weight", "head_input", "head_slope", "opnorm_E"): observe_tied},
        rounding=tied_rounding,
        several=lambda tied, table: len(set(tied.tokens)) > 1,
    )
)
