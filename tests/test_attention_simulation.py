"""The simulated attention norm: its Jacobian against the model's, draw by draw, and what it is good for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.weights import architecture

from empirics.model import Attention
from empirics.probes import PlainAttention
from empirics.spectral import explicit_jacobian, explicit_opnorm
from theory.attention_simulation import DRAWS, LARGEST_INPUT, _Attention, simulated_norms
from theory.statements import find

WIDTH, HEADS, LENGTH = 12, 3, 5


def both(seed: int, logit_variance: float) -> tuple[_Attention, PlainAttention, torch.Tensor]:
    """A draw, the model's attention with its weights, and its input, which the draw keeps as queries and keys."""
    drawn = _Attention(np.random.default_rng(seed), WIDTH, HEADS, WIDTH // HEADS, LENGTH, logit_variance)
    a = architecture(d_model=WIDTH, n_heads=HEADS, n_kv_heads=HEADS, d_head=WIDTH // HEADS, attention_scale=1.0)
    module = Attention(a).double().requires_grad_(False)
    for linear, weight in ((module.query, drawn.W_Q), (module.key, drawn.W_K), (module.value, drawn.W_V)):
        linear.weight.copy_(torch.from_numpy(weight.reshape(-1, WIDTH)))
    module.output.weight.copy_(torch.from_numpy(drawn.W_O.reshape(-1, WIDTH).T.copy()))
    # The tokens follow from their values: W_V of all heads is square and invertible.
    values = np.concatenate(list(drawn.v), axis=1)
    u = torch.from_numpy(np.linalg.solve(drawn.W_V.reshape(-1, WIDTH), values.T).T.copy())
    return drawn, PlainAttention(module), u[None]


@pytest.mark.parametrize("logit_variance", [0.1, 1.0, 4.0])
def test_a_draws_jacobian_is_the_models(logit_variance: float) -> None:
    """Forwards and backwards, column by column, against automatic differentiation in float64."""
    drawn, module, u = both(3, logit_variance)
    assert float(u.square().mean(-1).sub(1).abs().max()) < 1e-9  # tokens as a LayerNorm leaves them
    assert float(u.mean(-1).abs().max()) < 1e-9
    expected = explicit_jacobian(module, u).numpy()
    basis = np.eye(WIDTH * LENGTH)
    forward = np.stack([drawn.forward(column) for column in basis], axis=1)
    backward = np.stack([drawn.backward(row) for row in basis], axis=0)
    np.testing.assert_allclose(forward, expected, rtol=0, atol=1e-9 * np.abs(expected).max())
    np.testing.assert_allclose(backward, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def test_norms_are_those_of_the_draws() -> None:
    norms = simulated_norms(WIDTH, HEADS, WIDTH // HEADS, LENGTH, 1.0)
    assert norms.shape == (DRAWS,)
    for seed in (0, 7):
        _, module, u = both(seed, 1.0)
        assert norms[seed] == pytest.approx(explicit_opnorm(module, u), rel=1e-3)


def test_logits_have_the_variance_that_is_asked_for() -> None:
    draws = [_Attention(np.random.default_rng(seed), 64, 4, 16, 16, 2.5) for seed in range(40)]
    logits = np.stack([(d.q @ d.k.mT)[:, ~np.eye(16, dtype=bool)] for d in draws])
    assert np.mean(logits**2) == pytest.approx(2.5, rel=0.1)


def test_where_the_closed_form_ends() -> None:
    """At equal logits both are right; at logit variance 1 the closed form, outside its domain there, is a third low."""
    values = {"c_VO": 0.7, "d": 256, "n_heads": 4, "d_head": 64, "n_tokens": 8}
    closed = float(find("attention-sharp").evaluate({"c_VO": 0.7, "n_tokens": 8}))
    simulated = find("attention-simulated")
    even, uneven = (float(simulated.evaluate(values | {"logit_variance": a})) for a in (0.0, 1.0))
    assert closed == pytest.approx(even, rel=0.03)
    assert closed < 0.8 * uneven


def test_what_is_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match=f"at most {LARGEST_INPUT} numbers"):
        simulated_norms(1024, 8, 128, 64, 1.0)
    with pytest.raises(ValueError, match="use a width of 2 or more"):
        simulated_norms(1, 1, 4, 4, 1.0)
