"""Experts at initialisation: the outlier that the router makes, and its limits."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from empirics import norm_samples
from theory import experts_outlier
from theory.experts_outlier import RoutedLayer, Token, routed_opnorm, token, token_norm
from theory.random_matrix import feedforward_edge_opnorm
from theory.statements import find

SIZES: dict[str, Any] = {
    "sigma_1": 0.1, "sigma_2": 0.09, "sigma_router": 0.125, "d": 64, "d_ffn": 256, "n_experts": 8, "n_chosen": 2,
    "gates_renormalised": 1, "n_tokens": 4,
}  # fmt: skip
LAYER = RoutedLayer(
    activation="relu", gated=False, d=64, d_ffn=128, experts=8, chosen=2, renormalised=True, sigma_1=0.1, sigma_2=1.0,
    sigma_3=0.0, sigma_router=0.125,
)  # fmt: skip


def value(**changes: float) -> float:
    return float(find("experts-sharp-relu").evaluate(SIZES | changes))


def drawn(seed: int, layer: RoutedLayer = LAYER) -> Token:
    rng = np.random.default_rng(seed)
    return token(layer, layer.sigma_router * rng.standard_normal((layer.experts, layer.d)), rng)


@pytest.mark.parametrize("router", [0.0, 0.125])
def test_one_expert_with_all_the_weight_is_a_feed_forward_layer(router: float) -> None:
    """Its gate is 1 and does not change: the router is not in the norm."""
    sizes = {"d": 256, "d_ffn": 512, "sigma_1": 0.05, "n_tokens": 1}
    alone = 0.05 * 0.09 * 256 * float(feedforward_edge_opnorm("relu", 256, 512, 0.05))
    assert value(**sizes, n_chosen=1, sigma_router=router) == pytest.approx(alone, rel=0.01)


def test_the_routers_part_grows_with_the_root_of_the_width() -> None:
    """At equal variances of pre-activations, outputs and logits; the experts' own part does not grow."""
    stds = ("sigma_1", "sigma_2", "sigma_router")
    wide = {"d": 576, "d_ffn": 576, "n_tokens": 1} | {name: SIZES[name] / 3 for name in stds}
    narrow = {"d_ffn": 64, "n_tokens": 1}
    assert value(**wide) / value(**narrow) == pytest.approx(3, rel=0.25)
    assert value(**wide | {"n_chosen": 1}) / value(**narrow, n_chosen=1) == pytest.approx(1, abs=0.1)


def test_without_the_outlier_or_the_gates_weights_it_is_not_the_measured_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Controls: the parts of the argument are needed for the target, on the page's own row."""
    statement = find("experts-sharp-relu")
    setting = norm_samples.settings(statement)[0]
    measured = norm_samples.measure(statement, replace(setting, seeds=24))["measured"]
    assert float(statement.evaluate(setting.values)) == pytest.approx(measured, rel=0.08)  # of few seeds
    for broken in (
        lambda found: found._replace(rows=0 * found.rows),
        lambda found: found._replace(columns=np.vstack([found.columns[0], 1.2 * found.columns[1:]])),
    ):
        monkeypatch.setattr(experts_outlier, "token", lambda *args, broken=broken: broken(token(*args)))
        routed_opnorm.cache_clear()
        assert abs(float(statement.evaluate(setting.values)) / measured - 1) > 0.12
    routed_opnorm.cache_clear()


def test_the_largest_of_a_sequence_is_the_mean_over_all_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_outlier, "TOKENS", 6)
    monkeypatch.setattr(experts_outlier, "MOST_ROUTERS", 1)
    routed_opnorm.cache_clear()
    rng = np.random.default_rng(0)
    router = LAYER.sigma_router * rng.standard_normal((LAYER.experts, LAYER.d))
    norms = [token_norm(token(LAYER, router, rng), LAYER.d, rng) for _ in range(6)]
    expected = LAYER.d * np.mean([max(some) for some in combinations(norms, 3)])
    assert routed_opnorm(LAYER, 3) == pytest.approx(expected, rel=1e-12)
    routed_opnorm.cache_clear()


@pytest.mark.parametrize("seed", range(6))
def test_the_outlier_is_that_of_the_matrices(seed: int) -> None:
    """Against draws of the second matrices and of the units' rows, at a token's own slopes, outputs and rows."""
    layer = replace(LAYER, d=200, d_ffn=400, renormalised=seed % 2 == 0)
    found, rng = drawn(seed, layer), np.random.default_rng(seed)
    size = len(found.squares)
    predicted = np.mean([token_norm(found, layer.d, rng) for _ in range(60)])
    rows = np.linalg.cholesky(found.rows * layer.d + 1e-12 * np.eye(2))
    norms: list[float] = []
    for _ in range(20):
        second, inner = rng.standard_normal((layer.d, size)), rng.standard_normal((size, layer.d))
        # u is the first axis; the rows that go with the outputs are two others of their lengths.
        inner = np.sqrt(found.squares)[:, None] * inner
        inner[:, 0] = found.columns[0] / np.sqrt(layer.d)
        inner[:, 1:3] += found.columns[1:].T @ rows
        norms.append(float(np.linalg.norm(second @ inner, 2)) / layer.d)
    spread = np.std(norms) / np.sqrt(len(norms))
    assert predicted == pytest.approx(np.mean(norms), abs=4 * spread + 0.01 * predicted)


def test_what_has_no_routing_says_so() -> None:
    with pytest.raises(ValueError, match="n_chosen=9 of n_experts=8; use 1 to 8"):
        value(n_chosen=9)
    answer = find("experts-sharp-relu").predict(SIZES | {"n_chosen": 9})
    assert answer.value is None
    assert "it does not hold that n_chosen is at most n_experts" in answer.reasons
    assert find("experts-sharp-relu").predict(SIZES | {"sigma_router": 1.0}).value is None
    assert value(sigma_1=0.0) == 0.0
