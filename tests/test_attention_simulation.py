"""The simulated attention norm: its Jacobian against the model's, draw by draw, and what it is good for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers.weights import architecture

from empirics.bench_attention import FullAttention
from empirics.model import Attention, make_norm
from empirics.probes import PlainAttention
from empirics.spectral import explicit_jacobian, explicit_opnorm
from theory.architecture import Architecture
from theory.attention_ensembles import variant as architecture_of
from theory.attention_simulation import DRAWS, LARGEST_INPUT, SimulatedAttention, plain_attention, simulated_norms
from theory.initialisation import flat
from theory.statements import find

LENGTH = 5
SIZES: dict[str, Any] = {
    "d_model": 12, "n_heads": 4, "n_kv_heads": 4, "d_head": 4, "norm": "layernorm", "eps": 0.01, "init": flat(0.4),
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "RMSNorm": {"norm": "rmsnorm"},
    "grouped": {"n_kv_heads": 2},
    "RoPE": {"positions": "rope", "rope_base": 3.0},
    "RoPE, slow frequencies divided": {
        "positions": "rope", "rope_base": 3.0, "rope_stretch": 4.0,
        "rope_original": 6, "rope_low": 0.5, "rope_high": 2.0,
    },
    "half of RoPE, grouped": {"positions": "rope", "rope_fraction": 0.5, "n_kv_heads": 1},
    "ALiBi": {"positions": "alibi"},
    "window": {"window": 2},
    "window, and all in this layer": {"window": 2, "global_every": 1},
    "scale": {"attention_scale": 2.0},
    "soft-cap": {"attention_softcap": 0.7},
    "QK-norm a head": {"qk_norm": "head", "positions": "rope", "norm": "rmsnorm"},
    "QK-norm, full, grouped": {"qk_norm": "full", "n_kv_heads": 2},
    "all at once": {
        "qk_norm": "full", "n_kv_heads": 2, "positions": "rope", "window": 3, "attention_softcap": 0.5,
        "norm": "rmsnorm",
    },
}  # fmt: skip


def model_of(drawn: SimulatedAttention, kind: type[Attention] = Attention) -> tuple[PlainAttention, torch.Tensor]:
    """The model's attention with a draw's weights, and its input."""
    a = drawn.architecture
    module = kind(a).double().requires_grad_(False)
    for name in ("query", "key", "value"):
        getattr(module, name).weight.copy_(torch.from_numpy(drawn.weights[name].reshape(-1, a.d_model)))
    module.output.weight.copy_(torch.from_numpy(drawn.weights["output"].reshape(-1, a.d_model).T.copy()))
    return PlainAttention(module), torch.from_numpy(drawn.u)[None]


def draw(a: Architecture, seed: int) -> SimulatedAttention:
    return SimulatedAttention(a, LENGTH, np.random.default_rng(seed))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_draws_jacobian_is_the_models(variant: str) -> None:
    """Forwards and backwards, column by column, against automatic differentiation in float64."""
    drawn = draw(architecture(**(SIZES | VARIANTS[variant])), 3)
    module, u = model_of(drawn)
    assert float(u.square().mean(-1).sub(1).abs().max()) < 1e-9  # tokens as a norm leaves them
    expected = explicit_jacobian(module, u).numpy()
    basis = np.eye(expected.shape[0])
    forward = np.stack([drawn.forward(column) for column in basis], axis=1)
    backward = np.stack([drawn.backward(row) for row in basis], axis=0)
    np.testing.assert_allclose(forward, expected, rtol=0, atol=1e-9 * np.abs(expected).max())
    np.testing.assert_allclose(backward, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def test_without_a_mask_a_draws_jacobian_is_the_models() -> None:
    """And its norm, in the statement's draws; behind a mask it is another."""
    a = architecture(**SIZES)
    drawn = SimulatedAttention(a, LENGTH, np.random.default_rng(0), causal=False)
    module, u = model_of(drawn, FullAttention)
    expected = explicit_jacobian(module, u).numpy()
    basis = np.eye(expected.shape[0])
    for found in (np.stack([drawn.forward(c) for c in basis], axis=1), np.stack([drawn.backward(c) for c in basis])):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * np.abs(expected).max())
    norm = simulated_norms(a, LENGTH, draws=1, causal=False)[0]
    assert norm == pytest.approx(np.linalg.norm(expected, 2), rel=1e-3)
    assert abs(norm / simulated_norms(a, LENGTH, draws=1)[0] - 1) > 0.01


