"""True norms of what is read twice or by some: experts behind a router, and a table that is the head as well."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from empirics.adversaries import normal
from empirics.bench_embedding import TiedTable
from empirics.model import Experts
from empirics.norm_settings import PRECISE, Setting, fill, to_fill
from empirics.spectral import lanczos_opnorm, lanczos_opnorms
from theory.statements import Statement


class Routed(NamedTuple):
    """Sizes of a layer, its router's logit variance and the tokens of a sequence."""

    d: int
    d_ffn: int
    experts: int
    chosen: int
    renormalised: bool
    variance: float
    length: int
    seeds: int = 128


ROUTED = (
    Routed(64, 256, 8, 2, True, 1.0, 16),
    Routed(64, 256, 8, 2, False, 1.0, 16),
    Routed(64, 64, 4, 1, False, 1.0, 16),
    Routed(64, 128, 8, 2, True, 1.0, 256, 64),
    Routed(128, 512, 8, 2, True, 0.1, 16),
    Routed(128, 512, 8, 2, False, 4.0, 16),
    Routed(128, 512, 4, 1, True, 1.0, 16, 16),
    Routed(128, 64, 64, 8, True, 1.0, 16, 96),
    Routed(128, 256, 16, 4, False, 1.0, 64),
    Routed(256, 1024, 8, 2, True, 0.4, 1, 320),
    Routed(256, 1024, 8, 2, True, 0.4, 16, 64),
    Routed(256, 1024, 8, 2, False, 1.0, 64, 48),
    Routed(256, 256, 16, 4, True, 1.0, 16),
    Routed(64, 256, 8, 2, True, 25.0, 16),
    Routed(16, 64, 8, 2, True, 1.0, 16),
)


def experts(statement: Statement) -> Iterator[Setting]:
    """The largest |J_u| of normal tokens behind a normal router, from all weight on one expert to eight."""
    (activation,), (gated,) = (statement.covers[name] for name in ("activation", "gated"))
    for row in ROUTED:
        sigmas = {"enter": 0.8 / math.sqrt(row.d), "leave": 0.7 / math.sqrt(row.d)}
        if gated:
            sigmas["gate"] = 0.9 / math.sqrt(row.d)
        router = math.sqrt(row.variance / row.d)
        sizes = {"d_model": row.d, "d_ffn": row.d_ffn, "n_experts": row.experts, "experts_per_token": row.chosen}
        variant = {"gates_renormalised": row.renormalised, "activation": activation, "gated": gated}
        module = to_fill(Experts, {**sizes, **variant})

        def draw(
            seed: int, row: Routed = row, module: Experts = module, sigmas: Any = sigmas, router: float = router
        ) -> float:
            generator = torch.Generator().manual_seed(seed)
            module.router.weight.normal_(0, router, generator=generator)
            for expert in module.each:
                fill(expert, sigmas, generator)
            u = torch.nn.functional.layer_norm(normal(seed + 1000, row.length, row.d), (row.d,)).float()
            return max(one.value for one in lanczos_opnorms(module, u, tolerance=PRECISE, limit=100))

        values = {"sigma_1": sigmas["enter"], "sigma_2": sigmas["leave"], "sigma_3": sigmas.get("gate", 0.0)}
        values |= {"sigma_router": router, "d": row.d, "d_ffn": row.d_ffn, "n_experts": row.experts}
        values |= {"n_chosen": row.chosen, "gates_renormalised": int(row.renormalised), "n_tokens": row.length}
        over = "the chosen" if row.renormalised else "all"
        label = (
            f"d {row.d}, d_ffn {row.d_ffn}, {row.chosen} of {row.experts}, gates over {over}, "
            f"logit variance {row.variance:g}, T {row.length}"
        )
        yield Setting(label=label, values=values, draw=draw, seeds=row.seeds)


def tied_tables(statement: Statement) -> Iterator[Setting]:
    """|J_T| of a table that is read at both ends with a norm between, small and large beside the sequence."""
    eps = 1e-5
    for d, length, words, std, gradient, seeds in ((64, 16, 512, 0.02, 1.0, 64), (64, 16, 512, 0.02, 0.1, 48),
                                                   (64, 1, 512, 0.02, 1.0, 64), (64, 256, 300, 0.02, 1.0, 16),
                                                   (128, 32, 2048, 1.0, 1.0, 24), (128, 64, 1024, 0.002, 1.0, 24),
                                                   (256, 32, 2048, 0.02, 1.0, 12), (256, 64, 256, 0.02, 0.5, 12),
                                                   (32, 16, 512, 0.02, 1.0, 64)):  # fmt: skip
        choices = {"sequence": range(length), "multiplier": 1.0, "embedding_gradient": gradient, "averages": False}
        choices |= {"final_norm": True, "norm": "layernorm", "d_model": d, "eps": eps}
        tied = TiedTable(choices).requires_grad_(False)

        def draw(seed: int, tied: TiedTable = tied, words: int = words, d: int = d, std: float = std) -> float:
            table = std * normal(seed, words, d).float()

            def logits(E: Tensor) -> Tensor:
                return tied.read(table + tied.gradient * (E - table)) @ E.mT

            return lanczos_opnorm(logits, table, tolerance=PRECISE, limit=100).value

        values = {"embedding_gradient": gradient, "sigma_e": std, "eps": eps, "d": d, "n_tokens": length}
        values |= {"vocab_size": words, "numbers": d * length, "largest_count": 1}
        detached = f", gradient times {gradient:g}" if gradient < 1 else ""
        label = f"d {d}, T {length}, V {words}, std {std:g}{detached}"
        yield Setting(label=label, values=values, draw=draw, seeds=seeds)
