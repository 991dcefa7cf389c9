"""How close the bounds on attention come at the paper's initialisation, and why none from weights alone comes closer.

Weights are normal with the paper's std sqrt(2 / (5 d)), seeded; tokens are normal vectors after a LayerNorm.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.weights import architecture
from torch import Tensor

from empirics.attack import bound_of, observe
from empirics.attention_slopes import observe_blocks
from empirics.bench_attention import FullAttention
from empirics.model import Attention
from empirics.observables import observe_attention_weights, observe_covariances, observe_softmax, opnorm, true_attention
from empirics.probes import PlainAttention
from empirics.spectral import lanczos_opnorm
from theory.statements import find

# Tenths of the entries of 16 tokens before their LayerNorm, found by ascent on the Jacobian's norm at seed 0.
LOUD = Path(__file__).parent / "data" / "loud_tokens.json"


def paper_attention(d: int, seed: int, *, heads: int = 4) -> tuple[Attention, torch.Generator]:
    shape: dict[str, Any] = {"d_model": d, "n_heads": heads, "n_kv_heads": heads, "d_head": d // heads}
    module = Attention(architecture(**shape)).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * math.sqrt(2 / (5 * d)))
    return module, generator


def normalised(x_TD: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x_TD, x_TD.shape[-1:])


def normal_tokens(length: int, d: int, generator: torch.Generator) -> Tensor:
    return normalised(torch.randn(length, d, generator=generator, dtype=torch.float64))


def bound(name: str, module: Attention, u_TD: Tensor) -> tuple[float, float]:
    observed = observe(find(name), module, u_TD)
    return observed.truth, bound_of(find(name), observed)


@pytest.mark.parametrize("seed", range(3))
def test_a_posteriori_within_its_target(seed: int) -> None:
    """At d 64, T 16 and four heads: at most 4.4 where the truth is about 1.5."""
    module, generator = paper_attention(64, seed)
    truth, limit = bound("attention-blocks-upper", module, normal_tokens(16, 64, generator))
    assert 1.4 < truth < 1.6
    assert truth <= limit <= 4.4


def test_a_posteriori_within_four_times_the_truth() -> None:
    """At d 256, T 128, against a lower estimate of the norm."""
    module, generator = paper_attention(256, 0)
    u_TD = normal_tokens(128, 256, generator)
    truth = lanczos_opnorm(PlainAttention(module), u_TD[None]).value
    observers = (observe_attention_weights, observe_softmax, observe_blocks)
    values = {name: float(value) for observer in observers for name, value in observer(module, u_TD).items()}
    limit = float(find("attention-blocks-upper").evaluate(values))
    assert truth <= limit <= 4 * truth


def test_no_bound_from_the_weights_alone_is_small() -> None:
    """At these weights some normalised tokens have a norm over 18, twelve times that of normal ones: 10.9 would be
    violated.

    A bound that knows the weights and the length of the tokens holds for these tokens too.
    """
    module, generator = paper_attention(64, 0)
    loud = normalised(torch.tensor(json.loads(LOUD.read_text()), dtype=torch.float64) / 10)
    truth, limit = bound("attention-general-upper", module, loud)
    assert 18 < truth <= limit
    quiet_truth, quiet = bound("attention-general-upper", module, normal_tokens(16, 64, generator))
    assert quiet_truth < 1.6
    assert quiet < 3 * truth  # what is lost to the loudest tokens, not to the normal ones
    # The older bound is twice as far.
    assert bound("attention-upper-apriori", module, loud)[1] > 2 * limit


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
def test_covariances_are_sums_over_keys_in_the_frame_of_the_query(fraction: float) -> None:
    """key_term and query_term from rotation matrices of whole heads, of which a part turns and the rest stays."""
    length, width, heads, groups = 5, 8, 4, 2
    shape: dict[str, Any] = {"d_model": 6, "n_heads": heads, "n_kv_heads": groups, "d_head": width, "biases": True}
    turned: dict[str, Any] = {"positions": "rope", "rope_fraction": fraction, "rope_base": 3.0}
    module = Attention(architecture(**shape, **turned)).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    u_TD = torch.randn(length, 6, generator=generator, dtype=torch.float64)
    turning = round(fraction * width)
    turn_TEE = torch.eye(width, dtype=torch.float64).repeat(length, 1, 1)
    for t in range(length):
        for i in range(turning // 2):
            angle = torch.tensor(t / 3.0 ** (2 * i / turning), dtype=torch.float64)
            far = i + turning // 2
            turn_TEE[t, i, i] = turn_TEE[t, far, far] = angle.cos()
            turn_TEE[t, far, i], turn_TEE[t, i, far] = angle.sin(), -angle.sin()
    query, key, value = (
        linear(u_TD).view(length, -1, width).transpose(0, 1) for linear in (module.query, module.key, module.value)
    )
    blocks, query_term = torch.zeros(length, 6, 6, dtype=torch.float64), 0.0
    for h in range(heads):
        g = h // (heads // groups)
        weight = module.key.weight.view(groups, width, 6)[g]
        for t in range(length):
            v, k = value[g, : t + 1], torch.stack([turn_TEE[t].T @ turn_TEE[j] @ key[g, j] for j in range(t + 1)])
            p = (k @ query[h, t] * width**-0.5).softmax(0)
            apart = v - p @ v
            query_term = max(query_term, float(opnorm((p[:, None] * apart).T @ (k - p @ k))))
            spread = opnorm((p[:, None] * apart).T @ apart)
            for j in range(t + 1):
                a = weight.T @ turn_TEE[j].T @ turn_TEE[t] @ query[h, t] * width**-0.5
                blocks[j] += spread * p[j] * torch.outer(a, a)
    found = observe_covariances(module, u_TD)
    assert float(found["query_term"]) == pytest.approx(query_term, rel=1e-12)
    assert float(found["key_term"]) == pytest.approx(float(opnorm(blocks).max()) ** 0.5, rel=1e-12)


def test_without_a_mask() -> None:
    module, generator = paper_attention(64, 0)
    module.__class__ = FullAttention
    u_TD = normal_tokens(16, 64, generator)
    truth = float(true_attention(module, u_TD))
    for name in ("attention-blocks-upper", "attention-full-upper"):
        found, limit = bound(name, module, u_TD)
        assert found == pytest.approx(truth, rel=1e-12)
        assert truth <= limit
