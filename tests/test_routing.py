"""Experts behind a router: overlaps of gates against closed forms and samples, maps and networks against real ones."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.weights import architecture, generator
from helpers.wide import Array, grams_through, vectors

from empirics.data import random_tokens
from empirics.model import Experts, build
from empirics.plan import plan
from empirics.probes import layer_norms, measure_growth
from theory.architecture import Architecture, preset
from theory.gram_maps import FeedForwardMap
from theory.grams import Gram
from theory.growth import gradient_growth
from theory.initialisation import Init
from theory.routing import ANGLES, DRAWS, OWN, STEP, Own, Routing, _tables, gates
from theory.stack import paper_bound
from theory.verdict import check

ANGLE = np.linspace(0, math.pi, ANGLES)
# Relative standard errors of a table, as the module states them; the draws themselves say the same below.
OF_SHARED, OF_SLOPES, OF_EVEN = 0.005, 0.02, 0.02


def tables(experts: int, chosen: int, renormalised: bool, variance: float = 1.0) -> Array:
    return _tables(experts, chosen, renormalised, round(math.log(variance) / STEP))


# --- overlaps of gates ----------------------------------------------------------------------------------------------


def test_one_of_two_experts_by_the_angle() -> None:
    """Two tokens choose the same one of two with probability 1 - angle/pi (Sheppard); its gate is 1 and still."""
    shared, slopes = tables(2, 1, True)
    draws = DRAWS / 2
    error = np.sqrt(ANGLE / math.pi * (1 - ANGLE / math.pi) / draws)
    assert np.all(np.abs(shared - (1 - ANGLE / math.pi)) <= 4.5 * error + 1e-12)
    assert not slopes.any()


@pytest.mark.parametrize("variance", [math.exp(-2), 1.0, math.exp(1.5)])
def test_two_of_two_experts_by_quadrature(variance: float) -> None:
    """A softmax over two is a sigmoid of a difference of variance 2v: one-dimensional integrals at angle 0."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    weights = weights / weights.sum()
    g = 1 / (1 + np.exp(-math.sqrt(2 * variance) * nodes))
    shared, slopes = tables(2, 2, True, variance)
    assert shared[0] == pytest.approx(float(weights @ (g**2 + (1 - g) ** 2)), rel=4 * OF_SHARED)
    assert slopes[0] == pytest.approx(float(weights @ (4 * (g * (1 - g)) ** 2)), rel=4 * OF_SLOPES)


SETTINGS = pytest.mark.parametrize(
    ("experts", "chosen", "renormalised"), [(8, 2, True), (64, 8, False), (128, 8, True), (3, 3, True), (16, 1, False)]
)


