"""The part of the loss gradient that runs along the stream: what norms leave of it, and branches make of it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.growth_networks import UNIT, measured, reason, wide

from empirics.model import build
from theory import growth
from theory.architecture import Architecture
from theory.grams import Gram
from theory.growth import forward_pass, gradient_growth


def sent_back(a: Architecture, n_tokens: int, seeds: int) -> tuple[float, float]:
    """Mean log of |g_0|/|g_N| where g_N is the stream itself, and its standard error."""
    logs: list[float] = []
    for seed in range(seeds):
        tokens = torch.from_numpy(np.random.default_rng(seed).permutation(a.vocab_size)[None, :n_tokens])
        places: list[torch.Tensor] = []
        build(a, seed=seed).loss(tokens, tokens, places)
        along = places[-1].detach()
        (first,) = torch.autograd.grad(places[-1], places[0], along)
        logs.append(math.log(float(first.norm() / along.norm())))
    return float(np.mean(logs)), float(np.std(logs, ddof=1)) / math.sqrt(seeds)


@pytest.mark.parametrize("block", ["peri-ln", "branch-ln"])
def test_an_output_norm_takes_out_what_its_branch_has_added(block: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a = wide(n_layers=1, block=block, final_norm=False, positions="none")
    n_tokens = 32
    found, error = sent_back(a, n_tokens, 24)
    forward = forward_pass(a, n_tokens, distinct=True)
    none = Gram(np.zeros(n_tokens), np.zeros((n_tokens, n_tokens)))
    monkeypatch.setattr(growth, "head_gradient", lambda *_, **__: none)
    assert abs(math.log(forward.growth().value) - found) <= 0.08 + 3 * error
    # The same gradient, as if it were random: every branch would send all of it back.
    monkeypatch.setattr(growth, "head_gradient", lambda *_, **__: forward.stream)
    monkeypatch.setattr(growth, "head_tilt", lambda *_: 0.0)
    assert math.log(forward.growth().value) - found > 0.16


def test_a_stream_that_is_small_beside_eps() -> None:
    """Its norms take nothing out: what branches have written they send back amplified, layer after layer."""
    init = replace(UNIT, embedding=0.003, head=0.14, query_key=0.05, value="width")
    sizes: Any = {"d_model": 256, "n_layers": 3, "n_heads": 8, "n_kv_heads": 2, "d_head": 16, "d_ffn": 64}
    a = wide(**sizes, activation="relu-squared", gated=True, eps=0.1, positions="none", logit_multiplier=1.6, init=init)
    assert "runs along the stream" in reason(a)
    found, error = measured(a, 16, 16)
    print(math.log(gradient_growth(a, 16).value) - found, error)
    assert abs(math.log(gradient_growth(a, 16).value) - found) > 0.08 + 3 * error
    calm = replace(a, eps=0.5)
    assert reason(calm) == ""
    found, error = measured(calm, 16, 16)
    print(math.log(gradient_growth(calm, 16).value) - found, error)
    assert abs(math.log(gradient_growth(calm, 16).value) - found) <= 0.08 + 3 * error
