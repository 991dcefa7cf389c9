"""Networks at the edge of the growth recursion's domain, and what is measured and said of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from empirics.probes import measure_growth
from theory.architecture import Architecture
from theory.growth import gradient_growth
from theory.initialisation import Init, Rule

UNIT = Init(name="unit", hidden="fan-in", embedding=1.0, position=1.0, head="fan-in")


def wide(**changes: Any) -> Architecture:
    """Four layers of width 128 whose branches are as large as the stream."""
    sizes: dict[str, Any] = {
        "name": "wide", "d_model": 128, "n_layers": 4, "n_heads": 4, "n_kv_heads": 4, "d_head": 32, "d_ffn": 512,
        "vocab_size": 4096, "context": 64, "init": UNIT,
    }  # fmt: skip
    return Architecture(**(sizes | changes))


def narrow(**changes: Any) -> Architecture:
    return wide(**({"d_model": 32, "d_head": 8, "d_ffn": 128, "n_layers": 24} | changes))


def with_logits(a: Architecture, variance: float) -> Architecture:
    """Attention logits of this variance, before a soft-cap."""
    query_key: Rule = variance**0.25 / math.sqrt(a.d_model)
    return replace(a, init=replace(a.init, query_key=query_key))


def reason(a: Architecture, n_tokens: int = 16, **given: Any) -> str:
    """The only reason for being outside; empty inside."""
    found = gradient_growth(a, n_tokens, **given)
    assert found.in_domain == (not found.reasons)
    assert len(found.reasons) <= 1
    return "".join(found.reasons)


def one_head(variance: float) -> Architecture:
    """A layer of attention alone, of one head, over embeddings that it drowns."""
    parts: dict[str, Rule] = {"hidden": 1e-4, "embedding": 0.02, "value": "fan-in", "writers": "fan-in"}
    a = wide(n_layers=1, n_heads=1, n_kv_heads=1, d_head=128, d_ffn=64, init=replace(UNIT, **parts))
    return with_logits(replace(a, positions="none"), variance)


LOUD: dict[str, Any] = {"n_layers": 1, "init": replace(UNIT, embedding=0.02)}  # a stream that is its branches
FED = replace(UNIT, embedding=0.02, value=0.001)  # and its feed-forward alone


def measured(a: Architecture, n_tokens: int, seeds: int, sequences: int = 4) -> tuple[float, float]:
    """Mean log growth and its standard error, on distinct tokens."""

    def batches(seed: int) -> Any:
        generator = np.random.default_rng(seed)
        rows = [[generator.permutation(a.vocab_size)[:n_tokens] for _ in range(sequences)] for _ in range(2)]
        return np.array(rows[0]), np.array(rows[1])

    growth, _, _ = measure_growth(a, seeds=tuple(range(seeds)), batches=batches)
    assert growth.log_sd is not None
    return math.log(growth.values[0]), growth.log_sd[0] / math.sqrt(seeds)
