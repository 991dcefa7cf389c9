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
from theory.forward_pass import Branch, forward_pass
from theory.grams import Gram
from theory.growth import backward_pass, gradient_growth
from theory.scatter import own_gain


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
    assert abs(math.log(backward_pass(forward).value) - found) <= 0.08 + 3 * error
    # The same gradient, as if it were random: every branch would send all of it back.
    monkeypatch.setattr(growth, "head_gradient", lambda *_, **__: forward.stream)
    monkeypatch.setattr(growth, "head_tilt", lambda *_: 0.0)
    assert math.log(backward_pass(forward).value) - found > 0.16


@pytest.mark.parametrize(("activation", "gated"), [("relu", False), ("relu-squared", False), ("identity", True)])
@pytest.mark.parametrize("with_norm", [True, False])
def test_own_gain_is_that_of_random_weights(activation: Any, gated: bool, with_norm: bool) -> None:
    """One token through linear attention and through a feed-forward, whose norm takes out the input's direction."""
    a = wide(n_heads=1, n_kv_heads=1, d_head=48, d_ffn=192, activation=activation, gated=gated)
    d, n, m, draws = a.d_model, a.d_head, a.d_ffn, 200
    generator = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return torch.from_numpy(generator.normal(0, shape[-1] ** -0.5, shape))

    def sent(name: str) -> tuple[float, float]:
        z = (normal(1, d)[0] * math.sqrt(d)).requires_grad_()
        if name == "attention":
            f = normal(d, n) @ (normal(n, d) @ z)
        else:
            open_units, gate = normal(m, d) @ z, normal(m, d) @ z
            h = {"identity": open_units, "relu": open_units.relu(), "relu-squared": open_units.relu() ** 2}[activation]
            f = normal(d, m) @ (h * gate if gated else h)
        other = normal(1, d)[0]
        squares: list[float] = []
        for along in (f.detach(), other * f.detach().norm() / other.norm()):
            (back,) = torch.autograd.grad(f, z, along, retain_graph=True)
            if with_norm and name == "feedforward":
                back = back - z.detach() * (back @ z.detach()) / (z.detach() @ z.detach())
            squares.append(float(back @ back))
        return squares[0], squares[1]

    drawn = {name: np.array([sent(name) for _ in range(draws)]) for name in ("attention", "feedforward")}
    for name, squares in drawn.items():
        own, others = squares.mean(0)
        gain = own / others
        error = float(np.std(squares[:, 0] - gain * squares[:, 1])) / others / math.sqrt(draws)
        expected = own_gain(a, name, 0.0 if with_norm else 1.0)
        if name == "feedforward" and not with_norm and activation != "relu":
            assert gain > expected + 4 * error  # the docstring's: lambda^2 has a factor above 1
        else:
            assert abs(gain - expected) <= 4 * error + 0.03 * expected, (name, gain, expected)


NARROW: dict[str, Any] = {
    "d_model": 64, "n_layers": 1, "d_head": 8, "final_norm": False, "positions": "none", "logit_multiplier": 1.6
}  # fmt: skip


GATED: dict[str, Any] = {"activation": "identity", "gated": True}


@pytest.mark.parametrize(
    "changes",
    [
        {"n_heads": 2, "n_kv_heads": 2, "d_ffn": 256, "init": replace(UNIT, value=0.3)},
        {"n_heads": 8, "n_kv_heads": 8, "d_ffn": 16, **GATED, "init": replace(UNIT, value=0.02, writers=0.25)},
    ],
)
def test_a_branch_sends_back_more_of_what_runs_along_its_output(changes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a = wide(**(NARROW | changes))
    assert reason(a, 64) == ""
    found, error = measured(a, 64, 32)
    gap = math.log(gradient_growth(a, 64).value) - found
    print(f"{gap:+.1%} +- {error:.1%}")
    assert abs(gap) <= 0.08 + 3 * error
    monkeypatch.setattr(growth, "own_gain", lambda *_: 1.0)
    gap = math.log(gradient_growth(a, 64).value) - found
    print(f"as if it were random: {gap:+.1%}")
    assert gap < -0.08 - 3 * error


def test_a_tied_head_s_rows_behind_norms_with_an_eps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The final norm takes out part of what runs along the token, output norms what runs along their branches."""
    changes: dict[str, Any] = {"n_layers": 3, "n_heads": 8, "n_kv_heads": 8, "d_head": 16, "final_norm": True, **GATED}
    init = replace(UNIT, embedding=0.125, query_key=0.05, value=0.3, writers=0.2)
    treated: dict[str, Any] = {"tied": True, "embedding_multiplier": 8.0, "logit_multiplier": 2.4}
    a = wide(**(NARROW | changes | treated), d_ffn=64, block="peri-ln", eps=0.5, residual_multiplier=0.3, init=init)
    assert reason(a, 64) == ""
    found, error = measured(a, 64, 16)
    gap = math.log(gradient_growth(a, 64).value) - found
    print(f"{gap:+.1%} +- {error:.1%}")
    assert abs(gap) <= 0.08 + 3 * error

    def whole(along: Any, square: Any, weight: Any, share: Any) -> Any:
        return 0 * along - weight * np.sqrt(share / square)

    monkeypatch.setattr(growth, "behind_norm", whole)
    monkeypatch.setattr(growth, "own_gain", lambda *_: 1.0)
    monkeypatch.setattr(Branch, "loose", property(lambda branch: np.ones(branch.size.size)))
    gap = math.log(gradient_growth(a, 64).value) - found
    print(f"as if eps were 0 and branches random: {gap:+.1%}")
    assert gap > 0.08 + 3 * error


def test_a_stream_that_is_small_beside_eps() -> None:
    """Its norms take nothing out: what branches have written they send back amplified, layer after layer."""
    init = replace(UNIT, embedding=0.003, head=0.14, query_key=0.05, value="width")
    sizes: Any = {"d_model": 256, "n_layers": 3, "n_heads": 8, "n_kv_heads": 2, "d_head": 16, "d_ffn": 64}
    a = wide(**sizes, activation="relu-squared", gated=True, eps=0.1, positions="none", logit_multiplier=1.6, init=init)
    assert "runs along the stream" in reason(a)
    found, error = measured(a, 16, 64)
    print(math.log(gradient_growth(a, 16).value) - found, error)
    assert abs(math.log(gradient_growth(a, 16).value) - found) > 0.08 + 3 * error
    calm = replace(a, eps=0.5)
    assert reason(calm) == ""
    found, error = measured(calm, 16, 16)
    print(math.log(gradient_growth(calm, 16).value) - found, error)
    assert abs(math.log(gradient_growth(calm, 16).value) - found) <= 0.08 + 3 * error