@pytest.mark.parametrize(
    "variant", [name for name in VARIANTS if name not in ("plain", "window, and all in this layer")]
)
def test_each_variant_is_another_jacobian(variant: str) -> None:
    """Control: the same draw without the variant's one setting is far off."""
    a = architecture(**(SIZES | VARIANTS[variant]))
    module, u = model_of(draw(a, 3))
    expected = explicit_opnorm(module, u)
    plain = draw(architecture(**(SIZES | {"n_heads": a.n_heads, "n_kv_heads": a.n_heads, "norm": a.norm})), 3)
    if variant == "RMSNorm":
        plain = draw(architecture(**SIZES), 3)
    module, u = model_of(plain)
    assert abs(explicit_opnorm(module, u) / expected - 1) > 1e-3


@pytest.mark.parametrize("variant", ["plain", "RMSNorm", "all at once"])
def test_a_half_layers_jacobian_is_the_models(variant: str) -> None:
    """I + J behind the model's norm, at tokens of one std."""
    std = 0.6
    a = architecture(**(SIZES | VARIANTS[variant] | {"eps": 1e-12}))
    drawn = draw(a, 3)
    module, u = model_of(drawn)
    norm = make_norm(a).double().requires_grad_(False)
    expected = explicit_jacobian(lambda x: x + module(norm(x)), std * u).numpy()
    forward, backward = drawn.half_layer(std)
    basis = np.eye(expected.shape[0])
    tolerance = 1e-8 * np.abs(expected).max()  # eps is left out
    np.testing.assert_allclose(np.stack([forward(c) for c in basis], axis=1), expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(np.stack([backward(r) for r in basis], axis=0), expected, rtol=0, atol=tolerance)
    bare = np.eye(len(basis)) + explicit_jacobian(module, u).numpy() / std
    assert np.abs(bare - expected).max() > 1e-2 * np.abs(expected).max()  # control: the norm is felt


def test_norms_are_those_of_the_draws() -> None:
    a = architecture(**SIZES)
    norms = simulated_norms(a, LENGTH)
    assert norms.shape == (DRAWS,)
    for seed in (0, 7):
        module, u = model_of(draw(a, seed))
        assert norms[seed] == pytest.approx(explicit_opnorm(module, u), rel=1e-3)


def test_logits_have_the_variance_that_is_asked_for() -> None:
    a = plain_attention(64, 4, 16, 16, 2.5)
    draws = [SimulatedAttention(a, 16, np.random.default_rng(seed)) for seed in range(40)]
    logits = np.stack([(d.query @ d.key.mT / 4)[:, ~np.eye(16, dtype=bool)] for d in draws])
    assert np.mean(logits**2) == pytest.approx(2.5, rel=0.1)


def test_where_the_closed_form_ends() -> None:
    """At equal logits both are right; at logit variance 1 the closed form, outside its domain there, is a third low."""
    values = {"c_VO": 0.7, "d": 256, "n_heads": 4, "d_head": 64, "n_tokens": 8}
    closed = float(find("attention-sharp").evaluate(values | {"kv_group": 1}))
    simulated = find("attention-simulated")
    even, uneven = (float(simulated.evaluate(values | {"logit_variance": a})) for a in (0.0, 1.0))
    assert closed == pytest.approx(even, rel=0.03)
    assert closed < 0.8 * uneven


def test_without_a_mask_the_closed_form_ends_with_small_logits() -> None:
    values = {"c_VO": 0.7, "d": 256, "n_heads": 4, "d_head": 64, "n_tokens": 16}
    closed = float(find("attention-full-sharp").evaluate(values | {"kv_group": 1}))
    even, uneven = (
        float(find("attention-full-simulated").evaluate(values | {"logit_variance": a})) for a in (0.05, 1.0)
    )
    assert closed == pytest.approx(even, rel=0.03)
    assert closed < 0.8 * uneven


def test_a_half_layer_where_rows_are_even_is_the_closed_form() -> None:
    values = {"c_VO": 0.02, "s": 0.3, "d": 256, "n_heads": 4, "d_head": 64, "n_tokens": 8, "logit_variance": 0.01}
    closed = float(find("attention-half-layer-sharp").evaluate(values | {"kv_group": 1}))
    assert closed == pytest.approx(float(find("attention-half-layer-simulated").evaluate(values)), rel=0.02)


INSIDE: dict[str, dict[str, Any]] = {
    "attention-sharp": {"logit_variance": 0.1},
    "attention-half-layer-sharp": {"logit_variance": 0.1},
    "attention-uneven-sharp": {"logit_variance": 1.0},
    "attention-simulated": {"logit_variance": 1.0},
    "attention-half-layer-simulated": {"logit_variance": 1.0},
    "attention-full-simulated": {"logit_variance": 1.0},
}


@pytest.mark.parametrize("name", INSIDE)
def test_each_claims_only_the_heads_and_tokens_that_it_holds_for(name: str) -> None:
    statement = find(name)
    sizes = {"c_VO": 0.7, "s": 0.3, "d": 256, "n_heads": 4, "d_head": 64, "kv_group": 1, "n_tokens": 16}
    values = sizes | INSIDE[name] | {"numbers": 256 * 16}
    assert statement.outside(values) == ()
    own = "it does not hold that each query head has its own key head"
    grouped, whole = statement.outside(values | {"kv_group": 2}), name == "attention-uneven-sharp"
    assert (own in grouped) == ("simulated" in name)
    assert bool(grouped) == ("simulated" in name or whole)
    for n_heads, inside in ((8, not whole), (64, "simulated" in name)):  # together twice and sixteen times the stream
        wide = statement.outside(values | {"n_heads": n_heads})
        assert any("as wide as the stream" in reason for reason in wide) != inside
    few = {T: statement.outside(values | {"n_tokens": T, "logit_variance": 0.2}) for T in (2, 15, 16)}
    if name.endswith(("attention-sharp", "half-layer-sharp")):
        assert not few[16]
        assert all("a d / (2 n_heads)" in few[T][0] for T in (2, 15))
        assert not statement.outside(values | {"n_tokens": 2})
    else:
        assert all("n_tokens" in few[T][0] for T in (2, 15))


def test_few_tokens_are_the_closed_form_where_it_claims_them_and_not_beyond() -> None:
    values = {"c_VO": 1.0, "d": 256, "n_heads": 4, "d_head": 64, "kv_group": 1, "n_tokens": 2}
    closed = float(find("attention-sharp").evaluate(values))
    weak, strong = (simulated_norms(plain_attention(256, 4, 64, 2, a), 2) for a in (0.1, 0.2))
    error = float(weak.std()) / math.sqrt(DRAWS) / weak.mean()
    assert abs(closed / weak.mean() - 1) <= 0.03 - error
    assert closed / strong.mean() - 1 < -0.03 - error


@pytest.mark.parametrize("shape", [(64, 4, 16, 16), (64, 8, 16, 16), (128, 4, 32, 16)])
def test_the_mean_is_known_where_it_is_claimed(shape: tuple[int, int, int, int]) -> None:
    norms = simulated_norms(plain_attention(*shape, 4.0), shape[-1])
    assert norms.std() / norms.mean() / math.sqrt(DRAWS) <= 0.018
    for few, heads, d_head in ((2, 1, 64), (16, 4, 1)):  # control: one head of two tokens, and the narrowest heads
        norms = simulated_norms(plain_attention(64, heads, d_head, few, 4.0), few)
        assert norms.std() / norms.mean() / math.sqrt(DRAWS) > 0.03


def test_a_half_layer_without_a_branch_is_the_identity() -> None:
    values = {"s": 0.3, "d": 64, "n_heads": 4, "d_head": 16, "n_tokens": 16, "logit_variance": 1.0}
    assert float(find("attention-half-layer-simulated").evaluate(values | {"c_VO": 0.0})) == 1
    assert 1 < float(find("attention-half-layer-simulated").evaluate(values | {"c_VO": 1e-8})) < 1.01


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_seen": 0}, "n_seen=0"), ({"n_seen": 2.5}, "n_seen=2.5"), ({"rotary": 1.0, "alibi": 1}, "use rotary 0"),
        ({"rotary": 1.5}, "rotary=1.5"), ({"alibi": 0.5}, "alibi=0.5"), ({"qk_norm": 0.9}, "qk_norm=0.9"),
        ({"qk_norm": -1}, "qk_norm=-1"), ({"kv_group": 3}, "divisor of the 4 heads"), ({"kv_group": 0}, "kv_group=0"),
        ({"rotary": 1.0, "rope_base": 0.0}, "rope_base=0"), ({"rope_base": -1.0}, "rope_base=-1"),
        ({"softcap": -1.0}, "softcap=-1"),
    ],
)  # fmt: skip
def test_a_variant_that_has_no_meaning_is_refused(wrong: dict[str, float], message: str) -> None:
    values = {"c_VO": 0.7, "d": 64, "n_heads": 4, "d_head": 16, "kv_group": 1, "n_tokens": 8, "logit_variance": 1.0}
    values |= {"rotary": 0.0, "rope_base": 1e4, "alibi": 0, "n_seen": 8, "softcap": 0.0, "qk_norm": 0}
    with pytest.raises(ValueError, match=message):
        find("attention-variants-simulated").evaluate(values | wrong)


