"""The outlier of an uneven softmax row: its equation against explicit matrices, and its limits."""

from __future__ import annotations

import math

import numpy as np
import pytest

from theory.attention_outliers import uneven_opnorm, value_resolvents
from theory.statements import find

TOKENS = 3
MEAN = np.tril(np.ones((TOKENS, TOKENS))) / np.arange(1, TOKENS + 1)[:, None]


def test_resolvents_are_those_of_a_large_matrix() -> None:
    d, z = 160, 4.5
    rng = np.random.default_rng(0)
    whole = np.kron(MEAN, rng.standard_normal((d, d)) @ rng.standard_normal((d, d)) / d)
    for found, square in zip(value_resolvents(z, TOKENS), (whole @ whole.T, whole.T @ whole), strict=True):
        full = z * np.linalg.inv(z**2 * np.eye(len(square)) - square)
        blocks = np.einsum("tiui->tu", full.reshape(TOKENS, d, TOKENS, d)) / d
        np.testing.assert_allclose(found, blocks, rtol=0, atol=0.02 * np.abs(blocks).max())
        assert np.abs(np.eye(TOKENS) / z - blocks).max() > 0.05 * np.abs(blocks).max()  # control: not the trivial one


def test_outlier_beside_the_value_term_is_where_the_equation_says() -> None:
    """theta x y' with x = W_O v of the second row and y a quarter in token 1, three quarters in token 2."""
    d, d_head, variance, draws = 160, 64, 1.0, 8
    theta = math.sqrt(2 * d_head * variance) / 2
    rng, norms, apart = np.random.default_rng(1), list[float](), list[float]()
    for _ in range(draws):
        W_O, W_V = rng.standard_normal((2, d, d)) / math.sqrt(d)
        v, w, y_1, y_2, y_3 = rng.standard_normal((5, d)) / math.sqrt(d)
        row = np.concatenate([y_1 / 2, (y_2 / 2 + y_3 / math.sqrt(2)), 0 * y_1])
        value = np.kron(MEAN, W_O @ W_V)
        for left, found in ((W_O @ v, norms), (w, apart)):
            column = np.concatenate([0 * left, left, 0 * left])
            found.append(float(np.linalg.norm(value + theta * np.outer(column, row), 2)))
    error = float(np.std(norms)) / math.sqrt(draws)
    predicted = uneven_opnorm(d_head, TOKENS, variance)
    assert abs(predicted - np.mean(norms)) <= 4 * error + 0.01 * predicted
    assert np.mean(norms) > np.mean(apart)  # a column that the value term has not is another case


def test_limits() -> None:
    large = 10**6
    assert uneven_opnorm(large, TOKENS, 1.0) == pytest.approx(math.sqrt(large / 2), rel=1e-4)
    even = float(find("attention-sharp").evaluate({"c_VO": 1.0, "n_tokens": TOKENS}))
    assert uneven_opnorm(4, TOKENS, 0.01) == pytest.approx(even, rel=1e-12)
    assert uneven_opnorm(64, 1, 4.0) == pytest.approx(math.sqrt(27) / 2, rel=1e-12)