@SETTINGS
def test_uncorrelated_tokens_share_an_even_part(experts: int, chosen: int, renormalised: bool) -> None:
    """By symmetry A = (E sum_e g_e)^2 / n at angle pi/2, 1/n if the gates sum to 1."""
    shared, _ = tables(experts, chosen, renormalised)
    logits = np.random.default_rng(1).standard_normal((40_000, experts))
    mass = gates(logits, chosen, renormalised=renormalised)[0].sum(axis=1).mean()
    assert shared[ANGLES // 2] == pytest.approx(mass**2 / experts, rel=4 * OF_EVEN)


@SETTINGS
def test_the_tables_standard_error(experts: int, chosen: int, renormalised: bool) -> None:
    """What the module states, at the diagonal, where it decides: by fresh draws in equal number."""
    shared, slopes = tables(experts, chosen, renormalised)
    logits = np.random.default_rng(2).standard_normal((OWN * max(DRAWS // experts, 64), experts))
    g, p = gates(logits, chosen, renormalised=renormalised)
    own, turning = np.sum(g * g, axis=1), np.sum(g * g, axis=1) * (1 + np.sum(p * p, axis=1)) - 2 * np.sum(g * g * p, 1)
    for table, sample, stated in ((shared[0], own, OF_SHARED), (slopes[0], turning, OF_SLOPES)):
        error = sample.std() / math.sqrt(sample.size)
        assert error <= stated * sample.mean() or sample.mean() == 0
        assert abs(table - sample.mean()) <= 4.5 * math.sqrt(2) * error + 1e-15


@pytest.mark.parametrize("renormalised", [True, False])
@pytest.mark.parametrize("chosen", [1, 2, 5])
def test_the_slopes_are_those_of_the_models_gates(chosen: int, renormalised: bool) -> None:
    """diag(g) - g p' against autograd through the model's router."""
    module = Experts(
        architecture(d_model=5, n_experts=5, experts_per_token=chosen, gates_renormalised=renormalised)
    ).double()
    torch.nn.init.eye_(module.router.weight)

    def dense(u: torch.Tensor) -> torch.Tensor:
        values, index = module.gates(u[None])
        return torch.zeros(5, dtype=u.dtype).index_add(0, index[0], values[0])

    u = torch.randn(5, generator=generator(3), dtype=torch.float64)
    g, p = gates(u.numpy(), chosen, renormalised=renormalised)
    np.testing.assert_allclose(dense(u).detach().numpy(), g, rtol=1e-12, atol=1e-15)
    found = torch.autograd.functional.jacobian(dense, u).numpy()
    np.testing.assert_allclose(found, np.diag(g) - np.outer(g, p), rtol=1e-10, atol=1e-14)


def test_without_choosing_the_slopes_are_the_derivative_of_the_overlap() -> None:
    """Price's theorem, for all of 4 experts chosen; with 2 of them it fails: no derivative sees a change of routing."""
    variance = 1.0
    for chosen, holds in ((4, True), (2, False)):
        shared, slopes = tables(4, chosen, True, variance)
        rho = np.cos(ANGLE)
        middle = slice(4, ANGLES - 4)  # the grid is too coarse in rho at the ends
        derivative = np.gradient(shared, rho)[middle] / variance
        # Central differences of spacing 0.1 and a table's error: 3 % of the largest.
        close = np.abs(derivative - slopes[middle]) <= 0.03 * slopes.max()
        assert close.all() == holds


# --- the map on Gram matrices ---------------------------------------------------------------------------------------

WIDTH = 192


def simulated(kernel: Array, cotangent: Array, routing: Routing, draws: int) -> Array:
    """(draws, 2, T, T) Gram matrices of output and gradient of ReLU experts behind a router."""
    hidden = WIDTH
    module = Experts(
        architecture(
            d_model=WIDTH, d_ffn=hidden, activation="relu", n_experts=routing.experts,
            experts_per_token=routing.chosen, gates_renormalised=routing.renormalised,
        )
    ).double().requires_grad_(False)  # fmt: skip
    g, found = generator(11), []
    for _ in range(draws):
        torch.nn.init.normal_(module.router.weight, std=math.sqrt(routing.gain / WIDTH), generator=g)
        for expert in module.experts:
            torch.nn.init.normal_(expert.enter.weight, std=1 / math.sqrt(WIDTH), generator=g)
            torch.nn.init.normal_(expert.leave.weight, std=1 / math.sqrt(hidden), generator=g)
        found.append(grams_through(module, *vectors((kernel, cotangent), WIDTH, g)))
    return np.stack(found)


@pytest.mark.parametrize(
    "routing",
    [
        Routing(experts=4, chosen=2, gain=2.0, renormalised=True),
        Routing(experts=6, chosen=3, gain=4.0, renormalised=False),
    ],
    ids=["among the chosen", "over all"],
)
def test_routed_maps_against_simulated_experts(routing: Routing) -> None:
    """Standard errors and corrections of order 1/d alone. Controls: no router's share of the gradient, no overlap."""
    length, draws = 4, 250
    kernel = 0.5 * np.eye(length) + 0.5
    cotangent = 0.7 * np.eye(length) + 0.3
    sample = simulated(kernel, cotangent, routing, draws)
    sublayer = FeedForwardMap(activation="relu", enter=1.0, leave=1.0, routing=routing)
    applied = sublayer.at(Gram(np.ones(length), kernel))
    predicted = applied.output.dense(), applied.backward(Gram(np.diagonal(cotangent).copy(), cotangent)).dense()
    shared = routing.overlaps(Gram(np.ones(length), kernel)).shared.dense()
    still = 0.5 * shared * cotangent * np.where(np.eye(length) == 1, 1, (math.pi - math.acos(0.5)) / math.pi)
    for side, wrong in ((0, predicted[0] / shared / routing.experts), (1, still)):
        mean, error = sample[:, side].mean(0), sample[:, side].std(0, ddof=1) / math.sqrt(draws)
        allowed = 4.5 * error + 3 / WIDTH * predicted[side].diagonal().max()
        assert np.all(np.abs(predicted[side] - mean) <= allowed)
        assert not np.all(np.abs(wrong - mean) <= allowed)


# --- networks -------------------------------------------------------------------------------------------------------


def network(**changes: Any) -> Architecture:
    sizes = {"d_model": 128, "n_layers": 6, "n_heads": 4, "n_kv_heads": 4, "d_head": 32, "d_ffn": 256}
    return replace(preset("tiny"), vocab_size=2048, context=64, **(sizes | changes))


@pytest.mark.parametrize("chosen", [1, 2, 6])
@pytest.mark.parametrize("renormalised", [True, False])
def test_growth_of_a_network_of_experts(chosen: int, renormalised: bool) -> None:
    """Xavier's branches of order one, and a router of logit variance 1.8: to 3 % and three standard errors."""
    a = network(n_experts=6, experts_per_token=chosen, gates_renormalised=renormalised).with_init("xavier")
    a = a.with_embedding("scaled-embed")
    growth, _, residual = measure_growth(
        a, seeds=tuple(range(8)), batches=lambda seed: random_tokens(2048, seed=seed, batch_size=4, seq_len=32)
    )
    assert growth.log_sd is not None
    assert residual.log_sd is not None
    predicted, dense = gradient_growth(a, 32), gradient_growth(replace(a, n_experts=0), 32)
    error, allowed = math.log(predicted.value / growth.values[0]), 0.03 + 3 * growth.log_sd[0] / math.sqrt(8)
    assert abs(error) <= allowed
    last, spread = residual.values[-1], 0.03 + 3 * residual.log_sd[-1] / math.sqrt(8)
    assert abs(math.log(predicted.residual_std[-1] / last)) <= spread
    # Control: the same layer without router is another network, even where a single expert has a gate of 1: two
    # tokens share it more rarely.
    assert abs(math.log(dense.residual_std[-1] / last)) > spread


def test_a_router_does_not_move_its_expert_along_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 8, gates over all, below an output norm: nothing comes through the router. Control: all of it does."""
    init = Init(
        name="loud", hidden=2 / math.sqrt(128), value=0.001, query_key="fan-in", writers="fan-in", embedding=1.0,
        position=1.0, head="fan-in",
    )  # fmt: skip
    a = network(n_experts=8, experts_per_token=1, gates_renormalised=False, block="peri-ln", init=init, n_layers=4)
    growth, _, _ = measure_growth(
        a, seeds=tuple(range(8)), batches=lambda seed: random_tokens(2048, seed=seed, batch_size=4, seq_len=16)
    )
    assert growth.log_sd is not None
    found, allowed = math.log(growth.values[0]), 0.03 + 3 * growth.log_sd[0] / math.sqrt(8)
    predicted = gradient_growth(a, 16)
    assert predicted.in_domain
    assert abs(math.log(predicted.value) - found) <= allowed
    monkeypatch.setattr(Routing, "own", lambda *_: Own(0.0, 0.0, 1.0))
    assert abs(math.log(gradient_growth(a, 16).value) - found) > 2 * allowed


@pytest.mark.parametrize(("experts", "chosen", "renormalised"), [(8, 1, False), (8, 2, True), (5, 5, False)])
def test_what_norms_leave_of_the_router_s_gradient(experts: int, chosen: int, renormalised: bool) -> None:
    """D'F v for v orthogonal to x + f, f half of it, and to f alone: means over draws to four standard errors."""
    width, draws, variance = 256, 3000, 2.0
    routing = Routing(experts=experts, chosen=chosen, gain=variance, renormalised=renormalised)
    rng = np.random.default_rng(5)
    g, p = gates(math.sqrt(variance) * rng.standard_normal((draws, experts)), chosen, renormalised=renormalised)
    outputs, x, v = (rng.standard_normal((draws, *shape, width)) for shape in ((experts,), (), ()))
    f = np.einsum("ne,new->nw", g, outputs)
    unit = f / np.linalg.norm(f, axis=1, keepdims=True)
    shared, slopes = (part.diag[0] for part in routing.overlaps(Gram(np.ones(1), np.ones((1, 1)))))
    own, weight = routing.own(Gram(np.ones(1), np.ones((1, 1)))), np.mean(f * f, axis=1)

    def passed(y: Array) -> Array:
        """Squared gradient at the logits over that of v, without what is along y."""
        y = y / np.linalg.norm(y, axis=1, keepdims=True)
        left = np.einsum("new,nw->ne", outputs, v - y * np.sum(v * y, axis=1, keepdims=True))
        turned = g * left - p * np.sum(g * left, axis=1, keepdims=True)
        return np.sum(turned**2, axis=1) / width

    half = passed(unit + x / np.linalg.norm(x, axis=1, keepdims=True))
    alone = shared * passed(f) / weight
    for drawn, expected in ((half, slopes * (1 - own.radial / 2)), (alone, slopes * own.normed)):
        error = drawn.std() / math.sqrt(draws)
        assert abs(drawn.mean() - expected) <= 4 * error + (0.02 + 3 / width) * slopes
    if chosen == 1:
        assert own[1:] == pytest.approx((1, 0), abs=1e-9)
        assert abs(half.mean() - slopes) > 4 * half.std() / math.sqrt(draws) + 0.3 * slopes  # control: no norm


def test_gates_that_differ_scatter_the_stream() -> None:
    init = Init(
        name="loud", hidden="fan-in", value=0.001, query_key="fan-in", embedding=0.05, position=1.0, head="fan-in"
    )
    a = network(n_experts=8, experts_per_token=1, gates_renormalised=False, init=init, n_layers=1)
    (words,) = gradient_growth(a, 16).reasons
    assert "gates of unequal size scatter" in words
    assert gradient_growth(replace(a, gates_renormalised=True), 16).in_domain


def test_routing_of_what_is_not_a_number() -> None:
    """A stream that overflows has a reason, not an error."""
    for size in (math.nan, math.inf):
        routing = Routing(experts=2, chosen=1, gain=1.0, renormalised=True)
        with np.errstate(invalid="ignore"):  # as the recursion has it
            found = routing.overlaps(Gram(np.full(2, size), np.full((2, 2), size)))
        assert all(np.isnan(part.diag).all() for part in found)
    sharp = Init(name="sharp", hidden="fan-in", query_key=1.0, embedding=1.0, position=1.0, head="fan-in")
    a = network(
        n_layers=8, d_model=64, d_head=16, block="branch-ln", positions="none", n_experts=2, experts_per_token=1,
        activation="identity", shortcut_multiplier=1.3, init=sharp,
    )  # fmt: skip
    answer = gradient_growth(a, 16)
    assert not answer.in_domain
    assert math.isnan(answer.value)


def test_a_network_of_experts_trains_and_is_measured() -> None:
    """Every expert has a gradient, also one that no token came to."""
    a = network(n_layers=2, n_experts=8, experts_per_token=1)
    model = build(a, seed=0)
    tokens, targets = (torch.from_numpy(part) for part in random_tokens(2048, seed=0, batch_size=1, seq_len=2))
    model.loss(tokens, targets).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    idle = [expert for expert in model.layers[0].feedforward.experts if not expert.enter.weight.grad.any()]
    assert len(idle) >= 6
    rows = layer_norms(model, tokens)
    assert all(row["feedforward_half"] > 0 for row in rows)
    largest = max(torch.linalg.matrix_norm(e.enter.weight.detach(), ord=2) for e in model.layers[0].feedforward.experts)
    assert rows[0]["opnorm_1"] == pytest.approx(float(largest), rel=1e-6)


def test_experts_by_hand() -> None:
    """Each token's chosen experts weighted and added, one by one."""
    module = Experts(architecture(d_model=6, d_ffn=8, n_experts=5, experts_per_token=3, gates_renormalised=False))
    u = torch.randn(2, 7, 6, generator=generator(0))
    out = module(u)
    for b in range(2):
        for t in range(7):
            p = module.router(u[b, t]).softmax(-1)
            total = sum(p[e] * module.experts[e](u[b, t]) for e in p.argsort(descending=True)[:3])
            torch.testing.assert_close(out[b, t], total, rtol=1e-5, atol=1e-6)


def test_the_check_and_the_plan_know_experts() -> None:
    a = network(n_experts=8, experts_per_token=2)
    verdict = check(a, 32)
    assert verdict.growth.in_domain
    assert any("routing in expectation" in line for line in verdict.assumed)
    assert math.isfinite(verdict.rigorous.log10_product)
    assert any("gates" in line for line in verdict.paper.assumptions)
    dense = paper_bound(replace(a, n_experts=0), 32)
    assert verdict.paper.feedforward[0] < dense.feedforward[0]
    sizes: dict[str, Any] = {"device": "h100", "devices": 1, "steps": 1, "batch_size": 1, "seq_len": 32}
    half = plan(replace(a, experts_per_token=1), **sizes)
    assert plan(a, **sizes).flops > half.flops
    assert plan(a, **sizes).parameters == half.parameters


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_experts": 2, "experts_per_token": 3}, "experts_per_token=3 exceeds n_experts=2; use at most 2"),
        ({"n_experts": 2, "experts_per_token": 0}, "experts_per_token=0 is out of range; use 1"),
        ({"n_experts": -1}, "n_experts=-1 is out of range; use 0"),
    ],
)
def test_bad_experts_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        network(**changes)