def test_symbols_of_a_variant_are_its_fields() -> None:
    sizes = {"d": 64, "heads": 4, "d_head": 16, "kv_group": 2, "n_tokens": 12, "logit_variance": 0.5}
    off: dict[str, Any] = {"rotary": 0.0, "rope_base": 1e4, "alibi": 0, "n_seen": 12, "softcap": 0.0, "qk_norm": 0}
    plain = architecture_of(**sizes, **off)
    assert (plain.positions, plain.window, plain.qk_norm, plain.n_kv_heads) == ("none", 0, "none", 2)
    all_of_them = architecture_of(**sizes, **(off | {"rotary": 0.5, "n_seen": 5, "softcap": 2.0, "qk_norm": 2}))
    assert (all_of_them.positions, all_of_them.rope_fraction, all_of_them.window) == ("rope", 0.5, 5)
    assert (all_of_them.attention_softcap, all_of_them.qk_norm) == (2.0, "full")
    assert architecture_of(**sizes, **(off | {"alibi": 1})).positions == "alibi"
    for qk_norm in (0, 1, 2):  # the logits have the variance that is asked for, however they come by it
        a = architecture_of(**sizes, **(off | {"qk_norm": qk_norm}))
        draws = [SimulatedAttention(a, 12, np.random.default_rng(seed)) for seed in range(60)]
        logits = np.stack([a.logit_scale * d.left @ d.right.mT for d in draws])[:, :, ~np.eye(12, dtype=bool)]
        each = np.mean(logits**2, axis=(1, 2))
        normed = 0.5 / 15 + 1 / 64  # a norm takes one direction out of a head's 16 or a token's 64
        assert abs(each.mean() - 0.5) <= 4 * each.std() / math.sqrt(len(each)) + normed


def test_what_is_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match=f"at most {LARGEST_INPUT} numbers"):
        simulated_norms(architecture(d_model=1024), 64)
    with pytest.raises(ValueError, match="use a width of 2 or more"):
        simulated_norms(architecture(d_model=1), 4)
