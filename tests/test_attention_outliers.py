"""The outlier of an uneven softmax row: its equation against explicit matrices, and its limits."""

from __future__ import annotations

import math

import numpy as np
import pytest

from theory.attention_outliers import outlier, softmax_opnorm, strongest_rows, uneven_opnorm, value_resolvents
from theory.attention_simulation import plain_attention, simulated_norms
from theory.random_matrix import cesaro_opnorm, heads_edge

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
    d, theta, draws = 160, 5.5, 8
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
    predicted = float(outlier(TOKENS, np.array([theta]))[0])
    assert abs(predicted - np.mean(norms)) <= 4 * error + 0.01 * predicted
    assert np.mean(norms) > np.mean(apart)  # a column that the value term has not is another case


def test_limits() -> None:
    assert outlier(TOKENS, np.array([1e3]))[0] == pytest.approx(1e3, rel=1e-4)
    even = float(cesaro_opnorm(TOKENS)) * math.sqrt(27) / 2
    assert uneven_opnorm(256, 4, 64, TOKENS, 1e-4) == pytest.approx(even, rel=1e-12)
    assert uneven_opnorm(256, 4, 64, 1, 4.0) == pytest.approx(math.sqrt(27) / 2, rel=1e-12)
    shared = math.sqrt(heads_edge(1 / 4).limit)  # four heads of 64 to one value are one head of 64
    assert uneven_opnorm(256, 4, 64, 1, 4.0, 4) == pytest.approx(shared, rel=1e-12)


def test_softmax_norm_is_the_largest_eigenvalue() -> None:
    p = np.random.default_rng(0).dirichlet(np.full(6, 0.4), size=(3, 7))
    p[0, 0], p[0, 1] = [1, 0, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0, 0]
    matrices = p[..., None] * np.eye(6) - p[..., None] * p[..., None, :]
    np.testing.assert_allclose(softmax_opnorm(p), np.linalg.eigvalsh(matrices)[..., -1], atol=1e-10)


def test_more_rows_and_heads_have_a_stronger_one() -> None:
    few, heads, rows = (strongest_rows(256, h, 64, t, 1.0).mean() for h, t in ((2, 8), (16, 8), (2, 32)))
    assert few < min(heads, rows)
    assert (
        strongest_rows(10**6, 16, 10**6, 8, 1.0).mean() < 1
    )  # lengths no longer vary, and no row is stronger than even ones


@pytest.mark.slow
@pytest.mark.parametrize(
    ("d", "n_heads", "n_tokens", "logit_variance"),
    [(512, 8, 16, 1.0), (512, 4, 16, 1.0), (256, 4, 16, 2.0), (256, 4, 64, 1.0), (512, 8, 32, 2.0)],
)
def test_against_simulation(d: int, n_heads: int, n_tokens: int, logit_variance: float) -> None:
    d_head, draws = d // n_heads, 40
    drawn = simulated_norms(plain_attention(d, n_heads, d_head, n_tokens, logit_variance), n_tokens, draws=draws)
    predicted = uneven_opnorm(d, n_heads, d_head, n_tokens, logit_variance)
    assert abs(predicted / drawn.mean() - 1) <= 0.06 + 2 * float(drawn.std()) / math.sqrt(draws) / drawn.mean()
    even = math.sqrt(27) / 2 * 1.7
    assert even < 0.8 * drawn.mean()  # control: the norm at even rows
